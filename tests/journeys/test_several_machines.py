"""A site on several machines, everything real, while one process after the other is killed or paused.

The pauses are short; MOGINE_LONG_PAUSES=1 makes them half a minute, as the promise has it.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import aiohttp
import pytest

from mogine.analytics import reports
from mogine.analytics.records import Window
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.fronts.deployed import several, spread
from tests.fronts.nginx import Nginx
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import events_of
from tests.serve.fleets import redis_of
from tests.servers import Child, Spawn
from tests.upstreams.doubao import MODELS, DoubaoFake
from tests.upstreams.postgres import Database
from tests.upstreams.redis import RedisServer
from tests.upstreams.script import pause, say, script, usage
from tests.waiting import until

PAUSE_S = 30.0 if os.environ.get("MOGINE_LONG_PAUSES") else 4.0
HEALED_S = 5.0
YOUNG_S = 1.0  # what a process that is killed may not have written yet
VISITORS = 6
QUESTIONS_PER_ADDRESS = 4
WORDS = tuple(f"第{number}段" for number in range(7))
TEXT = "".join(WORDS)
TITLES = {"proxy": "proxy", "kb": "knowledge base"}
ANSWER = script(*(step for word in WORDS for step in (say(word), pause(0.12))), usage(20, 16))

# The proxies' way to a knowledge base, as in deploy/examples/compose/inside.conf.
INSIDE = """
    server {
        listen %s;
        access_log off;
        location = /api/search {
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_connect_timeout 1s;
            proxy_read_timeout 3s;
            proxy_next_upstream error timeout http_503;
            proxy_pass http://mogine_kb;
        }
    }
"""


@dataclass
class Machine:
    """One server on a machine of its own; `mark` is the model by which answers tell that it gave them."""

    spawn: Spawn
    which: str
    home: Path
    environ: dict[str, str]
    child: Child | None = None
    kills: list[tuple[float, float]] = field(default_factory=list)  # from the signal until it was gone

    @property
    def mark(self) -> str:
        return self.environ.get("DOUBAO_MODEL", "")

    @property
    def running(self) -> Child:
        assert self.child is not None, "it was not started"
        return self.child

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.running.port(TITLES[self.which])}"

    async def start(self) -> None:
        """Also again, where nginx knows it."""
        port = self.running.port(TITLES[self.which]) if self.child else 0
        self.child = await self.spawn(
            self.which, {**self.environ, f"MOGINE_{self.which.upper()}_PORT": str(port)}, home=self.home
        )

    async def kill(self) -> None:
        began = time.monotonic()
        self.running.send(signal.SIGKILL)
        await self.running.ended()
        self.kills.append((began, time.monotonic()))


@dataclass
class Visitor:
    """Somebody at an address of their own, and the conversation they are in."""

    session: aiohttp.ClientSession
    conversation: str = ""


@dataclass(frozen=True)
class Answered:
    """An answer that a visitor has got whole."""

    id: str
    mark: str
    at: float
    cited: bool


@dataclass(frozen=True)
class Failed:
    """One that was not."""

    question: str
    told: str
    begun: float
    at: float


@dataclass
class Site:
    """All its parts, and what its visitors were told."""

    front: Nginx
    doubao: DoubaoFake
    postgres: Database
    redis: RedisServer
    proxies: list[Machine]
    kbs: list[Machine]
    session: aiohttp.ClientSession
    answered: list[Answered] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    going_home: bool = False
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    addresses: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @contextlib.asynccontextmanager
    async def visitor(self) -> AsyncIterator[Visitor]:
        """Somebody who was never here."""
        number = next(self.addresses)
        connector = aiohttp.TCPConnector(
            ssl=self.front.ssl_context, local_addr=(f"127.77.{number // 250}.{number % 250 + 1}", 0)
        )
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(
            self.front.origin, connector=connector, timeout=timeout, trust_env=False
        ) as session:
            yield Visitor(session)

    async def ask(self, visitor: Visitor) -> str:
        """One question: "" when the answer was whole, else what was told instead."""
        question = f"如何退款? {next(self.numbers):05d}"
        asked = {"question": question, "session_id": visitor.conversation}
        begun = time.monotonic()
        try:
            async with visitor.session.post("/api/chat", json=asked) as response:
                body = await response.read()
            told = self._told(visitor, response.status, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            told = repr(error)
        if told and told not in ("too_many_streams", "rate_limited"):
            self.failed.append(Failed(question, told, begun, time.monotonic()))
        return told

    def _told(self, visitor: Visitor, status: int, body: bytes) -> str:
        if status == 429:
            return str(events_of(b"data: " + body)[0][1]["error"]["reason"])
        if status != 200:
            return f"{status} {body!r}"
        events = events_of(body)
        text = "".join(data["text"] for name, data in events if name == "delta")
        name, last = events[-1]
        if name != "done" or text != TEXT:
            return f"{events[-1]} after {text}"
        cited = any(data["citations"] for name, data in events if name == "citations")
        visitor.conversation = last["session_id"]
        self.answered.append(Answered(last["request_id"], last["model"], time.monotonic(), cited))
        return ""

    async def visit(self) -> None:
        """Somebody comes and asks some questions, then somebody else, and so on."""
        while not self.going_home:
            async with self.visitor() as visitor:
                for _ in range(QUESTIONS_PER_ADDRESS):
                    await self.ask(visitor)

    @contextlib.asynccontextmanager
    async def visited(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for _ in range(VISITORS):
                group.create_task(self.visit())
            yield
            self.going_home = True

    async def answers(self, more: int = 2 * VISITORS) -> None:
        """Return after so many further whole answers."""
        wanted = len(self.answered) + more
        await until(lambda: len(self.answered) >= wanted, 60)

    async def again(self, proxy: Machine) -> None:
        """Start a proxy that was killed, and return when nginx has found it and it has answered."""
        before = sum(one.mark == proxy.mark for one in self.answered)
        await proxy.start()
        await until(lambda: sum(one.mark == proxy.mark for one in self.answered) > before, 60)

    async def is_answering(self, proxy: Machine) -> None:
        """Return when `proxy` is amid an answer."""
        await until(
            lambda: any(not one.is_over and one.json["model"] == proxy.mark for one in self.doubao.requests)
        )

    async def rest_of_pause(self, began: float) -> None:
        """Visitors ask on for as long as a pause lasts."""
        await self.answers()
        await until(lambda: time.monotonic() > began + PAUSE_S, PAUSE_S + 1)

    @property
    def spools(self) -> list[Spool]:
        return [Spool(proxy.home / "data/spool") for proxy in self.proxies]

    def rows_on_disk(self) -> int:
        """How many wait for PostgreSQL."""
        return sum(spool.count() for spool in self.spools)

    # --- what is promised ------------------------------------------------------------------------

    async def limits_hold(self) -> None:
        """A visitor gets three answers at once and five a minute from all proxies together."""
        async with self.visitor() as visitor:
            told = Counter(await asyncio.gather(*(self.ask(visitor) for _ in range(8))))
            assert told == {"": 3, "too_many_streams": 5}
            while "rate_limited" not in told:
                told.update(await asyncio.gather(*(self.ask(visitor) for _ in range(3))))
            assert told[""] == 5, told

    async def limits_hold_apart(self) -> None:
        """Without Redis each proxy counts for itself: more is allowed, but not everything."""
        async with self.visitor() as visitor:
            told = Counter(await asyncio.gather(*(self.ask(visitor) for _ in range(12))))
            assert set(told) == {"", "too_many_streams"}
            assert 3 <= told[""] <= 9, told

    async def redis_is(self, state: str, within_s: float) -> None:
        """Return when all proxies say so of Redis."""

        async def is_told() -> bool:
            told = [await redis_of(self.session, proxy.running) for proxy in self.proxies]
            return all(one.startswith(state) for one in told)

        await until(is_told, within_s)

    def only_killed_proxies_failed(self) -> None:
        """Each answer that was not whole ran on a proxy when that was killed."""
        asked_of = {
            one.json["messages"][-1]["content"].rpartition("如何退款?")[2]: one.json["model"]
            for one in self.doubao.requests
        }
        for one in self.failed:
            mark = asked_of.get(one.question.rpartition("如何退款?")[2], "")  # "": it died before it asked
            kills = [kill for proxy in self.proxies if mark in ("", proxy.mark) for kill in proxy.kills]
            assert any(one.begun < gone and began < one.at for began, gone in kills), one
        assert len(self.failed) >= sum(len(proxy.kills) for proxy in self.proxies)

    async def everything_is_in_the_record(self) -> None:
        """Each answer that was given, once: in the rows, and in the sums of the reports."""
        kills = {proxy.mark: proxy.kills for proxy in self.proxies}
        acknowledged = {
            one.id
            for one in self.answered
            if not any(0 <= began - one.at < YOUNG_S for began, _ in kills[one.mark])
        }

        def stored() -> list[str]:
            return [str(row[0]) for row in self.postgres.query("SELECT id FROM queries")]

        await until(lambda: not self.rows_on_disk(), 60)
        await until(lambda: acknowledged <= set(stored()), 10)
        ids = stored()
        assert len(ids) == len(set(ids))
        twice = "SELECT question FROM texts GROUP BY question HAVING count(*) > 1"
        assert self.postgres.query(twice) == []
        store = AnalyticsStore(self.proxies[0].home / "data/analytics.db", self.postgres.url)
        window = Window.last_days(2, datetime.now(UTC), ZoneInfo("UTC"))
        assert reports.statistics(store, window).totals["questions"] == len(ids)
        store.close()


@pytest.fixture
async def site(
    spawn: Spawn, tmp_path: Path, own_postgres: Database, redis: RedisServer
) -> AsyncIterator[Site]:
    front = several(tmp_path)
    inside = f"127.0.0.2:{front.port}"
    async with DoubaoFake(ANSWER) as doubao, aiohttp.ClientSession(trust_env=False) as session:
        environ = {
            **doubao.environ,
            "MOGINE_DATABASE_URL": own_postgres.url,
            "MOGINE_REDIS_URL": redis.url,
            "MOGINE_KB_URL": f"http://{inside}",
            "MOGINE_TRUSTED_PROXIES": "127.0.0.1/32",
            "MOGINE_RATE_LIMIT": "5/minute",
        }
        places = [tmp_path / name for name in ("one", "two", "three", "library one", "library two")]
        for place in places:
            place.mkdir()
            (place / ".env").touch(mode=0o600)
        proxies = [
            Machine(spawn, "proxy", place, {**environ, "DOUBAO_MODEL": model})
            for place, model in zip(places[:3], MODELS, strict=False)
        ]
        kbs = [Machine(spawn, "kb", place, {}) for place in places[3:]]
        document = make_document("docs/refunds.md", "如何退款? 七天之内都可以退款。")
        take_in(Generations(kbs[0].home / "data/kb"), NoEmbedder(), document)
        shutil.copytree(kbs[0].home / "data", kbs[1].home / "data")
        await asyncio.gather(*(machine.start() for machine in (*kbs, *proxies)))
        addresses = tuple(proxy.address for proxy in proxies)
        with spread(front, proxies=addresses, kbs=tuple(kb.address for kb in kbs), more=INSIDE % inside):
            yield Site(front, doubao, own_postgres, redis, proxies, kbs, session)


async def test_whatever_dies_or_hangs_no_answer_and_no_row_is_lost(site: Site) -> None:
    """F14, F28, P25, P26, P43: three proxies, two knowledge bases, PostgreSQL and Redis, each in turn."""
    async with site.visited():
        await site.answers()
        for proxy in site.proxies:
            await site.is_answering(proxy)
            await proxy.kill()
            await site.answers()
            await site.again(proxy)
        for kb in site.kbs:
            await kb.kill()
            await site.answers()
            await kb.start()
        await _redis_goes_and_comes(site)
        await _postgres_goes_and_comes(site)
        await site.answers()
    assert all(one.cited for one in site.answered[-VISITORS:])
    site.only_killed_proxies_failed()
    await site.everything_is_in_the_record()
    for proxy in site.proxies:
        assert "Traceback" not in proxy.running.stderr


async def _redis_goes_and_comes(site: Site) -> None:
    await site.limits_hold()
    for go, come in ((site.redis.pause, site.redis.resume), (site.redis.kill, site.redis.start)):
        began = time.monotonic()
        go()
        await site.redis_is("away", 30)
        await site.limits_hold_apart()
        if go == site.redis.pause:
            await site.rest_of_pause(began)
        come()
        await site.redis_is("ok", HEALED_S)
        await site.limits_hold()


async def _postgres_goes_and_comes(site: Site) -> None:
    server, proxy = site.postgres.server, site.proxies[0]
    server.pause()
    await site.rest_of_pause(time.monotonic())
    server.resume()
    await until(lambda: not site.rows_on_disk(), 60)
    server.kill()
    await site.answers()
    await until(lambda: all(spool.count() for spool in site.spools))
    # What waits on the disk of a machine waits for its next start too, and that waits for nobody.
    await proxy.kill()
    await site.again(proxy)
    server.start()
