"""HTTP/1.1 as a client speaks it: pooled connections that push an answer's bytes the moment they arrive."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import inf
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

MAX_HEAD_BYTES = 64 * 1024
HIGH_WATER_BYTES = 64 * 1024
KEEP_ALIVE_S = 15.0
DNS_TTL_S = 60.0
MAX_DNS_NAMES = 64
SWITCHING_PROTOCOLS = 101
NO_ROOM = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

logger = logging.getLogger(__name__)

# Takes a block. True: that was all that matters. An awaitable: wait for it before the next block; its
# result means the same.
Take = Callable[[bytes], "Awaitable[bool | None] | bool | None"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long each phase of one call may take, in seconds."""

    connect_s: float = 5.0
    first_byte_s: float = 30.0
    idle_s: float = 30.0
    answer_s: float = 300.0


class Fault(Enum):
    """What can go wrong with a call, in the order of its phases."""

    ADDRESS = "its address is not valid"
    NAME = "its host name was not found"
    CONNECT = "no connection could be made"
    CONNECT_TIMEOUT = "no connection was made in time"
    TLS = "its TLS certificate is not trusted or TLS failed"
    LOST = "the connection was lost before it answered"
    FIRST_BYTE_TIMEOUT = "nothing was sent in time"
    NOT_HTTP = "the answer is no HTTP"
    CUT = "the connection broke within the answer"
    IDLE_TIMEOUT = "it fell silent within the answer"
    ANSWER_TIMEOUT = "the answer did not end in time"
    NO_ROOM = "this machine has no descriptor or memory left for a connection"


class Failure(Exception):
    """A call that failed; `fault` says how. Holds nothing of what was sent."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.value)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call goes, and how its request line and `Host` name that."""

    host: str
    port: int
    tls: bool
    host_header: bytes
    path: bytes

    @property
    def key(self) -> tuple[str, int, bool]:
        """What calls that may share a connection have in common."""
        return self.host, self.port, self.tls


@lru_cache(maxsize=64)
def target_of(url: str) -> Target:
    """The target that `url` names. Raises Failure(ADDRESS)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        name = parts.netloc.rpartition("@")[2]
        host_header = name.encode("ascii") if name.isascii() else name.encode("idna")
        target = path.encode("ascii")
    except (ValueError, UnicodeError):
        raise Failure(Fault.ADDRESS) from None
    odd = any(byte <= 0x20 or byte == 0x7F for byte in host_header + target)
    if parts.scheme not in ("http", "https") or not host or odd:
        raise Failure(Fault.ADDRESS)
    tls = parts.scheme == "https"
    return Target(host, port or (443 if tls else 80), tls, host_header, target)


# --- one call ---------------------------------------------------------------------------------------


class Exchange:
    """One call: its answer's head, then its body, either read piece by piece or pushed by `pump`.

    What arrives before anybody asks is kept, and the vendor is held back beyond 64 KiB of it.
    """

    __slots__ = (
        *("_blocks", "_connection", "_enough", "_failure", "_headers", "_held", "_kept", "_loop"),
        *("_take", "_waiter", "_wish", "begun", "complete", "status"),
    )

    def __init__(self, connection: "Connection", loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.begun = False  # a byte of the body has come
        self.complete = False  # its last byte has come
        self._loop = loop
        self._connection: Connection | None = connection
        self._headers: dict[bytes, bytes] = {}
        self._blocks: list[bytes] = []
        self._kept = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._wish: Awaitable[bool | None] | None = None
        self._held = False
        self._enough = False

    def header(self, name: str) -> str:
        """The header's first value; "" when there is none."""
        value = self._headers.get(name.lower().encode("ascii"))
        return "" if value is None else value.decode("latin-1").strip()

    def has(self, name: bytes) -> bool:
        """Whether there is a header of this name, which is in lower case."""
        return name in self._headers

    async def head(self) -> None:
        """Wait for the answer's head. Raises Failure."""
        while not self.status:
            if self._failure is not None:
                raise self._failure
            await self._wait()

    async def read(self) -> bytes:
        """The next bytes of the body, b"" at its end. Raises Failure."""
        while not self._blocks:
            if self._failure is not None:
                raise self._failure
            if self.complete:
                return b""
            if self._connection is not None:
                self._let_go()
                if self.begun:
                    self._connection.expect_more()
            await self._wait()
        return self._kept_bytes()

    def rest(self) -> bytes | None:
        """All of the body that is left to read, when it has come already."""
        if not self.complete or self._take is not None:
            return None
        return self._kept_bytes() if self._blocks else b""

    async def peek(self) -> bytes:
        """The first bytes of the body, which stay to be read; b"" when there are none. Raises Failure."""
        while not self._blocks:
            if self._failure is not None:
                raise self._failure
            if self.complete:
                return b""
            await self._wait()
        return self._blocks[0]

    async def pump(self, take: Take, patience_s: float) -> None:
        """Hand the body's bytes to `take` the moment they arrive, until the end.

        `take` is called from the event loop, so it must be quick. When it returns an awaitable, that is
        awaited here while the vendor is held back. When it returns True it has all it needs, and
        the body's end is awaited for `patience_s` only, so that the connection can be kept.
        Raises Failure, or what `take` or its awaitable raises.
        """
        self._take = take
        self._push_kept()
        while True:
            if self._wish is not None:
                wish, self._wish = self._wish, None
                self._take = None  # what comes meanwhile is kept
                self._enough = await wish is True or self._enough
                self._take = take
                self._push_kept()
                continue
            if self._failure is not None:
                raise self._failure
            if self.complete:
                return
            if self._connection is not None:
                self._let_go()
                if self._enough:
                    self._connection.expect_end(patience_s)
                elif self.begun:
                    self._connection.expect_more()
            await self._wait()

    def close(self) -> None:
        """Leave. A connection whose answer has not ended is dropped without a goodbye: after a polite
        TLS close the vendor goes on and bills."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

    # --- what the connection tells ----------------------------------------------------------------

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The head has come."""
        self._headers = headers
        self.status = status
        self._wake()

    def on_body(self, block: bytes) -> None:
        """Bytes of the body have come."""
        self.begun = True
        connection = self._connection
        if self._take is not None and self._wish is None:
            if connection is not None:
                connection.expect_more()
            self._hand_over(block)
            return
        self._blocks.append(block)
        self._kept += len(block)
        if connection is not None:
            connection.expect_nothing()
            if self._kept > HIGH_WATER_BYTES:
                self._hold()
        self._wake()

    def on_last(self, block: bytes) -> None:
        """The body's last bytes have come, and the connection is no longer ours."""
        self._connection = None
        if block:
            self.on_body(block)
        self.complete = True
        self._wake()

    def on_failure(self, failure: Failure) -> None:
        """The answer will not be whole, and the connection is gone."""
        self._connection = None
        if self._enough:
            self.complete = True  # all that matters has come
        elif self._failure is None:
            self._failure = failure
        self._wake()

    @property
    def held(self) -> bool:
        """Whether the vendor is held back."""
        return self._held

    def _push_kept(self) -> None:
        if self._blocks:
            self._hand_over(self._kept_bytes())

    def _kept_bytes(self) -> bytes:
        blocks = self._blocks
        block = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        blocks.clear()
        self._kept = 0
        return block

    def _hand_over(self, block: bytes) -> None:
        take = self._take
        if take is None or self._enough:
            return
        try:
            said = take(block)
        except Exception as error:
            self._take = None
            self._failure = error
            self.close()
            self._wake()
            return
        if said is None or said is False:
            return
        if said is True:
            self._enough = True
        else:
            self._wish = said
            self._hold()
        self._wake()

    def _hold(self) -> None:
        if self._connection is not None and not self._held:
            self._held = True
            self._connection.hold()

    def _let_go(self) -> None:
        if self._connection is not None and self._held:
            self._held = False
            self._connection.let_go()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


# --- one connection ---------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection, idle in the pool or with the one exchange that it serves.

    It has one timer, which is moved on when it rings: far cheaper than a new one for each block or
    each call. The same timer ends a connection that idled too long.
    """

    __slots__ = (
        *("_complete", "_due", "_end", "_exchange", "_extra", "_fault", "_framed", "_head_bytes", "_headers"),
        *(
            "_idle_s",
            "_in_head",
            "_keep",
            "_loop",
            "_parser",
            "_pieces",
            "_pool",
            "_quiet_bytes",
            "_rings_at",
        ),
        *("_timer", "_transport", "answered", "key", "on_body", "reused"),
    )

    def __init__(self, pool: "Pool", key: tuple[str, int, bool], loop: asyncio.AbstractEventLoop) -> None:
        self.key = key
        self.reused = False
        self.answered = False  # a byte of the running exchange's answer has come
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = inf
        self._due = self._end = inf
        self._idle_s = KEEP_ALIVE_S
        self._fault = Fault.FIRST_BYTE_TIMEOUT
        self._pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] | None = self._pieces.append  # no frame of ours per piece
        self._reset()
        self._parser: Any = httptools.HttpResponseParser(self)

    def _reset(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._quiet_bytes = 0  # received since the last piece of a body
        self._in_head = True
        self._framed = False  # the body's end is marked; else it ends with the connection
        self._complete = -1  # how many pieces are the answer's, once its end is known
        self._extra = False  # something came after the end
        self._keep = False

    # --- what the pool and the exchange ask for ---------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether a request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, exchange: Exchange, request: bytes, limits: Limits) -> None:
        """Send `request`, whose answer goes to `exchange`."""
        now = self._loop.time()
        self._exchange = exchange
        self.answered = False
        self._reset()
        self._idle_s = limits.idle_s
        self._end = now + limits.answer_s
        self._due = now + limits.first_byte_s
        self._fault = Fault.FIRST_BYTE_TIMEOUT
        self._ring_by(min(self._due, self._end, now + limits.idle_s))
        if self._transport is not None:
            self._transport.write(request)

    def expect_more(self) -> None:
        """Somebody waits for the next bytes of a body that has begun."""
        self._due = self._loop.time() + self._idle_s
        self._fault = Fault.IDLE_TIMEOUT

    def expect_nothing(self) -> None:
        """The reader is busy, and only the whole answer's limit counts."""
        self._due = inf

    def expect_end(self, seconds: float) -> None:
        """Only the body's end is awaited, for a moment."""
        self._due = self._loop.time() + seconds
        self._ring_by(self._due)

    def hold(self) -> None:
        """Read nothing until `let_go`."""
        self._due = inf
        if self.usable:
            cast(asyncio.Transport, self._transport).pause_reading()

    def let_go(self) -> None:
        """Read on."""
        if self.usable:
            cast(asyncio.Transport, self._transport).resume_reading()

    def drop(self) -> None:
        """End the connection at once."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # --- what asyncio tells -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self.drop()  # nobody asked, so it cannot be trusted with a question
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._complete < 0:
                self._fail(Fault.CUT if exchange.status else Fault.NOT_HTTP)
                return
            self._extra = True
        pieces = self._pieces
        if self._complete >= 0:
            self._finish(exchange)
        elif pieces:
            block = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._quiet_bytes = 0
            exchange.on_body(block)
        else:
            # A head, chunk extensions or trailers without end.
            self._quiet_bytes += len(data)
            if max(self._quiet_bytes, self._head_bytes) > MAX_HEAD_BYTES:
                self._fail(Fault.CUT if exchange.status else Fault.NOT_HTTP)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.forget(self)
        self._parser = self.on_body = None  # they hold this object; only the collector would part them
        exchange = self._exchange
        if exchange is None:
            return
        if not self._in_head and not self._framed and error is None:
            self._exchange = None
            exchange.on_last(b"")
        else:
            self._fail(Fault.CUT if exchange.status else Fault.LOST)

    # --- what the parser tells --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A new answer, which nobody asked for when the one before was complete."""
        if self._complete >= 0:
            self._extra = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers, which come after the head, are left alone."""
        if not self._in_head:
            return
        self._head_bytes += len(name) + len(value)
        name = name.lower()
        self._headers.setdefault(name, value)
        if name == b"content-length" or name == b"transfer-encoding":
            self._framed = True

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self._extra or not self._in_head:
            return
        status = self._parser.get_status_code()
        if status < 200 and status != SWITCHING_PROTOCOLS:
            self._headers = {}  # only an interim answer
            self._framed = False
            return
        self._in_head = False
        if self._exchange is not None and status != SWITCHING_PROTOCOLS:
            self._exchange.on_head(status, self._headers)

    def on_message_complete(self) -> None:
        """The answer is complete."""
        exchange = self._exchange
        if exchange is not None and exchange.status and self._complete < 0:
            self._complete = len(self._pieces)
            self._keep = self._parser.should_keep_alive()

    # --- ends -------------------------------------------------------------------------------------

    def _finish(self, exchange: Exchange) -> None:
        last = b"".join(self._pieces[: self._complete])
        self._pieces.clear()
        self._exchange = None
        if self._keep and not self._extra and self.usable:
            if exchange.held:
                self.let_go()
            self.reused = True
            self._due = self._loop.time() + KEEP_ALIVE_S
            self._ring_by(self._due)
            self._pool.give_back(self)
        else:
            self.drop()
        exchange.on_last(last)

    def _fail(self, fault: Fault) -> None:
        exchange = self._exchange
        self.drop()
        if exchange is not None:
            exchange.on_failure(Failure(fault))

    def _ring_by(self, at: float) -> None:
        """See to it that the timer rings at `at` or before."""
        if at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._rings_at = at
            self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._rings_at = inf
        now = self._loop.time()
        if self._exchange is None:
            if now < self._due:
                self._ring_by(self._due)
            else:
                self.drop()
        elif now >= self._end:
            self._fail(Fault.ANSWER_TIMEOUT)
        elif now >= self._due:
            self._fail(self._fault)
        else:
            # At least every `idle_s`: a wait that begins after a long rest would be missed otherwise.
            self._ring_by(min(self._due, self._end, now + self._idle_s))


# --- all connections --------------------------------------------------------------------------------


class Pool:
    """Connections by host: kept for a while after an answer, and used again, the latest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext | None) -> None:
        self._loop = loop
        self._tls = tls
        self._idle: dict[tuple[str, int, bool], list[Connection]] = {}
        self._all: set[Connection] = set()
        self._names: dict[tuple[str, int], tuple[float, list[tuple[int, str]]]] = {}
        self._lookups: dict[tuple[str, int], asyncio.Task[list[tuple[int, str]]]] = {}

    async def send(self, target: Target, request: bytes, limits: Limits) -> Exchange:
        """The exchange for `request`, its head already there. Raises Failure.

        A kept connection may have been closed by the vendor just now: when one ends before any byte
        of an answer, the request is sent once again, on a fresh one.
        """
        connection = self._take(target.key) or await self._connect(target, limits.connect_s)
        while True:
            reused = connection.reused
            exchange = Exchange(connection, self._loop)
            connection.begin(exchange, request, limits)
            try:
                await exchange.head()
                return exchange
            except Failure as failure:
                if not reused or connection.answered or failure.fault is not Fault.LOST:
                    raise
                logger.debug("a kept connection was stale")
            except BaseException:
                exchange.close()
                raise
            connection = await self._connect(target, limits.connect_s)

    def give_back(self, connection: Connection) -> None:
        """`connection` may serve another call."""
        self._idle.setdefault(connection.key, []).append(connection)

    def forget(self, connection: Connection) -> None:
        """`connection` has ended."""
        self._all.discard(connection)
        idle = self._idle.get(connection.key)
        if idle is not None and connection in idle:
            idle.remove(connection)

    async def close(self) -> None:
        """End all connections."""
        for lookup in tuple(self._lookups.values()):
            lookup.cancel()
        for connection in tuple(self._all):
            connection.drop()
        # The transports close their sockets in the loop's next turns.
        for _ in range(3):
            await asyncio.sleep(0)

    def _take(self, key: tuple[str, int, bool]) -> Connection | None:
        idle = self._idle.get(key)
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self, target: Target, seconds: float) -> Connection:
        """A fresh connection, to the first of the host's addresses that takes it."""
        try:
            async with asyncio.timeout(seconds):
                return await self._try_addresses(target, seconds)
        except TimeoutError:
            raise Failure(Fault.CONNECT_TIMEOUT) from None

    async def _try_addresses(self, target: Target, seconds: float) -> Connection:
        tls = self._tls_context() if target.tls else None
        for family, address in await self._addresses(target.host, target.port):
            connection = Connection(self, target.key, self._loop)
            try:
                transport, _ = await self._loop.create_connection(
                    lambda connection=connection: connection,
                    address,
                    target.port,
                    family=family,
                    ssl=tls,
                    server_hostname=target.host if tls else None,
                    ssl_handshake_timeout=seconds if tls else None,
                )
            except ssl.SSLError as error:
                logger.info("TLS with %s failed: %s", target.host, error.reason)
                raise Failure(Fault.TLS) from None
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise Failure(Fault.NO_ROOM) from None
                logger.info("no connection to %s: %s", target.host, type(error).__name__)
                continue
            _read_ahead_little(transport)
            self._all.add(connection)
            return connection
        self._names.pop((target.host, target.port), None)
        raise Failure(Fault.CONNECT)

    async def _addresses(self, host: str, port: int) -> list[tuple[int, str]]:
        until, known = self._names.get((host, port), (0.0, []))
        if self._loop.time() < until:
            return known
        # One lookup for all who wait: each holds a thread, also when nobody waits for it any more.
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = self._lookups[host, port] = self._loop.create_task(self._look_up(host, port))
            lookup.add_done_callback(lambda _: self._lookups.pop((host, port), None))
        addresses = await asyncio.shield(lookup)
        if not addresses:
            raise Failure(Fault.NAME)
        return addresses

    async def _look_up(self, host: str, port: int) -> list[tuple[int, str]]:
        """The addresses of a name; none when it has none."""
        now = self._loop.time()
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        addresses = [(int(family), str(address[0])) for family, _, _, _, address in found]
        if len(self._names) >= MAX_DNS_NAMES:
            self._names.clear()
        self._names[host, port] = (now + DNS_TTL_S, addresses)
        return addresses

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


def _read_ahead_little(transport: asyncio.Transport) -> None:
    """What the system and TLS read by themselves while we hold is megabytes, unless they are told."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HIGH_WATER_BYTES)
    limit = getattr(transport, "set_read_buffer_limits", None)
    if limit is not None:
        limit(high=HIGH_WATER_BYTES)


@asynccontextmanager
async def open_pool(tls: ssl.SSLContext | None = None) -> AsyncIterator[Pool]:
    """A pool for as long as the context lasts; `tls` is how it trusts (the system's way when None)."""
    pool = Pool(asyncio.get_running_loop(), tls)
    try:
        yield pool
    finally:
        await pool.close()
