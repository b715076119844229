"""Requests that are hardly HTTP, byte by byte, to servers that are processes of their own.

A plain question is read by our own lane, all else by aiohttp, with its C parser or, where that is not
installed, the one in Python: each has to refuse what two readers could understand differently.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

import aiohttp
import pytest

from mogine.serve import app, runner
from tests.serve.conftest import Served, Start, is_idle, question
from tests.servers import ADMIN_TOKEN, Child, Spawn
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import say, script

LLM = b"POST /api/llm/doubao HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(question()).encode()
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def chunked(body: bytes, size: int = 0) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)] if size else [body]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# Two readers could see different requests in these; each is followed by one that must not be seen.
SMUGGLING = {
    "CL and TE": LENGTH + CHUNKED + b"\r\n" + chunked(BODY),
    "TE and CL": CHUNKED + LENGTH + b"\r\n" + chunked(BODY),
    "CL 6, TE ends at once": b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "two lengths": LENGTH + b"Content-Length: 0\r\n\r\n",
    "two lengths in one line": b"Content-Length: 0, %d\r\n\r\n" % len(BODY),
    "length +5": b"Content-Length: +5\r\n\r\nhello",
    "length -1": b"Content-Length: -1\r\n\r\n",
    "length 1_0": b"Content-Length: 1_0\r\n\r\n" + BODY,
    "length 0x5": b"Content-Length: 0x5\r\n\r\nhello",
    "length of Arabic digits": "Content-Length: ٥\r\n\r\nhello".encode(),
    "length of 30 digits": b"Content-Length: %b\r\n\r\n" % (b"9" * 30),
    "empty length": b"Content-Length: \r\n\r\n",
    "TE xchunked": b"Transfer-Encoding: xchunked\r\n\r\n" + chunked(BODY),
    "TE chunked, identity": b"Transfer-Encoding: chunked, identity\r\n\r\n" + chunked(BODY),
    "TE twice": CHUNKED + CHUNKED + b"\r\n" + chunked(BODY),
    "TE after a blank": b"Transfer-Encoding : chunked\r\n\r\n" + chunked(BODY),
    "TE with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n" + chunked(BODY),
    "folded header": LENGTH + b"X: a\r\n b\r\n\r\n" + b"",
    "blank before the colon": b"Content-Length : 5\r\n\r\nhello",
    "header without a colon": LENGTH + b"nonsense\r\n\r\n" + BODY,
    "NUL in a header": LENGTH + b"X: a\0b\r\n\r\n" + BODY,
    "bare CR in a header": LENGTH + b"X: a\rContent-Length: 0\r\n\r\n" + BODY,
    "chunk size 0x5": CHUNKED + b"\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size +5": CHUNKED + b"\r\n+5\r\nhello\r\n0\r\n\r\n",
    "chunk size -5": CHUNKED + b"\r\n-5\r\nhello\r\n0\r\n\r\n",
    "chunk size 5_0": CHUNKED + b"\r\n5_0\r\nhello\r\n0\r\n\r\n",
    "chunk size of 20 digits": CHUNKED + b"\r\n" + b"F" * 20 + b"\r\nhello\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\n\r\nhello\r\n0\r\n\r\n",
    "chunk longer than told": CHUNKED + b"\r\n2\r\nhello\r\n0\r\n\r\n",
    "LF in a chunk extension": CHUNKED + b"\r\n5;a\nb\r\nhello\r\n0\r\n\r\n",
}
WHOLE = {
    "two hosts": LLM + b"Host: a\r\n" + LENGTH + b"\r\n" + BODY,
    "no host": LLM.replace(b"Host: localhost\r\n", b"") + LENGTH + b"\r\n" + BODY,
    "another host": LLM.replace(b"localhost", b"evil.example") + LENGTH + b"\r\n" + BODY,
    "absolute form": b"POST http://evil.example/api/llm/doubao HTTP/1.1\r\nHost: evil.example\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n\r\n",
    "PRI": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    "long address": b"POST /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long header": LLM + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
    "100,000 headers": LLM + b"X: a\r\n" * 100_000 + b"\r\n",
    "HTTP/9.9": b"POST /api/llm/doubao HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "odd method": b"P\x00ST / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CRLF in the address": b"GET /a%0d%0aSet-Cookie:%20x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "climbing address": b"GET /chat/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "encoded climbing": b"GET /chat/%2e%2e%2f%2e%2e%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in the address": b"GET /chat/a%00.js HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "nonsense": b"\r\n\r\n\r\n\r\nnonsense\r\n\r\n",
    "zip bomb": LLM + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b" + bytes(18),
    "endless trailers": LLM + CHUNKED + b"\r\n0\r\n" + b"X: y\r\n" * 100_000,
    "endless chunk extension": LLM + CHUNKED + b"\r\n1;" + b"x" * 200_000,
}


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("好"))) as fake:
        yield fake


async def said(port: int, request: bytes, *, wait_s: float = 0.3) -> bytes:
    """What comes back, until the server closes or has been silent for `wait_s` after its first word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            await asyncio.wait_for(writer.drain(), 5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while block := await asyncio.wait_for(reader.read(65536), wait_s if answer else 1.0):
                answer += block
    finally:
        writer.close()
    return answer


def statuses(answer: bytes) -> list[int]:
    """The status of every response in it."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", answer)]


async def with_parser(spawn: Spawn, parser: str, env: dict[str, str]) -> Child:
    more = {"AIOHTTP_NO_EXTENSIONS": "1"} if parser == "python" else {}
    child: Child = await spawn("all", {**env, **more})
    return child


@pytest.mark.parametrize("parser", ["c", "python"])
async def test_what_two_readers_could_read_differently_is_refused(
    parser: str, spawn: Spawn, doubao: DoubaoFake
) -> None:
    """B17, P41."""
    child = await with_parser(spawn, parser, {**doubao.environ, "DOUBAO_MODEL": MODEL})
    answers = await asyncio.gather(
        *(said(child.port(), LLM + shape + SMUGGLED) for shape in SMUGGLING.values()),
        *(said(child.port("analytics"), _to_analytics(shape) + SMUGGLED) for shape in SMUGGLING.values()),
    )
    for name, answer in zip([*SMUGGLING, *SMUGGLING], answers, strict=True):
        found = statuses(answer)
        assert all(400 <= status < 500 for status in found), (name, answer[:400])
        assert len(found) <= 1, (name, answer[:600])
        assert b"Traceback" not in answer
    assert doubao.requests == []
    await _is_well(child)
    assert "/smuggled" not in child.stderr


def _to_analytics(shape: bytes) -> bytes:
    head = b"POST /api/analytics/cleanup HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Authorization: Bearer %b\r\n" % ADMIN_TOKEN.encode() + shape


@pytest.mark.parametrize("parser", ["c", "python"])
async def test_what_is_no_request_for_us_is_refused_and_costs_nothing(
    parser: str, spawn: Spawn, doubao: DoubaoFake
) -> None:
    """B16, B18, B19, B24, B32, P23, P41."""
    child = await with_parser(spawn, parser, {**doubao.environ, "DOUBAO_MODEL": MODEL})
    for server in ("proxy", "knowledge base", "analytics"):
        answers = await asyncio.gather(*(said(child.port(server), shape) for shape in WHOLE.values()))
        for name, answer in zip(WHOLE, answers, strict=True):
            found = statuses(answer)
            assert all(400 <= status < 500 for status in found), (server, name, answer[:400])
            assert b"Traceback" not in answer and b"Set-Cookie" not in answer, (server, name)
    assert doubao.requests == []
    await _is_well(child)
    lines = child.stderr.splitlines()
    assert not any(line.startswith(("Set-Cookie", "X:")) for line in lines)
    assert max(map(len, lines)) < 2_000


async def _is_well(child: Child) -> None:
    async with aiohttp.ClientSession() as session:
        for server in ("proxy", "knowledge base", "analytics"):
            async with session.get(child.url(server) + "/healthz") as response:
                assert response.status == 200
    assert "Traceback" not in child.stderr


@pytest.mark.parametrize("parser", ["c", "python"])
async def test_odd_but_clear_requests_are_answered(parser: str, spawn: Spawn, doubao: DoubaoFake) -> None:
    """B16: chunks of one byte, extensions, trailers, packets cut anywhere, several requests at once."""
    child = await with_parser(spawn, parser, {**doubao.environ, "DOUBAO_MODEL": MODEL})
    plain = LLM + LENGTH + b"\r\n" + BODY
    shapes = [
        plain,
        LLM + CHUNKED + b"\r\n" + chunked(BODY, 1),
        LLM + CHUNKED + b"\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        LLM + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\nX-Trailer: y\r\n\r\n" % (len(BODY), BODY),
        plain.replace(b"Host: localhost", b"hOsT:localhost  "),
    ]
    for shape in shapes:
        assert statuses(await said(child.port(), shape)) == [200], shape[:200]
    assert (
        statuses(await said(child.port(), plain * 3 + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        == [200] * 4
    )
    for cut in range(1, len(plain), 7):
        reader, writer = await asyncio.open_connection("127.0.0.1", child.port())
        writer.write(plain[:cut])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(plain[cut:])
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 200"), cut
        writer.close()


# --- half a request ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (LLM[:40], None),
        (b"GET /heal", None),
        (LLM + LENGTH + b"\r\n" + BODY[:5], 408),
        (LLM + CHUNKED + b"\r\n5\r\n{", 408),
    ],
    ids=["head", "head of a GET", "body", "chunked body"],
)
async def test_half_a_request_is_given_up(
    sent: bytes, status: int | None, serve: Start, doubao: DoubaoFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7, with shorter times than 15 and 30 seconds."""
    monkeypatch.setattr(app, "BODY_IDLE_S", 0.2)
    monkeypatch.setattr("mogine.serve.lane.BODY_IDLE_S", 0.2)
    monkeypatch.setattr(runner, "KEEP_ALIVE_S", 0.3)
    served: Served = await serve(env=doubao.environ)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port())
    writer.write(sent)
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b"\r\n") if status else await reader.read()
    assert statuses(answer)[:1] == ([status] if status else []), answer
    writer.close()


async def test_five_hundred_half_requests_keep_nobody_waiting_and_leave_nothing_behind(
    spawn: Spawn, doubao: DoubaoFake
) -> None:
    """P7, P42."""
    child = await spawn("proxy", {**doubao.environ, "DOUBAO_MODEL": MODEL})
    async with aiohttp.ClientSession() as session:

        async def ask() -> int:
            async with session.post(child.url() + "/api/llm/doubao", json=question()) as response:
                return response.status

        assert await ask() == 200
        before = child.descriptors
        halves = [
            LLM[:50],
            LLM + LENGTH + b"\r\n" + BODY[:9],
            b"GET / HTTP/1.1\r\nHo",
            LLM + CHUNKED + b"\r\n1",
        ]
        writers = []
        for number in range(500):
            _, writer = await asyncio.open_connection("127.0.0.1", child.port())
            writer.write(halves[number % 4])
            writers.append(writer)
        assert child.descriptors >= before + 400
        assert [await ask() for _ in range(10)] == [200] * 10
        for writer in writers:
            writer.close()
        async with asyncio.timeout(20):
            while child.descriptors > before + 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert "Traceback" not in child.stderr


async def test_a_visitor_who_closes_only_the_sending_side_leaves_no_answer_open(
    serve: Start, doubao: DoubaoFake
) -> None:
    """F11: half-closed in the head, in the body, and after the question."""
    served: Served = await serve(env={**doubao.environ, "DOUBAO_MODEL": MODEL})
    for sent in (LLM[:40], LLM + LENGTH + b"\r\n" + BODY[:5], LLM + LENGTH + b"\r\n" + BODY):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port())
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
    await served.until(lambda: is_idle(served))
