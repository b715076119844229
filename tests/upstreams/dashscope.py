"""A fake DashScope: application completion, in both stream modes, both workflow modes and whole.

    async with DashScopeFake(script(say("图", "书馆"), usage(214, 37))) as fake:
        DASHSCOPE_BASE_URL = fake.base_url     # .../api/v1
        DASHSCOPE_APP_ID = APP_ID

A stream is what a caller gets who sends `X-DashScope-SSE: enable` or accepts `text/event-stream`. Checks:
bearer (401, JSON), workspace (403, JSON), app id (streaming: 200 and an error frame; else 400), input (400).
Keyword arguments: `keys`, `app_ids`, `workspace` (the one required), `strict_sessions` (an unknown or expired
session id is an error, not a new session), `workflow` (a workflow app), `model`, `clock` (for the hour after
which a session expires), `request_id`, `session_id` (fixed values where bytes are compared).
`sessions` holds what each session was asked.
"""

import json
import secrets
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.upstreams.doubao import dumps
from tests.upstreams.player import Meters, Wire, play, refused
from tests.upstreams.script import Fail, Finish, Refuse, Script
from tests.upstreams.server import Exchange, Fake, Playable, run_standalone

APP_ID = "test-app-dashscope"
KEY = "test-key-dashscope"
MODEL = "qwen3.7-plus"
SESSION_IDLE_S = 3600
SESSION_ROUNDS = 50

CODES = {
    400: "InvalidParameter",
    401: "InvalidApiKey",
    403: "App.AccessDenied",
    404: "ModelNotFound",
    413: "BadRequest.TooLarge",
    429: "Throttling.RateQuota",
    500: "InternalError",
    503: "ModelUnavailable",
}
MESSAGES = {
    "InvalidParameter": (
        "Required parameter(AppId) missing or invalid, please check the request parameters."
    ),
    "DataInspectionFailed": "Input or output data may contain inappropriate content.",
    "Arrearage": "Access denied, please make sure your account is in good standing.",
    "InvalidApiKey": "Invalid API-key provided.",
    "App.AccessDenied": "App access denied.",
    "Workspace.AccessDenied": "Workspace access denied.",
    "ModelNotFound": "Model can not be found.",
    "Throttling": "Requests throttling triggered.",
    "Throttling.RateQuota": "Requests rate limit exceeded, try again later.",
    "Throttling.AllocationQuota": "Allocated quota exceeded, please increase your quota limit.",
    "InternalError": ("An internal error has occurred, please try again later or contact service support."),
    "InternalError.Algo": "An internal error has occurred during algorithm execution.",
    "AppProcessFailed": "Failed to proceed application request.",
    "ModelUnavailable": "The model is unavailable at the moment, please try again later.",
}


@dataclass(slots=True)
class Session:
    """One of the vendor's sessions: it lives an hour after its last use, for 50 rounds."""

    id: str
    used_at: float
    prompts: list[str] = field(default_factory=list)


class DashScopeWire(Wire):
    """`id:`, `event:`, `:HTTP_STATUS/`, `data:` without spaces; everything so far, or only what is new."""

    stream_type = "text/event-stream;charset=UTF-8"

    def __init__(
        self, meters: Meters, body: dict[str, Any], fake: "DashScopeFake", session_id: str, request_id: str
    ) -> None:
        super().__init__(meters)
        parameters = body.get("parameters") or {}
        self._incremental = parameters.get("incremental_output") is True
        self._thinks = (
            parameters.get("has_thoughts") is True and parameters.get("enable_thinking") is not False
        )
        self._thinking_app = False
        mode = parameters.get("flow_stream_mode")
        self._flow = mode if fake.workflow and mode in ("message_format", "message_format_plus") else None
        self._fake, self._session_id, self._request_id = fake, session_id, request_id
        self._arrived_ms = int(time.time() * 1000)
        self._frames = self._node_frames = 0

    def headers(self, *, streaming: bool, failed: bool = False) -> dict[str, str]:
        now_ms = int(time.time() * 1000)
        head = {
            "x-request-id": self._request_id,
            "x-dashscope-call-gateway": "true",
            "x-dashscope-timeout": "298",
            "req-cost-time": str(now_ms - self._arrived_ms),
            "req-arrive-time": str(self._arrived_ms),
            "resp-start-time": str(now_ms),
            "x-envoy-upstream-service-time": str(now_ms - self._arrived_ms),
            "server": "istio-envoy",
            "vary": "Origin,Access-Control-Request-Method,Access-Control-Request-Headers",
        }
        return head | ({"x-dashscope-finished": "true" if failed else "false"} if streaming else {})

    def frame(self, data: bytes) -> bytes:
        return self._event(b"result", 200, data)

    def _event(self, name: bytes, status: int, data: bytes) -> bytes:
        self._frames += 1
        return b"id:%d\nevent:%b\n:HTTP_STATUS/%d\ndata:%b\n\n" % (self._frames, name, status, data)

    def _usage(self) -> dict[str, Any]:
        meters = self.meters.now
        if not meters:
            return {}
        return {
            "models": [
                {
                    "input_tokens": meter.prompt,
                    "output_tokens": meter.completion,
                    "model_id": meter.model or self._fake.model,
                }
                for meter in meters
            ]
        }

    def _result(self, output: dict[str, Any]) -> bytes:
        body = {"output": output, "usage": self._usage(), "request_id": self._request_id}
        return self.frame(dumps(body))

    def _output(self, text: str, thought: str, finish_reason: str = "null") -> dict[str, Any]:
        output: dict[str, Any] = {}
        if self._thinking_app:
            names = {"action_type": "reasoning", "response": thought, "action_name": "思考过程"}
            output["thoughts"] = [{"action": "reasoning", "thought": thought} | names]
        output |= {"session_id": self._session_id, "finish_reason": finish_reason, "text": text}
        if self.answer.references:
            output["doc_references"] = [dict(one) for one in self.answer.references]
        return output

    def say(self, piece: str) -> bytes:
        if self._flow:
            return self._node("End" if self._flow == "message_format" else "LLM", piece, "")
        if self._incremental:
            return self._result(self._output(piece, ""))
        return self._result(self._output(self.answer.text, self.answer.thoughts))

    def think(self, piece: str) -> bytes:
        if self._flow == "message_format_plus":
            return self._node("LLM", "", piece)
        if not self._thinks or self._flow:
            return b""
        self._thinking_app = True
        return self._result(self._output("", piece if self._incremental else self.answer.thoughts))

    def _node(self, kind: str, result: str, reasoning: str, *, completed: bool = False) -> bytes:
        """A frame of one workflow node; the LLM node's content is itself JSON text, but empty at its end."""
        self._node_frames += 1
        content = result
        if kind == "LLM" and not completed:
            content = dumps({"result": result, "reasoningContent": reasoning}).decode()
        return self._workflow(kind, self._node_frames, content, completed)

    def _workflow(self, kind: str, sequence: int, content: str, completed: bool) -> bytes:
        names = {"Start": "开始", "LLM": "大模型1", "End": "结束"}
        message = {
            "node_status": "success" if completed else "executing",
            "node_type": kind,
            "node_msg_seq_id": sequence,
            "node_name": names[kind],
            "message": {"content": content, "role": "assistant"},
            "node_is_completed": completed,
            "node_id": f"{kind}_k3Qa",
        }
        output = {"session_id": self._session_id, "workflow_message": message, "finish_reason": "null"}
        body = {"output": output, "usage": self._flow_usage(kind, completed)}
        return self.frame(dumps(body | {"request_id": self._request_id}))

    def _flow_usage(self, kind: str, completed: bool) -> dict[str, Any]:
        """Workflow frames tell no tokens until the LLM node is done."""
        return self._usage() if self._flow == "message_format_plus" and completed and kind != "Start" else {}

    def opening(self) -> bytes:
        """What `message_format_plus` reports before any model runs."""
        if self._flow != "message_format_plus":
            return b""
        return self._workflow("Start", 1, '{"user":{}}', True)

    def finish(self, step: Finish) -> bytes:
        frames = b""
        if self._flow == "message_format":
            frames = self._node("End", "", "", completed=True)
        elif self._flow:
            frames = self._node("LLM", "", "", completed=True) + self._workflow("End", 1, "", True)
        everything = self._flow or not self._incremental
        text = self.answer.text if everything else ""
        return frames + self._result(
            self._output(text, self.answer.thoughts if everything else "", step.reason)
        )

    def failure(self, step: Fail) -> bytes:
        return self._event(b"error", step.status, self._envelope(step))

    def error_body(self, step: Refuse | Fail) -> tuple[bytes, str]:
        body = self._envelope(step)
        if isinstance(step, Refuse) and step.framed:
            return self._event(b"error", step.status, body), self.stream_type
        return body, self.json_type

    def _envelope(self, step: Refuse | Fail) -> bytes:
        code = step.code or CODES.get(step.status, "InternalError")
        message = step.message or MESSAGES.get(code, "The request was refused.")
        return dumps({"code": code, "message": message, "request_id": self._request_id})

    def whole(self, step: Finish) -> bytes:
        answer = self.answer
        output: dict[str, Any] = {
            "finish_reason": step.reason,
            "session_id": self._session_id,
            "text": answer.text,
        }
        if self._thinks and answer.thoughts:
            names = {"action_type": "reasoning", "action_name": "思考过程", "action": "reasoning"}
            output["thoughts"] = [names | {"thought": answer.thoughts, "response": answer.thoughts}]
        if answer.references:
            output["doc_references"] = [dict(one) for one in answer.references]
        return dumps({"output": output, "usage": self._usage(), "request_id": self._request_id})


class DashScopeFake(Fake):
    """DashScope on loopback; see the module's docstring."""

    prefix = "/api/v1"

    def __init__(
        self,
        *scripts: Playable,
        keys: Collection[str] = (),
        app_ids: Collection[str] = (APP_ID,),
        workspace: str = "",
        strict_sessions: bool = False,
        workflow: bool = False,
        model: str = MODEL,
        clock: Callable[[], float] = time.monotonic,
        request_id: str = "",
        session_id: str = "",
        tls: bool = False,
        port: int = 0,
    ) -> None:
        super().__init__(*scripts, tls=tls, port=port)
        self.keys, self.app_ids, self.workspace = frozenset(keys), frozenset(app_ids), workspace
        self.strict_sessions, self.workflow, self.model = strict_sessions, workflow, model
        self.clock, self.request_id, self.session_id = clock, request_id, session_id
        self.sessions: dict[str, Session] = {}

    @property
    def environ(self) -> dict[str, str]:
        app_id = min(self.app_ids)
        return {"DASHSCOPE_API_KEY": KEY, "DASHSCOPE_APP_ID": app_id, "DASHSCOPE_BASE_URL": self.base_url}

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        parts = exchange.request.path.split("/")
        if parts[:4] != ["", "api", "v1", "apps"] or parts[5:] != ["completion"]:
            return web.Response(status=404)
        if exchange.record.method != "POST":
            return web.Response(status=405)
        return await self._complete(exchange, parts[4])

    async def _complete(self, exchange: Exchange, app_id: str) -> web.StreamResponse:
        body = read_object(exchange.record.body)
        streaming = (
            exchange.header("X-DashScope-SSE").lower() == "enable"
            or "text/event-stream" in exchange.header("Accept").lower()
        )
        request_id = self.request_id or str(uuid.uuid4())
        wire = DashScopeWire(Meters(Script(()), ""), body or {}, self, "", request_id)
        if (turned_away := self._turned_away(exchange)) is not None:
            return await refused(exchange, wire, turned_away)
        if app_id not in self.app_ids:
            return await play(exchange, Script((Fail(400),)), wire, streaming=streaming)
        if (problem := bad_input(body, streaming)) is not None:
            return await play(exchange, Script((problem,)), wire, streaming=streaming)
        asked = body["input"] if body else {}
        if (session := self._session(asked)) is None:
            unknown = "The session_id is invalid or has expired."
            return await play(
                exchange, Script((Fail(400, "InvalidParameter", unknown),)), wire, streaming=streaming
            )
        script = self.next_script()
        prompt = json.dumps(asked.get("messages") or asked.get("prompt"), ensure_ascii=False)
        wire = DashScopeWire(Meters(script, prompt), body or {}, self, session.id, request_id)
        return await play(exchange, script, wire, streaming=streaming)

    def _turned_away(self, exchange: Exchange) -> Refuse | None:
        key = exchange.record.bearer
        if key is None or (self.keys and key not in self.keys):
            return Refuse(401)
        if self.workspace and exchange.header("X-DashScope-WorkSpace") != self.workspace:
            return Refuse(403, "Workspace.AccessDenied")
        return None

    def _session(self, asked: dict[str, Any]) -> Session | None:
        """The session asked for, or a new one; None where a strict vendor would refuse."""
        now = self.clock()
        given = None if asked.get("messages") else asked.get("session_id")
        session = self.sessions.get(str(given)) if given else None
        if session and (now - session.used_at > SESSION_IDLE_S or len(session.prompts) >= SESSION_ROUNDS):
            del self.sessions[session.id]
            session = None
        if given and session is None and self.strict_sessions:
            return None
        if session is None:
            session = Session(self.session_id or secrets.token_hex(16), now)
            self.sessions[session.id] = session
        session.used_at = now
        session.prompts.append(str(asked.get("prompt") or ""))
        return session


def read_object(data: bytes) -> dict[str, Any] | None:
    """The body as an object, None for anything else."""
    try:
        body = json.loads(data)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def bad_input(body: dict[str, Any] | None, streaming: bool) -> Refuse | Fail | None:
    """What is wrong with the input; unknown keys and nulls are ignored."""
    if body is None:
        return Fail(400, "InvalidParameter", "The request body is not valid JSON.")
    asked = body.get("input")
    if not isinstance(asked, dict):
        return Fail(400, "BadRequest.EmptyInput", "Required input parameter missing.")
    messages = asked.get("messages")
    if messages:
        if not isinstance(messages, list) or any(not well_formed(one) for one in messages):
            text = "Role must be user or assistant and Content length must be greater than 0"
            # One gateway answers this with SSE frames under a JSON content type.
            json_type = "application/json"
            return Refuse(400, "InvalidParameter", text, framed=streaming, content_type=json_type)
    elif not isinstance(asked.get("prompt"), str) or not asked["prompt"]:
        return Fail(400, "InvalidParameter", "Required input parameter missing: prompt.")
    return None


def well_formed(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        return False
    content = message.get("content")
    return isinstance(content, str | list) and bool(content)


if __name__ == "__main__":
    run_standalone(DashScopeFake, knobs={"keys": "an accepted key", "app_ids": "a known app id"})
