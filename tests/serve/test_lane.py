"""The short way in: what is read there, what is handed over to aiohttp, and that both answer alike."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.serve import runner
from mogine.serve.access import Access
from mogine.serve.app import FRAME, SHORT_ROUTES, Route, ShortJson
from mogine.serve.keys import REQUEST_ID, STATE, ServerState
from mogine.serve.lane import Lanes
from mogine.serve.requests import ShortRequest
from mogine.settings import load_settings
from tests.serve.conftest import Start, is_idle, question
from tests.servers import DEFAULTS
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import endless, script

LLM = "/api/llm/doubao"
BODY = json.dumps(question()).encode()
HEAD = f"POST {LLM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake() as fake:
        yield fake


def request(*lines: str, body: bytes = BODY) -> bytes:
    """A request in one piece, with `lines` in its head."""
    return (HEAD + "".join(f"{line}\r\n" for line in (*lines, f"Content-Length: {len(body)}"))).encode() + (
        b"\r\n" + body
    )


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


async def whole(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an answer with a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


def names(head: bytes) -> set[str]:
    """The names of a head's headers, lower case."""
    return {line.split(":")[0].lower() for line in head.decode().split("\r\n")[1:] if line}


# The same question as aiohttp gets it: what the lane does not take.
LONG_WAYS = {
    "a query in the address": request().replace(b" HTTP/1.1", b"?a=b HTTP/1.1", 1),
    "absolute address": request().replace(b"POST /", b"POST http://localhost/", 1),
    "upgrade": request("Connection: Upgrade", "Upgrade: h2c"),
    "TE": request("TE: trailers"),
    "many headers": request(*(f"X-{n}: {'x' * 100}" for n in range(90))),
    "blank line before": b"\r\n" + request(),
    "chunked": (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode()
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
}


@pytest.mark.parametrize("way", LONG_WAYS)
async def test_what_the_lane_does_not_take_is_answered_alike(
    serve: Start, doubao: DoubaoFake, way: str
) -> None:
    served = await serve(env=doubao.environ)
    async with connected(served.port()) as (reader, writer):
        writer.write(request())
        short_head, short_body = await whole(reader)
    async with connected(served.port()) as (reader, writer):
        writer.write(LONG_WAYS[way])
        long_head, long_body = await whole(reader)
    assert short_head.startswith(b"HTTP/1.1 200 OK") and long_head.startswith(b"HTTP/1.1 200 OK")
    assert names(short_head) == names(long_head)
    said = [json.loads(body)["choices"][0]["message"] for body in (short_body, long_body)]
    assert said[0] == said[1]


async def test_errors_bear_the_same_headers_on_both_ways(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env={**doubao.environ, "MOGINE_ALLOWED_ORIGINS": "https://shop.example"})
    heads = []
    for wrong in (
        request("Origin: https://shop.example", body=b"{"),
        request("Origin: https://shop.example", "TE: trailers", body=b"{"),
    ):
        async with connected(served.port()) as (reader, writer):
            writer.write(wrong)
            head, body = await whole(reader)
            heads.append(head)
            assert json.loads(body)["error"]["reason"] == "invalid_json"
            assert b"Access-Control-Allow-Origin: https://shop.example" in head
    assert names(heads[0]) == names(heads[1])


async def test_a_request_in_single_bytes_is_read(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env=doubao.environ)
    async with connected(served.port()) as (reader, writer):
        for byte in request():
            writer.write(bytes((byte,)))
            await asyncio.sleep(0)
        head, _ = await whole(reader)
    assert head.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("cut", [1, 5, 6, 40, 100, -1, -len(BODY), -len(BODY) - 1, -len(BODY) - 3])
async def test_a_request_in_two_pieces_is_read_and_the_next_one_too(
    serve: Start, doubao: DoubaoFake, cut: int
) -> None:
    served = await serve(env=doubao.environ)
    async with connected(served.port()) as (reader, writer):
        for _ in range(2):
            whole_request = request()
            writer.write(whole_request[:cut])
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.write(whole_request[cut:])
            head, _ = await whole(reader)
            assert head.startswith(b"HTTP/1.1 200")
    assert len(await served.rows()) == 2


async def test_requests_that_come_together_are_answered_in_turn(serve: Start, doubao: DoubaoFake) -> None:
    """Whole ones, one that is cut anywhere, and one for aiohttp at the end."""
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    stream = request() + request(body=json.dumps(question("再见")).encode()) + request() + last
    served = await serve(env=doubao.environ)
    for cut in range(1, len(stream), 97):
        async with connected(served.port()) as (reader, writer):
            writer.write(stream[:cut])
            await asyncio.sleep(0.001)
            writer.write(stream[cut:])
            for _ in range(3):
                head, body = await whole(reader)
                assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["choices"]
            _, body = await whole(reader)
            assert json.loads(body) == {"status": "ok"}


async def test_connection_close_is_obeyed(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env=doubao.environ)
    for stream in (False, True):
        async with connected(served.port()) as (reader, writer):
            writer.write(request("Connection: close", body=json.dumps(question(stream=stream)).encode()))
            answer = await reader.read()
    assert b"Connection: close" in answer and answer.endswith(b"0\r\n\r\n")


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent(
    serve: Start, doubao: DoubaoFake
) -> None:
    served = await serve(env={**doubao.environ, "MOGINE_MAX_BODY_BYTES": "2048"})
    async with connected(served.port()) as (reader, writer):
        writer.write(f"{HEAD}Content-Length: 1000000\r\n\r\n".encode() + b"x" * 100_000)
        head, body = await whole(reader)
        assert head.startswith(b"HTTP/1.1 413") and b"Connection: close" in head
        assert json.loads(body)["error"]["reason"] == "payload_too_large"
        writer.write(b"x" * 900_000)  # who sends on is not cut off, so that the answer arrives
        await writer.drain()
        assert await reader.read() == b""
    assert doubao.requests == []


async def test_a_server_that_stops_ends_idle_connections(home: Path, doubao: DoubaoFake) -> None:
    loaded = load_settings({**DEFAULTS, **doubao.environ}, home)
    async with runner.started(loaded, ("proxy",)) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.settings.proxy.port)
        writer.write(request())
        await whole(reader)
        fresh, other = await asyncio.open_connection("127.0.0.1", running.settings.proxy.port)
    async with asyncio.timeout(5):
        assert await reader.read() == b"" and await fresh.read() == b""
    writer.close()
    other.close()


async def test_a_visitor_who_leaves_ends_the_vendors_answer(serve: Start, doubao: DoubaoFake) -> None:
    doubao.play(script(endless("字", every_s=0.01)))
    served = await serve(env=doubao.environ)
    async with connected(served.port()) as (reader, writer):
        writer.write(request(body=json.dumps(question(stream=True)).encode()))
        await reader.readuntil(b"data: ")
    await served.until(lambda: is_idle(served))
    await served.row_with("aborted")


# --- any bytes, in any pieces ------------------------------------------------------------------------


class Successor(asyncio.Protocol):
    """Stands where aiohttp's protocol does, and keeps what it is given."""

    def __init__(self) -> None:
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data


class Transport(asyncio.Transport):
    """A visitor who reads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = write_eof = close

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None:
        raise AssertionError("so little fits into the buffer")


@dataclass
class Heard:
    """What became of some bytes: bodies that were answered, and what was left to aiohttp."""

    bodies: list[bytes]
    left: bytes


async def fed(app: web.Application, pieces: Sequence[bytes]) -> Heard:
    """`pieces` given to a lane one after the other, each after the answers to those before."""
    heard = Heard([], b"")
    successors: list[Successor] = []

    def successor() -> Successor:
        successors.append(Successor())
        return successors[-1]

    class Frame:
        def cors_lines(self, request: ShortRequest) -> bytes:
            return b""

        async def answer(self, request: ShortRequest, *_: object) -> web.StreamResponse:
            request[REQUEST_ID] = "0" * 44
            heard.bodies.append(request.body)
            return ShortJson(b"{}")

    app[FRAME] = cast(Any, Frame())
    app[STATE] = ServerState()
    lanes = Lanes(app, successor, max_body_bytes=2048, keep_alive_s=30)
    lane, transport = lanes(), Transport()
    transport.protocol = lane
    lane.connection_made(transport)
    for piece in pieces:
        if not transport.is_closed:
            transport.protocol.data_received(piece)
        for _ in range(8):
            await asyncio.sleep(0)
    lane.connection_lost(None)
    heard.left = b"".join(one.received for one in successors)
    assert len(successors) <= 1
    return heard


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


BODIES = st.lists(st.binary(max_size=40), max_size=3)
TAILS = st.sampled_from(
    [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n\r\n", b"P", b"POST /x HTTP/1.1\r\n\r\n", b"\0\xff"]
)


@given(bodies=BODIES, tail=TAILS, places=st.lists(st.integers(0, 2000), max_size=8))
@settings(deadline=None)
def test_requests_in_any_pieces_are_heard_alike(bodies: list[bytes], tail: bytes, places: list[int]) -> None:
    """Every body once and whole, in turn; and what follows goes to aiohttp, no byte lost or doubled."""
    app = web.Application()
    app[SHORT_ROUTES] = {LLM: (Route("POST", LLM, nobody, Access.VISITOR), {})}
    data = b"".join(request(body=body) for body in bodies) + tail
    heard = asyncio.run(fed(app, cut(data, places)))
    assert heard.bodies == bodies
    # What may still become a request for the lane waits there; blank lines mean nothing to anybody.
    if tail == b"\r\n\r\n":
        assert tail.endswith(heard.left)
    else:
        assert heard.left == tail or (heard.left == b"" and tail == b"P")


@given(
    place=st.integers(0, 2000), new=st.binary(max_size=3), places=st.lists(st.integers(0, 2000), max_size=4)
)
@settings(deadline=None, max_examples=300)
def test_a_spoilt_request_is_answered_whole_or_left_whole(place: int, new: bytes, places: list[int]) -> None:
    """A body of its announced length, or all of the bytes for aiohttp: never a part of each."""
    app = web.Application()
    app[SHORT_ROUTES] = {LLM: (Route("POST", LLM, nobody, Access.VISITOR), {})}
    data = request("X-Note: a")
    place %= len(data)
    spoilt = data[:place] + new + data[place + len(new) :]
    heard = asyncio.run(fed(app, cut(spoilt, places)))
    if heard.bodies:
        head, _, rest = spoilt.partition(b"\r\n\r\n")
        length = int(head.lower().rpartition(b"content-length:")[2].split(b"\r\n")[0])
        assert heard.bodies[0] == rest[:length]
        assert heard.left in (b"", rest[length:])
    else:
        assert heard.left in (b"", spoilt)


async def nobody(request: ShortRequest) -> web.StreamResponse:
    raise AssertionError("the frame of these tests answers by itself")
