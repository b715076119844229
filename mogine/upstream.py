"""One way to call out: a POST as a stream of bytes, frames out of bytes, and when to ask again."""

import asyncio
import email.utils
import logging
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, TypeVar

from mogine.errors import (
    AnswerTooLong,
    MogineError,
    SettingsError,
    Unavailable,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mogine.http1 import Exchange, Failure, Fault, Pool, Take, Target, open_pool, target_of
from mogine.http1 import Limits as Limits
from mogine.values import value

USER_AGENT = "Mogine-AI-Chatbot/1.0"
MAX_LINE_BYTES = 512 * 1024
MAX_FRAME_BYTES = 1024 * 1024
MAX_EMPTY_BYTES = 2 * 1024 * 1024  # of comments and blank lines, without any data between them
MAX_DATA_LINES = 4096  # kept apart; short ones take ten times their length
MAX_STREAM_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_RETRY_WAIT_S = 5.0
MAX_TOLD_WAIT_S = 120.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


@value(frozen=True, slots=True)
class Call:
    """One POST. `label` and `setting` are for messages: who is called, what setting holds the address."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    label: str
    setting: str


# --- the client -------------------------------------------------------------------------------------


class Answer:
    """A vendor's answer whose head has come: `status`, `header`, and its body by `read` or `pump`."""

    __slots__ = ("_call", "_exchange", "_limits", "complete", "status")

    def __init__(self, exchange: Exchange, call: Call, limits: Limits) -> None:
        self._exchange = exchange
        self._call = call
        self._limits = limits
        self.status = exchange.status
        self.complete = False

    def header(self, name: str) -> str:
        """The header's value; "" when there is none."""
        return self._exchange.header(name)

    async def read(self) -> bytes:
        """The next bytes as they came, b"" at the end; raises UpstreamCut or UpstreamTimeout."""
        try:
            block = await self._exchange.read()
        except Failure as failure:
            raise _error(failure.fault, self._call, self._limits) from None
        self.complete = not block
        return block

    async def peek(self) -> bytes:
        """The first bytes, which stay to be read; raises as `read` does."""
        try:
            return await self._exchange.peek()
        except Failure as failure:
            raise _error(failure.fault, self._call, self._limits) from None

    async def pump(self, take: Take, patience_s: float = 0.1) -> None:
        """Hand each block to `take` the moment it arrives, until the end; see `Exchange.pump`.

        Raises UpstreamCut or UpstreamTimeout, or what `take` raises.
        """
        try:
            await self._exchange.pump(take, patience_s)
        except Failure as failure:
            raise _error(failure.fault, self._call, self._limits) from None
        self.complete = True

    async def read_all(self, limit_bytes: int) -> bytes:
        """What is left of the body; raises UpstreamBadResponse when it is larger than `limit_bytes`."""
        rest = self._exchange.rest()
        if rest is not None and len(rest) <= limit_bytes:
            self.complete = True  # as nearly every whole answer, it came with its head
            return rest
        blocks: list[bytes] = [] if rest is None else [rest]
        size = sum(map(len, blocks))
        while block := await self.read():
            blocks.append(block)
            size += len(block)
            if size > limit_bytes:
                break
        if size > limit_bytes:
            raise UpstreamBadResponse(
                f"API proxy error: the upstream answer is larger than {limit_bytes} bytes"
            )
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    async def read_some(self, limit_bytes: int) -> bytes:
        """The body's first bytes, up to `limit_bytes`, whatever ends it: for the code in an error's body."""
        body = bytearray()
        try:
            while len(body) < limit_bytes and (block := await self.read()):
                body += block
        except UpstreamError as error:
            logger.info("the body of an upstream error is incomplete: %s", error.reason)
        return bytes(body[:limit_bytes])

    async def finish(self, patience_s: float = 0.1) -> None:
        """All that matters was read: wait a moment for the body's end, so that the connection can be kept."""
        try:
            async with asyncio.timeout(patience_s):
                while await self.read():
                    continue
        except (TimeoutError, UpstreamError) as error:
            logger.debug("connection given up after the answer: %s", type(error).__name__)


def _error(fault: Fault, call: Call, limits: Limits) -> MogineError:
    """A failure in our words."""
    if fault is Fault.NO_ROOM:
        return Unavailable("this server has too many connections open; ask again in a moment")
    label, setting = call.label, call.setting
    late = {
        Fault.FIRST_BYTE_TIMEOUT: f"sent nothing for {limits.first_byte_s:g} s (MOGINE_FIRST_BYTE_TIMEOUT)",
        Fault.IDLE_TIMEOUT: f"fell silent for {limits.idle_s:g} s within its answer (MOGINE_IDLE_TIMEOUT)",
        Fault.ANSWER_TIMEOUT: (
            f"did not finish its answer within {limits.answer_s:g} s (MOGINE_ANSWER_TIMEOUT)"
        ),
        Fault.CONNECT_TIMEOUT: (
            f"could not be reached within {limits.connect_s:g} s (MOGINE_CONNECT_TIMEOUT);"
            f" check {setting} and the network"
        ),
    }
    if fault in late:
        return UpstreamTimeout(f"API proxy error: {label} {late[fault]}")
    if fault is Fault.CUT:
        return UpstreamCut("API proxy error: the upstream connection broke, the answer was cut")
    if fault is Fault.NOT_HTTP:
        return UpstreamBadResponse(f"API proxy error: {label} did not answer in HTTP; check {setting}")
    return UpstreamUnreachable(
        f"API proxy error: {label} could not be reached: {fault.value}; check {setting}"
    )


class Posting:
    """A call on its way: entering gives its answer, leaving before the body has ended aborts it."""

    __slots__ = ("_call", "_exchange", "_limits", "_pool")

    def __init__(self, pool: Pool, call: Call, limits: Limits) -> None:
        self._pool = pool
        self._call = call
        self._limits = limits
        self._exchange: Exchange | None = None

    async def __aenter__(self) -> Answer:
        call = self._call
        try:
            target = target_of(call.url)
            request = _request_bytes(target, call)
            exchange = self._exchange = await self._pool.send(target, request, self._limits)
        except Failure as failure:
            logger.info("%s: %s", call.label, failure.fault.value)
            raise _error(failure.fault, call, self._limits) from None
        if exchange.has(b"content-encoding") and exchange.header("Content-Encoding").lower() != "identity":
            exchange.close()
            raise UpstreamBadResponse(
                f"API proxy error: {call.label} sent a compressed answer though none was asked for",
                upstream_status=exchange.status,
            )
        return Answer(exchange, call, self._limits)

    async def __aexit__(self, *_: object) -> None:
        if self._exchange is not None:
            self._exchange.close()


def _request_bytes(target: Target, call: Call) -> bytes:
    """The request with the headers that we make, and no other."""
    head = _head_of(target, tuple(call.headers.items()))
    return b"%b%d\r\n\r\n%b" % (head, len(call.body), call.body)


@lru_cache(maxsize=64)
def _head_of(target: Target, headers: tuple[tuple[str, str], ...]) -> bytes:
    """A request up to the value of its last header, `Content-Length`: the same for nearly all of a vendor."""
    lines = [f"{name}: {value}" for name, value in headers]
    if not any(name == "Accept" for name, _ in headers):
        lines.append("Accept: */*")
    text = "\r\n".join(lines)
    try:
        given = text.encode("latin-1")
    except UnicodeEncodeError:
        given = b""
    if not given or text.count("\n") >= len(lines) or text.count("\r") >= len(lines) or "\0" in text:
        raise Failure(Fault.ADDRESS)
    head = (
        b"POST %b HTTP/1.1\r\nHost: %b\r\nUser-Agent: %b\r\nAccept-Encoding: identity\r\n"
        b"%b\r\nContent-Length: "
    )
    return head % (target.path, target.host_header, USER_AGENT.encode(), given)


class Client:
    """One pool of connections to vendors."""

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits

    def post(self, call: Call) -> Posting:
        """The answer to `call`, by `async with`; leaving before its body has ended aborts the connection."""
        return Posting(self._pool, call, self._limits)


@asynccontextmanager
async def open_client(limits: Limits, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    """A client for as long as the context lasts. `tls` may trust more authorities, never fewer checks."""
    if tls is not None and (tls.verify_mode is not ssl.CERT_REQUIRED or not tls.check_hostname):
        raise SettingsError("TLS to a vendor is always verified; give the client a context that does")
    async with open_pool(tls) as pool:
        yield Client(pool, limits)


# --- server-sent events -----------------------------------------------------------------------------


@dataclass(slots=True)
class Frame:
    """One frame of an event stream: its bytes, blank line included, and what its lines say."""

    raw: bytes
    data: bytes
    event: str
    http_status: int | None
    has_id: bool


class FrameDecoder:
    """Bytes in, in any split; whole frames out. A last frame without its blank line is never given out."""

    __slots__ = (
        "_begin",
        "_buffer",
        "_data",
        "_empty",
        "_event",
        "_first",
        "_has_id",
        "_line",
        "_received",
        "_scan",
        "_status",
    )

    def __init__(self) -> None:
        self._buffer = bytearray()  # what follows the last whole frame
        self._begin = 0  # offsets into the buffer: of the frame,
        self._line = 0  # of the line that is not complete yet,
        self._scan = 0  # and of the first byte not yet searched for a line's end
        self._first = True
        self._received = 0
        self._empty = 0
        self._clear()

    def _clear(self) -> None:
        self._data: list[bytes] = []
        self._event = ""
        self._status: int | None = None
        self._has_id = False

    def feed(self, block: bytes) -> list[Frame]:
        """The frames that `block` completes; raises UpstreamError when a part or all grows too large."""
        size = len(block)
        self._count(size)
        buffer = self._buffer
        if not buffer and size <= MAX_LINE_BYTES and (plain := _plain_frames(block)) is not None:
            self._first = False
            self._empty = 0
            return plain
        buffer += block
        if self._first:
            if b"\xef\xbb\xbf".startswith(buffer[:3]) and len(buffer) < 3:
                return []  # may still become a byte order mark
            self._first = False
            if buffer.startswith(b"\xef\xbb\xbf"):
                del buffer[:3]
        frames: list[Frame] = []
        while (end := buffer.find(b"\n", self._scan)) >= 0:
            stop = end - 1 if end > self._line and buffer[end - 1] == 0x0D else end
            self._scan = end + 1
            if stop > self._line:
                self._check(end - self._line, end - self._begin)
                self._field(bytes(buffer[self._line : stop]))
            else:
                if self._line > self._begin:
                    raw = bytes(buffer[self._begin : end + 1])
                    data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    frames.append(Frame(raw, data, self._event, self._status, self._has_id))
                    self._clear()
                self._begin = end + 1
            self._line = end + 1
        if self._begin:
            del buffer[: self._begin]
            self._line -= self._begin
            self._begin = 0
        self._scan = len(buffer)
        self._check(len(buffer) - self._line, len(buffer))
        self._check_empty(frames, size)
        return frames

    def skip(self, size: int) -> bool:
        """Count whole frames of `size` bytes that need no decoding; False when one is cut just now."""
        if self._buffer or self._first or size > MAX_LINE_BYTES:
            return False
        self._count(size)
        self._empty = 0
        return True

    def _count(self, size: int) -> None:
        self._received += size
        if self._received > MAX_STREAM_BYTES:
            raise AnswerTooLong("API proxy error: the upstream stream does not end")

    def _check(self, line_bytes: int, frame_bytes: int) -> None:
        if line_bytes > MAX_LINE_BYTES or frame_bytes > MAX_FRAME_BYTES:
            raise UpstreamBadResponse(
                "API proxy error: the upstream stream holds a line or frame that is too long"
            )

    def _check_empty(self, frames: list[Frame], size: int) -> None:
        self._empty = 0 if any(frame.data for frame in frames) else self._empty + size
        if self._empty > MAX_EMPTY_BYTES:
            raise UpstreamBadResponse("API proxy error: the upstream stream says nothing, at great length")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            if len(self._data) >= MAX_DATA_LINES:
                self._data = [b"\n".join(self._data)]
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id":
            self._has_id = True
        elif not name and value.startswith(b"HTTP_STATUS/"):
            digits = value[12:].strip()
            if len(digits) == 3 and digits.isdigit():
                self._status = int(digits)


def _plain_frames(block: bytes) -> list[Frame] | None:
    """The frames of a block that holds nothing but whole ones of a single data line, as nearly every block
    does; None for any other."""
    if not block.startswith(b"data: ") or not block.endswith(b"\n\n") or b"\r" in block:
        return None
    if block.find(b"\n") == len(block) - 2:
        return [Frame(block, block[6:-2], "", None, False)]
    lines = block[:-2].split(b"\n\n")
    if not all(line.startswith(b"data: ") and b"\n" not in line for line in lines):
        return None
    return [Frame(line + b"\n\n", line[6:], "", None, False) for line in lines]


# --- asking again -----------------------------------------------------------------------------------


def retry_after_s(header: str, now: float) -> float | None:
    """The seconds that a `Retry-After` header asks for; None when it is absent or makes no sense."""
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(min(int(header[:12]), 10**9))
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError, OSError):
        return None


class Watch(Protocol):
    """Whoever follows one question through all its tries."""

    def admit(self) -> None:
        """Before the first try; raises when the vendor is not to be asked."""
        ...

    def again(self, error: UpstreamError) -> bool:
        """Whether something has changed after `error`, such that another try may go better at once."""
        ...

    def ended(self, error: MogineError | None, *, begun: bool) -> None:
        """The question has its answer, or `error` ended it; `begun`: something was handed on."""
        ...


@dataclass(slots=True)
class Retries:
    """When to ask a vendor again: only what may heal, only before anything was passed on.

    At most a fifth of the requests in flight (but always three) may be second tries, so that
    a vendor in trouble is not buried under them. `never` holds vendor codes that do not heal.
    """

    never: frozenset[str] = frozenset()
    times: int = 2
    first_wait_s: float = 0.3
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    in_flight: int = 0
    retrying: int = 0
    retried: int = 0  # since the start

    def wait_s(self, error: UpstreamError, tries: int) -> float | None:
        """How long to wait after try number `tries` (from 1) failed; None: do not ask again."""
        heals = isinstance(error, UpstreamBusy | UpstreamUnreachable) or (
            type(error) is UpstreamError and (error.upstream_status or 500) >= 500
        )
        if not heals or tries > self.times or error.upstream_code in self.never:
            return None
        if self.retrying >= max(3.0, 0.2 * self.in_flight):
            return None
        wait: float = self.first_wait_s * 2 ** (tries - 1) * (0.5 + self.random() / 2)
        if error.retry_after_s is None:
            return wait
        return None if error.retry_after_s > MAX_RETRY_WAIT_S else error.retry_after_s + wait / 4

    def settle(self, error: UpstreamError) -> None:
        """`retry_after_s` was what the vendor asked for; from here on it is what the visitor is told."""
        if error.upstream_code in self.never:
            error.retry_after_s = MAX_TOLD_WAIT_S
        elif isinstance(error, UpstreamBusy):
            asked = 5.0 if error.retry_after_s is None else error.retry_after_s
            error.retry_after_s = min(max(asked, 1.0), MAX_TOLD_WAIT_S)

    async def call(
        self,
        attempt: Callable[[], Awaitable[T]],
        begun: Callable[[], bool],
        watch: Watch | None = None,
    ) -> T:
        """The result of `attempt()`, which is made again while it fails before `begun()` is true."""
        tries = _Tries(self, watch)
        try:
            while True:
                try:
                    result = await attempt()
                except UpstreamError as error:
                    wait = tries.failed(error, begun())
                except MogineError as error:
                    tries.over(error, begun())
                    raise
                else:
                    tries.over(None, begun())
                    return result
                if wait:
                    await self.sleep(wait)
        finally:
            tries.leave()

    async def run(
        self, attempt: Callable[[], AsyncGenerator[T, None]], watch: Watch | None = None
    ) -> AsyncGenerator[T, None]:
        """The items of `attempt()`, which is made again while it fails before its first item."""
        tries = _Tries(self, watch)
        try:
            while True:
                begun = False
                try:
                    async with aclosing(attempt()) as items:
                        async for item in items:
                            begun = True
                            yield item
                except UpstreamError as error:
                    wait = tries.failed(error, begun)
                except MogineError as error:
                    tries.over(error, begun)
                    raise
                else:
                    tries.over(None, begun)
                    return
                if wait:
                    await self.sleep(wait)
        finally:
            tries.leave()


class _Tries:
    """The tries of one question."""

    __slots__ = ("_again", "_made", "_retries", "_watch")

    def __init__(self, retries: Retries, watch: Watch | None) -> None:
        if watch is not None:
            watch.admit()
        self._retries = retries
        self._watch = watch
        self._made = 0
        self._again = False
        retries.in_flight += 1

    def failed(self, error: UpstreamError, begun: bool) -> float:
        """How long to wait before the next try; raises `error` when there is none."""
        if not begun and self._watch is not None and self._watch.again(error):
            return 0.0
        self._made += 1
        retries = self._retries
        wait = None if begun else retries.wait_s(error, self._made)
        if wait is None:
            retries.settle(error)
            self.over(error, begun)
            raise error
        retries.retried += 1
        if not self._again:
            self._again = True
            retries.retrying += 1
        return wait

    def over(self, error: MogineError | None, begun: bool) -> None:
        if self._watch is not None:
            self._watch.ended(error, begun=begun)

    def leave(self) -> None:
        self._retries.in_flight -= 1
        self._retries.retrying -= self._again
