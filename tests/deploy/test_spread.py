"""Several proxies behind the nginx of `mogine deploy nginx --upstreams`: restarts and deaths under load."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fronts.deployed import several, spread
from tests.fronts.nginx import Nginx
from tests.serve.conftest import events_of, question
from tests.servers import Child, Spawn
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import Script, hang, head, pause, say, script

WORDS = tuple(f"第{number}段" for number in range(8))


def lasting(seconds: float) -> Script:
    """The same answer, in pieces over so long."""
    return script(*(step for word in WORDS for step in (say(word), pause(seconds / len(WORDS)))))


STREAM = lasting(0.4)
TEXT = "".join(WORDS)
STREAMED = {f"127.0.0.{number}" for number in range(10, 18)}
WHOLE = {f"127.0.0.{number}" for number in range(20, 28)}
ROLLING = {"MOGINE_ROLLING_RESTART": "true", "MOGINE_SHUTDOWN_GRACE": "30", "DOUBAO_MODEL": MODEL}


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(STREAM) as fake:
        yield fake


@dataclass
class Proxies:
    """Proxies with homes of their own, as on several machines, and the nginx in front of them."""

    spawn: Spawn
    folder: Path
    environ: dict[str, str]
    children: list[Child] = field(default_factory=list)

    async def start(self, count: int) -> None:
        for number in range(count):
            home = self.folder / f"machine {number}"
            home.mkdir()
            (home / ".env").touch(mode=0o600)
            self.children.append(await self.spawn("proxy", self.environ, home=home))

    async def restart(self, number: int) -> None:
        """As `systemctl restart` does: SIGTERM, wait for the end, start, wait until it is ready."""
        old = self.children[number]
        port = str(old.port())
        old.send(signal.SIGTERM)
        assert await old.ended() == 0, old.stderr
        assert "Traceback" not in old.stderr
        self.children[number] = await self.spawn(
            "proxy", {**self.environ, "MOGINE_PROXY_PORT": port}, home=old.home
        )

    @contextlib.contextmanager
    def behind_nginx(self, *others: str) -> Iterator[Nginx]:
        front = several(self.folder)
        addresses = (*others, *(f"127.0.0.1:{child.port()}" for child in self.children))
        with spread(front, proxies=addresses):
            yield front


@pytest.fixture
def proxies(spawn: Spawn, tmp_path: Path, doubao: DoubaoFake) -> Proxies:
    return Proxies(spawn, tmp_path, {**doubao.environ, **ROLLING, "MOGINE_KB_URL": "http://127.0.0.1:1"})


@dataclass
class Crowd:
    """Visitors who ask again and again; `problems` are the answers that were not whole."""

    front: Nginx
    asked: int = 0
    problems: list[str] = field(default_factory=list)
    going_home: bool = False

    async def visit(self, address: str, ask: Callable[[aiohttp.ClientSession], Any]) -> None:
        """One visitor, who comes anew for every third question."""
        while not self.going_home:
            connector = aiohttp.TCPConnector(ssl=self.front.ssl_context, local_addr=(address, 0))
            async with aiohttp.ClientSession(
                self.front.origin, connector=connector, trust_env=False
            ) as session:
                for _ in range(3):
                    self.asked += 1
                    try:
                        problem = await ask(session)
                    except (aiohttp.ClientError, TimeoutError) as error:
                        problem = repr(error)
                    if problem:
                        self.problems.append(problem)

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator["Crowd"]:
        async with asyncio.TaskGroup() as group:
            for address in STREAMED:
                group.create_task(self.visit(address, streamed))
            for address in WHOLE:
                group.create_task(self.visit(address, whole))
            yield self
            self.going_home = True

    async def until_asked(self, more: int) -> None:
        """Return after `more` further questions."""
        wanted = self.asked + more
        async with asyncio.timeout(60):
            while self.asked < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def streamed(session: aiohttp.ClientSession) -> str:
    """An answer of the assistant, read to its end; what was wrong with it."""
    async with session.post("/api/chat", json={"question": "你好", "provider": "doubao"}) as response:
        body = await response.read()
    if response.status != 200:
        return f"{response.status} {body!r}"
    events = events_of(body)
    text = "".join(data["text"] for name, data in events if name == "delta")
    return "" if events[-1][0] == "done" and text == TEXT else f"{events[-1]} after {text}"


async def whole(session: aiohttp.ClientSession) -> str:
    """An answer in one piece, and then a page; what was wrong with them."""
    async with session.post("/api/llm/doubao", json=question()) as response:
        body = await response.read()
        if response.status != 200:
            return f"{response.status} {body!r}"
        if (await response.json())["choices"][0]["message"]["content"] != TEXT:
            return f"cut: {body!r}"
    async with session.get("/api/chat/config") as page:
        return "" if page.status == 200 else f"{page.status} {await page.text()}"


async def open_answers(child: Child) -> int:
    """How many answers a proxy is giving, by its own count."""
    async with aiohttp.ClientSession() as session, session.get(child.url() + "/metrics") as response:
        (line,) = [
            one for one in (await response.text()).splitlines() if one.startswith("mogine_streams_open ")
        ]
    return int(float(line.split()[1]))


@pytest.mark.parametrize(("count", "answer_s"), [(3, 0.4), (2, 3.0)], ids=("short", "long"))
async def test_a_rolling_restart_fails_no_request_and_cuts_no_answer(
    proxies: Proxies, doubao: DoubaoFake, count: int, answer_s: float
) -> None:
    """F15, P39: also when no answer of the one has ended before the next one stops."""
    doubao.play(lasting(answer_s))
    await proxies.start(count)
    with proxies.behind_nginx() as front:
        async with Crowd(front).asking() as crowd:
            await crowd.until_asked(20)
            for number in range(count):
                await proxies.restart(number)
            await crowd.until_asked(20)
    assert crowd.problems == []
    assert len(doubao.requests) == crowd.asked, "no question was asked twice"


async def test_only_the_answers_of_a_killed_proxy_are_cut(proxies: Proxies, doubao: DoubaoFake) -> None:
    """F14"""
    doubao.play(*[script(say("一"), hang())] * 6, STREAM)
    await proxies.start(3)
    with proxies.behind_nginx() as front, contextlib.ExitStack() as stack:
        connector = aiohttp.TCPConnector(ssl=front.ssl_context, local_addr=("127.0.0.5", 0))
        async with aiohttp.ClientSession(front.origin, connector=connector, trust_env=False) as session:
            answers = []
            for _ in range(6):
                answers.append(await session.post("/api/llm/doubao", json=question(stream=True)))
                stack.callback(answers[-1].close)
                while "一".encode() not in await answers[-1].content.readline():
                    pass
            spread = [await open_answers(child) for child in proxies.children]
            assert sorted(spread) == [2, 2, 2], "the least busy one is asked"
            proxies.children[1].send(signal.SIGKILL)
            reading = [asyncio.create_task(answer.read()) for answer in answers]
            async with asyncio.timeout(10):
                await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                for _ in range(10):
                    assert await whole(session) == ""
            over = [one for one in reading if one.done()]
            assert len(over) == 2
            assert all(isinstance(one.exception(), aiohttp.ClientPayloadError) for one in over), (
                "not as if whole"
            )
            for one in reading:
                one.cancel()
    assert len(doubao.requests) == 16


async def test_a_question_that_may_have_been_asked_is_not_asked_again(
    proxies: Proxies, doubao: DoubaoFake
) -> None:
    """P4"""
    doubao.play(script(head(), hang()))
    await proxies.start(2)
    with proxies.behind_nginx() as front:
        connector = aiohttp.TCPConnector(ssl=front.ssl_context)
        async with aiohttp.ClientSession(front.origin, connector=connector, trust_env=False) as session:
            asking = asyncio.create_task(session.post("/api/llm/doubao", json=question()))
            await doubao.wait_requests(1)
            for child in proxies.children:
                if await open_answers(child):
                    child.send(signal.SIGKILL)
            async with asyncio.timeout(10):
                answer = await asking
            assert answer.status == 502
            assert (await answer.json())["error"]["reason"] == "upstream_unavailable"
    assert len(doubao.requests) == 1


async def test_an_answer_is_read_on_wherever_it_runs(proxies: Proxies, doubao: DoubaoFake) -> None:
    await proxies.start(3)
    with proxies.behind_nginx() as front:
        connector = aiohttp.TCPConnector(ssl=front.ssl_context, force_close=True)
        async with aiohttp.ClientSession(front.origin, connector=connector, trust_env=False) as session:
            for _ in range(3):
                asked = {"question": "q", "provider": "doubao", "resume": True}
                response = await session.post("/api/chat", json=asked)
                _, start = events_of(await response.content.readuntil(b"\n\n"))[0]
                response.close()
                place = {name: start[name] for name in ("request_id", "session_id")}
                async with session.post("/api/chat/resume", json=place) as rest:
                    assert rest.status == 200
                    assert events_of(await rest.read())[-1][0] == "done"
            unknown = {"request_id": "0" * 44, "session_id": "a" * 32}
            async with session.post("/api/chat/resume", json=unknown) as rest:
                assert rest.status == 404
                assert (await rest.json())["error"]["reason"] == "not_found"
            assert await streamed(session) == ""
    assert len(doubao.requests) == 4


async def test_a_machine_that_is_away_costs_no_question(proxies: Proxies, doubao: DoubaoFake) -> None:
    await proxies.start(1)
    with proxies.behind_nginx("127.0.0.1:1", "127.0.0.99:9") as front:
        connector = aiohttp.TCPConnector(ssl=front.ssl_context)
        async with aiohttp.ClientSession(front.origin, connector=connector, trust_env=False) as session:
            for _ in range(5):
                assert await whole(session) == ""
    assert len(doubao.requests) == 5
