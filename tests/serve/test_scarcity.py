"""A machine short of something: descriptors, names, settings, ports; and what load leaves behind."""

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.conftest import Run
from tests.serve.conftest import Reply, Start, assert_envelope, is_idle, question, read_rows
from tests.servers import DEFAULTS, Child, Spawn
from tests.upstreams.doubao import KEY, MODEL, DoubaoFake
from tests.upstreams.script import cut, hang, refuse, say, script, usage

LLM = "/api/llm/doubao"
PLAY = script(say("好"), usage(1, 1))


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(PLAY) as fake:
        yield fake


def settings_of(fake: DoubaoFake, **more: str) -> dict[str, str]:
    return {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_MAX_STREAMS_PER_VISITOR": "500", **more}


async def ask(child: Child, *, stream: bool = False) -> Reply:
    """One question on a connection of its own; status 0 when even that could not be had."""
    try:
        async with (
            asyncio.timeout(10),
            aiohttp.request("POST", child.url() + LLM, json=question(stream=stream)) as response,
        ):
            return Reply(response.status, response.headers, await response.read())
    except (aiohttp.ClientError, TimeoutError):
        return Reply(0, {}, b"")


async def until_answered(child: Child) -> None:
    async with asyncio.timeout(30):
        while (await ask(child)).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


# --- descriptors ---------------------------------------------------------------------------------


async def test_without_descriptors_questions_are_refused_and_it_recovers_by_itself(
    spawn: Spawn, doubao: DoubaoFake
) -> None:
    """F22."""
    doubao.play(script(say("一"), hang()))
    child = await spawn("proxy", settings_of(doubao))
    pid = child.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))
        )
        running = [
            await stack.enter_async_context(session.post(child.url() + LLM, json=question(stream=True)))
            for _ in range(3)
        ]
        for one in running:
            assert "一" in (await one.content.readuntil(b"\n\n")).decode()
        # Room for one more visitor, and none for a way to the vendor.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (child.descriptors + 1, before[1]))
        doubao.play(PLAY)
        refused = await ask(child)
        if refused.status:
            assert_envelope(refused, 503, "overloaded")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (child.descriptors, before[1]))
        assert {reply.status for reply in await asyncio.gather(*(ask(child) for _ in range(20)))} <= {0, 503}
        assert child.process.poll() is None
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        await until_answered(child)
        assert all(request.disconnected_at is None for request in doubao.requests[:3]), "streams went on"
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert "Traceback" not in child.stderr
    assert len(child.stderr.splitlines()) < 200, "the log is not flooded"


async def test_load_with_every_kind_of_end_leaves_nothing_behind(spawn: Spawn, doubao: DoubaoFake) -> None:
    """P42, F11."""
    child = await spawn("proxy", settings_of(doubao))
    await asyncio.gather(*(ask(child) for _ in range(8)))
    descriptors, threads = child.descriptors, child.threads
    plays = [PLAY, script(say("一"), cut()), script(refuse(401)), script(say("一"), hang()), script(cut())]
    for _ in range(6):
        for play in plays:
            doubao.play(play)
            asked = len(doubao.requests)
            asking = [asyncio.create_task(ask(child, stream=number % 2 == 0)) for number in range(10)]
            if play is plays[3]:
                await doubao.wait_requests(asked + 1)
                for task in asking:
                    task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
    doubao.play(PLAY)
    await until_answered(child)
    async with asyncio.timeout(40):
        # Some kept connections to the vendor are no leak.
        while child.descriptors > descriptors + 3 or child.threads > threads + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    async with aiohttp.request("GET", child.url() + "/metrics") as response:
        assert "mogine_streams_open 0.0" in await response.text()
    assert "Traceback" not in child.stderr


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_name_that_is_not_found_is_told_with_its_setting(stream: bool, serve: Start) -> None:
    """F23: no resolver, or no such name."""
    served = await serve(env={"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": "http://vendor.invalid/api"})
    reply = await served.post(LLM, question(stream=stream))
    assert "DOUBAO_BASE_URL" in assert_envelope(reply, 502, "upstream_error")
    assert is_idle(served)


async def test_a_resolver_that_hangs_costs_one_thread_and_no_other_visitor(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F23."""
    real, answered, asked = socket.getaddrinfo, threading.Event(), []

    def slow(host: str, *args: object, **more: object) -> object:
        if host != "vendor.test":
            return real(host, *args, **more)  # type: ignore[arg-type]
        asked.append(host)
        answered.wait(30)
        raise socket.gaierror("nothing")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    env = {
        "DOUBAO_API_KEY": KEY,
        "DOUBAO_BASE_URL": "http://vendor.test/api",
        "MOGINE_CONNECT_TIMEOUT": "0.2",
    }
    served = await serve(env={**env, "MOGINE_MAX_STREAMS_PER_VISITOR": "50"})
    try:
        asking = [asyncio.create_task(served.post(LLM, question())) for _ in range(20)]
        assert (await served.post("/api/llm/extract", question())).status == 200
        assert (await served.ask("GET", "/healthz")).status == 200
        for reply in await asyncio.gather(*asking):
            assert_envelope(reply, 504, "upstream_timeout")
        assert len(asked) == 1
        assert (await served.rows())[-1].provider, "the record has a thread to be written in"
    finally:
        answered.set()


async def test_a_name_that_moves_is_found_where_it_is(
    serve: Start, doubao: DoubaoFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F23: the first of its addresses takes nobody."""
    real = socket.getaddrinfo

    def moving(host: str, port: int, *args: object, **more: object) -> object:
        if host != "vendor.test":
            return real(host, port, *args, **more)  # type: ignore[arg-type]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("127.0.0.9", "127.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    base_url = doubao.base_url.replace("127.0.0.1", "vendor.test")
    served = await serve(env=settings_of(doubao, DOUBAO_BASE_URL=base_url))
    assert (await served.post(LLM, question())).status == 200


# --- settings and ports --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"DOUBAO_API_KEY=test-secret-value\nnonsense test-secret-value\n", "line 2"),
        (b"MOGINE_PROXY_PORT=test-secret-value\n", "MOGINE_PROXY_PORT"),
        (b"DOUBAO_API_KEY=\xff\xfe\n", "UTF-8"),
        (b"# x\n" * 3_000_000, "1 MiB"),
        (None, "cannot be read"),
    ],
    ids=["line", "value", "no text", "10 MiB", "folder"],
)
def test_a_settings_file_that_cannot_be_used_is_named_and_nothing_starts(
    content: bytes | None, words: str, mogine: Run, home: Path
) -> None:
    """F24."""
    path = home / ".env"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    done = mogine("serve", "proxy")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    if words != "MOGINE_PROXY_PORT":
        assert "test-secret-value" not in done.stdout + done.stderr
    assert not (home / "data").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "link", "crlf", "bom"])
async def test_an_odd_settings_file_serves(kind: str, spawn: Spawn, home: Path, doubao: DoubaoFake) -> None:
    """F24."""
    path = home / ".env"
    lines = f"DOUBAO_API_KEY={KEY}\nDOUBAO_BASE_URL={doubao.base_url}\nDOUBAO_MODEL={MODEL}\n"
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "link":
        (home / "real.env").write_text(lines)
        path.symlink_to("real.env")
    elif kind == "crlf":
        path.write_bytes(lines.replace("\n", "\r\n").encode())
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    child = await spawn("proxy")
    expected = 503 if kind in ("missing", "empty") else 200
    assert (await ask(child)).status == expected


async def test_a_second_server_of_the_same_ports_says_so_and_the_first_goes_on(
    spawn: Spawn, mogine: Run, home: Path, doubao: DoubaoFake
) -> None:
    """F25, P40."""
    child = await spawn("all", settings_of(doubao))
    ports = {
        "MOGINE_PROXY_PORT": str(child.port()),
        "MOGINE_KB_PORT": str(child.port("knowledge base")),
        "MOGINE_ANALYTICS_PORT": str(child.port("analytics")),
    }
    done = await asyncio.to_thread(mogine, "serve", "all", env={**DEFAULTS, **ports})
    assert done.returncode == 2 and "in use" in done.stderr and "Traceback" not in done.stderr
    assert (await ask(child)).status == 200
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert [row.status for row in read_rows(home)] == ["ok"]
