"""What a fake vendor will do with a request, as a list of steps: say, think, pause, refuse, hang, cut.

A script is made with `script(step, step, ..., chop=, pace_s=, drop_after=, gzip=, headers=)`, or a plain
list of steps where nothing but steps is needed. The same script fits every fake and both modes: each
vendor's fake renders the steps in its own frames, and folds them into one JSON body when the caller did
not ask for a stream. A script that says nothing about its end is finished with `finish("stop")`.

    script(think("先想一想。"), say("你好，", "世界"), usage(31, 58, reasoning=37))
    script(refuse(429, headers={"Retry-After": "1"}))
    script(say("一", "二"), fail(429, "Throttling.AllocationQuota"))
    script(say("一"), cut(inside="周末"))
    script(head(), hang())
"""

import gzip as gzip_format
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GarbleKind = Literal["json", "utf8", "nul", "surrogate", "no_newline", "list", "html"]


@dataclass(frozen=True, slots=True)
class Say:
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Think:
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seal:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    pieces: tuple[str, ...]
    id: str


@dataclass(frozen=True, slots=True)
class Cite:
    reference: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Meter:
    """Tokens from here on; `model` is told by DashScope only. `known` is false for an empty usage."""

    prompt: int
    completion: int
    reasoning: int = 0
    cached: int = 0
    model: str | None = None
    known: bool = True


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str = "stop"
    moderation: str | None = None
    done: bool = True


@dataclass(frozen=True, slots=True)
class Refuse:
    status: int
    code: str | None = None
    message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    framed: bool = False
    content_type: str | None = None
    leak: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    content_type: str | None
    headers: Mapping[str, str]
    times: int


@dataclass(frozen=True, slots=True)
class Fail:
    status: int
    code: str | None = None
    message: str | None = None
    leak: bool = False


@dataclass(frozen=True, slots=True)
class Hang:
    pass


@dataclass(frozen=True, slots=True)
class Head:
    pass


@dataclass(frozen=True, slots=True)
class Cut:
    inside: str = ""
    reset: bool = False


@dataclass(frozen=True, slots=True)
class End:
    pass


@dataclass(frozen=True, slots=True)
class Garble:
    kind: GarbleKind


@dataclass(frozen=True, slots=True)
class Raw:
    data: bytes
    times: int = 1


@dataclass(frozen=True, slots=True)
class Comment:
    text: str


@dataclass(frozen=True, slots=True)
class Drip:
    size: int
    every_s: float


@dataclass(frozen=True, slots=True)
class Endless:
    text: str
    every_s: float


Step = (
    Say
    | Think
    | Seal
    | Call
    | Cite
    | Pause
    | Meter
    | Finish
    | Refuse
    | Reply
    | Fail
    | Hang
    | Head
    | Cut
    | End
    | Garble
    | Raw
    | Comment
    | Drip
    | Endless
)

# A step after which nothing of the vendor's own ending may follow.
LAST_WORDS = (Finish, Refuse, Reply, Fail, Hang, Cut, End, Endless)


@dataclass(frozen=True, slots=True)
class Script:
    """Steps and how their bytes leave: see `script`."""

    steps: tuple[Step, ...]
    chop: int = 0
    pace_s: float = 0.0
    drop_after: int | None = None
    gzip: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            if isinstance(step, Refuse | Reply) and not isinstance(before, Pause):
                raise ValueError(
                    f"{step!r} is a whole HTTP answer: only pauses may precede it, not {before!r}"
                )


def script(
    *steps: Step,
    chop: int = 0,
    pace_s: float = 0.0,
    drop_after: int | None = None,
    gzip: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Script:
    """Steps in order, and knobs for the transport.

    `chop` writes that many bytes at a time (5 cuts through every Chinese character); `pace_s` waits
    before each frame; `drop_after` closes the socket after so many body bytes; `gzip` compresses the
    stream when the caller accepts it; `headers` are added to the response's head.
    """
    return Script(steps, chop, pace_s, drop_after, gzip, dict(headers or {}))


def say(*pieces: str) -> Say:
    """Pieces of the answer, one frame each."""
    return Say(pieces)


def think(*pieces: str) -> Think:
    """Pieces of the model's thinking, one frame each; left out when the caller switched it off."""
    return Think(pieces)


def seal(text: str) -> Seal:
    """Ark's frame of `encrypted_content`, as summary models send after thinking; others skip it."""
    return Seal(text)


def call(name: str, *pieces: str, id: str = "call_q7w2e9r4t5y6u1i8o3p0a2s4") -> Call:
    """One tool call: a frame with its name, then a frame per piece of its JSON arguments."""
    return Call(name, pieces, id)


def cite(
    index_id: str | int,
    *,
    title: str = "",
    doc_name: str = "",
    text: str = "",
    doc_id: str = "",
    **more: Any,
) -> Cite:
    """One of DashScope's `doc_references`, told in every frame from here on; others skip it."""
    reference: dict[str, Any] = {"images": [], "text": text, "index_id": str(index_id)}
    reference |= {"title": title} if title else {}
    reference |= {"doc_name": doc_name} if doc_name else {}
    reference |= {"doc_id": doc_id} if doc_id else {}
    return Cite(reference | more)


def pause(seconds: float) -> Pause:
    """Nothing for a while; before the first word this delays the head too."""
    return Pause(seconds)


def usage(
    prompt: int, completion: int, reasoning: int = 0, cached: int = 0, model: str | None = None
) -> Meter:
    """The tokens told from here on (`completion` includes `reasoning`).

    Frames before the first `usage` tell a share of it that grows with the frames; without any
    `usage` the fake estimates. Several with different `model`s make DashScope's list of models.
    """
    return Meter(prompt, completion, reasoning, cached, model)


def no_usage() -> Meter:
    """DashScope's `"usage": {}` of workflow apps; elsewhere a null and no usage frame."""
    return Meter(0, 0, known=False)


def finish(reason: str = "stop", *, moderation: str | None = None, done: bool = True) -> Finish:
    """The end as the vendor tells it: `stop`, `length`, `content_filter` (with `moderation`, Ark's
    `moderation_hit_type`) or `tool_calls`; `done=False` leaves out `[DONE]`."""
    return Finish(reason, moderation, done)


def refuse(
    status: int,
    code: str | None = None,
    message: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    framed: bool = False,
    content_type: str | None = None,
    leak: bool = False,
) -> Refuse:
    """An HTTP error in the vendor's envelope instead of an answer; `code` and `message` default to what
    the vendor sends with that status (502, 503 and 504 of Ark are a gateway's HTML page).

    `framed` gives DashScope's SSE-framed error body, under `content_type`; `leak` repeats the caller's
    key in the message, as some vendors do.
    """
    return Refuse(status, code, message, dict(headers or {}), framed, content_type, leak)


def reply(
    status: int = 200,
    body: bytes | str = b"",
    content_type: str | None = "application/json",
    *,
    headers: Mapping[str, str] | None = None,
    times: int = 1,
) -> Reply:
    """Exactly this HTTP answer, whatever was asked; `times` repeats the body (sent in chunks)."""
    data = body.encode() if isinstance(body, str) else body
    return Reply(status, data, content_type, dict(headers or {}), times)


def redirect(location: str, status: int = 302) -> Reply:
    """An HTTP redirect."""
    return reply(status, b"", None, headers={"Location": location})


def gzip_bomb(mib: int = 64) -> Reply:
    """An answer of `mib` MiB of spaces, gzipped to a thousandth, though nobody asked for gzip."""
    body = gzip_format.compress(b" " * (mib << 20), compresslevel=9)
    return reply(200, body, headers={"Content-Encoding": "gzip"})


def fail(
    status: int = 500, code: str | None = None, message: str | None = None, *, leak: bool = False
) -> Fail:
    """An error told inside the stream under HTTP 200 (also as its first frame), then the end without
    any stop; a plain HTTP error when no stream was asked for."""
    return Fail(status, code, message, leak)


def hang() -> Hang:
    """Silence until the caller leaves or the fake stops."""
    return Hang()


def head() -> Head:
    """The response's head now, before any frame."""
    return Head()


def cut(*, inside: str = "", reset: bool = False) -> Cut:
    """The connection breaks here, without the last chunk: closed, or reset (RST) with `reset`.

    With `inside` a frame with that text is begun and broken off after the first byte of its last character.
    """
    return Cut(inside, reset)


def end() -> End:
    """A clean end of the body here, without a stop frame and without `[DONE]`."""
    return End()


def garble(kind: GarbleKind = "json") -> Garble:
    """A frame that is broken: `json` (does not parse), `utf8` (invalid bytes), `nul` (a NUL in the
    text), `surrogate` (a lone \\ud800 escape), `list` (JSON, not an object), `html` (a page in place of
    the data), `no_newline` (a frame without its blank line)."""
    return Garble(kind)


def send_raw(data: bytes, times: int = 1) -> Raw:
    """Exactly these bytes into the stream (`times` over); without a stream they are the whole body."""
    return Raw(data, times)


def comment(text: str = "keep-alive") -> Comment:
    """An SSE comment line and a blank line."""
    return Comment(text)


def drip(size: int = 1, every_s: float = 0.01) -> Drip:
    """From here on, write `size` bytes at a time with a wait between them."""
    return Drip(size, every_s)


def endless(text: str = "字", every_s: float = 0.0) -> Endless:
    """The same piece for ever, until the caller leaves or the fake stops."""
    return Endless(text, every_s)


STEPS = {
    maker.__name__: maker
    for maker in (
        *(say, think, seal, call, cite, pause, usage, no_usage, finish, refuse, reply, redirect),
        *(gzip_bomb, fail, hang, head, cut, end, garble, comment, drip, endless),
    )
}


def parse_script(text: str) -> Script:
    """A script written as JSON: `[["say", "你好"], ["pause", 0.1], ["refuse", 429, {"code": "x"}]]`;
    a last object in a step holds keyword arguments, an object among the steps the knobs of `script`."""
    steps: list[Step] = []
    knobs: dict[str, Any] = {}
    for item in json.loads(text):
        if isinstance(item, dict):
            knobs |= item
            continue
        name, *args = item
        keywords = args.pop() if args and isinstance(args[-1], dict) else {}
        steps.append(STEPS[name](*args, **keywords))
    return script(*steps, **knobs)


def as_script(value: Script | Iterable[Step] | Step) -> Script:
    """A script from what tests like to write: a script, a list of steps, one step."""
    if isinstance(value, Script):
        return value
    if isinstance(value, Iterable):
        return Script(tuple(value))
    return Script((value,))
