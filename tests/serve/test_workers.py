"""Several processes on one port, as a user starts them: what they share adds up, who dies is replaced."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import clean_environ
from tests.serve.conftest import Reply, assert_envelope, question, read_rows
from tests.servers import DEFAULTS
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import pause, say, script, usage
from tests.waiting import until

PLAY = script(say("好"), usage(10, 5))
SLOW = script(say("一"), pause(20), say("二"))


@dataclass
class Site:
    """`mogine serve ... --workers N` and a client that opens a connection for every request."""

    process: asyncio.subprocess.Process
    port: int
    session: aiohttp.ClientSession
    said: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, **how: Any) -> Reply:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, **how) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Any) -> Reply:
        return await self.ask("POST", path, json=body)

    async def numbers(self) -> dict[str, float]:
        """Each metric, summed up over its labels."""
        found: dict[str, float] = {}
        text = (await self.ask("GET", "/metrics")).body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def children(self) -> list[int]:
        """The process ids of the workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 20)


@asynccontextmanager
async def site(
    home: Path, env: Mapping[str, str], *, which: str = "proxy", workers: int = 2
) -> AsyncIterator[Site]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mogine", "serve", which, "--workers", str(workers)),
        cwd=home,
        env=clean_environ({**DEFAULTS, "MOGINE_PROXY_PORT": str(port), **env}),
        stderr=asyncio.subprocess.PIPE,
    )
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        found = Site(process, port, session)
        assert process.stderr is not None
        stderr = process.stderr
        try:
            async with asyncio.timeout(40):
                while line := (await stderr.readline()).decode():
                    found.said.append(line)
                    if "Ctrl-C stops" in line:
                        break
            reading = asyncio.create_task(read_on(stderr, found.said))
            yield found
            await found.stop()
            await reading
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def read_on(stream: asyncio.StreamReader, lines: list[str]) -> None:
    while line := (await stream.readline()).decode():
        lines.append(line)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def test_limits_sessions_and_metrics_hold_for_all_workers_together(home: Path) -> None:
    async with DoubaoFake(PLAY) as fake:
        env = {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_RATE_LIMIT": "12/minute"}
        async with site(home, env) as served:
            assert len(served.children()) == 2
            begin = {"question": "第一问是什么？", "stream": False}
            session = (await served.post("/api/chat", begin)).json["session_id"]
            for _ in range(5):
                body = {"question": "然后呢？", "stream": False, "session_id": session}
                assert (await served.post("/api/chat", body)).json["session_id"] == session
                turns = [m["content"] for m in fake.requests[-1].json["messages"]]
                assert "第一问是什么？" in str(turns), "whoever answers knows what was said before"
            replies = [await served.post("/api/llm/doubao", question()) for _ in range(14)]
            assert [reply.status for reply in replies] == [200] * 6 + [429] * 8
            for reply in replies[6:]:
                assert_envelope(reply, 429, "rate_limited")

            async def all_have_reported() -> bool:
                return (await served.numbers())["mogine_tokens_total"] == 12 * 15

            await until(all_have_reported)
            found = await served.numbers()
            assert await served.stop() == 0
    assert found["mogine_workers"] == 2 and found["mogine_visitors_tracked"] == 1
    assert found["mogine_questions_total"] == 13, "of those refused in a row the first is told"
    rows = read_rows(home)
    assert sum(row.status == "ok" for row in rows) == 12


async def test_open_answers_are_counted_over_workers_and_given_back_when_one_is_killed(home: Path) -> None:
    async with DoubaoFake(SLOW) as fake:
        env = {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_MAX_STREAMS_PER_VISITOR": "4"}
        async with site(home, {**env, "MOGINE_SHUTDOWN_GRACE": "0"}) as served:
            body = question(stream=True)
            running = [asyncio.create_task(served.post("/api/llm/doubao", body)) for _ in range(4)]
            await fake.wait_requests(4, timeout_s=20)
            assert_envelope(await served.post("/api/llm/doubao", body), 429, "too_many_streams")
            before = served.children()
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            ended = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(end, aiohttp.ClientError) for end in ended)

            async def is_back() -> bool:
                with contextlib.suppress(aiohttp.ClientError):
                    return len(served.children()) == 2 and bool(await served.numbers())
                return False

            await until(is_back)
            assert not set(served.children()) & set(before)
            fake.play(PLAY)
            for _ in range(5):
                assert (await served.post("/api/llm/doubao", body)).status == 200
            await until(lambda: _restarts(served))
            assert await served.stop() == 0
    assert any("a worker (proxy) has ended" in line for line in served.said)


async def _restarts(served: Site) -> bool:
    return (await served.numbers())["mogine_worker_restarts_total"] == 2


async def test_a_stop_lets_answers_finish_and_leaves_no_child_behind(home: Path) -> None:
    async with DoubaoFake(script(say("一"), pause(1), say("二"))) as fake:
        env = {**fake.environ, "DOUBAO_MODEL": MODEL}
        async with site(home, env, which="all") as served:
            children = served.children()
            assert len(children) == 3
            body = question(stream=True)
            running = [asyncio.create_task(served.post("/api/llm/doubao", body)) for _ in range(3)]
            await fake.wait_requests(3, timeout_s=20)
            assert await served.stop() == 0
            for reply in await asyncio.gather(*running):
                assert reply.body.endswith(b"data: [DONE]\n\n")
    assert not any(map(is_alive, children))


async def test_workers_end_when_their_parent_is_gone(home: Path) -> None:
    async with site(home, {}) as served:
        children = served.children()
        served.process.kill()

        async def are_gone() -> bool:
            return not any(map(is_alive, children))

        await until(are_gone)


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_port_in_use_is_told_once_and_nothing_is_left_running(is_shared: bool, home: Path) -> None:
    """F25."""
    with socket.socket() as taken:
        if is_shared:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"MOGINE_PROXY_PORT": str(taken.getsockname()[1])}
        async with site(home, env) as served:
            assert await asyncio.wait_for(served.process.wait(), 20) == 2
    assert sum("MOGINE_PROXY_PORT" in line for line in served.said) == 1


async def test_a_hangup_brings_new_keys_to_every_worker(home: Path) -> None:
    async with DoubaoFake(PLAY) as fake:
        text = f"DOUBAO_BASE_URL={fake.base_url}\nDOUBAO_MODEL={MODEL}\nDOUBAO_API_KEY="
        (home / ".env").write_text(text + "old-key\n")
        async with site(home, {}) as served:
            assert (await served.post("/api/llm/doubao", question())).status == 200
            (home / ".env").write_text(text + "new-key\n")
            served.process.send_signal(signal.SIGHUP)
            fake.requests.clear()

            async def all_are_new() -> bool:
                fake.requests.clear()
                for _ in range(12):
                    assert (await served.post("/api/llm/doubao", question())).status == 200
                return {request.bearer for request in fake.requests} == {"new-key"}

            await until(all_are_new, timeout_s=10)
            assert await served.stop() == 0


async def test_workers_are_for_the_proxy(home: Path) -> None:
    async with site(home, {}, which="kb") as served:
        assert await asyncio.wait_for(served.process.wait(), 20) == 2
    assert "--workers is for the proxy" in "".join(served.said)
