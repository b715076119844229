"""HTTP/1.1 to the vendors: one answer in any split, odd and broken answers, connections kept and dropped."""

import asyncio
import itertools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.http1 import (
    HIGH_WATER_BYTES,
    KEEP_ALIVE_S,
    MAX_HEAD_BYTES,
    Connection,
    Exchange,
    Failure,
    Fault,
    Limits,
    Pool,
    Target,
    open_pool,
    target_of,
)
from tests.upstreams.raw import RawFake
from tests.upstreams.tls import certificate_files

CALM = Limits(connect_s=5, first_byte_s=5, idle_s=5, answer_s=10)
REQUEST = b"POST /x HTTP/1.1\r\nHost: vendor\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Wire:
    """A transport without a network: notes what the connection does with it."""

    written: bytes = b""
    aborted: bool = False
    reading: bool = True

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@dataclass
class Clock:
    """A loop whose time stands still until it is moved; timers ring in order."""

    loop: asyncio.AbstractEventLoop
    now: float = 1000.0
    timers: list[tuple[float, Callable[[], None], "Timer"]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, ring: Callable[[], None]) -> "Timer":
        timer = Timer()
        self.timers.append((when, ring, timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return self.loop.create_future()

    def move(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [t for t in self.timers if t[0] <= end and not t[2].cancelled]:
            first = min(due, key=lambda t: t[0])
            self.timers.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


@dataclass
class Timer:
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Line:
    """One connection on a wire, with the exchange that it serves."""

    clock: Clock
    pool: Pool
    wire: Wire
    connection: Connection
    exchange: Exchange


def line(limits: Limits = CALM) -> Line:
    """A connection that has just sent a request."""
    clock: Any = Clock(asyncio.get_running_loop())
    pool = Pool(clock, None)
    wire: Any = Wire()
    connection = Connection(pool, ("vendor", 80, False), clock)
    connection.connection_made(wire)
    exchange = Exchange(connection, clock)
    connection.begin(exchange, REQUEST, limits)
    assert wire.written == REQUEST
    return Line(clock, pool, wire, connection, exchange)


@dataclass(frozen=True)
class Outcome:
    """What a caller sees of an answer: status and body, or how it failed; and if the connection is kept."""

    status: int
    body: bytes
    fault: Fault | None
    kept: bool


async def outcome(line: Line) -> Outcome:
    """The outcome of what was fed; a wait that does not end fails the test."""
    body = b""
    fault = None
    async with asyncio.timeout(1):
        try:
            await line.exchange.head()
            while block := await line.exchange.read():
                body += block
        except Failure as failure:
            fault = failure.fault
    return Outcome(line.exchange.status, body, fault, not line.wire.aborted and line.connection.usable)


async def fed(*blocks: bytes, close: bool = False, reset: bool = False) -> Outcome:
    """The outcome of an answer that comes in `blocks`, after which the vendor leaves or not."""
    here = line()
    for block in blocks:
        if not here.wire.aborted:
            here.connection.data_received(block)
    if close or reset or here.wire.aborted:
        here.connection.connection_lost(ConnectionResetError() if reset else None)
    return await outcome(here)


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places) if a < b]


# name: (bytes, whether the vendor closes after them, outcome)
ANSWERS: dict[str, tuple[bytes, bool, Outcome]] = {
    "length": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        False,
        Outcome(200, b"hello", None, True),
    ),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False, Outcome(200, b"", None, True)),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", False, Outcome(204, b"", None, True)),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        False,
        Outcome(200, b"hello", None, True),
    ),
    "chunk extensions": (
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5;a=b;c="d;e"\r\nhello\r\n0;last\r\n\r\n',
        False,
        Outcome(200, b"hello", None, True),
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
        False,
        Outcome(200, b"hello", None, True),
    ),
    "interim answers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        False,
        Outcome(200, b"hello", None, True),
    ),
    "connection close": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        False,
        Outcome(200, b"hello", None, False),
    ),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nhello", True, Outcome(200, b"hello", None, False)),
    "http 1.0": (b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nhello", True, Outcome(200, b"hello", None, False)),
    "http 1.0 with length": (
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        False,
        Outcome(200, b"hello", None, False),
    ),
    "an error's body": (
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\n{}",
        False,
        Outcome(429, b"{}", None, True),
    ),
    "cut in a length": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
        True,
        Outcome(200, b"hello", Fault.CUT, False),
    ),
    "cut in a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello",
        True,
        Outcome(200, b"hello", Fault.CUT, False),
    ),
    "cut before the last chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        True,
        Outcome(200, b"hello", Fault.CUT, False),
    ),
    "cut in the head": (b"HTTP/1.1 200 OK\r\nContent-", True, Outcome(0, b"", Fault.LOST, False)),
    "nothing": (b"", True, Outcome(0, b"", Fault.LOST, False)),
    "tls": (b"\x15\x03\x01\x00\x02\x02\x46", False, Outcome(0, b"", Fault.NOT_HTTP, False)),
    "upgrade": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        False,
        Outcome(0, b"", Fault.NOT_HTTP, False),
    ),
    "a chunk size that is none": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        False,
        Outcome(200, b"", Fault.CUT, False),
    ),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        False,
        Outcome(0, b"", Fault.NOT_HTTP, False),
    ),
    "length and chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        False,
        Outcome(0, b"", Fault.NOT_HTTP, False),
    ),
    "a second answer": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
        False,
        Outcome(200, b"hello", None, False),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_gives_its_outcome_whole_and_byte_by_byte(name: str) -> None:
    data, close, expected = ANSWERS[name]
    assert await fed(data, close=close) == expected
    if name != "a second answer":  # byte by byte it comes when the first is over
        assert await fed(*(data[i : i + 1] for i in range(len(data))), close=close) == expected


@given(st.sampled_from([n for n in ANSWERS if n != "a second answer"]), st.lists(st.integers(0, 500)))
def test_any_split_gives_the_same_outcome(name: str, cuts: list[int]) -> None:
    data, close, expected = ANSWERS[name]
    assert asyncio.run(fed(*parts(data, cuts), close=close)) == expected


@given(
    st.sampled_from([data for data, _, _ in ANSWERS.values() if data]),
    st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=4)), min_size=1, max_size=5),
    st.lists(st.integers(0, 500), max_size=5),
    st.booleans(),
)
def test_a_garbled_answer_ends_in_an_answer_or_a_failure(
    data: bytes, changes: list[tuple[int, bytes]], cuts: list[int], reset: bool
) -> None:
    for place, new in changes:
        place %= len(data) + 1
        data = data[:place] + new + data[place + len(new) :]
    ended = asyncio.run(fed(*parts(data, cuts), close=not reset, reset=reset))
    assert ended.status == 0 or 200 <= ended.status <= 999


@given(st.binary(max_size=200))
def test_noise_is_never_taken_for_an_answer_that_may_be_kept(noise: bytes) -> None:
    assert asyncio.run(fed(noise, close=True)).kept is False


async def test_headers_are_found_in_any_case_and_trailers_are_none() -> None:
    here = line()
    here.connection.data_received(
        b"HTTP/1.1 200 OK\r\nRETRY-after: 7 \r\nX-A: 1\r\nx-a: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1\r\nx\r\n0\r\nX-B: 3\r\n\r\n"
    )
    exchange = here.exchange
    assert [exchange.header(name) for name in ("Retry-After", "X-A", "X-B")] == ["7", "1", ""]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_head_without_end_is_refused(whole: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"X-Pad: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"
    blocks = [head] if whole else [head[i : i + 1000] for i in range(0, len(head), 1000)]
    assert (await fed(*blocks)).fault in (Fault.NOT_HTTP, Fault.CUT)


@pytest.mark.parametrize("start", [b"0\r\nX-Pad: ", b"5;pad="], ids=["trailer", "chunk extension"])
async def test_what_surrounds_a_body_may_not_be_without_end(start: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    padding = [b"x" * 1000] * (MAX_HEAD_BYTES // 1000 + 2)
    assert (await fed(head + start, *padding)).fault is Fault.CUT


# --- limits of time ---------------------------------------------------------------------------------


async def test_each_phase_has_its_limit() -> None:
    limits = Limits(connect_s=1, first_byte_s=30, idle_s=20, answer_s=300)
    silent, begun, slow = line(limits), line(limits), line(limits)
    silent.clock.move(31)
    assert (await outcome(silent)).fault is Fault.FIRST_BYTE_TIMEOUT
    begun.connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nx")
    assert await begun.exchange.read() == b"x"
    waiting = asyncio.ensure_future(outcome(begun))
    await asyncio.sleep(0)
    begun.clock.move(21)
    begun.clock.move(20)
    assert (await waiting).fault is Fault.IDLE_TIMEOUT
    slow.connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(20):
        slow.clock.move(19)
        if not slow.wire.aborted:
            slow.connection.data_received(b"x")
            await slow.exchange.read()
    assert (await outcome(slow)).fault is Fault.ANSWER_TIMEOUT
    assert silent.wire.aborted and begun.wire.aborted and slow.wire.aborted


async def test_a_pushed_answer_has_the_same_limits() -> None:
    here = line(Limits(first_byte_s=30, idle_s=20, answer_s=300))
    here.connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nx")
    pumping = asyncio.ensure_future(here.exchange.pump(lambda block: None, 0.1))
    await asyncio.sleep(0)
    for _ in range(5):
        here.clock.move(19)
        here.connection.data_received(b"x")
    assert not here.wire.aborted
    here.clock.move(41)
    with pytest.raises(Failure) as raised:
        await pumping
    assert raised.value.fault is Fault.IDLE_TIMEOUT


async def test_a_kept_connection_ends_after_a_while() -> None:
    here = line()
    here.connection.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")
    here.clock.move(KEEP_ALIVE_S - 1)
    assert here.connection.usable
    here.clock.move(2)
    assert here.wire.aborted


async def test_words_that_nobody_asked_for_end_a_kept_connection() -> None:
    here = line()
    here.connection.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")
    here.connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert here.wire.aborted


# --- pushing and holding back -----------------------------------------------------------------------


def chunked(*blocks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(block), block) for block in blocks)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


async def test_blocks_are_pushed_where_they_arrive() -> None:
    here = line()
    here.connection.data_received(HEAD + chunked(b"a"))
    taken: list[bytes] = []
    pumping = asyncio.ensure_future(here.exchange.pump(taken.append, 0.1))
    await asyncio.sleep(0)
    assert taken == [b"a"], "what came before is handed over first"
    here.connection.data_received(chunked(b"b", b"c"))
    assert taken == [b"a", b"bc"], "at once, without a turn of the loop"
    here.connection.data_received(chunked(b"d") + END)
    assert taken == [b"a", b"bc", b"d"]
    await pumping
    assert here.connection.usable and here.exchange.complete


async def test_the_vendor_is_held_back_while_the_taker_waits() -> None:
    here = line()
    gate = asyncio.Event()
    taken: list[bytes] = []

    async def wait() -> None:
        await gate.wait()

    def take(block: bytes) -> Awaitable[None] | None:
        taken.append(block)
        return wait() if len(taken) == 1 else None

    here.connection.data_received(HEAD + chunked(b"a"))
    pumping = asyncio.ensure_future(here.exchange.pump(take, 0.1))
    await asyncio.sleep(0)
    assert not here.wire.reading
    here.connection.data_received(chunked(b"b"))  # was on its way already
    assert taken == [b"a"]
    gate.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert here.wire.reading and taken == [b"a", b"b"]
    here.connection.data_received(END)
    await pumping


async def test_an_answer_that_ends_while_the_taker_waits_is_whole() -> None:
    here = line()
    gate = asyncio.Event()
    taken: list[bytes] = []

    async def wait() -> None:
        await gate.wait()

    def take(block: bytes) -> Awaitable[None]:
        taken.append(block)
        return wait()

    here.connection.data_received(HEAD + chunked(b"a"))
    pumping = asyncio.ensure_future(here.exchange.pump(take, 0.1))
    await asyncio.sleep(0)
    here.connection.data_received(chunked(b"b") + END)
    assert here.wire.reading, "the connection is free for others"
    gate.set()
    await pumping
    assert taken == [b"a", b"b"]


async def test_a_taker_that_has_enough_waits_for_the_end_only_a_moment() -> None:
    here = line()
    here.connection.data_received(HEAD + chunked(b"a"))
    pumping = asyncio.ensure_future(here.exchange.pump(lambda block: True, 0.1))
    await asyncio.sleep(0)
    assert not pumping.done()
    here.clock.move(0.2)
    await pumping
    assert here.wire.aborted, "the body had not ended"


async def test_a_taker_that_fails_ends_the_answer_with_its_error() -> None:
    here = line()

    def take(block: bytes) -> None:
        raise ValueError("not like this")

    here.connection.data_received(HEAD)
    pumping = asyncio.ensure_future(here.exchange.pump(take, 0.1))
    await asyncio.sleep(0)
    here.connection.data_received(chunked(b"a"))
    assert here.wire.aborted
    with pytest.raises(ValueError, match="not like this"):
        await pumping


async def test_a_reader_who_is_away_holds_the_vendor_back() -> None:
    here = line()
    here.connection.data_received(HEAD + chunked(b"x" * (HIGH_WATER_BYTES + 1)))
    assert not here.wire.reading
    assert len(await here.exchange.read()) == HIGH_WATER_BYTES + 1
    reading = asyncio.ensure_future(here.exchange.read())
    await asyncio.sleep(0)
    assert here.wire.reading
    here.connection.data_received(END)
    assert await reading == b""


# --- a pool of real connections ---------------------------------------------------------------------


class Vendor:
    """Answers each request on a connection with the next of `answers`; b"" closes without an answer."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n") and await reader.readexactly(2):
                self.requests += 1
                answer = self.answers.pop(0)
                writer.write(answer)
                await writer.drain()
                if not answer or answer.endswith(b"!"):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def serving(vendor: Vendor) -> AsyncIterator[Target]:
    server = await asyncio.start_server(vendor.serve, "127.0.0.1", 0)
    try:
        yield target_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x")
    finally:
        server.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!"  # the vendor leaves after it, without saying so


async def ask(pool: Pool, target: Target) -> bytes:
    exchange = await pool.send(target, REQUEST, CALM)
    return await exchange.read()


async def test_connections_are_kept_and_used_again() -> None:
    vendor = Vendor(OK, OK, OK)
    async with serving(vendor) as target, open_pool() as pool:
        assert [await ask(pool, target) for _ in range(3)] == [b"{}"] * 3
    assert (vendor.connections, vendor.requests) == (1, 3)


async def test_a_request_on_a_stale_connection_is_sent_once_again() -> None:
    vendor = Vendor(OK, b"", OK)
    async with serving(vendor) as target, open_pool() as pool:
        assert await ask(pool, target) == b"{}"
        assert await ask(pool, target) == b"{}"
    assert (vendor.connections, vendor.requests) == (2, 3)


async def test_a_connection_that_the_vendor_has_left_is_not_used() -> None:
    vendor = Vendor(LAST, OK)
    async with serving(vendor) as target, open_pool() as pool:
        assert await ask(pool, target) == b"!"
        await asyncio.sleep(0.02)
        assert await ask(pool, target) == b"{}"
    assert (vendor.connections, vendor.requests) == (2, 2)


async def test_a_fresh_connection_that_dies_is_no_reason_to_ask_again() -> None:
    vendor = Vendor(b"", OK)
    async with serving(vendor) as target, open_pool() as pool:
        with pytest.raises(Failure) as raised:
            await ask(pool, target)
    assert (raised.value.fault, vendor.requests) == (Fault.LOST, 1)


async def test_a_stale_connection_is_replaced_by_a_fresh_one_and_no_more() -> None:
    vendor = Vendor(OK, b"", b"", OK)
    async with serving(vendor) as target, open_pool() as pool:
        await ask(pool, target)
        with pytest.raises(Failure) as raised:
            await ask(pool, target)
    assert (raised.value.fault, vendor.requests) == (Fault.LOST, 3)


async def test_a_kept_connection_that_has_begun_to_answer_is_not_replaced() -> None:
    """The vendor may have worked, and billed."""
    vendor = Vendor(OK, b"HTTP/1.1 200 O!", OK)
    async with serving(vendor) as target, open_pool() as pool:
        await ask(pool, target)
        with pytest.raises(Failure) as raised:
            await ask(pool, target)
    assert (raised.value.fault, vendor.requests) == (Fault.LOST, 2)


async def test_the_next_address_is_tried_when_one_refuses() -> None:
    vendor = Vendor(OK)
    server = await asyncio.start_server(vendor.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    class TwoAddresses(asyncio.SelectorEventLoop):
        async def getaddrinfo(self, host: Any, port: Any, **how: Any) -> Any:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.2", "127.0.0.1")
            ]

    loop = asyncio.get_running_loop()
    lookups: Any = TwoAddresses.getaddrinfo

    class Lookups:
        """The running loop, with a name that has two addresses; counts how often it is asked."""

        asked = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(loop, name)

        async def getaddrinfo(self, host: Any, port: Any, **how: Any) -> Any:
            self.asked += 1
            return await lookups(loop, host, port, **how)

    names: Any = Lookups()
    pool = Pool(names, None)
    target = Target("vendor.test", port, False, b"vendor.test", b"/x")
    assert await ask(pool, target) == b"{}"
    vendor.answers = [b"", OK]
    assert await ask(pool, target) == b"{}"
    assert names.asked == 1, "names are remembered for a while"
    await pool.close()
    server.close()


async def test_a_name_that_resolves_to_nothing_is_told() -> None:
    async with open_pool() as pool:
        with pytest.raises(Failure) as raised:
            await pool.send(target_of("http://no-such-host.invalid/x"), REQUEST, CALM)
    assert raised.value.fault is Fault.NAME


async def test_a_handshake_that_hangs_ends_in_time() -> None:
    limits = Limits(connect_s=0.1)
    async with RawFake(hold=True) as fake, open_pool() as pool:
        with pytest.raises(Failure) as raised:
            await pool.send(target_of(f"https://127.0.0.1:{fake.port}/x"), REQUEST, limits)
    assert raised.value.fault in (Fault.CONNECT_TIMEOUT, Fault.CONNECT)


async def test_a_certificate_for_another_name_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate_files())
    vendor = Vendor(OK)
    server = await asyncio.start_server(vendor.serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    trust = ssl.create_default_context(cafile=certificate_files()[0])
    async with open_pool(trust) as pool:
        assert await ask(pool, target_of(f"https://localhost:{port}/x")) == b"{}"
        other = Target("vendor.test", port, True, b"vendor.test", b"/x")
        pool._names["vendor.test", port] = (float("inf"), [(int(socket.AF_INET), "127.0.0.1")])
        with pytest.raises(Failure) as raised:
            await pool.send(other, REQUEST, CALM)
    server.close()
    assert (raised.value.fault, vendor.requests) == (Fault.TLS, 1)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "vendor",
        "ftp://vendor/x",
        "http://",
        "http://vendor:99999/",
        "http://vendor/a b",
        "http://ve\nndor/é",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Failure) as raised:
        target_of(url)
    assert raised.value.fault is Fault.ADDRESS


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://vendor", Target("vendor", 80, False, b"vendor", b"/")),
        ("https://Vendor:8443/a/b?c=d", Target("vendor", 8443, True, b"Vendor:8443", b"/a/b?c=d")),
        ("http://[::1]:9/x", Target("::1", 9, False, b"[::1]:9", b"/x")),
    ],
)
def test_an_address_is_taken_apart(url: str, target: Target) -> None:
    assert target_of(url) == target
