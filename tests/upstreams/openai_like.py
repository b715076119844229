"""A fake of any OpenAI-compatible server: chat completions, models, embeddings.

    async with OpenAIFake(script(think("想"), say("好"), usage(3, 2, 1))) as fake:
        OPENAI_BASE_URL = fake.base_url        # .../v1

Checks: bearer where `keys` is given (401), body (400), model (404). `models` are the known ones; with
`models=()` any name is, as with llama.cpp. `answer_id`, `created`, `request_id` fix what is otherwise random.
"""

import json
import secrets
import time
from collections.abc import Collection
from typing import Any

from aiohttp import web

from tests.upstreams.doubao import dumps, read_object
from tests.upstreams.embeddings import embed_openai
from tests.upstreams.player import GATEWAY_PAGE, Meters, Wire, play, refused
from tests.upstreams.script import Call, Fail, Finish, Meter, Refuse, Script
from tests.upstreams.server import Exchange, Fake, Playable, run_standalone

MODEL = "test-model"
KEY = "test-key-openai"

ERRORS = {
    400: ("'messages' must be a non-empty array.", "invalid_request_error", "invalid_value"),
    401: ("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    403: ("You are not allowed to use this model.", "permission_error", "forbidden"),
    404: ("The model does not exist.", "invalid_request_error", "model_not_found"),
    429: ("Rate limit reached, retry in 1 second.", "rate_limit_error", "rate_limit_exceeded"),
    500: ("The server had an error while processing your request.", "server_error", "internal_error"),
    503: ("The server is overloaded.", "server_error", "overloaded"),
}


def usage_of(meter: Meter) -> dict[str, Any]:
    return {
        "prompt_tokens": meter.prompt,
        "completion_tokens": meter.completion,
        "total_tokens": meter.prompt + meter.completion,
        "prompt_tokens_details": {"cached_tokens": meter.cached},
        "completion_tokens_details": {"reasoning_tokens": meter.reasoning},
    }


class OpenAIWire(Wire):
    """Chunks with a role first, explicit null finish reasons, usage only when asked for."""

    def __init__(self, meters: Meters, body: dict[str, Any], fake: "OpenAIFake") -> None:
        super().__init__(meters)
        self._with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._model = body.get("model") or MODEL
        self._id = fake.answer_id or f"chatcmpl-{secrets.token_hex(10)}"
        self._created = fake.created or int(time.time())
        self._request_id = fake.request_id or f"req_{secrets.token_hex(8)}"

    def headers(self, *, streaming: bool, failed: bool = False) -> dict[str, str]:
        return {"x-request-id": self._request_id}

    def frame(self, data: bytes) -> bytes:
        return b"data: " + data + b"\n\n"

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk: dict[str, Any] = {"id": self._id, "object": "chat.completion.chunk"}
        chunk |= {"created": self._created, "model": self._model, "choices": choices}
        return self.frame(dumps(chunk | ({"usage": usage} if self._with_usage else {})))

    def _delta(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def opening(self) -> bytes:
        return self._delta({"role": "assistant", "content": ""})

    def say(self, piece: str) -> bytes:
        return self._delta({"content": piece})

    def think(self, piece: str) -> bytes:
        return self._delta({"reasoning_content": piece})

    def call(self, step: Call) -> list[bytes]:
        index = len(self.answer.calls) - 1
        first = {"index": index, "id": step.id, "type": "function"}
        frames = [self._delta({"tool_calls": [first | {"function": {"name": step.name, "arguments": ""}}]})]
        for piece in step.pieces:
            frames.append(self._delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}))
        return frames

    def finish(self, step: Finish) -> bytes:
        frames = self._delta({}, step.reason)
        if self._with_usage and (meter := self.meters.last) is not None:
            frames += self._chunk([], usage_of(meter))
        return frames + (self.frame(b"[DONE]") if step.done else b"")

    def failure(self, step: Fail) -> bytes:
        return self.frame(self._envelope(step))

    def error_body(self, step: Refuse | Fail) -> tuple[bytes, str]:
        if step.code is None and step.message is None and step.status not in ERRORS:
            return GATEWAY_PAGE % (step.status, b"Error", step.status, b"Error"), "text/html"
        return self._envelope(step), self.json_type

    def _envelope(self, step: Refuse | Fail) -> bytes:
        message, kind, code = ERRORS.get(step.status, ERRORS[500])
        param = {400: "messages", 404: "model"}.get(step.status)
        error = {"message": step.message or message, "type": kind, "param": param}
        return dumps({"error": error | {"code": step.code or code}})

    def whole(self, step: Finish) -> bytes:
        answer = self.answer
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        message |= {"reasoning_content": answer.thoughts} if answer.thoughts else {}
        message["refusal"] = None
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": one.id,
                    "type": "function",
                    "function": {"name": one.name, "arguments": "".join(one.pieces)},
                }
                for one in answer.calls
            ]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": step.reason}
        body: dict[str, Any] = {"id": self._id, "object": "chat.completion", "created": self._created}
        body |= {"model": self._model, "choices": [choice]}
        meter = self.meters.last
        return dumps(body | ({"usage": usage_of(meter)} if meter else {}))


class OpenAIFake(Fake):
    """An OpenAI-compatible server on loopback; see the module's docstring."""

    prefix = "/v1"

    def __init__(
        self,
        *scripts: Playable,
        keys: Collection[str] = (),
        models: Collection[str] = (MODEL,),
        answer_id: str = "",
        created: int = 0,
        request_id: str = "",
        tls: bool = False,
        port: int = 0,
    ) -> None:
        super().__init__(*scripts, tls=tls, port=port)
        self.keys, self.models = frozenset(keys), tuple(models)
        self.answer_id, self.created, self.request_id = answer_id, created, request_id

    @property
    def environ(self) -> dict[str, str]:
        model = self.models[0] if self.models else MODEL
        return {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": self.base_url, "OPENAI_MODEL": model}

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        body, broken = read_object(exchange.record.body)
        wire = OpenAIWire(Meters(Script(()), ""), body, self)
        if self.keys and exchange.record.bearer not in self.keys:
            return await refused(exchange, wire, Refuse(401))
        match exchange.record.method, exchange.request.path:
            case "GET", "/v1/models":
                return self._json({"object": "list", "data": [self._row(one) for one in self.models]})
            case "GET", path if path.startswith("/v1/models/"):
                name = path.removeprefix("/v1/models/")
                if name in self.models:
                    return self._json(self._row(name))
                return await refused(exchange, wire, missing_model(name))
            case "POST", "/v1/chat/completions":
                return await self._chat(exchange, body, broken)
            case "POST", "/v1/embeddings":
                return await embed_openai(exchange, self.next_script())
        return await refused(exchange, wire, Refuse(404, "not_found", "Unknown address."))

    async def _chat(
        self, exchange: Exchange, body: dict[str, Any], broken: Refuse | None
    ) -> web.StreamResponse:
        problem = broken or bad_messages(body)
        if problem is None and self.models and body.get("model") not in self.models:
            problem = missing_model(body.get("model"))
        if problem is not None:
            return await refused(exchange, OpenAIWire(Meters(Script(()), ""), body, self), problem)
        script = self.next_script()
        wire = OpenAIWire(Meters(script, json.dumps(body["messages"], ensure_ascii=False)), body, self)
        return await play(exchange, script, wire, streaming=bool(body.get("stream")))

    def _row(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created or 1795337200, "owned_by": "fake"}

    def _json(self, value: Any) -> web.Response:
        return web.Response(body=dumps(value), content_type="application/json")


def missing_model(name: Any) -> Refuse:
    return Refuse(404, message=f"The model '{name}' does not exist.")


def bad_messages(body: dict[str, Any]) -> Refuse | None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return Refuse(400)
    if any(not isinstance(one, dict) or "role" not in one for one in messages):
        return Refuse(400, message="Every message needs a role.")
    return None


if __name__ == "__main__":
    run_standalone(OpenAIFake, knobs={"keys": "an accepted key", "models": "a known model"})
