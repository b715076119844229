"""`POST /api/llm/{provider}`: one question to one provider, answered in the dialect in which it was asked."""

import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace

from aiohttp import web

from mogine.answer import cite, find
from mogine.chat import ChatEvent, ChatMessage, ChatRequest, Chunk, Citations, Provider, Usage
from mogine.errors import ErrorEnvelope
from mogine.providers.compatible import OpenAIEncoder
from mogine.providers.dashscope import DashScopeEncoder
from mogine.providers.vendor import VendorProvider
from mogine.serve import sse
from mogine.serve.app import ReadyJson, json_response, read_json
from mogine.serve.desk import DESK, Desk, told
from mogine.serve.dialects import Asked, Dialect, max_body_bytes, parse
from mogine.serve.observe import Observation, recorded


async def llm(request: web.Request) -> web.StreamResponse:
    """The handler."""
    desk = request.app[DESK]
    provider = desk.provider(request.match_info["provider"])
    limits = desk.settings.proxy
    body = await read_json(request, max_body_bytes(limits))
    asked = parse(body, request.headers, provider, limits)
    bucket = desk.bucket(request)
    seen = desk.observe(request, bucket, "llm", provider.name, asked.request.question)
    with recorded(desk.recorder, seen), desk.limits.open(bucket) as place:
        wanted = _settled(desk, asked.request, bucket, provider)
        if not provider.dialect:
            hits = await find(wanted, desk.knowledge, limits.kb_top_k)
            wanted = replace(wanted, citations=tuple(cite(hits)))
        if wanted is not asked.request:
            asked = replace(asked, request=wanted)
        seen.request, seen.model = wanted, wanted.model
        if wanted.stream:
            pushing = _Relay(provider, asked, seen).run if isinstance(provider, VendorProvider) else None
            response = await sse.respond(
                request,
                pushing or _frames(provider, asked, seen),
                within=desk.within(place),
                last_words=lambda error: _error_frame(asked.dialect, told(request, error, seen)),
                ping_s=limits.ping_s,
                stall_s=limits.reader_timeout_s,
            )
        else:
            async with desk.within(place):
                response = await _whole(request, provider, asked, seen)
        if seen.finish is not None and seen.finish.session_id:
            desk.vendor_sessions.note(seen.finish.session_id, bucket)
        return response


def _settled(desk: Desk, request: ChatRequest, bucket: str, provider: Provider) -> ChatRequest:
    """The request with what the server adds: its own system prompt, which `extract` has no use for."""
    if request.session_id and not desk.vendor_sessions.allows(request.session_id, bucket):
        request = replace(request, session_id=None)
    if not provider.dialect:
        return request
    system = desk.site.now().assistant.get("llm_system_prompt")
    if isinstance(system, str) and system.strip():
        return replace(request, messages=(ChatMessage("system", system.strip()), *request.messages))
    return request


async def _frames(provider: Provider, asked: Asked, seen: Observation) -> AsyncGenerator[bytes, None]:
    """The answer's frames: the vendor's own bytes where it speaks the visitor's dialect."""
    encoder = None if provider.dialect == asked.dialect else _encoder(asked, seen)
    if encoder is not None and asked.request.citations:
        citations = Citations(asked.request.citations)
        seen.see(citations)
        yield encoder.chunk(citations)
    async with aclosing(provider.stream(asked.request)) as chunks:
        async for chunk in chunks:
            for event in chunk.events:
                seen.see(event)
            if encoder is not None:
                if frames := b"".join(map(encoder.chunk, chunk.events)):
                    yield frames
            elif chunk.raw and (
                asked.include_usage or asked.dialect != "openai" or not _only_usage(chunk.events)
            ):
                yield chunk.raw
    if encoder is not None and (last := encoder.end()):
        yield last


class _Relay:
    """`_frames` for a provider that pushes: chunks are looked at and handed on where they arrive."""

    __slots__ = ("_asked", "_encoder", "_hide_usage", "_provider", "_push", "_seen")

    def __init__(self, provider: VendorProvider, asked: Asked, seen: Observation) -> None:
        self._provider = provider
        self._asked = asked
        self._seen = seen
        self._encoder = None if provider.dialect == asked.dialect else _encoder(asked, seen)
        self._hide_usage = asked.dialect == "openai" and not asked.include_usage
        self._push: sse.Push | None = None

    async def run(self, push: sse.Push) -> None:
        self._push = push
        await self._provider.push(self._asked.request, self._take)
        if self._encoder is not None and (last := self._encoder.end()) and (wait := push(last)) is not None:
            await wait

    def _take(self, chunks: Sequence[Chunk]) -> Awaitable[None] | None:
        frames: list[bytes] = []
        see = self._seen.see
        for chunk in chunks:
            events = chunk.events
            for event in events:
                see(event)
            if self._encoder is not None:
                frames += map(self._encoder.chunk, events)
            elif not (self._hide_usage and events and type(events[0]) is Usage and _only_usage(events)):
                frames.append(chunk.raw)
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        return self._push(data) if data and self._push is not None else None


async def _whole(
    request: web.Request, provider: Provider, asked: Asked, seen: Observation
) -> web.StreamResponse:
    events: list[ChatEvent] = []
    if asked.request.citations:
        events.append(Citations(asked.request.citations))
    raw = b""
    if isinstance(provider, VendorProvider):
        answer = await provider.whole(asked.request)
        raw = answer.raw
        events += answer.events
    else:
        async with aclosing(provider.stream(asked.request)) as chunks:
            async for chunk in chunks:
                raw += chunk.raw
                events += chunk.events
    for event in events:
        seen.see(event)
    if provider.dialect == asked.dialect:
        return ReadyJson.of(request, raw)
    return json_response(_encoder(asked, seen).whole(events))


def _encoder(asked: Asked, seen: Observation) -> OpenAIEncoder:
    model = asked.request.model or asked.request.provider
    return OpenAIEncoder(f"chatcmpl-{seen.id}", model, int(time.time()), include_usage=asked.include_usage)


def _only_usage(events: tuple[ChatEvent, ...]) -> bool:
    """A frame of totals, which OpenAI's dialect sends only to who asked for them."""
    return bool(events) and all(type(event) is Usage for event in events)


def _error_frame(dialect: Dialect, error: ErrorEnvelope) -> bytes:
    """The last frame of an answer that failed, such that the dialect's own clients raise it."""
    if dialect == "openai":
        return sse.event("error", error.to_dict())
    return DashScopeEncoder("", error.request_id, "", incremental=True).error(error.to_dict())
