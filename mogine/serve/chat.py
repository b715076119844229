"""`POST /api/chat`, the assistant: searches, asks the providers in turn, streams, remembers the turn."""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from mogine.answer import AnswerEvent, answer
from mogine.chat import ChatMessage, ChatRequest, Citations, Delta, Provider, Reasoning, Usage
from mogine.errors import MogineError, NotFound, RequestError
from mogine.serve import sse
from mogine.serve.app import json_response, read_json
from mogine.serve.desk import DESK, Desk, told
from mogine.serve.dialects import question_text, session_id
from mogine.serve.keys import REQUEST_ID
from mogine.serve.limits import Place
from mogine.serve.observe import Observation, recorded
from mogine.serve.replay import REPLAYS, Replay
from mogine.serve.requests import Request
from mogine.serve.siblings import SIBLINGS
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
    resume: bool = False

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
        resume = body.get("resume", False)
        if not isinstance(resume, bool):
            raise RequestError('"resume" must be true or false', param="resume")
        return cls(
            question_text(body.get("question"), limits, "question"),
            session_id(body.get("session_id")),
            provider,
            _page(body.get("page_url")),
            stream,
            resume and stream,
        )


async def chat(request: Request) -> web.StreamResponse:
    """The handler."""
    desk = request.app[DESK]
    limits = desk.settings.proxy
    question = Question.of(await read_json(request, limits.max_body_bytes), request.headers, limits)
    if question.resume:
        return await _resumable(request, desk, question)
    if not question.stream:
        return json_response(await whole(request, question))
    bucket = desk.bucket(request)
    seen = _watched(request, desk, question, bucket)
    with recorded(desk.books, seen), desk.limits.open(bucket) as place:
        events = await _begin(request, desk, question, seen, place)
        response = await sse.respond(
            request,
            _frames(events, seen),
            within=desk.within(place),
            last_words=lambda error: sse.event("error", told(request, error, seen).to_dict()),
            ping_s=limits.ping_s,
            stall_s=limits.reader_timeout_s,
        )
        _remember(desk, bucket, question, seen)
        return response


async def whole(request: Request, question: Question) -> dict[str, Any]:
    """The answer when it is complete, as `/api/chat` tells it without a stream."""
    desk = request.app[DESK]
    bucket = desk.bucket(request)
    seen = _watched(request, desk, question, bucket)
    with recorded(desk.books, seen), desk.limits.open(bucket) as place:
        events = await _begin(request, desk, question, seen, place)
        with desk.within(place):
            found = await _gathered(events, seen)
        _remember(desk, bucket, question, seen)
        return found


async def _resumable(request: Request, desk: Desk, question: Question) -> web.StreamResponse:
    """The answer as a stream with numbered events, which goes on for a moment when the connection is lost."""
    bucket = desk.bucket(request)
    seen = _watched(request, desk, question, bucket)
    session, history = await desk.open_session(question.session_id, bucket)

    async def write(replay: Replay) -> None:
        with recorded(desk.books, seen), desk.limits.open(bucket) as place:
            events = await _begin(request, desk, question, seen, place, (session, history))
            replay.push(sse.event("start", {"request_id": seen.id, "session_id": session}))
            try:
                with desk.within(place):
                    async with aclosing(_frames(events, seen)) as frames:
                        async for frame in frames:
                            replay.push(frame)
            except Exception as error:
                replay.push(sse.event("error", told(request, error, seen).to_dict()))
            _remember(desk, bucket, question, seen)

    return await _follow(request, request.app[REPLAYS].start(seen.id, bucket, session, write).read())


async def resume(request: Request) -> web.StreamResponse:
    """`POST /api/chat/resume`: the rest of an answer, after the event that `Last-Event-ID` names."""
    last = request.headers.get("Last-Event-ID", "0")
    if not re.fullmatch(r"[0-9]{1,9}", last):
        raise RequestError("Last-Event-ID must be the number of an event", param="Last-Event-ID")
    wanted, siblings = await _wanted(request), request.app.get(SIBLINGS)
    if (replay := request.app[REPLAYS].find(*wanted)) is not None:
        return await _follow(request, replay.read(int(last)))
    if siblings is not None and (frames := await siblings.read(*wanted, int(last))) is not None:
        return await _follow(request, frames)
    raise _absent()


async def stop(request: Request) -> web.Response:
    """`POST /api/chat/stop`: end a running answer now.

    NotFound for one that is not here, as for `resume`: a balancer then asks the next proxy.
    """
    wanted, siblings = await _wanted(request), request.app.get(SIBLINGS)
    if (replay := request.app[REPLAYS].find(*wanted)) is not None:
        replay.stop()
    elif siblings is None or not await siblings.stop(*wanted):
        raise _absent()
    return json_response({"status": "stopped"})


async def _wanted(request: Request) -> tuple[str, str, str]:
    """The id of an answer, and the visitor and session to whom it must belong."""
    body = await read_json(request)
    id, session = body.get("request_id"), body.get("session_id")
    if not isinstance(id, str) or not isinstance(session, str):
        raise RequestError("send request_id and session_id, as the answer's first event told them")
    return id, request.app[DESK].bucket(request), session


def _absent() -> NotFound:
    return NotFound("there is no answer of yours with this request_id that still waits for you")


async def _follow(request: Request, frames: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    def last_words(error: Exception) -> bytes:
        reason = error.reason if isinstance(error, MogineError) else "internal_error"
        return sse.event("error", {"error": {"reason": reason, "request_id": request[REQUEST_ID]}})

    limits = request.app[DESK].settings.proxy
    return await sse.respond(
        request,
        frames,
        within=nullcontext(),
        last_words=last_words,
        ping_s=limits.ping_s,
        stall_s=limits.reader_timeout_s,
    )


def _watched(request: Request, desk: Desk, question: Question, bucket: str) -> Observation:
    first = desk.affordable(question.provider)[0]
    seen = desk.observe(request, bucket, "chat", first.name, question.text)
    seen.page_url = question.page_url
    return seen


async def _begin(
    request: Request,
    desk: Desk,
    question: Question,
    seen: Observation,
    place: Place,
    session: tuple[str, tuple[ChatMessage, ...]] | None = None,
) -> AsyncGenerator[AnswerEvent, None]:
    """Ask: everything between the place under the limits and the first event."""
    bucket = place.visitor
    if desk.shared is not None:
        await desk.shared.admit(place, bucket, [p.name for p in desk.in_order(question.provider)])
    seen.session, history = session or await desk.open_session(question.session_id, bucket)
    limits = desk.settings.proxy
    providers = desk.affordable(question.provider)
    seen.request = _request(providers[0], history, question.text, limits, trace_of(request.headers))
    asked = providers if seen.trace is None else seen.trace.providers(providers)
    return answer(seen.request, asked, desk.retriever(seen), desk.manner())


def _remember(desk: Desk, bucket: str, question: Question, seen: Observation) -> None:
    if seen.finish is not None and seen.error is None and (text := seen.text):
        desk.add_turn(seen.session, bucket, question.text, text)


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


async def _gathered(events: AsyncGenerator[AnswerEvent, None], seen: Observation) -> dict[str, Any]:
    reasoning: list[str] = []
    async with aclosing(events):
        async for event in events:
            seen.see(event)
            if isinstance(event, Reasoning):
                reasoning.append(event.text)
    usage = seen.usage_so_far()
    return {
        "answer": seen.text,
        "reasoning": "".join(reasoning),
        "citations": _citations(Citations(seen.citations)),
        "usage": _usage(usage) if usage else None,
        **_done(seen),
    }


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
