"""A vendor that sends rubbish, too much or without end, to a proxy that is a process of its own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.serve.conftest import Reply, Served, Start, assert_envelope, is_idle, question, read_rows
from tests.servers import Child, Spawn
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.raw import RawFake
from tests.upstreams.script import (
    Step,
    drip,
    endless,
    finish,
    garble,
    gzip_bomb,
    head,
    say,
    script,
    send_raw,
    think,
    usage,
)
from tests.upstreams.server import Fake

KINDS = ("doubao", "dashscope")
MIB = 1 << 20
SURROGATE = b'data: {"choices":[{"index":0,"delta":{"content":"a\\ud800b"},"finish_reason":null}]}\n\n'
BREAKS: dict[str, list[Step]] = {
    "json": [say("一"), garble("json"), say("二")],
    "list": [say("一"), garble("list"), say("二")],
    "html": [say("一"), garble("html"), say("二")],
    "utf8": [say("一"), garble("utf8"), say("二")],
    "no blank line": [say("一"), garble("no_newline"), say("二")],
    "nul": [say("一"), garble("nul"), say("二")],
    "surrogate": [say("一"), garble("surrogate"), say("二")],
    "binary": [say("一"), send_raw(bytes(range(256)) * 40 + b"\n\n"), say("二")],
    "line of 24 MiB": [say("一"), send_raw(b"data: " + b"x" * MIB, 24), say("二")],
    "no newline ever": [say("一"), send_raw(b"x" * 65536, 640)],
    "lines without end": [say("一"), send_raw(b"data: x\n" * 8192, 640)],
    "blank lines without end": [say("一"), send_raw(b"\n" * 65536, 1280)],
    "comments without end": [say("一"), send_raw(b": x\n\n" * 10000, 1400)],
}


def fake_of(kind: str, *steps: Any) -> Fake:
    return DoubaoFake(*steps) if kind == "doubao" else DashScopeFake(*steps)


def settings_of(fake: Fake, **more: str) -> dict[str, str]:
    return {**fake.environ, "DOUBAO_MODEL": MODEL, **more}


async def ask(child: Child, path: str, body: Any) -> Reply:
    async with asyncio.timeout(30), aiohttp.request("POST", child.url() + path, json=body) as response:
        return Reply(response.status, response.headers, await response.read())


def is_broken_off(reply: Reply) -> bool:
    """Whether the answer ended with an error that nobody can take for a whole answer."""
    name, data = reply.events[-1]
    return name == "error" and "error" in data and b"[DONE]" not in reply.body


@pytest.mark.parametrize("kind", KINDS)
async def test_rubbish_in_a_stream_ends_in_valid_output_or_an_error_in_little_memory(
    kind: str, spawn: Spawn
) -> None:
    """F7, F9, P2, P14, P41: whatever comes, what goes out is UTF-8 and JSON."""
    async with fake_of(kind) as fake:
        child = await spawn("proxy", settings_of(fake))
        fake.play(script(say("好")))
        for path, body in ((f"/api/llm/{kind}", question(stream=True)), ("/api/chat", {"question": "x"})):
            await ask(child, path, body)
        for name, steps in BREAKS.items():
            is_large = any(word in name for word in ("without end", "MiB", "ever"))
            fake.play(script(*steps))
            child.forget_peak()
            before = child.memory_kib()
            for path in (f"/api/llm/{kind}", "/v1/chat/completions", "/api/chat")[: 1 if is_large else 3]:
                reply = await ask(child, path, question(stream=True, model=kind, question="x"))
                assert reply.status == 200, (name, path, reply.body[:300])
                reply.body.decode("utf-8")
                whole = reply.events[-1] == ("", "[DONE]") or reply.events[-1][0] == "done"
                assert (whole and not is_large) or is_broken_off(reply), (name, path, reply.body[-300:])
                assert "一" in reply.body.decode()
            assert child.memory_kib("VmHWM") - before <= 16 * 1024, name
        await _is_well(child, fake, kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_rubbish_instead_of_a_whole_answer_is_a_502(kind: str, spawn: Spawn) -> None:
    """F6, F7, F8."""
    bodies = [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'{"choices":',
        b'{"choices":[{"message":{"content":"\xff"}}]}',
        b'{"choices":{}}',
        b'{"output":[]}',
        b"{" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a":' + b"9" * 100_000 + b"}",
        bytes(range(256)) * 100,
        b"\xef\xbb\xbf",
    ]
    async with fake_of(kind) as fake:
        child = await spawn("proxy", settings_of(fake))
        for body in bodies:
            fake.play(script(send_raw(body)))
            reply = await ask(child, f"/api/llm/{kind}", question())
            assert reply.status == 502, (body[:40], reply.body[:300])
            assert reply.json["error"]["type"] == "proxy_error"
            fake.play(script(say("好")))  # else the vendor would be left alone
            assert (await ask(child, f"/api/llm/{kind}", question())).status == 200
        child.forget_peak()
        before = child.memory_kib()
        for play in (gzip_bomb(256), script(send_raw(b'{"a":"' + b"x" * MIB, 200))):
            fake.play(play)
            for stream in (True, False):
                reply = await ask(child, f"/api/llm/{kind}", question(stream=stream))
                assert reply.status == 502, reply.body[:300]
        assert child.memory_kib("VmHWM") - before <= 16 * 1024
        await _is_well(child, fake, kind)


async def _is_well(child: Child, fake: Fake, kind: str) -> None:
    """After all that no connection, answer or line of a traceback is left."""
    fake.play(script(say("好")))
    reply = await ask(child, "/api/chat", {"question": "x", "provider": kind})
    assert dict(reply.events)["done"]["finish_reason"] == "stop", reply.body
    await fake.wait_until(lambda: fake.open_connections <= 1, "connections to be closed")
    assert "Traceback" not in child.stderr


@pytest.mark.parametrize(
    "status_line", [b"HTTP/1.1 200", b"HTTP/1.1 999 X", b"ICY 200 OK", b"HTTP/1.1 101 X", b""]
)
async def test_what_is_hardly_http_is_a_502(status_line: bytes, serve: Start) -> None:
    """F7."""
    heads = [
        b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"\r\nContent-Type: text/event-stream\r\n\r\n\xff\xfe\x00",
    ]
    for rest in heads:
        async with RawFake(status_line + rest) as fake:
            env = {"DOUBAO_API_KEY": "test-key-doubao", "DOUBAO_BASE_URL": fake.origin}
            served = await serve(env=env)
            for stream in (True, False):
                reply = await served.post("/api/llm/doubao", question(stream=stream))
                if reply.status != 200:
                    assert reply.status == 502 and reply.json["error"]["type"] == "proxy_error"
                else:
                    assert is_broken_off(reply)
        assert is_idle(served)


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake() as fake:
        yield fake


@pytest.mark.parametrize("stream", [True, False])
async def test_a_fast_answer_without_end_is_cut_by_its_size(
    stream: bool, serve: Start, doubao: DoubaoFake
) -> None:
    """F9, P14."""
    served: Served = await serve(env=settings_of(doubao))
    for play in (endless("字" * 100), think("嗯" * 400_000), say("x" * 100_000)):
        doubao.play(script(play))
        reply = await served.post("/api/llm/doubao", question(stream=stream))
        if reply.status == 200:
            assert stream and is_broken_off(reply)
            assert reply.events[-1][1]["error"]["code"] == 502
        else:
            assert reply.status == 502 == reply.json["error"]["code"], reply.body[:300]
    await served.until(lambda: is_idle(served))


async def test_a_slow_answer_without_end_is_cut_by_its_time(serve: Start, doubao: DoubaoFake) -> None:
    """F9, P14: also when it never falls silent."""
    served = await serve(env=settings_of(doubao, MOGINE_ANSWER_TIMEOUT="0.5"))
    doubao.play(script(endless("字", every_s=0.02)))
    for path, body in (("/api/llm/doubao", question(stream=True)), ("/api/chat", {"question": "x"})):
        reply = await served.post(path, body)
        assert is_broken_off(reply)
        assert reply.events[-1][1]["error"]["reason"] == "upstream_timeout"
        await doubao.wait_disconnect()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_drips_byte_by_byte_is_whole(kind: str, serve: Start) -> None:
    """F10, P2."""
    async with fake_of(kind, script(head(), drip(1, 0.0002), say("你好，", "🙂"), usage(1, 2))) as fake:
        served = await serve(env=settings_of(fake))
        reply = await served.post(f"/api/llm/{kind}", question(stream=True))
    said = "".join(c["delta"].get("content") or "" for f in reply.frames[:-1] for c in f["choices"])
    assert said == "你好，🙂" and reply.frames[-1] == "[DONE]"


async def test_ten_thousand_events_do_not_keep_others_waiting(spawn: Spawn, doubao: DoubaoFake) -> None:
    """F10, P42: another visitor is answered in between."""
    doubao.play(script(say(*["a"] * 10_000), finish("stop")))
    child = await spawn("proxy", settings_of(doubao))
    slowest = 0.0
    async with aiohttp.ClientSession() as session:
        running = asyncio.create_task(ask(child, "/api/llm/doubao", question(stream=True)))
        while not running.done():
            began = time.monotonic()
            async with session.get(child.url() + "/healthz") as response:
                assert response.status == 200
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.005)
        reply = await running
    frames = [json.loads(f[6:]) for f in reply.body.decode().split("\n\n") if f.startswith("data: {")]
    said = "".join(c["delta"].get("content") or "" for f in frames for c in f["choices"])
    assert said == "a" * 10_000
    assert slowest < 1.0, "far above what one block of events takes, far below all of them together"
    child.send(15)
    assert await child.ended() == 0
    assert [(row.status, len(row.answer)) for row in read_rows(child.home)] == [("ok", 10_000)]


async def test_a_compressed_answer_is_refused_before_its_body_is_read(
    serve: Start, doubao: DoubaoFake
) -> None:
    """F8."""
    doubao.play(gzip_bomb(64))
    served = await serve(env=settings_of(doubao))
    reply = await served.post("/api/llm/doubao", question())
    assert "compressed" in assert_envelope(reply, 502, "upstream_bad_response")
