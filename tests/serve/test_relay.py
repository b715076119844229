"""The short ways of the proxy: frames pushed to old and new visitors, whole answers in one piece."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.serve.conftest import Served, Start, question
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import endless, say, script, usage

LLM = "/api/llm/doubao"


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("一", "二", "三"), usage(3, 3))) as fake:
        yield fake


async def raw(served: Served, head: str, *, stream: bool) -> tuple[dict[str, str], bytes]:
    """Headers and body bytes of one question, read until the server closes."""
    body = json.dumps(question(stream=stream)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port())
    rest = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(f"{head}{rest}".encode() + body)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    head_bytes, _, sent = answer.partition(b"\r\n\r\n")
    lines = head_bytes.decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}, sent


async def test_a_visitor_of_http_1_0_gets_the_frames_unchunked_until_the_connection_ends(
    serve: Start, doubao: DoubaoFake
) -> None:
    """As nginx is, unless it is told otherwise."""
    served = await serve(env=doubao.environ)
    headers, body = await raw(served, f"POST {LLM} HTTP/1.0\r\n", stream=True)
    assert "transfer-encoding" not in headers and "content-length" not in headers
    frames = body.decode().split("\n\n")
    assert frames[-1] == "" and frames[-2] == "data: [DONE]"
    said = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert "".join(c["delta"].get("content", "") for f in said for c in f["choices"]) == "一二三"


async def test_a_newer_visitor_gets_the_same_frames_chunked(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env=doubao.environ)
    _, old = await raw(served, f"POST {LLM} HTTP/1.0\r\n", stream=True)
    headers, body = await raw(served, f"POST {LLM} HTTP/1.1\r\nConnection: close\r\n", stream=True)
    assert headers["transfer-encoding"] == "chunked"
    plain, rest = b"", body
    while True:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        plain += rest[:count]
        assert rest[count : count + 2] == b"\r\n"
        rest = rest[count + 2 :]
        if not count:
            break
    assert rest == b""

    def texts(stream: bytes) -> list[object]:
        frames = [f.removeprefix("data: ") for f in stream.decode().split("\n\n")]
        return [json.loads(f)["choices"] for f in frames if f.startswith("{")]

    assert texts(plain) == texts(old)


async def test_the_short_way_of_a_whole_answer_bears_the_headers_of_the_long_one(
    serve: Start, doubao: DoubaoFake
) -> None:
    served = await serve(env=doubao.environ)
    long, long_body = await raw(served, f"POST {LLM} HTTP/1.1\r\nConnection: close\r\n", stream=False)
    reply = await served.post(LLM, question())
    short = {name.lower(): value for name, value in reply.headers.items()}
    assert long.pop("connection") == "close" and "connection" not in short
    assert set(short) == set(long)
    varying = {"date", "x-request-id", "content-length"}
    assert {n: v for n, v in short.items() if n not in varying} == {
        n: v for n, v in long.items() if n not in varying
    }
    assert len(short["x-request-id"]) == len(long["x-request-id"]) == 44
    assert int(short["content-length"]) == len(reply.body)
    assert json.loads(long_body)["choices"] == reply.json["choices"]


async def test_a_connection_serves_one_whole_answer_after_the_other(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env=doubao.environ)
    body = json.dumps(question()).encode()
    one = f"POST {LLM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{one}Content-Length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port())
    writer.write(request * 3)  # pipelined
    async with asyncio.timeout(5):
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["object"] == "chat.completion"
    writer.close()
    assert len(await served.rows()) == 3


async def test_a_visitor_who_reads_on_gets_all_of_a_fast_answer(serve: Start, doubao: DoubaoFake) -> None:
    """Held back while the visitor slept, and nothing lost or doubled by it."""
    pieces = [f"{number:05d} " * 20 for number in range(500)]
    doubao.play(script(say(*pieces)))
    served = await serve(env=doubao.environ)
    body = json.dumps(question(stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port(), limit=2048)
    writer.write(
        f"POST {LLM} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await asyncio.sleep(0.1)
    received = b""
    async with asyncio.timeout(10):
        while block := await reader.read(1024):
            received += block
    writer.close()
    frames = [f for f in received.partition(b"\r\n\r\n")[2].decode().split("\n\n") if f.startswith("data: {")]
    said = "".join(
        choice["delta"].get("content", "")
        for frame in frames
        for choice in json.loads(frame.removeprefix("data: "))["choices"]
    )
    assert said == "".join(pieces)
    assert (await served.rows())[0].answer == said


async def test_many_streams_at_once_do_not_mix(serve: Start, doubao: DoubaoFake) -> None:
    doubao.play(script(endless("字", every_s=0.001)))
    served = await serve(env={**doubao.environ, "MOGINE_ANSWER_TIMEOUT": "0.3"})
    replies = await asyncio.gather(
        *(
            served.post(LLM, question(stream=True), headers={"X-Forwarded-For": f"203.0.113.{n}"})
            for n in range(20)
        )
    )
    for reply in replies:
        names = [name for name, _ in reply.events]
        assert names[-1] == "error" and set(names[:-1]) == {""}
        assert reply.events[-1][1]["error"]["reason"] == "upstream_timeout"
