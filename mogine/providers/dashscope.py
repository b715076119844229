"""DashScope's application completion: its requests, its frames in, and answers composed in its dialect."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar
from urllib.parse import quote

from mogine.chat import (
    ChatEvent,
    ChatRequest,
    Chunk,
    Citation,
    Citations,
    Delta,
    Finish,
    Reasoning,
    ToolCalls,
    Usage,
)
from mogine.errors import UpstreamBadResponse
from mogine.providers.compatible import NOTHING, Collected, encode
from mogine.providers.vendor import (
    Refusal,
    Refused,
    Vendor,
    VendorProvider,
    checked_raw,
    count_of,
    load_object,
    refusal_in,
    refuse_images,
    text_of,
)
from mogine.settings import DashScopeSettings
from mogine.upstream import Client, Frame, Retries

MAX_EXCERPT_CHARS = 1000

# The application, not the caller, chooses the model: what another vendor's model is here the app id is.
DASHSCOPE = Vendor(
    label="DashScope",
    key_setting="DASHSCOPE_API_KEY",
    model_setting="DASHSCOPE_APP_ID",
    url_setting="DASHSCOPE_BASE_URL",
    retired={},
)


def provider(settings: DashScopeSettings, client: Client, retries: Retries | None = None) -> VendorProvider:
    """The provider `dashscope`."""
    dialect = DashScopeDialect(settings.base_url, settings.app_id)
    return VendorProvider("dashscope", "", DASHSCOPE, dialect, client, settings.keys, retries)


class DashScopeDialect:
    """`POST {base}/apps/{app_id}/completion`; a header, not the body, asks for a stream."""

    name: ClassVar[str] = "dashscope"

    def __init__(self, base_url: str, app_id: str) -> None:
        self._url = f"{base_url}/apps/{quote(app_id, safe='')}/completion"

    def headers(self, request: ChatRequest, key: str) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        if request.stream:
            headers |= {"Accept": "text/event-stream", "X-DashScope-SSE": "enable"}
        else:
            headers["Accept"] = "application/json"
        return headers

    def call(self, request: ChatRequest, model: str) -> tuple[str, bytes]:
        parameters: dict[str, Any] = {}
        if request.stream and request.incremental:
            parameters["incremental_output"] = True
        if request.thoughts:
            parameters["has_thoughts"] = True
        for name in ("temperature", "top_p"):
            if (value := getattr(request, name)) is not None:
                parameters[name] = value
        return self._url, encode({"input": _input(request), "parameters": parameters, "debug": {}})

    def parser(self, request: ChatRequest) -> "ApplicationParser":
        return ApplicationParser(incremental=request.incremental)


def _input(request: ChatRequest) -> dict[str, Any]:
    """A vendor's session remembers the turns itself, but `messages` would win over it when both are sent."""
    for message in request.messages:
        refuse_images(message.images, DASHSCOPE.label)
    instructed = any(message.role == "system" for message in request.messages)
    if request.session_id and not instructed:
        return {"prompt": request.question, "session_id": request.session_id}
    if len(request.messages) == 1 and not instructed:
        return {"prompt": request.question}
    return {"messages": [{"role": message.role, "content": message.text} for message in request.messages]}


# --- what comes in ----------------------------------------------------------------------------------


class ApplicationParser:
    """One answer of an application: agent or workflow, in pieces or cumulative, streamed or whole."""

    def __init__(self, *, incremental: bool = True) -> None:
        self.finished = False
        self.done = False
        self._text = _Growth(incremental)
        self._thought = _Growth(incremental)
        self._marks = _MarkFilter()
        self._references = 0
        self._usage: Usage | None = None
        self._model = ""
        self._model_tokens = -1
        self._session_id: str | None = None

    def frame(self, frame: Frame) -> Chunk | None:
        if not frame.data:
            return Chunk(checked_raw(frame.raw))
        payload = load_object(frame.data)
        status = frame.http_status if frame.http_status and frame.http_status >= 400 else 0
        refusal = refusal_in(payload, status)
        if refusal is None and (status or frame.event == "error"):
            refusal = Refusal(status)
        if refusal is not None:
            raise Refused(refusal)
        chunk = Chunk(checked_raw(frame.raw), self._events(payload))
        self.done = self.finished
        return chunk

    def text_alone(self, frame: bytes) -> str | None:
        return None  # frames are numbered, and may repeat what came before

    def whole(self, body: bytes, *, as_stream: bool) -> Chunk:
        payload = load_object(body.removeprefix(b"\xef\xbb\xbf"))
        refusal = refusal_in(payload, 0)
        if refusal is not None:
            raise Refused(refusal)
        events = self._events(payload)
        if not self.finished:
            raise UpstreamBadResponse("API proxy error: the upstream answer has no finish reason, it was cut")
        self.done = True
        if not as_stream:
            return Chunk(body, events)
        encoder = DashScopeEncoder(
            self._session_id or "", text_of(payload.get("request_id")), self._model, incremental=True
        )
        return Chunk(b"".join(encoder.chunk(event) for event in events), events)

    def held(self) -> Chunk | None:
        text = self._marks.strip(self._text.rest(), last=True)
        thought = self._thought.rest()
        events: list[ChatEvent] = [Reasoning(thought)] if thought else []
        if text:
            events.append(Delta(text))
        return Chunk(NOTHING, tuple(events)) if events else None

    def end(self) -> Chunk | None:
        return None  # the frame with the finish reason said all

    def _events(self, payload: dict[str, Any]) -> tuple[ChatEvent, ...]:
        output = payload.get("output")
        if type(output) is not dict:
            return ()
        reason = text_of(output.get("finish_reason"))
        last = reason not in ("", "null")  # the word null, until the answer is complete
        self._session_id = text_of(output.get("session_id")) or self._session_id
        text, thought = _spoken(output)
        events: list[ChatEvent] = []
        if (usage := self._new_usage(payload)) is not None:
            events.append(usage)
        if thought := self._thought.new(thought, last=last):
            events.append(Reasoning(thought))
        if (citations := self._new_citations(output)) is not None:
            events.append(citations)
        if text := self._marks.strip(self._text.new(text, last=last), last=last):
            events.append(Delta(text))
        if last:
            self.finished = True
            known = reason in ("stop", "length", "content_filter", "tool_calls")
            events.append(Finish(reason if known else "stop", self._model, self._session_id))
        return tuple(events)

    def _new_citations(self, output: dict[str, Any]) -> Citations | None:
        """All references so far, when a frame brings more of them; the list is cumulative in every mode."""
        references = output.get("doc_references")
        if type(references) is not list or len(references) <= self._references:
            return None
        self._references = len(references)
        return Citations(tuple(_citation(n, r) for n, r in enumerate(references, start=1) if type(r) is dict))

    def _new_usage(self, payload: dict[str, Any]) -> Usage | None:
        """The sum over all models that ran, when it has changed; workflows may tell nothing."""
        usage = payload.get("usage")
        models = usage.get("models") if type(usage) is dict else None
        entries = [m for m in models if type(m) is dict] if type(models) is list else []
        if not entries:
            return None
        for entry in entries:
            if count_of(entry.get("output_tokens")) > self._model_tokens:
                self._model_tokens = count_of(entry.get("output_tokens"))
                self._model = text_of(entry.get("model_id"))
        total = Usage(
            prompt_tokens=sum(count_of(entry.get("input_tokens")) for entry in entries),
            completion_tokens=sum(count_of(entry.get("output_tokens")) for entry in entries),
        )
        if total == self._usage:
            return None
        self._usage = total
        return total


def _spoken(output: dict[str, Any]) -> tuple[str, str]:
    """Text and thought of one frame, as its mode has them: a piece, or everything so far."""
    thoughts = output.get("thoughts")
    steps = [t for t in thoughts if type(t) is dict] if type(thoughts) is list else []
    thought = "".join(text_of(t.get("thought")) for t in steps if t.get("action_type") == "reasoning")
    message = output.get("workflow_message")
    if type(message) is not dict:
        return text_of(output.get("text")), thought
    text, reasoning = _node_message(message)
    return text_of(output.get("text")) or text, thought or reasoning


def _node_message(message: dict[str, Any]) -> tuple[str, str]:
    """What a workflow's node says: plain text, or for an LLM node of `message_format_plus` JSON text."""
    inner = message.get("message")
    content = text_of(inner.get("content")) if type(inner) is dict else ""
    if not content or message.get("node_type") == "Start":  # its content is the input
        return "", ""
    if message.get("node_type") == "LLM" and content.startswith("{"):
        try:
            parts = load_object(content.encode())
        except UpstreamBadResponse:
            return content, ""  # a plain answer that happens to begin with a brace
        if "result" in parts or "reasoningContent" in parts:
            return text_of(parts.get("result")), text_of(parts.get("reasoningContent"))
    return content, ""


def _citation(position: int, reference: dict[str, Any]) -> Citation:
    index = text_of(reference.get("index_id"))
    title = text_of(reference.get("title")) or text_of(reference.get("doc_name"))
    excerpt = text_of(reference.get("text"))
    _, mark, body = excerpt.partition("【正文】:")
    return Citation(
        number=int(index) if re.fullmatch(r"[0-9]{1,4}", index) else position,
        title=title,
        source=text_of(reference.get("doc_name")) or title,
        heading="",
        url=text_of(reference.get("doc_url")),
        excerpt=(body if mark else excerpt).strip()[:MAX_EXCERPT_CHARS],
        score=0.0,
    )


class _Growth:
    """Text that comes piece by piece or, in each frame, whole so far: tells what is new.

    What was asked for is believed until the frames say otherwise, since some applications ignore the
    wish. A frame that fits both readings ("图" then "图书馆") is held back until the next one decides.
    """

    def __init__(self, incremental: bool) -> None:
        self._incremental = incremental
        self._sure = False
        self._text = ""  # all that was given out
        self._held: list[str] = []
        self._growths = 0

    def new(self, text: str, *, last: bool) -> str:
        """What `text`, as the next frame has it, adds to the answer."""
        if not text and not last:
            return ""
        if not self._text:
            new = text
        elif self._sure:
            new = self._surely_new(text, last)
        else:
            new = self._perhaps_new(text, last)
        self._text += new
        return new

    def rest(self) -> str:
        """What is held back; for a stream that breaks off."""
        held, self._held = self._held, []
        return "".join(held) if self._incremental else ""

    def _surely_new(self, text: str, last: bool) -> str:
        if self._incremental and not (last and text.startswith(self._text)):
            return text
        return text[len(self._text) :]

    def _perhaps_new(self, text: str, last: bool) -> str:
        before = self._held[-1] if self._held else self._text
        if not text.startswith(before):
            # No whole text can shrink or change: these are pieces, or a cumulative text was rewritten.
            self._sure = True
            self._incremental = self._incremental or self._growths == 0
            return self.rest() + text if self._incremental else text[len(self._text) :]
        if last:
            self._held.clear()
            return text[len(self._text) :]
        self._growths += len(text) > len(before)
        if self._incremental and self._growths < 2:
            self._held.append(text)
            return ""
        self._sure = self._growths >= 2
        self._incremental = False
        self._held.clear()
        return text[len(self._text) :]


class _MarkFilter:
    """Makes `<ref>[1]</ref>` into `[1]`, also when the marks are split over frames."""

    def __init__(self) -> None:
        self._tail = ""

    def strip(self, text: str, *, last: bool) -> str:
        text = self._tail + text
        self._tail = ""
        if "<" not in text:
            return text
        text = re.sub("</?ref>", "", text)
        begin = text.rfind("<")
        if begin >= 0 and not last and any(mark.startswith(text[begin:]) for mark in ("<ref>", "</ref>")):
            text, self._tail = text[:begin], text[begin:]
        return text


# --- what goes out ----------------------------------------------------------------------------------


class DashScopeEncoder:
    """Any provider's events as an application's answer: `chunk` for each event, or `whole` at once.

    Frames are byte for byte the vendor's: LF, no space after a colon, raw UTF-8, no mark of the end.
    """

    def __init__(
        self,
        session_id: str,
        request_id: str,
        model: str,
        *,
        incremental: bool,
        thoughts: bool = True,
    ) -> None:
        self._session_id = session_id
        self._request_id = request_id
        self._model = model
        self._incremental = incremental
        self._thoughts = thoughts
        self._frames = 0
        self._text = ""
        self._thought = ""
        self._thinks = False
        self._references: list[dict[str, Any]] = []
        self._usage: dict[str, Any] = {}

    def chunk(self, event: ChatEvent) -> bytes:
        """The frame for `event`; b"" for what the following frames will bear or the dialect cannot say."""
        match event:
            case Delta(text):
                self._text += text
                return self._result("" if self._incremental else self._thought, text, "null")
            case Reasoning(text) if self._thoughts:
                self._thinks = True
                self._thought += text
                return self._result(text if self._incremental else self._thought, "", "null")
            case Citations():
                self._references = _references(event)
            case Usage():
                self._usage = _models(event, self._model)
            case Finish(reason):
                return self._result("" if self._incremental else self._thought, "", reason)
            case Reasoning() | ToolCalls():
                return b""
        return b""

    def end(self) -> bytes:
        """Nothing: the frame with the finish reason was the last."""
        return b""

    def error(self, envelope: dict[str, Any]) -> bytes:
        """The last frame of a stream that failed: our envelope, and what the vendor's own clients read."""
        error = envelope["error"]
        data = {
            "code": error["reason"],
            "message": error["message"],
            "request_id": error["request_id"],
            "error": error,
        }
        return self._frame(b"error", error["code"], data)

    def whole(self, events: Iterable[ChatEvent]) -> dict[str, Any]:
        """The answer as one object."""
        answer = Collected.of(events)
        output: dict[str, Any] = {
            "finish_reason": answer.finish.reason,
            "session_id": self._session_id,
            "text": answer.text,
        }
        if answer.reasoning and self._thoughts:
            output["thoughts"] = [_thought(answer.reasoning)]
        if answer.citations is not None:
            output["doc_references"] = _references(answer.citations)
        usage = {} if answer.usage is None else _models(answer.usage, self._model)
        return {"output": output, "usage": usage, "request_id": self._request_id}

    def _result(self, thought: str, text: str, finish_reason: str) -> bytes:
        output: dict[str, Any] = {"thoughts": [_thought(thought)]} if self._thinks else {}
        output["session_id"] = self._session_id
        output["finish_reason"] = finish_reason
        output["text"] = text if self._incremental else self._text
        if self._references:
            output["doc_references"] = self._references
        data = {"output": output, "usage": self._usage, "request_id": self._request_id}
        return self._frame(b"result", 200, data)

    def _frame(self, event: bytes, status: int, data: dict[str, Any]) -> bytes:
        self._frames += 1
        return b"id:%d\nevent:%b\n:HTTP_STATUS/%d\ndata:%b\n\n" % (self._frames, event, status, encode(data))


def _thought(text: str) -> dict[str, Any]:
    return {
        "action": "reasoning",
        "thought": text,
        "action_type": "reasoning",
        "response": text,
        "action_name": "思考过程",
    }


def _references(citations: Citations) -> list[dict[str, Any]]:
    return [
        {
            "images": [],
            "text": c.excerpt,
            "index_id": str(c.number),
            "title": c.title,
            "doc_name": c.source,
            "doc_url": c.url,
        }
        for c in citations.items
    ]


def _models(usage: Usage, model: str) -> dict[str, Any]:
    entry = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens, "model_id": model}
    return {"models": [entry]}
