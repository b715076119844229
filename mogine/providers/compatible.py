"""The OpenAI-compatible dialect, Ark's too: requests out, events in, and answers composed in it."""

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import orjson

from mogine.chat import (
    ChatEvent,
    ChatMessage,
    ChatRequest,
    Chunk,
    Citations,
    Delta,
    Finish,
    Reasoning,
    ToolCalls,
    Usage,
)
from mogine.errors import UpstreamBadResponse
from mogine.providers.vendor import Refused, checked_raw, count_of, load_object, refusal_in, text_of
from mogine.upstream import Frame

DONE = b"data: [DONE]\n\n"
NOTHING = b":\n\n"  # a comment: bytes for a chunk whose frame has already been handed on
FINISH_REASONS = {
    "function_call": "tool_calls",
    "max_tokens": "length",
    "insufficient_system_resource": "length",
}


class CompatibleDialect:
    """Chat completions as OpenAI defined them."""

    name: ClassVar[str] = "openai"

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/chat/completions"

    def headers(self, request: ChatRequest, key: str) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if request.stream else "application/json",
        }
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def call(self, request: ChatRequest, model: str) -> tuple[str, bytes]:
        body: dict[str, Any] = {
            "model": model,
            "messages": [_message(m) for m in request.messages],
            "stream": request.stream,
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        for name in ("temperature", "top_p", "max_tokens"):
            if (value := getattr(request, name)) is not None:
                body[name] = value
        if request.stop:
            body["stop"] = list(request.stop)
        return self._url, encode(body)

    def parser(self, request: ChatRequest) -> "CompletionParser":
        return CompletionParser()


def _message(message: ChatMessage) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image_url", "image_url": {"url": image.url}} for image in message.images]
    return {"role": message.role, "content": [{"type": "text", "text": message.text}, *pictures]}


def encode(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate, which has no UTF-8, becomes a question mark."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --- what comes in ----------------------------------------------------------------------------------


class CompletionParser:
    """One answer: its frames, or its whole body, become chunks. `Finish` is the last event of all."""

    def __init__(self) -> None:
        self.finished = False
        self.done = False
        self._finish_reason = ""
        self._model = ""

    def frame(self, frame: Frame) -> Chunk | None:
        if not frame.data:
            return Chunk(checked_raw(frame.raw)) if not frame.has_id else None
        if frame.data.startswith(b"[DONE]"):
            if not self.finished:
                raise UpstreamBadResponse(
                    "API proxy error: the upstream stream ended without a finish reason"
                )
            self.done = True
            return Chunk(DONE, (self._finish(),))
        payload = load_object(frame.data)
        refusal = refusal_in(payload, frame.http_status or 0)
        if refusal is not None:
            raise Refused(refusal)
        # With an `id:` line before our keep-alive comments OpenAI's own client dispatches an empty event.
        raw = b"data: " + frame.data.replace(b"\n", b"\ndata: ") + b"\n\n" if frame.has_id else frame.raw
        return Chunk(checked_raw(raw), self._events(payload, "delta"))

    def text_alone(self, frame: bytes) -> str | None:
        blank = CompletionParser()
        data = frame.removeprefix(b"data: ").removesuffix(b"\n\n")
        match blank.frame(Frame(frame, data, "", None, False)):
            case Chunk(raw, (Delta(text),)) if raw == frame and not blank.finished:
                return text
        return None

    def whole(self, body: bytes, *, as_stream: bool) -> Chunk:
        payload = load_object(body.removeprefix(b"\xef\xbb\xbf"))
        refusal = refusal_in(payload, 0)
        if refusal is not None:
            raise Refused(refusal)
        events = self._events(payload, "message")
        if not self.finished:
            raise UpstreamBadResponse("API proxy error: the upstream answer has no finish reason, it was cut")
        events = (*events, self._finish())
        self.done = True
        if not as_stream:
            return Chunk(body, events)
        encoder = OpenAIEncoder(text_of(payload.get("id")), self._model, count_of(payload.get("created")))
        return Chunk(b"".join(encoder.chunk(event) for event in events) + encoder.end(), events)

    def held(self) -> Chunk | None:
        return None

    def end(self) -> Chunk | None:
        # Some servers leave [DONE] out; a visitor's client may wait for it.
        return None if self.done else Chunk(DONE, (self._finish(),))

    def _finish(self) -> Finish:
        return Finish(self._finish_reason, self._model)

    def _events(self, payload: dict[str, Any], part: str) -> tuple[ChatEvent, ...]:
        if not self._model:
            self._model = text_of(payload.get("model"))
        events: list[ChatEvent] = []
        choices = payload.get("choices")
        choice = choices[0] if type(choices) is list and choices else None
        if type(choice) is dict:
            piece = choice.get(part)
            if type(piece) is dict:
                _read_piece(piece, events)
            if (given := choice.get("finish_reason")) and (reason := text_of(given)):
                self.finished = True
                self._finish_reason = _finish_reason(reason)
        usage = payload.get("usage")
        if type(usage) is dict:
            events.append(_usage(usage))
        return tuple(events)


def _read_piece(piece: dict[str, Any], events: list[ChatEvent]) -> None:
    thought = piece.get("reasoning_content") or piece.get("reasoning")
    if thought and (reasoning := text_of(thought)):
        events.append(Reasoning(reasoning))
    if text := text_of(piece.get("content")):
        events.append(Delta(text))
    calls = piece.get("tool_calls")
    if type(calls) is list and (fragments := tuple(call for call in calls if type(call) is dict)):
        events.append(ToolCalls(fragments))


def _finish_reason(reason: str) -> str:
    if reason in ("stop", "length", "content_filter", "tool_calls"):
        return reason
    return FINISH_REASONS.get(reason, "stop")


def _usage(usage: dict[str, Any]) -> Usage:
    said, asked = usage.get("completion_tokens_details"), usage.get("prompt_tokens_details")
    return Usage(
        count_of(usage.get("prompt_tokens")),
        count_of(usage.get("completion_tokens")),
        count_of(said.get("reasoning_tokens")) if type(said) is dict else 0,
        count_of(asked.get("cached_tokens")) if type(asked) is dict else 0,
    )


# --- what goes out ----------------------------------------------------------------------------------


class OpenAIEncoder:
    """Any provider's events as an OpenAI answer: `chunk` for each event and `end`, or `whole` at once.

    `end` gives `[DONE]` only after a `Finish`: a cut answer never looks complete.
    """

    def __init__(self, id: str, model: str, created: int, *, include_usage: bool = False) -> None:
        self._head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage = include_usage
        self._usage: Usage | None = None
        self._begun = False
        self._finished = False

    def chunk(self, event: ChatEvent) -> bytes:
        """The frames for `event`; b"" for what is told later or not at all."""
        match event:
            case Delta(text):
                return self._delta({"content": text})
            case Reasoning(text):
                return self._delta({"reasoning_content": text})
            case ToolCalls(fragments):
                return self._delta({"tool_calls": list(fragments)})
            case Citations():
                return self._delta({}, citations=citation_dicts(event))
            case Usage():
                self._usage = event
                return b""
            case Finish(reason):
                self._finished = True
                return self._delta({}, reason)

    def end(self) -> bytes:
        """The totals, if asked for and known, and the mark of the end."""
        if not self._finished:
            return b""
        if not self._include_usage or self._usage is None:
            return DONE
        return self._frame({**self._head, "choices": [], "usage": usage_dict(self._usage)}) + DONE

    def error(self, envelope: dict[str, Any]) -> bytes:
        """The last frame of a stream that failed; `envelope` is `ErrorEnvelope.to_dict()`."""
        return b"event: error\n" + self._frame(envelope)

    def whole(self, events: Iterable[ChatEvent]) -> dict[str, Any]:
        """The answer as one `chat.completion`."""
        answer = Collected.of(events)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = answer.tool_calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish.reason}
        body: dict[str, Any] = {**self._head, "object": "chat.completion", "choices": [choice]}
        if answer.usage is not None:
            body["usage"] = usage_dict(answer.usage)
        if answer.citations is not None:
            body["citations"] = citation_dicts(answer.citations)
        return body

    def _delta(self, delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
        if self._begun:
            return self._choice(delta, finish_reason, extra)
        self._begun = True
        role = self._choice({"role": "assistant", "content": ""}, None, {})
        return role + self._choice(delta, finish_reason, extra)

    def _choice(self, delta: dict[str, Any], finish_reason: str | None, extra: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        body: dict[str, Any] = {**self._head, "choices": [choice], **extra}
        if self._include_usage:
            body["usage"] = None
        return self._frame(body)

    @staticmethod
    def _frame(body: dict[str, Any]) -> bytes:
        return b"data: " + encode(body) + b"\n\n"


class Collected:
    """A whole answer, put together from its events."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.citations: Citations | None = None
        self.usage: Usage | None = None
        self.finish = Finish("stop")

    @classmethod
    def of(cls, events: Iterable[ChatEvent]) -> "Collected":
        """`events` put together; pieces of text and of tool calls are joined."""
        answer = cls()
        text: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case Delta(piece):
                    text.append(piece)
                case Reasoning(piece):
                    reasoning.append(piece)
                case ToolCalls(fragments):
                    for position, fragment in enumerate(fragments):
                        _join_call(calls, position, fragment)
                case Citations():
                    answer.citations = event
                case Usage():
                    answer.usage = event
                case Finish():
                    answer.finish = event
        answer.text = "".join(text)
        answer.reasoning = "".join(reasoning)
        answer.tool_calls = [calls[index] for index in sorted(calls)]
        return answer


def _join_call(calls: dict[int, dict[str, Any]], position: int, fragment: dict[str, Any]) -> None:
    index = fragment.get("index")
    call = calls.setdefault(
        index if type(index) is int else position,
        {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
    )
    call["id"] = call["id"] or text_of(fragment.get("id"))
    function = fragment.get("function")
    if type(function) is dict:
        call["function"]["name"] = call["function"]["name"] or text_of(function.get("name"))
        call["function"]["arguments"] += text_of(function.get("arguments"))


def usage_dict(usage: Usage) -> dict[str, Any]:
    """`usage` in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def citation_dicts(citations: Citations) -> list[dict[str, Any]]:
    """The passages as plain objects."""
    return [
        {
            "number": c.number,
            "title": c.title,
            "source": c.source,
            "url": c.url,
            "heading": c.heading,
            "excerpt": c.excerpt,
            "score": c.score,
        }
        for c in citations.items
    ]
