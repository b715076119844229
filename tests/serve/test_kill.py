"""Servers that are killed, told to stop and given new keys while they are at work."""

import asyncio
import contextlib
import os
import pty
import random
import select
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.conftest import Run, clean_environ
from tests.serve.conftest import Reply, question
from tests.servers import DEFAULTS, Child, Spawn
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import cut, fail, pause, refuse, say, script, usage

LLM = "/api/llm/doubao"
OLD, NEW = "test-key-old-0000000001", "test-key-new-0000000002"
ROUNDS = 4


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("好"), usage(1, 1)), keys=(OLD, NEW)) as fake:
        yield fake


def write_env(home: Path, fake: DoubaoFake, keys: str) -> None:
    draft = home / ".env.draft"
    draft.write_text(f"DOUBAO_API_KEY={keys}\nDOUBAO_BASE_URL={fake.base_url}\nDOUBAO_MODEL={MODEL}\n")
    draft.chmod(0o600)
    draft.replace(home / ".env")


class Ledger:
    """What visitors sent, and when they had their answers."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.answered: dict[str, float] = {}

    async def visit(self, child: Child, name: str) -> None:
        """Ask again and again until the server is gone."""
        async with aiohttp.ClientSession() as session:
            for number in range(10_000):
                text = f"{name}-{number}"
                self.sent.add(text)
                try:
                    body = question(text, stream=number % 2 == 0)
                    async with session.post(child.url() + LLM, json=body) as response:
                        whole = await response.read()
                        if response.status == 200 and (number % 2 or b"[DONE]" in whole):
                            self.answered[text] = time.monotonic()
                except aiohttp.ClientError:
                    return


async def test_what_was_answered_a_second_before_a_kill_is_in_the_record_once(
    spawn: Spawn, home: Path, doubao: DoubaoFake
) -> None:
    """F14, P25, P26: some rounds of it."""
    env = {
        **doubao.environ,
        "DOUBAO_API_KEY": OLD,
        "DOUBAO_MODEL": MODEL,
        "MOGINE_MAX_STREAMS_PER_VISITOR": "9",
    }
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    ledger, safe = Ledger(), set()
    for round in range(ROUNDS):
        child = await spawn("proxy", env)
        visits = [asyncio.create_task(ledger.visit(child, f"{round}-{n}")) for n in range(4)]
        begun = time.monotonic()
        async with asyncio.timeout(30):
            # So long that some answers are older than a second at the end.
            while len(ledger.answered) < 40 * (round + 1) or time.monotonic() < begun + 1.3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(dice.uniform(0, 0.1))
        killed_at = time.monotonic()
        os.kill(child.process.pid, signal.SIGKILL)
        await asyncio.gather(*visits)
        safe |= {text for text, at in ledger.answered.items() if begun < at < killed_at - 1.0}
    child = await spawn("proxy", env)
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    with sqlite3.connect(home / "data/analytics.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = [row[0] for row in database.execute("SELECT question FROM texts")]
        ids = [row[0] for row in database.execute("SELECT id FROM queries")]
    database.close()
    assert len(ids) == len(set(ids)) and len(stored) == len(set(stored)), f"seed {seed}"
    assert safe <= set(stored) <= ledger.sent, f"seed {seed}"
    assert len(safe) >= ROUNDS, f"seed {seed}"


async def test_a_stop_under_load_ends_every_answer_properly(spawn: Spawn, doubao: DoubaoFake) -> None:
    """F15, P39."""
    doubao.play(script(say("一"), pause(0.5), say("二")))
    env = {
        **doubao.environ,
        "DOUBAO_API_KEY": OLD,
        "DOUBAO_MODEL": MODEL,
        "MOGINE_MAX_STREAMS_PER_VISITOR": "99",
    }
    child = await spawn("proxy", env)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(stream: bool) -> Reply:
            async with session.post(child.url() + LLM, json=question(stream=stream)) as response:
                return Reply(response.status, response.headers, await response.read())

        running = [asyncio.create_task(ask(number % 2 == 0)) for number in range(40)]
        await doubao.wait_requests(40, timeout_s=20)
        child.send(signal.SIGTERM)
        replies = await asyncio.gather(*running)
    assert [reply.status for reply in replies] == [200] * 40
    assert all(b"[DONE]" in reply.body for reply in replies[::2])
    assert await child.ended() == 0
    assert child.stderr.count("Traceback") == 0


# --- keys ----------------------------------------------------------------------------------------


async def test_a_rotation_reaches_a_running_server_and_no_stream_ends(
    spawn: Spawn, home: Path, doubao: DoubaoFake
) -> None:
    """F26, P19."""
    write_env(home, doubao, OLD)
    child = await spawn("proxy", {"MOGINE_MAX_STREAMS_PER_VISITOR": "99"})
    doubao.play(script(say("一"), pause(3), say("二")))

    async def ask(stream: bool = False) -> Reply:
        url = child.url() + LLM
        async with aiohttp.request("POST", url, json=question(stream=stream)) as response:
            return Reply(response.status, response.headers, await response.read())

    running = [asyncio.create_task(ask(stream=True)) for _ in range(20)]
    await doubao.wait_requests(20, timeout_s=20)
    doubao.play(script(say("好"), usage(1, 1)))
    rotation = await _mogine(home, "keys", "rotate", "doubao", "--overlap", "0", text=NEW)
    assert rotation.returncode == 0, rotation.stderr
    async with asyncio.timeout(10):
        while doubao.requests[-1].bearer != NEW or (await ask()).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for reply in await asyncio.gather(*running):
        assert "二" in reply.body.decode() and b"[DONE]" in reply.body
    refused = await _mogine(home, "keys", "rotate", "doubao", text="test-key-wrong-00000009")
    assert refused.returncode == 4 and f"DOUBAO_API_KEY={NEW}\n" in (home / ".env").read_text()
    assert (await ask()).status == 200
    assert not any(key in child.stderr + rotation.stdout + rotation.stderr for key in (OLD, NEW))


async def rotating(home: Path, *, stderr: int) -> asyncio.subprocess.Process:
    """A rotation that waits for its key, and then for ten minutes with both in force."""
    command = ("keys", "rotate", "doubao", "--overlap", "600")
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mogine", "--home", str(home), *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=stderr,
        env=clean_environ(),
    )


async def test_a_rotation_that_is_killed_leaves_a_file_with_which_a_server_works(
    home: Path, doubao: DoubaoFake
) -> None:
    """F26, P19: both keys are in force at that moment."""
    write_env(home, doubao, OLD)
    process = await rotating(home, stderr=asyncio.subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(NEW.encode())
    process.stdin.close()
    async with asyncio.timeout(30):
        while f"DOUBAO_API_KEY={NEW},{OLD}\n" not in (home / ".env").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    process.kill()
    await process.wait()
    assert (home / ".env").stat().st_mode & 0o777 == 0o600
    assert [name for name in os.listdir(home) if name.startswith(".env")] == [".env"]
    tried = await _mogine(home, "keys", "test", "doubao")
    assert tried.returncode == 0 and tried.stdout.count("taken") == 2


async def test_an_interrupted_rotation_puts_the_old_file_back(home: Path, doubao: DoubaoFake) -> None:
    """F26, P19."""
    write_env(home, doubao, OLD)
    before = (home / ".env").read_text()
    process = await rotating(home, stderr=asyncio.subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(NEW.encode())
    process.stdin.close()
    async with asyncio.timeout(30):
        while NEW not in (home / ".env").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = (await process.stderr.read()).decode()
        await process.wait()
    assert "undone" in said and process.returncode == 130
    assert (home / ".env").read_text() == before


def shown(terminal: int, ends_at: float) -> bytes:
    """What comes next on a terminal."""
    assert select.select([terminal], [], [], ends_at - time.monotonic())[0], "nothing more is shown"
    return os.read(terminal, 4096)


def test_a_key_is_typed_without_being_shown(home: Path) -> None:
    """P18: on a terminal it is asked for, and does not appear."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mogine", "--home", str(home), "keys", "set", "doubao"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_environ(),
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    ends_at = time.monotonic() + 30
    while b"DOUBAO_API_KEY" not in seen:
        seen += shown(ours, ends_at)
    while termios.tcgetattr(ours)[3] & termios.ECHO:  # what is typed before is thrown away
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    os.write(ours, NEW.encode() + b"\n")
    with contextlib.suppress(OSError):  # the terminal's way of saying that the program has ended
        while block := shown(ours, ends_at):
            seen += block
    assert process.wait(30) == 0, seen
    os.close(ours)
    assert NEW.encode() not in seen
    assert f"DOUBAO_API_KEY={NEW}\n" in (home / ".env").read_text()


async def _mogine(home: Path, *args: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "mogine", "--home", str(home), *args],
        input=text,
        capture_output=True,
        text=True,
        env=clean_environ(),
        timeout=60,
    )


# --- secrets -------------------------------------------------------------------------------------


async def test_no_key_and_no_token_is_ever_shown_anywhere(spawn: Spawn, mogine: Run, home: Path) -> None:
    """P18, B23, F4: whatever fails, and wherever one looks."""
    keys = ("test-key-doubao-secret-1", "test-key-dashscope-secret-2")
    token = DEFAULTS["MOGINE_ADMIN_TOKEN"]
    async with DoubaoFake(keys=keys[:1]) as doubao, DashScopeFake(keys=keys[1:]) as dashscope:
        env = {
            **doubao.environ,
            **dashscope.environ,
            "DOUBAO_API_KEY": keys[0],
            "DASHSCOPE_API_KEY": keys[1],
            "DOUBAO_MODEL": MODEL,
        }
        (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
        child = await spawn("all")
        seen: list[str] = []
        plays = (
            *(script(refuse(status, leak=True)) for status in (400, 401, 500)),
            *(script(say("一"), fail(status, leak=True)) for status in (401,)),
            script(say("一"), cut()),
            script(say("好")),
        )
        async with aiohttp.ClientSession() as session:
            for play in plays:
                doubao.play(play)
                dashscope.play(play)
                for path in (LLM, "/api/llm/dashscope", "/v1/chat/completions", "/api/chat"):
                    for stream in (True, False):
                        body = question(stream=stream, model="auto", question="x")
                        async with session.post(child.url() + path, json=body) as response:
                            seen.append(str(response.headers) + await response.text())
            for path in ("/readyz", "/metrics", "/healthz", "/v1/models", "/api/chat/config"):
                async with session.get(child.url() + path) as response:
                    seen.append(str(response.headers) + await response.text())
        seen.append(child.command_line)
        for command in (
            ("config", "show"),
            ("config", "show", "--json"),
            ("doctor",),
            ("queries", "-n", "100"),
        ):
            done = await asyncio.to_thread(mogine, *command)
            seen.append(done.stdout + done.stderr)
        child.send(signal.SIGTERM)
        assert await child.ended() == 0
        seen.append(child.stderr)
    seen += files_below(home / "data")
    for text in seen:
        assert not any(secret in text for secret in (*keys, token)), text[:2000]


def files_below(folder: Path) -> list[str]:
    """What all files hold, but for the one that is a secret."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "admin_token")
    return [path.read_bytes().decode("latin-1") for path in paths]
