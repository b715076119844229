"""Conversations, vendors' session ids and the day's salt over several machines that share a real Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import aiohttp

from mogine.redis_client import PREFIX
from mogine.serve.fleet import Fleet, joined
from mogine.serve.sessions import MAX_TURNS, Sessions
from mogine.serve.talks import Talks
from mogine.serve.visitors import Visitors
from mogine.settings import AccessSettings
from tests.serve.fleets import homes, raw, with_redis
from tests.servers import Spawn
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.redis import RedisServer
from tests.upstreams.script import say, script
from tests.waiting import until

ID = "0123456789abcdef" * 2
ZONE = ZoneInfo("Asia/Shanghai")


class Machine:
    """What one process remembers, and what all do."""

    def __init__(self, fleet: Fleet) -> None:
        self.sessions = Sessions()
        self.talks = Talks(fleet)

    async def open(self, id: str, visitor: str) -> tuple[str, list[str]]:
        known = self.sessions.open(id, visitor)
        found, turns = await self.talks.open(known, visitor) if known[0] == id else known
        return found, [turn.text for turn in turns]

    def add(self, id: str, visitor: str, question: str, answer: str) -> None:
        self.sessions.add(id, visitor, question, answer)
        self.talks.add(id, visitor, question, answer)


@asynccontextmanager
async def machines(url: str, count: int = 2) -> AsyncIterator[list[Machine]]:
    async with AsyncExitStack() as stack:
        fleets = [Fleet(url, AccessSettings(), f"home {n}", retry_s=0.05) for n in range(count)]
        yield [Machine(await stack.enter_async_context(joined(fleet))) for fleet in fleets]


async def test_a_conversation_goes_on_on_another_machine(redis: RedisServer) -> None:
    async with machines(redis.url) as (one, two):
        assert await one.open(ID, "a") == (ID, [])
        one.add(ID, "a", "红色的有吗？", "有 [1]")

        async def heard() -> bool:
            return await two.open(ID, "a") == (ID, ["红色的有吗？", "有 [1]"])

        await until(heard)
        for number in range(MAX_TURNS):
            two.add(ID, "a", f"q{number}", f"a{number}")

        async def only_the_last_turns() -> bool:
            _, turns = await one.open(ID, "a")
            return turns[0] == "q0" and len(turns) == 2 * MAX_TURNS

        await until(only_the_last_turns)


async def test_a_conversation_is_told_to_its_visitor_alone(redis: RedisServer) -> None:
    async with machines(redis.url) as (one, two):
        one.add(ID, "a", "secret", "told")

        async def is_foreign() -> bool:
            id, turns = await two.open(ID, "b")
            return id != ID and not turns

        await until(is_foreign)
        two.talks.add(ID, "b", "mine?", "no")  # who guesses an id writes nothing into it either
        await two.talks.open((ID, ()), "b")
        assert (await two.open(ID, "a"))[1] == ["secret", "told"]
        async with raw(redis) as client:
            keys = [key async for key in client.scan_iter(f"{PREFIX}talk*")]
            assert keys
            assert not any(ID in key for key in keys)
            assert all(0 < left <= 3600 for left in [await client.ttl(key) for key in keys])


async def test_without_redis_each_machine_goes_on_with_what_it_heard(redis: RedisServer) -> None:
    async with machines(redis.url) as (one, two):
        one.add(ID, "a", "first", "yes")

        async def heard() -> bool:
            return bool((await two.open(ID, "a"))[1])

        await until(heard)
        redis.kill()

        async def goes_on() -> bool:
            return await one.open(ID, "a") == (ID, ["first", "yes"]) and await two.open(ID, "a") == (ID, [])

        await until(goes_on)
        one.add(ID, "a", "second", "no")
        redis.start()
        # Redis has forgotten all, but this machine has not.
        assert (await one.open(ID, "a"))[1] == ["first", "yes", "second", "no"]


async def test_a_vendors_session_belongs_to_one_visitor_on_all_machines(redis: RedisServer) -> None:
    async with machines(redis.url) as (one, two):
        one.talks.note("vendor-1", "a")

        async def is_kept_from_others() -> bool:
            return not await two.talks.allows("vendor-1", "b")

        await until(is_kept_from_others)
        two.talks.note("vendor-1", "b")  # the first owner stays
        assert await two.talks.allows("vendor-1", "a")
        assert not await one.talks.allows("vendor-1", "b")
        assert await one.talks.allows("vendor-2", "b")


async def test_a_visitor_has_one_hash_on_all_machines_and_another_tomorrow(
    redis: RedisServer, tmp_path: Path
) -> None:
    now = datetime(2026, 11, 26, 15, 30, tzinfo=UTC)  # half an hour before midnight in Shanghai
    clock = lambda: now  # noqa: E731
    several = [Visitors(home, ZONE, clock) for home in homes(tmp_path, 2)]
    alone = [visitors.hash("192.0.2.1") for visitors in several]
    assert alone[0] != alone[1]
    async with AsyncExitStack() as stack:
        for number, visitors in enumerate(several):
            fleet = Fleet(redis.url, AccessSettings(), f"home {number}", visitors=visitors)
            await stack.enter_async_context(joined(fleet))
    # The first one's salt is all machines' now, also after a restart without Redis.
    assert [visitors.hash("192.0.2.1") for visitors in several] == [alone[0]] * 2
    again = [Visitors(home, ZONE, clock) for home in (tmp_path / "machine-0", tmp_path / "machine-1")]
    assert [visitors.hash("192.0.2.1") for visitors in again] == [alone[0]] * 2
    now = datetime(2026, 11, 26, 16, 30, tzinfo=UTC)
    tomorrow = {visitors.hash("192.0.2.1") for visitors in several}
    assert len(tomorrow) == 1
    assert tomorrow != {alone[0]}
    async with raw(redis) as client:
        assert 0 < await client.ttl(f"{PREFIX}salt:2026-11-27") <= 2 * 86400


async def test_the_next_question_may_reach_any_proxy(
    redis: RedisServer, spawn: Spawn, tmp_path: Path
) -> None:
    async with DoubaoFake(script(say("ok"))) as doubao, aiohttp.ClientSession() as session:
        env = with_redis(redis, doubao, MOGINE_KB_URL="http://127.0.0.1:1")
        children = [await spawn("proxy", env, home=home) for home in homes(tmp_path, 2)]
        for number, text in enumerate(("And the price of XJ-200?", "And in white?", "Thanks")):
            url = children[number % 2].url() + "/api/chat"
            async with session.post(url, json={"question": text, "session_id": ID}) as response:
                assert "event: done" in await response.text()
            await asyncio.sleep(0.1)
        asked = [request.json["messages"] for request in doubao.requests]
    assert [[m["role"] for m in messages][1:] for messages in asked] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
    ]
    assert asked[2][1]["content"] == "And the price of XJ-200?"
