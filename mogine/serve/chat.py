"""`POST /api/chat`, the assistant: searches, asks the providers in turn, streams, remembers the turn."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from mogine.answer import AnswerEvent, answer
from mogine.chat import ChatMessage, ChatRequest, Citations, Delta, Provider, Reasoning, Usage
from mogine.errors import RequestError
from mogine.serve import sse
from mogine.serve.app import json_response, read_json
from mogine.serve.desk import DESK, told
from mogine.serve.dialects import question_text, session_id
from mogine.serve.observe import Observation, recorded
from mogine.serve.requests import Request
from mogine.serve.traces import trace_of
from mogine.settings import PROVIDER_NAMES, ProxySettings

MAX_PAGE_URL_CHARS = 500


@dataclass(frozen=True, slots=True)
class Question:
    """What a visitor may say in the body of `/api/chat`; everything else in it is left alone."""

    text: str
    session_id: str
    provider: str
    page_url: str
    stream: bool

    @classmethod
    def of(cls, body: Mapping[str, Any], headers: Mapping[str, str], limits: ProxySettings) -> "Question":
        """Raises RequestError that names the field."""
        provider = body.get("provider") or ""
        if provider and provider not in PROVIDER_NAMES:
            raise RequestError(
                f"there is no such provider; known are: {', '.join(PROVIDER_NAMES)}", param="provider"
            )
        stream = body.get("stream")
        if stream is None:
            accepted = headers.get(hdrs.ACCEPT, "")
            stream = "application/json" not in accepted or "text/event-stream" in accepted
        elif not isinstance(stream, bool):
            raise RequestError('"stream" must be true or false', param="stream")
        return cls(
            question_text(body.get("question"), limits, "question"),
            session_id(body.get("session_id")),
            provider,
            _page(body.get("page_url")),
            stream,
        )


async def chat(request: Request) -> web.StreamResponse:
    """The handler."""
    desk = request.app[DESK]
    limits = desk.settings.proxy
    question = Question.of(await read_json(request, limits.max_body_bytes), request.headers, limits)
    bucket = desk.bucket(request)
    providers = desk.affordable(question.provider)
    seen = desk.observe(request, bucket, "chat", providers[0].name, question.text)
    seen.page_url = question.page_url
    with recorded(desk.books, seen), desk.limits.open(bucket) as place:
        if desk.shared is not None:
            await desk.shared.admit(place, bucket)
        seen.session, history = await desk.open_session(question.session_id, bucket)
        seen.request = _request(providers[0], history, question.text, limits, trace_of(request.headers))
        events = answer(seen.request, providers, desk.knowledge, desk.manner())
        if question.stream:
            response = await sse.respond(
                request,
                _frames(events, seen),
                within=desk.within(place),
                last_words=lambda error: sse.event("error", told(request, error, seen).to_dict()),
                ping_s=limits.ping_s,
                stall_s=limits.reader_timeout_s,
            )
        else:
            with desk.within(place):
                response = await _whole(events, seen)
        if seen.finish is not None and seen.error is None and (text := seen.text):
            desk.add_turn(seen.session, bucket, question.text, text)
        return response


def _request(
    provider: Provider,
    history: tuple[ChatMessage, ...],
    question: str,
    limits: ProxySettings,
    traceparent: str,
) -> ChatRequest:
    return ChatRequest(
        messages=(*history, ChatMessage("user", question)),
        provider=provider.name,
        model=provider.default_model,
        max_tokens=limits.max_output_tokens,
        traceparent=traceparent,
    )


async def _frames(
    events: AsyncGenerator[AnswerEvent, None], seen: Observation
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            seen.see(event)
            match event:
                case Delta(text):
                    yield sse.event("delta", {"text": text})
                case Reasoning(text):
                    yield sse.event("reasoning", {"text": text})
                case Citations():
                    yield sse.event("citations", {"citations": _citations(event)})
    if (usage := seen.usage_so_far()) is not None:
        yield sse.event("usage", _usage(usage))
    yield sse.event("done", _done(seen))


async def _whole(events: AsyncGenerator[AnswerEvent, None], seen: Observation) -> web.Response:
    reasoning: list[str] = []
    async with aclosing(events):
        async for event in events:
            seen.see(event)
            if isinstance(event, Reasoning):
                reasoning.append(event.text)
    usage = seen.usage_so_far()
    return json_response(
        {
            "answer": seen.text,
            "reasoning": "".join(reasoning),
            "citations": _citations(Citations(seen.citations)),
            "usage": _usage(usage) if usage else None,
            **_done(seen),
        }
    )


def _done(seen: Observation) -> dict[str, Any]:
    return {
        "finish_reason": seen.finish.reason if seen.finish else "stop",
        "request_id": seen.id,
        "session_id": seen.session,
        "provider": seen.provider,
        "model": seen.model,
        "answered": seen.answered,
    }


def _citations(citations: Citations) -> list[dict[str, Any]]:
    return [asdict(citation) for citation in citations.items]


def _usage(usage: Usage) -> dict[str, Any]:
    return {**asdict(usage), "total_tokens": usage.prompt_tokens + usage.completion_tokens}


def _page(value: Any) -> str:
    """The page that asked, without what may be personal in it: its query and fragment."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError('"page_url" must be a text', param="page_url")
    try:
        parts = urlsplit(value[: 4 * MAX_PAGE_URL_CHARS])
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ""
    port = f":{parts.netloc.rpartition(':')[2]}" if parts.netloc.rpartition(":")[2].isdigit() else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"[:MAX_PAGE_URL_CHARS]


async def config(request: web.Request) -> web.Response:
    """`GET /api/chat/config`: what a page needs to know before the first question."""
    desk = request.app[DESK]
    site = desk.site.now()
    assistant, widget = site.assistant, site.widget
    name = str(assistant.get("name") or "")
    return json_response(
        {
            "name": name,
            "title": str(widget.get("title") or name),
            "greeting": str(assistant.get("greeting") or ""),
            "starters": _texts(assistant.get("starter_questions")),
            "language": str(widget.get("language") or "auto"),
            "colour": str(widget.get("colour") or ""),
            "position": str(widget.get("position") or "right"),
            "ai_notice": str(assistant.get("ai_notice") or ""),
            "handoff": {
                "text": str(assistant.get("handoff_text") or ""),
                "contacts": _texts(assistant.get("handoff_contacts")),
            },
            "providers": [p.name for p in desk.in_order()],
            "max_question_chars": desk.settings.proxy.max_question_chars,
        }
    )


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
