"""One way to call out: a POST as a stream of bytes, frames out of bytes, and when to ask again."""

import asyncio
import email.utils
import logging
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from mogine.errors import (
    AnswerTooLong,
    SettingsError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamCut,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)

USER_AGENT = "Mogine-AI-Chatbot/1.0"
MAX_LINE_BYTES = 512 * 1024
MAX_FRAME_BYTES = 1024 * 1024
MAX_STREAM_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_RETRY_WAIT_S = 5.0
MAX_TOLD_WAIT_S = 120.0
KEEP_ALIVE_S = 15.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long each phase of one call may take, in seconds."""

    connect_s: float = 5.0
    first_byte_s: float = 30.0
    idle_s: float = 30.0
    answer_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Call:
    """One POST. `label` and `setting` are for messages: who is called, what setting holds the address."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    label: str
    setting: str


# --- the client: aiohttp's, behind `open_client`, `Client.post` and `Answer` alone ------------------


class _Lease:
    """A connection while it serves one call: watches the clock and can drop it at once."""

    __slots__ = ("_call", "_due", "_end", "_late", "_limits", "_loop", "_timer", "_transport", "response")

    def __init__(self, call: Call, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._limits = limits
        self._loop = loop
        self._end = loop.time() + limits.answer_s
        self._due = self._end
        self._late = ""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.BaseTransport | None = None
        self.response: aiohttp.ClientResponse | None = None

    def connected(self, transport: asyncio.BaseTransport | None) -> None:
        """From here on the first byte is awaited."""
        self._transport = transport
        self.wait(self._limits.first_byte_s)
        self._arm()

    def wait(self, seconds: float) -> None:
        """Something is expected of the vendor within `seconds`."""
        self._due = self._loop.time() + seconds

    def rest(self) -> None:
        """Nothing is expected: the reader is busy, and only the whole answer's limit counts."""
        self._due = self._end

    def _arm(self) -> None:
        # One timer that is moved on when it rings is far cheaper than a new one for each block. It rings
        # at least every `idle_s`: a wait that begins after a long rest would be missed otherwise.
        at = min(self._due, self._end, self._loop.time() + self._limits.idle_s)
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        now = self._loop.time()
        if now < min(self._due, self._end):
            self._arm()
            return
        if now >= self._end:
            self._late = (
                f"did not finish its answer within {self._limits.answer_s:g} s (MOGINE_ANSWER_TIMEOUT)"
            )
        elif self.response is None or not self.response.content.total_bytes:
            self._late = f"sent nothing for {self._limits.first_byte_s:g} s (MOGINE_FIRST_BYTE_TIMEOUT)"
        else:
            self._late = f"fell silent for {self._limits.idle_s:g} s within its answer (MOGINE_IDLE_TIMEOUT)"
        self.abort()

    def abort(self) -> None:
        """Drop the connection without a goodbye: after a polite TLS close the vendor goes on and bills."""
        if self.response is not None and self.response.connection is None:
            return  # read to its end and back in the pool, perhaps serving another call by now
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    def close(self, *, complete: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not complete:
            self.abort()
            if self.response is not None:
                self.response.close()

    @property
    def timeout(self) -> UpstreamTimeout | None:
        """The error to raise when the clock, not the vendor, ended the call."""
        return UpstreamTimeout(f"API proxy error: {self._call.label} {self._late}") if self._late else None

    def failure(self, error: Exception) -> UpstreamError:
        """A failure before the answer's head, in our words."""
        if self.timeout is not None:
            return self.timeout
        label, setting = self._call.label, self._call.setting
        logger.info("%s: %s before the answer", label, type(error).__name__)
        match error:
            case aiohttp.ConnectionTimeoutError():
                return UpstreamTimeout(
                    f"API proxy error: {label} could not be reached within {self._limits.connect_s:g} s"
                    f" (MOGINE_CONNECT_TIMEOUT); check {setting} and the network"
                )
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError():
                why = "its TLS certificate is not trusted or TLS failed"
            case aiohttp.ClientConnectorDNSError():
                why = "its host name was not found"
            case aiohttp.InvalidURL():
                why = "its address is not valid"
            case aiohttp.ClientConnectorError():
                why = "no connection could be made"
            case aiohttp.ClientResponseError():
                return UpstreamBadResponse(
                    f"API proxy error: {label} did not answer in HTTP; check {setting}"
                )
            case _:
                why = "the connection was lost before it answered"
        return UpstreamUnreachable(f"API proxy error: {label} could not be reached: {why}; check {setting}")


_LEASE: ContextVar[_Lease] = ContextVar("_LEASE")


class _Connector(aiohttp.TCPConnector):
    """Tells the running call's lease which connection it got, so that it can be aborted in every phase."""

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:  # noqa: ASYNC109 - aiohttp's name
        connection = await super().connect(req, traces, timeout)
        _LEASE.get().connected(connection.transport)
        return connection


class Answer:
    """A vendor's answer whose head has come: `status`, `header` and, block by block, `read`."""

    __slots__ = ("_lease", "_limits", "_response", "complete", "status")

    def __init__(self, response: aiohttp.ClientResponse, lease: _Lease, limits: Limits) -> None:
        self._response = response
        self._lease = lease
        self._limits = limits
        self.status = response.status
        self.complete = False

    def header(self, name: str) -> str:
        """The header's value; "" when there is none."""
        return self._response.headers.get(name, "")

    async def read(self) -> bytes:
        """The next bytes as they came, b"" at the end; raises UpstreamCut or UpstreamTimeout."""
        content = self._response.content
        if content.total_bytes:  # until then the limit for the first byte runs on
            self._lease.wait(self._limits.idle_s)
        broken = False
        block = b""
        try:
            block = await content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.info("%s within an answer", type(error).__name__)
            broken = True
        self._lease.rest()
        # Raised outside of the handler: aiohttp's errors hold the request's headers, thus the key.
        if not block:
            if (timeout := self._lease.timeout) is not None:
                raise timeout
            if broken:
                raise UpstreamCut("API proxy error: the upstream connection broke, the answer was cut")
            self.complete = True
        return block

    async def read_all(self, limit_bytes: int) -> bytes:
        """What is left of the body; raises UpstreamBadResponse when it is larger than `limit_bytes`."""
        body = bytearray()
        while block := await self.read():
            body += block
            if len(body) > limit_bytes:
                raise UpstreamBadResponse(
                    f"API proxy error: the upstream answer is larger than {limit_bytes} bytes"
                )
        return bytes(body)

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


class Client:
    """One pool of connections to vendors."""

    def __init__(self, session: aiohttp.ClientSession, limits: Limits) -> None:
        self._session = session
        self._limits = limits

    @asynccontextmanager
    async def post(self, call: Call) -> AsyncIterator[Answer]:
        """The answer to `call`; leaving before its body has ended aborts the connection."""
        lease = _Lease(call, self._limits, asyncio.get_running_loop())
        _LEASE.set(lease)
        answer: Answer | None = None
        failure: UpstreamError | None = None
        try:
            try:
                lease.response = await self._session.post(
                    call.url, headers=call.headers, data=call.body, allow_redirects=False
                )
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                failure = lease.failure(error)
            if failure is not None or lease.response is None:
                raise failure or UpstreamUnreachable(f"API proxy error: {call.label} did not answer")
            if lease.response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
                raise UpstreamBadResponse(
                    f"API proxy error: {call.label} sent a compressed answer though none was asked for",
                    upstream_status=lease.response.status,
                )
            answer = Answer(lease.response, lease, self._limits)
            yield answer
        finally:
            lease.close(complete=answer is not None and answer.complete)


@asynccontextmanager
async def open_client(limits: Limits, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    """A client for as long as the context lasts. `tls` may trust more authorities, never fewer checks."""
    if tls is not None and (tls.verify_mode is not ssl.CERT_REQUIRED or not tls.check_hostname):
        raise SettingsError("TLS to a vendor is always verified; give the client a context that does")
    connector = _Connector(
        limit=0,  # open streams are limited at the front door; a queue here would look like a slow vendor
        keepalive_timeout=KEEP_ALIVE_S,
        ttl_dns_cache=60,
        ssl=tls or True,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, connect=limits.connect_s),
    ) as session:
        yield Client(session, limits)


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
        self._clear()

    def _clear(self) -> None:
        self._data: list[bytes] = []
        self._event = ""
        self._status: int | None = None
        self._has_id = False

    def feed(self, block: bytes) -> list[Frame]:
        """The frames that `block` completes; raises UpstreamError when a part or all grows too large."""
        self._received += len(block)
        if self._received > MAX_STREAM_BYTES:
            raise AnswerTooLong("API proxy error: the upstream stream does not end")
        buffer = self._buffer
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
        return frames

    def _check(self, line_bytes: int, frame_bytes: int) -> None:
        if line_bytes > MAX_LINE_BYTES or frame_bytes > MAX_FRAME_BYTES:
            raise UpstreamBadResponse(
                "API proxy error: the upstream stream holds a line or frame that is too long"
            )

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id":
            self._has_id = True
        elif not name and value.startswith(b"HTTP_STATUS/"):
            digits = value[12:].strip()
            if len(digits) == 3 and digits.isdigit():
                self._status = int(digits)


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


@dataclass(slots=True)
class Retries:
    """When to ask a vendor again: only what may heal, only before anything was passed on.

    At most a fifth of the requests in flight (but always three) may be second tries, so that
    a vendor in trouble is not buried under them. `never` holds vendor codes that do not heal.
    """

    never: frozenset[str] = frozenset()
    times: int = 2
    first_wait_s: float = 0.4
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    in_flight: int = 0
    retrying: int = 0

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

    def _settle(self, error: UpstreamError) -> None:
        """`retry_after_s` was what the vendor asked for; from here on it is what the visitor is told."""
        if error.upstream_code in self.never:
            error.retry_after_s = MAX_TOLD_WAIT_S
        elif isinstance(error, UpstreamBusy):
            asked = 5.0 if error.retry_after_s is None else error.retry_after_s
            error.retry_after_s = min(max(asked, 1.0), MAX_TOLD_WAIT_S)

    async def run(self, attempt: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The items of `attempt()`, which is made again while it fails before its first item."""
        self.in_flight += 1
        tries = 0
        again = False
        try:
            while True:
                tries += 1
                begun = False
                try:
                    async with aclosing(attempt()) as items:
                        async for item in items:
                            begun = True
                            yield item
                    return
                except UpstreamError as error:
                    wait = None if begun else self.wait_s(error, tries)
                    if wait is None:
                        self._settle(error)
                        raise
                if not again:
                    again = True
                    self.retrying += 1
                await self.sleep(wait)
        finally:
            self.in_flight -= 1
            self.retrying -= again
