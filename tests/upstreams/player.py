"""Plays a script onto one HTTP response, in the frames of whichever vendor is faked."""

import socket
import struct
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from tests.upstreams.script import (
    LAST_WORDS,
    Call,
    Cite,
    Comment,
    Cut,
    Drip,
    End,
    Endless,
    Fail,
    Finish,
    Garble,
    Hang,
    Head,
    Meter,
    Pause,
    Raw,
    Refuse,
    Reply,
    Say,
    Script,
    Seal,
    Step,
    Think,
)
from tests.upstreams.server import Exchange

_Error = TypeVar("_Error", bound=Refuse | Fail)

GATEWAY_PAGE = (
    b"<html>\r\n<head><title>%d %s</title></head>\r\n<body>\r\n<center><h1>%d %s</h1></center>\r\n"
    b"<hr><center>gateway</center>\r\n</body>\r\n</html>\r\n"
)


def estimate(text: str) -> int:
    """Tokens of a text, roughly: 1 per 1.6 characters."""
    return max(1, round(len(text) / 1.6)) if text else 0


class Meters:
    """What a frame tells about tokens: exact after a `usage` step, a growing share of it before."""

    def __init__(self, script: Script, prompt_text: str) -> None:
        pieces, told, text = 0, None, ""
        for step in script.steps:
            if isinstance(step, Meter):
                told = step
                break
            if isinstance(step, Say | Think):
                pieces += len(step.pieces)
                text += "".join(step.pieces)
        self._target = told or Meter(estimate(prompt_text), estimate(text))
        self._pieces = max(pieces, 1)
        self._seen = 0
        self._told: dict[str | None, Meter] = {}

    def count_piece(self) -> None:
        self._seen += 1

    def tell(self, meter: Meter) -> None:
        self._told[meter.model] = meter

    @property
    def now(self) -> list[Meter]:
        """One entry per model; empty when the script says that usage is unknown."""
        if self._told:
            return [meter for meter in self._told.values() if meter.known]
        if not self._target.known:
            return []
        share = self._target.completion * self._seen / self._pieces
        completion = min(round(share), self._target.completion) if self._seen <= self._pieces else self._seen
        goal = self._target
        return [Meter(goal.prompt, completion, min(goal.reasoning, completion), goal.cached, goal.model)]

    @property
    def last(self) -> Meter | None:
        """The one usage of vendors that tell a single total."""
        return self.now[-1] if self.now else None


@dataclass(slots=True)
class Answer:
    """What the script has said so far, for bodies and frames that hold everything so far."""

    text: str = ""
    thoughts: str = ""
    sealed: str = ""
    calls: list[Call] = field(default_factory=list)
    references: list[Mapping[str, Any]] = field(default_factory=list)


class Wire(ABC):
    """One vendor's bytes for one request. A method that returns b"" sends no frame."""

    stream_type = "text/event-stream; charset=utf-8"
    json_type = "application/json"

    def __init__(self, meters: Meters) -> None:
        self.meters = meters
        self.answer = Answer()

    def headers(self, *, streaming: bool, failed: bool = False) -> dict[str, str]:
        """The head's own fields beside the content type."""
        return {}

    def opening(self) -> bytes:
        """Frames before the first one of the script."""
        return b""

    @abstractmethod
    def say(self, piece: str) -> bytes: ...

    @abstractmethod
    def think(self, piece: str) -> bytes: ...

    def seal(self, text: str) -> bytes:
        return b""

    def call(self, step: Call) -> list[bytes]:
        return []

    @abstractmethod
    def frame(self, data: bytes) -> bytes:
        """Any data in the vendor's framing."""

    @abstractmethod
    def finish(self, step: Finish) -> bytes: ...

    @abstractmethod
    def failure(self, step: Fail) -> bytes:
        """An error frame."""

    @abstractmethod
    def error_body(self, step: Refuse | Fail) -> tuple[bytes, str]:
        """The body and content type of an HTTP error."""

    @abstractmethod
    def whole(self, step: Finish) -> bytes:
        """The body when no stream was asked for."""


class Cutoff(Exception):
    """The script has broken the connection: nothing more may be written."""


class Pipe:
    """The response's body: begins the head when needed, writes as the script's knobs say."""

    def __init__(self, exchange: Exchange, script: Script, response: web.StreamResponse) -> None:
        self._exchange = exchange
        self.script = script
        self.response = response
        self.chop, self.every_s = script.chop, 0.0
        accepts_gzip = "gzip" in exchange.header("Accept-Encoding")
        self.squeeze = zlib.compressobj(wbits=31) if script.gzip and accepts_gzip else None

    async def open(self) -> None:
        if self.response.prepared:
            return
        if self.squeeze:
            self.response.headers["Content-Encoding"] = "gzip"
        self._exchange.record.head_at = time.monotonic()
        await self.response.prepare(self._exchange.request)

    async def write(self, data: bytes) -> None:
        await self.open()
        if self.squeeze:
            data = self.squeeze.compress(data) + self.squeeze.flush(zlib.Z_SYNC_FLUSH)
        size = self.chop or len(data)
        for start in range(0, len(data), max(size, 1)):
            await self._write_piece(data[start : start + size])

    async def _write_piece(self, piece: bytes) -> None:
        record, limit = self._exchange.record, self.script.drop_after
        if limit is not None and record.bytes_sent + len(piece) >= limit:
            await self._hand_over(piece[: limit - record.bytes_sent])
            self.cut()
        await self._hand_over(piece)
        if self.every_s or self.chop:
            await self._exchange.fake.sleep(self.every_s)

    async def _hand_over(self, piece: bytes) -> None:
        if piece:
            await self.response.write(piece)
            self._exchange.record.bytes_sent += len(piece)

    async def close(self) -> web.StreamResponse:
        if self.squeeze:
            await self._hand_over(self.squeeze.flush())
        await self.response.write_eof()
        return self.response

    def cut(self, reset: bool = False) -> None:
        """Break the connection and stop the script."""
        self._exchange.record.cut_at = time.monotonic()
        transport = self._exchange.request.transport
        if transport is not None and reset:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif transport is not None:
            transport.close()
        raise Cutoff


async def play(exchange: Exchange, script: Script, wire: Wire, *, streaming: bool) -> web.StreamResponse:
    """Answer the exchange as the script says."""
    head = web.StreamResponse(headers={"Content-Type": wire.stream_type if streaming else wire.json_type})
    head.headers.update({**wire.headers(streaming=streaming), **script.headers})
    pipe = Pipe(exchange, script, head)
    steps: tuple[Step, ...] = script.steps
    if not any(isinstance(step, LAST_WORDS) for step in steps):
        steps += (Finish(),)
    player = _Streamed(pipe, wire, exchange) if streaming else _Whole(pipe, wire, exchange)
    try:
        for step in steps:
            if (response := await player.step(step)) is not None:
                return response
        return await player.done()
    except Cutoff:
        return pipe.response


class _Player:
    """What both modes do alike: wait, hang, refuse, reply."""

    def __init__(self, pipe: Pipe, wire: Wire, exchange: Exchange) -> None:
        self.pipe, self.wire, self.exchange = pipe, wire, exchange

    async def step(self, step: Step) -> web.StreamResponse | None:
        """Play one step; a response means that the exchange is over."""
        match step:
            case Pause(seconds):
                await self.exchange.fake.sleep(seconds)
            case Hang():
                await self.exchange.fake.hang()
                self.pipe.cut()
            case Meter():
                self.wire.meters.tell(step)
            case Drip(size, every_s):
                self.pipe.chop, self.pipe.every_s = size, every_s
            case Cite(reference):
                self.wire.answer.references.append(reference)
            case Refuse():
                return await refused(self.exchange, self.wire, step)
            case Reply():
                return await self._reply(step)
            case _:
                return await self.words(step)
        return None

    async def words(self, step: Step) -> web.StreamResponse | None:
        raise NotImplementedError

    async def done(self) -> web.StreamResponse:
        raise NotImplementedError

    async def _reply(self, step: Reply) -> web.StreamResponse:
        self.pipe.response = response = web.StreamResponse(status=step.status)
        response.headers["Content-Type"] = step.content_type or "-"
        response.headers.update(step.headers)
        if step.times == 1:
            response.content_length = len(step.body)
        for _ in range(step.times):
            await self.pipe.write(step.body)
        return await self.pipe.close()


class _Streamed(_Player):
    """One frame after the other."""

    opened = False

    async def words(self, step: Step) -> web.StreamResponse | None:  # noqa: C901 - one arm per step
        match step:
            case Head():
                await self.pipe.open()
            case Say(pieces):
                for piece in pieces:
                    await self._frame(partial(self._spoken, piece))
            case Think(pieces):
                for piece in pieces:
                    await self._frame(partial(self._thought, piece))
            case Seal(text):
                self.wire.answer.sealed = text
                await self._frame(partial(self.wire.seal, text))
            case Call():
                self.wire.answer.calls.append(step)
                for frame in self.wire.call(step):
                    await self._frame(partial(bytes, frame))
            case Endless(text, every_s):
                while not self.exchange.fake.is_closing:
                    self.wire.meters.count_piece()
                    await self._frame(partial(self.wire.say, text))
                    await self.exchange.fake.sleep(every_s)
                self.pipe.cut()
            case Comment(text):
                await self.pipe.write(f": {text}\n\n".encode())
            case Raw(data, times):
                for _ in range(times):
                    await self.pipe.write(data)
            case Garble(kind):
                await self.pipe.write(garbled_frame(self.wire, kind))
            case Finish():
                await self._frame(partial(self.wire.finish, step))
            case Fail():
                return await self._fail(step)
            case Cut(inside, reset):
                if inside:
                    await self._half(inside)
                self.pipe.cut(reset)
            case End():
                return await self.done()
        return None

    async def done(self) -> web.StreamResponse:
        await self.pipe.open()
        return await self.pipe.close()

    async def _fail(self, step: Fail) -> web.StreamResponse:
        if not self.pipe.response.prepared:
            self.pipe.response.headers.update(self.wire.headers(streaming=True, failed=True))
        await self.pipe.write(self.wire.failure(with_leak(step, self.exchange)))
        return await self.pipe.close()

    async def _frame(self, make: Callable[[], bytes]) -> None:
        """Make one frame (after the opening ones) and write it, unless the vendor would send none."""
        opening = b"" if self.opened else self.wire.opening()
        self.opened = True
        if data := opening + make():
            await self.exchange.fake.sleep(self.pipe.script.pace_s)
            await self.pipe.write(data)

    def _spoken(self, piece: str) -> bytes:
        self.wire.meters.count_piece()
        self.wire.answer.text += piece
        return self.wire.say(piece)

    def _thought(self, piece: str) -> bytes:
        self.wire.meters.count_piece()
        self.wire.answer.thoughts += piece
        return self.wire.think(piece)

    async def _half(self, inside: str) -> None:
        """A frame that ends after the first byte of its text's last character."""
        frame = self._spoken(inside)
        text = inside.encode()
        await self.pipe.write(frame[: frame.rindex(text) + len(text) - len(inside[-1].encode()) + 1])


class _Whole(_Player):
    """One body at the end."""

    def __init__(self, pipe: Pipe, wire: Wire, exchange: Exchange) -> None:
        super().__init__(pipe, wire, exchange)
        self._finish = Finish()
        self._raw: list[Raw] = []
        self._garble: Garble | None = None

    async def words(self, step: Step) -> web.StreamResponse | None:  # noqa: C901 - one arm per step
        answer = self.wire.answer
        match step:
            case Say(pieces):
                answer.text += "".join(pieces)
            case Think(pieces):
                answer.thoughts += "".join(pieces)
            case Seal(text):
                answer.sealed = text
            case Call():
                answer.calls.append(step)
            case Head():
                await self.pipe.open()
            case Endless(text, every_s):
                while not self.exchange.fake.is_closing:
                    await self.pipe.write(text.encode())
                    await self.exchange.fake.sleep(every_s)
                self.pipe.cut()
            case Raw():
                self._raw.append(step)
            case Garble():
                self._garble = step
            case Finish():
                self._finish = step
            case Fail():
                return await refused(self.exchange, self.wire, step)
            case Cut(_, reset):
                body = self._body()
                if not self.pipe.response.prepared:
                    self.pipe.response.content_length = len(body)
                await self.pipe.write(body[: len(body) // 2])
                self.pipe.cut(reset)
            case End():
                return await self.done()
        return None

    async def done(self) -> web.StreamResponse:
        if self._raw:
            for one in self._raw:
                for _ in range(one.times):
                    await self.pipe.write(one.data)
            return await self.pipe.close()
        body = self._body()
        if not self.pipe.response.prepared and not self.pipe.squeeze:
            self.pipe.response.content_length = len(body)
        await self.pipe.write(body)
        return await self.pipe.close()

    def _body(self) -> bytes:
        body = self.wire.whole(self._finish)
        return garbled(body, self._garble.kind) if self._garble else body


async def refused(exchange: Exchange, wire: Wire, step: Refuse | Fail) -> web.StreamResponse:
    """An HTTP error in the vendor's envelope."""
    step = with_leak(step, exchange)
    body, content_type = wire.error_body(step)
    response = web.StreamResponse(status=step.status, headers={"Content-Type": content_type})
    response.headers.update(wire.headers(streaming=False, failed=True))
    if isinstance(step, Refuse):
        response.headers.update(step.headers)
        if step.content_type is not None:
            response.headers["Content-Type"] = step.content_type or "-"
    response.content_length = len(body)
    exchange.record.head_at = time.monotonic()
    await response.prepare(exchange.request)
    await response.write(body)
    await response.write_eof()
    exchange.record.bytes_sent += len(body)
    return response


def with_leak(step: _Error, exchange: Exchange) -> _Error:
    """The same error, repeating the caller's key in its message when the script says so."""
    if not step.leak:
        return step
    text = f"{step.message or 'The request was refused.'} Authorization: Bearer {exchange.record.bearer}"
    return replace(step, message=text)


def garbled_frame(wire: Wire, kind: str) -> bytes:
    """A frame with broken data, or one whose blank line is missing."""
    if kind == "no_newline":
        return wire.frame(b'{"half":').rstrip(b"\n")
    return wire.frame(
        garbled(b'{"choices":[{"delta":{"content":"?"},"index":0}],"output":{"text":"?"}}', kind)
    )


def garbled(body: bytes, kind: str) -> bytes:
    """JSON, broken in one way."""
    match kind:
        case "json":
            return body[: len(body) // 2] + b"<<<"
        case "utf8":
            return body.replace(b'":"', b'":"\xff\xfe\xc3', 1)
        case "nul":
            return body.replace(b'":"', b'":"\x00', 1)
        case "surrogate":
            return body.replace(b'":"', b'":"\\ud800', 1)
        case "list":
            return b"[1,2,3]"
        case "html":
            return b"<html><body>Service is being updated</body></html>"
    return body[:-1]
