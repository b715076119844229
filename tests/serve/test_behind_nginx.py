"""The proxy as in production: a process of its own behind a real nginx with TLS and a path prefix."""

import asyncio
import contextlib
import json
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, RateLimitError

from tests.fronts.nginx import PREFIX, Fronted, Nginx
from tests.serve.conftest import Reply, assert_envelope, question, read_rows
from tests.servers import Spawn
from tests.upstreams.doubao import KEY, MODEL, DoubaoFake
from tests.upstreams.script import hang, say, script, usage

LLM = "api/llm/doubao"
STREAMS = 100
FRAME = (
    'data: {{"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    '[{{"index":0,"delta":{{"role":"assistant","content":"{}"}},"finish_reason":{}}}]}}\n\n'
)


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("一"), hang())) as fake:
        yield fake


def settings_of(fake: DoubaoFake, **more: str) -> dict[str, str]:
    return {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_BASE_PATH": PREFIX, **more}


@contextlib.asynccontextmanager
async def browser(front: Nginx, address: str = "127.0.0.2") -> AsyncIterator[aiohttp.ClientSession]:
    """A client that trusts the certificate and calls from `address`, a loopback one."""
    connector = aiohttp.TCPConnector(ssl=front.ssl_context, limit=0, local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        yield session


async def ask(session: aiohttp.ClientSession, front: Nginx, path: str, body: Any, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with session.post(front.url(path), json=body, headers=names) as response:
        return Reply(response.status, response.headers, await response.read())


class Steps:
    """A vendor that sends a frame when it is told to, and not before."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.environ: dict[str, str] = {}

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            writer.write(head)
            while frame := await self.frames.get():
                writer.write(frame)
        writer.close()

    async def __aenter__(self) -> "Steps":
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.environ = {"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}"}
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


# --- streaming -----------------------------------------------------------------------------------


async def test_each_piece_is_seen_before_the_next_is_sent(spawn: Spawn, nginx: Fronted) -> None:
    """P1."""
    async with Steps() as vendor:
        child = await spawn("proxy", {**vendor.environ, "MOGINE_BASE_PATH": PREFIX})
        front = nginx(child.port())
        async with browser(front) as session, asyncio.timeout(20):
            vendor.frames.put_nowait(FRAME.format("0", "null").encode())
            async with session.post(front.url(LLM), json=question(stream=True)) as response:
                assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
                assert response.headers["Cache-Control"] == "no-cache, no-transform"
                assert "Content-Encoding" not in response.headers
                for number in range(1, 8):
                    seen = b""
                    while not seen.endswith(b"\n\n"):
                        seen += await response.content.readany()
                    assert f'"content":"{number - 1}"' in seen.decode()
                    vendor.frames.put_nowait(FRAME.format(number, "null").encode())
                vendor.frames.put_nowait(FRAME.format("", '"stop"').encode() + b"data: [DONE]\n\n")
                vendor.frames.put_nowait(b"")
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert not front.problems()


async def test_pages_and_the_assistant_work_under_the_prefix(spawn: Spawn, nginx: Fronted) -> None:
    child = await spawn("proxy", {"MOGINE_BASE_PATH": PREFIX})
    front = nginx(child.port())
    async with browser(front) as session:
        async with session.get(front.url("")) as response:
            assert response.status == 200
            assert response.url.path == f"{PREFIX}chat/", "the redirect stays behind the prefix"
        own_page = {"Origin": front.origin}
        answer = await ask(session, front, "api/chat", {"question": "x"}, **own_page)
        assert answer.events[-1][0] == "done"
        foreign = await ask(session, front, "api/chat", {"question": "x"}, Origin="https://evil.example")
        assert_envelope(foreign, 403, "origin_not_allowed")
        async with session.get(front.url("metrics")) as response:
            assert response.status == 401, "who comes through nginx is not local"


# --- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False], ids=["rst", "fin"])
async def test_a_visitor_who_leaves_frees_the_vendor_within_a_second(
    spawn: Spawn, nginx: Fronted, doubao: DoubaoFake, stream: bool, reset: bool
) -> None:
    """P5, B22."""
    child = await spawn("proxy", settings_of(doubao))
    front = nginx(child.port())
    body = json.dumps(question(stream=stream)).encode()
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", front.port, ssl=front.ssl_context, server_hostname="localhost"
    )
    writer.write(
        f"POST {PREFIX}{LLM} HTTP/1.1\r\nHost: localhost:{front.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await doubao.wait_requests(1)
    if stream:
        await asyncio.wait_for(reader.readuntil("一".encode()), 10)
    left_at = time.monotonic()
    if reset:
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    # asyncio's own close waits for the farewell of TLS; browsers do not.
    writer.transport.abort()
    assert await doubao.wait_disconnect() - left_at < 1.0
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert [(row.status, row.error_type) for row in read_rows(child.home)] == [("aborted", "client_left")]


# --- who it is -----------------------------------------------------------------------------------


async def test_two_visitors_behind_nginx_have_a_rate_each_and_no_header_makes_a_third(
    spawn: Spawn, nginx: Fronted, doubao: DoubaoFake
) -> None:
    """P12, B4."""
    doubao.play(script(say("好"), usage(1, 1)))
    child = await spawn("proxy", settings_of(doubao, MOGINE_RATE_LIMIT="3/hour"))
    front = nginx(child.port())
    async with browser(front, "127.0.0.2") as one, browser(front, "127.0.0.3") as two:
        assert [(await ask(one, front, LLM, question())).status for _ in range(4)] == [200] * 3 + [429]
        for number, name in enumerate(
            ("X_Forwarded_For", "X_Real_IP", "Forwarded", "True_Client_IP", "CF_Connecting_IP")
        ):
            forged = await ask(one, front, LLM, question(), **{name: f"198.51.100.{number}"})
            assert_envelope(forged, 429, "rate_limited")
        forged = await ask(one, front, LLM, question(), X_Forwarded_For="198.51.100.9, 127.0.0.1, 127.0.0.3")
        assert_envelope(forged, 429, "rate_limited")
        assert [(await ask(two, front, LLM, question())).status for _ in range(4)] == [200] * 3 + [429]
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert len({row.visitor for row in read_rows(child.home)}) == 2


# --- nginx itself is changed ---------------------------------------------------------------------


async def test_running_streams_survive_a_reload_and_end_with_a_restart(
    spawn: Spawn, nginx: Fronted, doubao: DoubaoFake
) -> None:
    """F13."""
    limits = {"MOGINE_MAX_STREAMS_PER_VISITOR": str(STREAMS)}
    child = await spawn("proxy", settings_of(doubao, **limits))
    front = nginx(child.port())
    async with browser(front) as session, contextlib.AsyncExitStack() as stack:
        body = question(stream=True)
        streams = await asyncio.gather(
            *(stack.enter_async_context(session.post(front.url(LLM), json=body)) for _ in range(STREAMS))
        )
        for response in streams:
            assert "一" in (await response.content.readuntil(b"\n\n")).decode()
        old = front.workers
        await asyncio.to_thread(front.reload)
        async with browser(front) as new, new.get(front.url("healthz")) as response:
            assert response.status == 200
        assert set(old) < set(front.workers), "the old worker stays as long as its streams do"
        assert all(request.disconnected_at is None for request in doubao.requests)
        await asyncio.to_thread(front.stop)
        stopped_at = time.monotonic()
        for index in range(STREAMS):
            assert await doubao.wait_disconnect(index) - stopped_at < 1.0
        await asyncio.to_thread(front.start)
        for response in streams:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    async with browser(front) as new:
        doubao.play(script(say("好")))
        assert (await ask(new, front, LLM, question())).status == 200
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert [row.status for row in read_rows(child.home)] == ["aborted"] * STREAMS + ["ok"]


# --- OpenAI's own client -------------------------------------------------------------------------


async def test_openais_client_works_through_nginx(spawn: Spawn, nginx: Fronted, doubao: DoubaoFake) -> None:
    doubao.play(script(say("你好", "🙂"), usage(7, 5)))
    child = await spawn("proxy", settings_of(doubao, MOGINE_RATE_LIMIT="3/hour"))
    front = nginx(child.port())
    async with AsyncOpenAI(
        base_url=front.url("v1"),
        api_key="anything",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(verify=front.ssl_context, trust_env=False),
    ) as client:
        assert "doubao" in {model.id async for model in client.models.list()}
        messages: Any = question("问")["messages"]
        whole = await client.chat.completions.create(model="doubao", messages=messages)
        assert whole.choices[0].message.content == "你好🙂"
        assert whole.usage is not None and whole.usage.total_tokens == 12
        stream = await client.chat.completions.create(
            model="doubao", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        pieces, total = "", 0
        async for chunk in stream:
            pieces += "".join(choice.delta.content or "" for choice in chunk.choices)
            total = chunk.usage.total_tokens if chunk.usage else total
        assert (pieces, total) == ("你好🙂", 12)
        with pytest.raises(BadRequestError):
            await client.chat.completions.create(model="doubao", messages=[])
        await client.chat.completions.create(model="doubao", messages=messages)
        with pytest.raises(RateLimitError) as refused:
            await client.chat.completions.create(model="doubao", messages=messages)
        assert refused.value.body is not None
