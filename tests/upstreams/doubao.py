"""A fake Volcengine Ark: chat completions and the list of models, as the vendor's own SDK expects them.

    async with DoubaoFake(script(think("\\n", "想"), say("反向", "代理"), usage(31, 58, 37))) as fake:
        DOUBAO_BASE_URL = fake.base_url        # .../api/v3

Checks come in the vendor's order: bearer (401), model (404), account (403), parameters (400); only then is
a script played. Keyword arguments: `keys` (accepted API keys, any by default), `models` (the retired
default model is not among them: pass `models=(*MODELS, RETIRED_MODEL)` to bring it back), `overdue` (403),
`answer_id`, `created`, `request_id` (fixed values where bytes are compared).
"""

import json
import secrets
import time
from collections.abc import Collection
from typing import Any

from aiohttp import web

from tests.upstreams.player import GATEWAY_PAGE, Meters, Wire, play, refused
from tests.upstreams.script import Call, Fail, Finish, Meter, Refuse, Script
from tests.upstreams.server import Exchange, Fake, Playable, run_standalone

MODEL = "doubao-seed-2-1-turbo-260628"
RETIRED_MODEL = "doubao-1-5-thinking-vision-pro-250428"
MODELS = (
    *(MODEL, "doubao-seed-2-1-pro-260628", "doubao-seed-evolving", "doubao-seed-2-0-pro-260215"),
    *("doubao-seed-2-0-lite-260428", "doubao-seed-2-0-mini-260428", "doubao-seed-1-8-251228"),
)
KEY = "test-key-doubao"
ROLES = ("system", "assistant", "user", "tool")

TYPES = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    429: "TooManyRequests",
    500: "Internal Server Error",
}
CODES = {
    400: "InvalidParameter",
    401: "AuthenticationError",
    403: "AccountOverdueError",
    404: "InvalidEndpointOrModel.NotFound",
    429: "ModelAccountRpmRateLimitExceeded",
    500: "InternalServiceError",
}
MESSAGES = {
    "MissingParameter": "The request is missing the required parameter `messages`.",
    "InvalidParameter": "A parameter specified in the request is not valid.",
    "InputTextSensitiveContentDetected": (
        "The request failed because the input text may contain sensitive information."
    ),
    "InvalidImageURL.InvalidFormat": "The image could not be parsed or its format is not supported.",
    "InvalidImageURL.EmptyURL": "The image url is empty.",
    "AuthenticationError": "The API key or AK/SK in the request is missing or invalid.",
    "AccountOverdueError": (
        "The account is overdue, so the request was refused. Top up the balance and retry."
    ),
    "ModelAccountRpmRateLimitExceeded": ("The account is over its requests-per-minute limit for this model."),
    "RateLimitExceeded.EndpointTPMExceeded": "The endpoint is over its tokens-per-minute limit.",
    "ServerOverloaded": "The service is busy at the moment. Retry later.",
    "RequestBurstTooFast": (
        "Requests arrived faster than the allowed burst for this model. Slow down and retry."
    ),
    "SetLimitExceeded": "The spending cap configured for this model was reached, so it is paused.",
    "InternalServiceError": "The service encountered an unexpected internal error. Please retry later.",
}
PARAMS = {"MissingParameter": "messages", "InvalidImageURL.InvalidFormat": "image_url"}


def dumps(value: Any) -> bytes:
    """JSON as the vendors write it: no spaces, raw UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def usage_of(meter: Meter | None) -> dict[str, Any] | None:
    if meter is None:
        return None
    return {
        "completion_tokens": meter.completion,
        "prompt_tokens": meter.prompt,
        "total_tokens": meter.prompt + meter.completion,
        "prompt_tokens_details": {"cached_tokens": meter.cached},
        "completion_tokens_details": {"reasoning_tokens": meter.reasoning},
    }


class DoubaoWire(Wire):
    """Ark's chunks: no role chunk, no null finish reasons, usage null unless asked for."""

    json_type = "application/json; charset=utf-8"

    def __init__(self, meters: Meters, body: dict[str, Any], fake: "DoubaoFake", client_id: str) -> None:
        super().__init__(meters)
        options = body.get("stream_options") or {}
        self._each_usage = bool(options.get("chunk_include_usage"))
        self._last_usage = bool(options.get("include_usage")) or self._each_usage
        self._thinks = thinks(body)
        self._fake, self._client_id = fake, client_id
        self._request_id = fake.request_id or new_request_id()
        self._tail = {
            "created": fake.created or int(time.time()),
            "id": fake.answer_id or f"02{int(time.time() * 1000):013d}{secrets.token_hex(19)}",
            "model": body.get("model") or "",
            "service_tier": "default",
        }

    def headers(self, *, streaming: bool, failed: bool = False) -> dict[str, str]:
        head = {"X-Request-Id": self._request_id, "Server": "hertz", "Vary": "Accept-Encoding"}
        return head | ({"X-Client-Request-Id": self._client_id} if self._client_id else {})

    def frame(self, data: bytes) -> bytes:
        return b"data: " + data + b"\n\n"

    def _chunk(self, choices: list[dict[str, Any]], meter: Meter | None) -> bytes:
        chunk = {"choices": choices} | self._tail
        return self.frame(dumps(chunk | {"object": "chat.completion.chunk", "usage": usage_of(meter)}))

    def _delta(self, **delta: Any) -> bytes:
        choice = {"delta": dict(sorted({"content": "", "role": "assistant", **delta}.items())), "index": 0}
        return self._chunk([choice], self._running)

    @property
    def _meter(self) -> Meter | None:
        meter = self.meters.last
        if meter is None or self._thinks:
            return meter
        return Meter(meter.prompt, meter.completion - meter.reasoning, 0, meter.cached)

    @property
    def _running(self) -> Meter | None:
        return self._meter if self._each_usage else None

    def say(self, piece: str) -> bytes:
        return self._delta(content=piece)

    def think(self, piece: str) -> bytes:
        return self._delta(reasoning_content=piece) if self._thinks else b""

    def seal(self, text: str) -> bytes:
        return self._delta(encrypted_content=text) if self._thinks else b""

    def call(self, step: Call) -> list[bytes]:
        index = len(self.answer.calls) - 1
        first = {"function": {"arguments": "", "name": step.name}, "id": step.id, "index": index}
        frames = [self._delta(tool_calls=[first | {"type": "function"}])]
        for piece in step.pieces:
            frames.append(self._delta(tool_calls=[{"function": {"arguments": piece}, "index": index}]))
        return frames

    def finish(self, step: Finish) -> bytes:
        choice = {"delta": {"content": "", "role": "assistant"}, "finish_reason": step.reason, "index": 0}
        choice |= {"moderation_hit_type": step.moderation} if step.moderation else {}
        frames = self._chunk([choice], self._running)
        if self._last_usage and self._meter is not None:
            frames += self._chunk([], self._meter)
        return frames + (self.frame(b"[DONE]") if step.done else b"")

    def failure(self, step: Fail) -> bytes:
        return self.frame(self._envelope(step))

    def error_body(self, step: Refuse | Fail) -> tuple[bytes, str]:
        if step.code is None and step.status not in CODES:
            words = {502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout"}
            word = words.get(step.status, b"Error")
            return GATEWAY_PAGE % (step.status, word, step.status, word), "text/html"
        return self._envelope(step), self.json_type

    def _envelope(self, step: Refuse | Fail) -> bytes:
        code = step.code or CODES.get(step.status, "InternalServiceError")
        message = step.message or MESSAGES.get(code, "The request was refused.")
        error = {"code": code, "message": f"{message} Request id: {self._request_id}"}
        param = "" if step.message else PARAMS.get(code, "")
        error |= {"param": param, "type": TYPES.get(step.status, "Internal Server Error")}
        return dumps({"error": error})

    def whole(self, step: Finish) -> bytes:
        answer = self.answer
        message: dict[str, Any] = {"content": answer.text}
        if self._thinks and answer.sealed:
            message["encrypted_content"] = answer.sealed
        if self._thinks and answer.thoughts:
            message["reasoning_content"] = answer.thoughts
        message["role"] = "assistant"
        if answer.calls:
            message["tool_calls"] = [
                {
                    "function": {"arguments": "".join(one.pieces), "name": one.name},
                    "id": one.id,
                    "type": "function",
                }
                for one in answer.calls
            ]
        choice = {"finish_reason": step.reason, "index": 0, "logprobs": None, "message": message}
        choice |= {"moderation_hit_type": step.moderation} if step.moderation else {}
        body = {"choices": [choice]} | self._tail
        return dumps(body | {"object": "chat.completion", "usage": usage_of(self._meter)})


class DoubaoFake(Fake):
    """Ark on loopback; see the module's docstring."""

    prefix = "/api/v3"

    def __init__(
        self,
        *scripts: Playable,
        keys: Collection[str] = (),
        models: Collection[str] = MODELS,
        overdue: bool = False,
        answer_id: str = "",
        created: int = 0,
        request_id: str = "",
        tls: bool = False,
        port: int = 0,
    ) -> None:
        super().__init__(*scripts, tls=tls, port=port)
        self.keys, self.models, self.overdue = frozenset(keys), tuple(models), overdue
        self.answer_id, self.created, self.request_id = answer_id, created, request_id

    @property
    def environ(self) -> dict[str, str]:
        return {"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": self.base_url, "DOUBAO_MODEL": MODEL}

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        path = exchange.request.path
        if path == "/api/v3/chat/completions" and exchange.record.method == "POST":
            return await self._chat(exchange)
        if path == "/api/v3/models" and exchange.record.method == "GET":
            return web.Response(body=dumps(self._model_list()), content_type="application/json")
        return web.Response(status=404)

    async def _chat(self, exchange: Exchange) -> web.StreamResponse:
        body, broken = read_object(exchange.record.body)
        wire = DoubaoWire(Meters(Script(()), ""), body, self, exchange.header("X-Client-Request-Id"))
        problem = self._turned_away(exchange, body) or broken or bad_parameter(body)
        if problem is not None:
            return await refused(exchange, wire, problem)
        script = self.next_script()
        wire.meters = Meters(script, json.dumps(body["messages"], ensure_ascii=False))
        return await play(exchange, script, wire, streaming=bool(body.get("stream")))

    def _turned_away(self, exchange: Exchange, body: dict[str, Any]) -> Refuse | None:
        """The vendor's first three checks, in its order."""
        key, model = exchange.record.bearer, body.get("model")
        if key is None or (self.keys and key not in self.keys):
            return Refuse(401)
        if model is not None and not self._knows(str(model)):
            missing = f"The model or endpoint {model} does not exist or you do not have access to it."
            return Refuse(404, message=missing)
        return Refuse(403) if self.overdue else None

    def _knows(self, model: str) -> bool:
        return model in self.models or model.startswith("ep-")

    def _model_list(self) -> dict[str, Any]:
        rows = [model_row(name, None) for name in self.models]
        if RETIRED_MODEL not in self.models:
            rows.append(model_row(RETIRED_MODEL, "Shutdown"))
        return {"object": "list", "data": rows}


def model_row(name: str, status: str | None) -> dict[str, Any]:
    family, _, version = name.rpartition("-")
    row: dict[str, Any] = {"id": name, "created": 1782604800, "object": "model", "name": family}
    row |= {"version": version, "domain": "VLM", "task_type": ["VisualQuestionAnswering"]}
    return row | {"status": status}


def new_request_id() -> str:
    return f"02{int(time.time() * 1000):013d}{'0' * 20}ffff{secrets.token_hex(6)}"


def read_object(data: bytes) -> tuple[dict[str, Any], Refuse | None]:
    """The body as an object, or the refusal of what is none."""
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return {}, Refuse(400, message="The request body is not a valid JSON object.")
    return body, None


def thinks(body: dict[str, Any]) -> bool:
    """Thinking is on unless the caller switched it off in one of the two ways."""
    thinking = body.get("thinking") or {}
    return thinking.get("type") != "disabled" and body.get("reasoning_effort") not in ("minimal", "none")


def invalid(name: str, detail: str) -> Refuse:
    return Refuse(400, message=f"The parameter `{name}` specified in the request are not valid: {detail}.")


def bad_parameter(body: dict[str, Any]) -> Refuse | None:
    """The last check; null counts as absent everywhere, unknown keys are ignored."""
    if body.get("model") is None:
        return Refuse(400, "MissingParameter", "The request is missing the required parameter `model`.")
    messages = body.get("messages")
    if messages is None or messages == []:
        return Refuse(400, "MissingParameter")
    if not isinstance(messages, list):
        return invalid("messages", "expected an array")
    for message in messages:
        if (problem := bad_message(message)) is not None:
            return problem
    return bad_number(body) or bad_option(body)


def bad_message(message: Any) -> Refuse | None:
    if not isinstance(message, dict):
        return invalid("messages", "expected an object")
    if (role := message.get("role")) not in ROLES:
        known = "`system`, `assistant`, `user`, `tool`"
        return invalid("messages.role", f"invalid value: `{role}`, supported values are: {known}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        return invalid("messages.content", "expected a string or an array")
    for part in content if isinstance(content, list) else []:
        if (problem := bad_part(part)) is not None:
            return problem
    return None


def bad_part(part: Any) -> Refuse | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image_url", "video_url", "input_audio", "file"):
        return invalid("messages.content.type", f"invalid value: `{kind}`")
    if kind == "text" and not isinstance(part.get("text"), str):
        return invalid("messages.content.text", "expected a string")
    if kind != "image_url":
        return None
    address = (part.get("image_url") or {}).get("url")
    if not address:
        return Refuse(400, "InvalidImageURL.EmptyURL")
    if not str(address).startswith(("http://", "https://", "data:image/")):
        return Refuse(400, "InvalidImageURL.InvalidFormat")
    return None


def bad_number(body: dict[str, Any]) -> Refuse | None:
    ranges = {
        "temperature": (0, 2),
        "top_p": (0, 1),
        "max_tokens": (1, 1 << 20),
        "max_completion_tokens": (1, 65536),
    }
    for name, (low, high) in ranges.items():
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return invalid(name, f"expected a number in [{low}, {high}]")
    return None


def bad_option(body: dict[str, Any]) -> Refuse | None:
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        return invalid("max_tokens", "`max_tokens` and `max_completion_tokens` exclude each other")
    if not isinstance(body.get("stream"), bool | None):
        return invalid("stream", "expected a boolean")
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > 4:
        return invalid("stop", "at most 4 sequences")
    thinking = body.get("thinking")
    if thinking is not None and (
        not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "disabled", "auto", None)
    ):
        return invalid("thinking.type", "supported values are: `enabled`, `disabled`, `auto`")
    return None


if __name__ == "__main__":
    run_standalone(DoubaoFake, knobs={"keys": "an accepted key", "models": "a known model"})
