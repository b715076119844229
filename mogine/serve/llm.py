"""`POST /api/llm/{provider}`: one question to one provider, answered in the dialect in which it was asked."""

import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace

from aiohttp import web

from mogine.analytics.records import Kind
from mogine.answer import cite, find
from mogine.chat import ChatEvent, ChatMessage, Chunk, Citations, Delta, Provider, Usage
from mogine.errors import ErrorEnvelope, MogineError, RequestError, UpstreamError, UpstreamUnavailable
from mogine.providers.compatible import OpenAIEncoder
from mogine.providers.dashscope import DashScopeEncoder
from mogine.providers.vendor import VendorProvider
from mogine.serve import sse
from mogine.serve.app import json_bytes, json_response, read_json
from mogine.serve.desk import DESK, Desk, told
from mogine.serve.dialects import Asked, Dialect, max_body_bytes, parse
from mogine.serve.middlewares import error_body
from mogine.serve.observe import Observation, recorded
from mogine.serve.requests import Request

log = logging.getLogger(__name__)


async def llm(request: Request) -> web.StreamResponse:
    """The handler."""
    desk = request.app[DESK]
    provider = desk.provider(request.match_info["provider"])
    limits = desk.settings.proxy
    body = await read_json(request, max_body_bytes(limits))
    return await relay(request, "llm", (provider,), parse(body, request.headers, provider, limits))


async def relay(
    request: Request, kind: Kind, providers: Sequence[Provider], asked: Asked
) -> web.StreamResponse:
    """Give the answer of the first of `providers`, or of the next where one fails before its first word.

    `asked.request` is meant for the first; the others are asked for their own model.
    """
    desk = request.app[DESK]
    limits = desk.settings.proxy
    bucket = desk.bucket(request)
    seen = desk.observe(request, bucket, kind, providers[0].name, asked.request.question)
    with recorded(desk.books, seen), desk.limits.open(bucket) as place:
        if desk.shared is not None:
            await desk.shared.admit(place, bucket, [provider.name for provider in providers])
        desk.require_budget(providers[0])
        turns = _Turns(desk, bucket, providers, asked, seen)
        if asked.request.stream:
            response = await sse.respond(
                request,
                turns.frames,
                within=desk.within(place),
                last_words=lambda error: _error_frame(asked.dialect, told(request, error, seen), kind),
                ping_s=limits.ping_s,
                stall_s=limits.reader_timeout_s,
            )
        else:
            with desk.within(place):
                response = await turns.whole(request)
        if seen.finish is not None and seen.finish.session_id:
            desk.note_vendor_session(seen.finish.session_id, bucket)
        return response


class _Turns:
    """Providers, asked one after the other until one has said a word; the first one's error is told."""

    __slots__ = ("_asked", "_bucket", "_desk", "_error", "_providers", "_seen")

    def __init__(
        self, desk: Desk, bucket: str, providers: Sequence[Provider], asked: Asked, seen: Observation
    ) -> None:
        self._desk = desk
        self._bucket = bucket
        self._providers = providers
        self._asked = asked
        self._seen = seen
        self._error: MogineError | None = None

    async def frames(self, push: sse.Push) -> None:
        """The frames of the first provider that has any."""
        for provider in self._providers:
            relay = _Relay(provider, await self._settled(provider), self._seen)
            try:
                return await relay.run(push)
            except (UpstreamError, RequestError) as error:
                if relay.begun:
                    raise
                self._failed(provider, error)
        raise self._error or UpstreamUnavailable("there is no provider to answer")

    async def whole(self, request: Request) -> web.StreamResponse:
        """The answer in one piece."""
        for provider in self._providers:
            try:
                return await _whole(request, provider, await self._settled(provider), self._seen)
            except (UpstreamError, RequestError) as error:
                self._failed(provider, error)
        raise self._error or UpstreamUnavailable("there is no provider to answer")

    def _failed(self, provider: Provider, error: MogineError) -> None:
        # What the first provider calls a bad question is one; what a substitute cannot take is no news.
        if len(self._providers) == 1 or (self._error is None and isinstance(error, RequestError)):
            raise error
        log.warning("provider %s gave no answer (%s)", provider.name, error.reason)
        self._seen.pass_over(error.reason)
        self._error = self._error or error

    async def _settled(self, provider: Provider) -> Asked:
        """The question as `provider` gets it, with what the server adds: its own system prompt, passages
        for `extract`."""
        desk, given = self._desk, self._asked.request
        request = given
        if request.provider != provider.name:
            request = replace(request, provider=provider.name, model=provider.default_model, session_id=None)
        if request.session_id and not await desk.allows_vendor_session(request.session_id, self._bucket):
            request = replace(request, session_id=None)
        if not provider.dialect:
            search = await find(request, desk.retriever(self._seen), desk.manner())
            self._seen.search_ms = search.took_ms
            request = replace(request, citations=tuple(cite(search.hits or ())))
        else:
            system = desk.site.now().assistant.get("llm_system_prompt")
            if isinstance(system, str) and system.strip():
                turns = (ChatMessage("system", system.strip()), *request.messages)
                request = replace(request, messages=turns)
        self._seen.ask(provider.name, request)
        if self._seen.trace is not None:
            request = self._seen.trace.asking(provider, request)
        return self._asked if request is given else replace(self._asked, request=request)


class _Relay:
    """An answer on its way: chunks are looked at and handed on where they arrive.

    Where the provider speaks the visitor's dialect its own bytes go out, else what an encoder makes of them.
    """

    __slots__ = ("_asked", "_encoder", "_hide_usage", "_provider", "_push", "_seen", "begun")

    def __init__(self, provider: Provider, asked: Asked, seen: Observation) -> None:
        self._provider = provider
        self._asked = asked
        self._seen = seen
        self._encoder = None if provider.dialect == asked.dialect else _encoder(asked, seen)
        self._hide_usage = asked.dialect == "openai" and not asked.include_usage
        self._push: sse.Push | None = None
        self.begun = False

    async def run(self, push: sse.Push) -> None:
        """The whole answer, to `push`."""
        self._push = push
        encoder, request = self._encoder, self._asked.request
        if encoder is not None and request.citations:
            await self._take_now(Chunk(events=(Citations(request.citations),)))
        if isinstance(self._provider, VendorProvider):
            await self._provider.push(request, self)
        else:
            async with aclosing(self._provider.stream(request)) as chunks:
                async for chunk in chunks:
                    await self._take_now(chunk)
        if encoder is not None and (last := encoder.end()) and (wait := push(last)) is not None:
            await wait

    async def _take_now(self, chunk: Chunk) -> None:
        if (wait := self.take((chunk,))) is not None:
            await wait

    def take_text(self, raw: bytes, text: str) -> Awaitable[None] | None:
        """See `mogine.providers.vendor.Taker`."""
        self._seen.say(text)
        self.begun = True
        push = self._push
        if push is None:
            return None
        return push(raw if self._encoder is None else self._encoder.chunk(Delta(text)))

    def take(self, chunks: Sequence[Chunk]) -> Awaitable[None] | None:
        """See `mogine.providers.vendor.Taker`."""
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
        if not data or self._push is None:
            return None
        self.begun = True
        return self._push(data)


async def _whole(request: Request, provider: Provider, asked: Asked, seen: Observation) -> web.StreamResponse:
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
        return json_bytes(request, raw)
    return json_response(_encoder(asked, seen).whole(events))


def _encoder(asked: Asked, seen: Observation) -> OpenAIEncoder:
    model = asked.request.model or asked.request.provider
    return OpenAIEncoder(f"chatcmpl-{seen.id}", model, int(time.time()), include_usage=asked.include_usage)


def _only_usage(events: tuple[ChatEvent, ...]) -> bool:
    """A frame of totals, which OpenAI's dialect sends only to who asked for them."""
    return bool(events) and all(type(event) is Usage for event in events)


def _error_frame(dialect: Dialect, error: ErrorEnvelope, kind: Kind) -> bytes:
    """The last frame of an answer that failed, such that the dialect's own clients raise it."""
    body = error_body(error, openai=kind == "v1")
    if dialect == "openai":
        return sse.event("error", body)
    return DashScopeEncoder("", error.request_id, "", incremental=True).error(body)
