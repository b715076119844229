"""The words of a conversation: requests, events and the provider protocol; values only, no I/O."""

from collections.abc import AsyncGenerator
from dataclasses import field
from typing import Any, Literal, Protocol

from mogine.values import value

Role = Literal["system", "user", "assistant"]


@value(frozen=True, slots=True)
class ImagePart:
    """One picture of a question: a `data:` address (PNG, JPEG or WebP), already checked."""

    url: str


@value(frozen=True, slots=True)
class ChatMessage:
    """One turn. `images` may only be set on user turns, for vision models."""

    role: Role
    text: str
    images: tuple[ImagePart, ...] = ()


@value(frozen=True, slots=True)
class ChatRequest:
    """What goes to a provider: everything in it was chosen or checked by the server.

    `provider` and `model` are settled (`model` may be "" where the vendor's side chooses it).
    `session_id` is the vendor's own session (DashScope), never ours. `incremental` and `thoughts`
    are DashScope's `incremental_output` and `has_thoughts`: a native body decides them, so that the
    vendor's frames can be handed on as they are; other dialects leave them alone. `traceparent` is the
    caller's, checked: the one header of a visitor that a vendor is told.
    """

    messages: tuple[ChatMessage, ...]
    provider: str
    model: str
    stream: bool = True
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    session_id: str | None = None
    citations: tuple["Citation", ...] = ()
    incremental: bool = True
    thoughts: bool = True
    traceparent: str = ""

    @property
    def question(self) -> str:
        """The last user turn's text; "" when there is none."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")


@value(frozen=True, slots=True)
class Citation:
    """One numbered passage under an answer; `number` counts from 1, `score` lies in 0-1."""

    number: int
    title: str
    source: str
    heading: str
    url: str
    excerpt: str
    score: float


@value(frozen=True, slots=True)
class Citations:
    """The passages an answer stands on; sent before its first word.

    `searched` is False when there was no knowledge base to be asked, which is another thing than none found.
    `search_ms` is how long they were looked for, in vain too; None when nobody looked.
    """

    items: tuple[Citation, ...]
    searched: bool = True
    search_ms: int | None = None


@value(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's thinking."""

    text: str


@value(frozen=True, slots=True)
class Delta:
    """A piece of the answer."""

    text: str


@value(frozen=True, slots=True)
class ToolCalls:
    """Fragments of tool calls in the OpenAI shape, handed on as they came."""

    fragments: tuple[dict[str, Any], ...]


@value(frozen=True, slots=True)
class Usage:
    """Tokens so far; the last one of a stream counts. `completion_tokens` includes reasoning."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False


@value(frozen=True, slots=True)
class Finish:
    """The answer is complete. `reason`: stop, length, content_filter or tool_calls."""

    reason: str
    model: str = ""
    session_id: str | None = None


ChatEvent = Citations | Reasoning | Delta | ToolCalls | Usage | Finish


@value(frozen=True, slots=True)
class Chunk:
    """One frame of a vendor's stream: its exact bytes (blank line included) and what they mean.

    `raw` is empty for providers that make their own events (`extract`), and must then be
    composed in the visitor's dialect; a frame that carries only a comment has no events.
    """

    raw: bytes = b""
    events: tuple[ChatEvent, ...] = field(default=())


class Provider(Protocol):
    """One way to get an answer. Implementations live in `providers/`."""

    @property
    def name(self) -> str: ...

    @property
    def default_model(self) -> str: ...

    @property
    def dialect(self) -> str:
        """The wire format of `Chunk.raw`: "openai", "dashscope" or "" (no bytes of its own)."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes. Ends after a `Finish`, or raises `UpstreamError`.

        Nothing is yielded before the vendor has accepted the request, so an error before the
        first chunk can still become a plain HTTP error. Closing the generator early aborts the
        vendor's connection at once.
        """
        ...
