"""What came out of a provider or a parser, put together so that a test can look at it."""

from collections.abc import AsyncIterable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from mogine.chat import (
    ChatEvent,
    ChatMessage,
    ChatRequest,
    Chunk,
    Citation,
    Citations,
    Delta,
    Finish,
    Provider,
    Reasoning,
    ToolCalls,
    Usage,
)
from mogine.errors import MogineError
from mogine.providers.vendor import Parser, Refused
from mogine.upstream import FrameDecoder


@dataclass
class Outcome:
    """An answer in one piece, and the error that ended it."""

    events: list[ChatEvent] = field(default_factory=list)
    raw: bytes = b""
    chunks: int = 0
    error: MogineError | None = None

    def add(self, chunk: Chunk) -> None:
        self.chunks += 1
        self.raw += chunk.raw
        self.events += chunk.events

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Reasoning))

    @property
    def fragments(self) -> list[dict[str, Any]]:
        return [f for event in self.events if isinstance(event, ToolCalls) for f in event.fragments]

    @property
    def usage(self) -> Usage | None:
        return next((event for event in reversed(self.events) if isinstance(event, Usage)), None)

    @property
    def citations(self) -> tuple[Citation, ...]:
        return next((e.items for e in reversed(self.events) if isinstance(e, Citations)), ())

    @property
    def finish(self) -> Finish | None:
        finishes = [event for event in self.events if isinstance(event, Finish)]
        assert len(finishes) <= 1, "an answer finishes once"
        assert not finishes or self.events[-1] is finishes[0], "Finish is the last event of all"
        return finishes[0] if finishes else None


def question(text: str = "你好", **fields: Any) -> ChatRequest:
    """A request with one user turn."""
    return ChatRequest(**{"messages": (ChatMessage("user", text),), "provider": "", "model": "", **fields})


async def collect(chunks: AsyncIterable[Chunk]) -> Outcome:
    """All that `chunks` gives, up to an error."""
    outcome = Outcome()
    try:
        async for chunk in chunks:
            outcome.add(chunk)
    except MogineError as error:
        outcome.error = error
    return outcome


async def ask(provider: Provider, request: ChatRequest | None = None) -> Outcome:
    """The provider's whole answer."""
    async with aclosing(provider.stream(request or question())) as chunks:
        return await collect(chunks)


def parse(parser: Parser, blocks: Iterable[bytes]) -> Outcome:
    """What `parser` makes of a stream, without any network; an upstream error is noted by its code alone."""
    outcome = Outcome()
    decoder = FrameDecoder()
    try:
        for block in blocks:
            for frame in decoder.feed(block):
                if (chunk := parser.frame(frame)) is not None:
                    outcome.add(chunk)
    except Refused as refused:
        outcome.error = MogineError(refused.refusal.code, upstream_status=refused.refusal.status)
    if outcome.error is None and parser.finished and (last := parser.end()) is not None:
        outcome.add(last)
    elif not parser.finished and (held := parser.held()) is not None:
        outcome.add(held)
    return outcome
