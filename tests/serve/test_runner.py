"""Start, stop and death of `mogine serve` as a process, and the runner's own steps."""

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from mogine.errors import SettingsError
from mogine.serve import runner
from mogine.settings import Settings
from tests.conftest import Run
from tests.serve.conftest import Start, question, read_rows
from tests.serve.test_proxy_leaving import Visitor
from tests.servers import DEFAULTS, Spawn
from tests.upstreams.doubao import KEY, DoubaoFake
from tests.upstreams.script import hang, pause, say, script

LLM = "/api/llm/doubao"


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake() as fake:
        yield fake


# --- the process ---------------------------------------------------------------------------------


async def test_all_three_serve_in_one_process_and_end_clean(spawn: Spawn, home: Path) -> None:
    child = await spawn("all")
    async with aiohttp.ClientSession() as session:
        for title in ("proxy", "knowledge base", "analytics"):
            async with session.get(child.url(title) + "/healthz") as response:
                assert await response.json() == {"status": "ok"}
        async with session.post(child.url() + "/api/chat", json={"question": "退款"}) as response:
            assert b"event: done" in await response.read()
    assert (home / "data").stat().st_mode & 0o777 == 0o700
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert "everything is written" in child.stderr
    assert [row.question for row in read_rows(home)] == ["退款"]
    assert "Traceback" not in child.stderr


@pytest.mark.parametrize("which", ["analytics", "kb", "proxy"])
async def test_each_server_works_alone(spawn: Spawn, which: str) -> None:
    child = await spawn(which)
    title = {"kb": "knowledge base"}.get(which, which)
    async with aiohttp.ClientSession() as session, session.get(child.url(title) + "/healthz") as response:
        assert response.status == 200
    child.send(signal.SIGINT)
    assert await child.ended() == 0


async def test_running_answers_may_finish_and_new_ones_are_refused(
    spawn: Spawn, home: Path, doubao: DoubaoFake
) -> None:
    """F15, P39."""
    doubao.play(script(say("一"), pause(0.8), say("二")))
    child = await spawn("proxy", doubao.environ)
    visitor = await Visitor.asking(child, LLM, question(stream=True))
    await visitor.read_until("一".encode())
    child.send(signal.SIGTERM)
    async with aiohttp.ClientSession() as session, asyncio.timeout(5):
        while True:
            async with session.get(child.url() + "/healthz") as response:
                if (await response.json())["status"] == "draining":
                    break
        async with session.post(child.url() + LLM, json=question()) as response:
            assert response.status == 503
            assert (await response.json())["error"]["reason"] == "shutting_down"
    await visitor.read_until(b"[DONE]")
    assert await child.ended() == 0
    assert sorted(row.status for row in read_rows(home)) == ["ok", "refused"]
    visitor.leave()


async def test_answers_that_outlast_the_grace_end_with_an_error(
    spawn: Spawn, home: Path, doubao: DoubaoFake
) -> None:
    doubao.play(script(say("一"), hang()))
    child = await spawn("proxy", {**doubao.environ, "MOGINE_SHUTDOWN_GRACE": "0.2"})
    visitor = await Visitor.asking(child, LLM, question(stream=True))
    await visitor.read_until("一".encode())
    child.send(signal.SIGTERM)
    await visitor.read_until(b"shutting_down")
    assert await child.ended() == 0
    assert [(row.status, row.error_type, row.answer) for row in read_rows(home)] == [
        ("error", "shutting_down", "一")
    ]
    visitor.leave()


async def test_a_second_signal_does_not_wait(spawn: Spawn, home: Path, doubao: DoubaoFake) -> None:
    """F15, P39."""
    doubao.play(script(say("一"), hang()))
    child = await spawn("proxy", {**doubao.environ, "MOGINE_SHUTDOWN_GRACE": "300"})
    visitor = await Visitor.asking(child, LLM, question(stream=True))
    await visitor.read_until("一".encode())
    child.send(signal.SIGTERM)
    async with aiohttp.ClientSession() as session, asyncio.timeout(5):
        while True:
            async with session.get(child.url() + "/healthz") as response:
                if (await response.json())["status"] == "draining":
                    break
    child.send(signal.SIGTERM)
    await visitor.read_until(b"shutting_down")
    assert await child.ended() == 0
    assert [row.status for row in read_rows(home)] == ["error"]
    visitor.leave()


async def test_in_a_rolling_restart_the_port_closes_and_kept_connections_are_answered(
    spawn: Spawn, home: Path, doubao: DoubaoFake
) -> None:
    """F15, P39: the front asks another proxy, and cannot where it has sent the question already."""
    doubao.play(script(say("一"), pause(0.3), say("二")))
    child = await spawn("proxy", {**doubao.environ, "MOGINE_ROLLING_RESTART": "true"})
    kept = [await Visitor.asking(child, LLM, question()) for _ in range(2)]
    for visitor in kept:
        await visitor.read_until(b'"finish_reason":"stop"')
    running = await Visitor.asking(child, LLM, question(stream=True))
    await running.read_until("一".encode())
    child.send(signal.SIGTERM)
    async with asyncio.timeout(5):
        while _listens(child.port()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await running.read_until(b"[DONE]")
    for visitor, asked in zip(kept, (LLM, "/v1/models"), strict=True):
        visitor.received = b""
        body = json.dumps(question()) if asked == LLM else ""
        method = "POST" if asked == LLM else "GET"
        await visitor.send(
            f"{method} {asked} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()
        )
        await visitor.read_to_end()
        assert visitor.received.startswith(b"HTTP/1.1 200")
        assert b"Connection: close\r\n" in visitor.received
    assert await child.ended() == 0
    assert [row.status for row in read_rows(home)] == ["ok"] * 4
    for visitor in (*kept, running):
        visitor.leave()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(0.05)
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def test_a_visitor_who_leaves_ends_a_call_over_tls(spawn: Spawn, home: Path) -> None:
    async with DoubaoFake(script(say("一"), hang()), tls=True) as fake:
        child = await spawn("proxy", {**fake.environ, "SSL_CERT_FILE": str(fake.ca_file)})
        visitor = await Visitor.asking(child, LLM, question(stream=True))
        await visitor.read_until("一".encode())
        left_at = visitor.leave()
        assert await fake.wait_disconnect() - left_at < 1.0
        child.send(signal.SIGTERM)
        assert await child.ended() == 0
        assert [row.status for row in read_rows(home)] == ["aborted"]


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_the_log_has_a_line_for_each_request_and_no_key_question_or_address(
    spawn: Spawn, doubao: DoubaoFake, log_format: str
) -> None:
    """P18, P32, B23, B30."""
    doubao.play(script(say("好")))
    child = await spawn("proxy", {**doubao.environ, "MOGINE_LOG_FORMAT": log_format})
    headers = {"X-Forwarded-For": "203.0.113.77", "Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        ids = []
        for path, body in ((LLM, question("ein Geheimnis")), (LLM, {}), ("/nothing%0d%0aforged", {})):
            async with session.post(child.url() + path, json=body) as response:
                ids.append(response.headers["X-Request-Id"])
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    lines = [line for line in child.stderr.splitlines() if any(id in line for id in ids)]
    assert len(lines) == 3
    assert all(json.loads(line)["request_id"] in ids for line in lines if log_format == "json")
    assert not re.search(rf"{KEY}|Geheimnis|203\.0\.113|^forged", child.stderr, re.MULTILINE)


# --- what keeps it from starting ----------------------------------------------------------------


@pytest.mark.parametrize("server", ["proxy", "kb", "analytics"])
def test_a_port_in_use_is_named_with_its_setting_and_nothing_is_left_running(
    mogine: Run, home: Path, server: str
) -> None:
    """F25, P40."""
    setting = f"MOGINE_{server.upper()}_PORT"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = mogine("serve", "all", env={**DEFAULTS, setting: str(port)})
    assert result.returncode == 2
    assert f"port {port}" in result.stderr and setting in result.stderr
    assert "Traceback" not in result.stderr
    assert not (home / "data/analytics.db").exists(), "no server was opened"


def test_a_host_that_is_not_of_this_machine_is_named(mogine: Run) -> None:
    result = mogine("serve", "proxy", env={**DEFAULTS, "MOGINE_HOST": "203.0.113.1"})
    assert result.returncode == 2
    assert "MOGINE_HOST" in result.stderr and "Traceback" not in result.stderr


def test_a_home_that_cannot_be_written_is_named(mogine: Run) -> None:
    """Nobody, root included, makes folders in /proc."""
    result = mogine("--home", "/proc", "serve", "proxy", env=DEFAULTS)
    assert result.returncode == 2
    assert "/proc" in result.stderr and "--home" in result.stderr and "Traceback" not in result.stderr


def test_a_home_whose_data_is_a_file_is_named(mogine: Run, home: Path) -> None:
    (home / "data").write_text("no folder")
    result = mogine("serve", "proxy", env=DEFAULTS)
    assert result.returncode == 2
    assert str(home / "data") in result.stderr and "Traceback" not in result.stderr


def test_wrong_settings_are_told_all_at_once(mogine: Run) -> None:
    result = mogine("serve", "all", env={"MOGINE_PROXY_PORT": "x", "MOGINE_RATE_LIMIT": "often"})
    assert result.returncode == 2
    assert "MOGINE_PROXY_PORT" in result.stderr and "MOGINE_RATE_LIMIT" in result.stderr


def test_help_shows_examples_without_starting_anything(mogine: Run) -> None:
    result = mogine("serve", "--help")
    assert result.returncode == 0
    assert "mogine serve all" in result.stdout


# --- the banner ---------------------------------------------------------------------------------


async def test_the_banner_tells_where_what_and_what_to_beware_of(spawn: Spawn, home: Path) -> None:
    (home / ".env").chmod(0o644)
    child = await spawn("all", {"MOGINE_ALLOWED_ORIGINS": "*", "DOUBAO_API_KEY": KEY})
    text = child.stderr
    assert str(home) in text
    assert "/chat/" in text and "curl -N http://" in text
    assert "kb ingest" in text
    assert "providers    doubao (key: yes), extract, dashscope (key: no), openai (key: no)" in text
    assert "its mode is 600 now" in text
    assert (home / ".env").stat().st_mode & 0o777 == 0o600
    assert "MOGINE_ALLOWED_ORIGINS=*" in text
    assert KEY not in text


async def test_servers_listen_to_this_machine_alone_unless_told_and_warned(spawn: Spawn) -> None:
    """P24."""
    child = await spawn("all")
    assert all(child.url(title).startswith("http://127.0.0.1:") for title in ("proxy", "analytics"))
    assert "lets other machines in" not in child.stderr
    wide = await spawn("analytics", {"MOGINE_HOST": "0.0.0.0"})
    assert "MOGINE_HOST=0.0.0.0 lets other machines in" in wide.stderr


# --- the runner's steps --------------------------------------------------------------------------


@contextmanager
def only(sockets: list[socket.socket]) -> Iterator[socket.socket]:
    (one,) = sockets
    try:
        yield one
    finally:
        one.close()


def test_a_bound_port_is_free_again_when_another_could_not_be_had(settings: Settings) -> None:
    with only(runner.bind("127.0.0.1", 0, "A")) as bound:
        port = bound.getsockname()[1]
        bound.listen()
        with pytest.raises(SettingsError, match="set B to a free port"):
            runner.bind("127.0.0.1", port, "B")
    with only(runner.bind("127.0.0.1", port, "A")):
        pass


def test_every_address_of_a_host_is_bound_to_one_port() -> None:
    sockets = runner.bind("localhost", 0, "A")
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def test_a_port_below_1024_asks_for_a_higher_one() -> None:
    error = runner._no_port(PermissionError(13, "x"), "127.0.0.1", 80, "MOGINE_PROXY_PORT")
    assert "MOGINE_PROXY_PORT" in error.message and "above 1023" in error.message


async def test_a_server_that_cannot_be_opened_closes_those_before_it(serve: Start, home: Path) -> None:
    (home / "data").mkdir()
    (home / "data/analytics.db").mkdir()
    before = set(asyncio.all_tasks())
    with pytest.raises(Exception, match=r"analytics\.db"):
        await serve("kb", "proxy")
    assert set(asyncio.all_tasks()) == before


def test_every_module_of_the_table_makes_an_application(settings: Settings) -> None:
    assert list(runner.SERVERS) == ["analytics", "kb", "proxy"]
    for server in runner.SERVERS.values():
        assert isinstance(server.create_app(settings), web.Application)


def test_a_second_signal_is_told_from_the_first() -> None:
    stop = runner.Stop()
    stop.signal()
    assert stop.asked.is_set() and not stop.now.is_set()
    stop.signal()
    assert stop.now.is_set()
