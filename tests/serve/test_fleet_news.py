"""What proxies tell one another through Redis beside limits: spending, and what they know of vendors."""

import asyncio
import signal
from collections import Counter
from pathlib import Path

import aiohttp

from mogine.redis_client import PREFIX
from tests.serve.conftest import ONE_CNY
from tests.serve.fleets import ask, homes, raw, ready, redis_of, value, with_redis
from tests.servers import Spawn
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.redis import RedisServer
from tests.upstreams.script import refuse
from tests.waiting import until

# --- budgets -------------------------------------------------------------------------------------


async def spent_in_redis(client: object) -> dict[str, float]:
    """What all homes have spent, by period."""
    found = {}
    async for key in client.scan_iter(f"{PREFIX}spent:*"):  # type: ignore[attr-defined]
        amounts = await client.hvals(key)  # type: ignore[attr-defined]
        found[key.removeprefix(f"{PREFIX}spent:")] = round(sum(map(int, amounts)) / 10**9, 3)
    return found


async def test_what_one_machine_has_spent_counts_for_the_next_question_on_another(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P11: at once, not when the record is read next."""
    env = with_redis(redis, vendor, MOGINE_DAILY_BUDGET_CNY="3", MOGINE_MONTHLY_BUDGET_CNY="50")
    one, two = [await spawn("proxy", env, home=home) for home in homes(tmp_path, 2)]
    async with aiohttp.ClientSession() as session, raw(redis) as client:
        for number, child in enumerate((one, two, one), start=1):
            assert await ask(session, child) == 200

            async def is_told(total: int = number) -> bool:
                return sorted({*(await spent_in_redis(client)).values()}) == [float(total)]

            await until(is_told)
        assert [await ask(session, child) for child in (two, one)] == [429, 429]
        for child in (one, two):
            for period in ("today", "month"):
                assert round(await value(session, child, f"mogine_spent_{period}_cny"), 3) == 3
    assert len(vendor.requests) == 3


async def test_machines_that_spend_at_once_exceed_the_budget_by_open_answers_at_most(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P11."""
    env = with_redis(redis, vendor, MOGINE_DAILY_BUDGET_CNY="20", MOGINE_MAX_STREAMS_PER_VISITOR="2")
    children = await asyncio.gather(*(spawn("proxy", env, home=one) for one in homes(tmp_path, 3)))
    async with aiohttp.ClientSession() as session:

        async def visit(child_number: int) -> Counter[int]:
            return Counter([await ask(session, children[child_number % 3]) for _ in range(15)])

        total = sum(await asyncio.gather(*map(visit, range(4))), Counter())
    assert 20 <= len(vendor.requests) <= 20 + 2, "two answers may be open at once"
    assert total[200] == len(vendor.requests) and total[429] == 60 - total[200]


async def test_a_redis_that_begins_anew_is_told_what_was_spent_also_by_machines_that_are_gone(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P11, F28."""
    env = with_redis(redis, vendor, MOGINE_DAILY_BUDGET_CNY="3")
    stays, goes, comes = homes(tmp_path, 3)
    one, two = [await spawn("proxy", env, home=home) for home in (stays, goes)]
    async with aiohttp.ClientSession() as session:
        assert [await ask(session, child) for child in (one, two, two)] == [200] * 3

        async def knows_all() -> bool:
            return await value(session, one, "mogine_spent_today_cny") >= 3

        await until(knows_all)  # by its own look, it was not asked any more
        two.send(signal.SIGTERM)
        assert await two.ended() == 0
        redis.kill()
        assert await ask(session, one) == 429, "what was known stays known"
        redis.start()

        async def is_back() -> bool:
            return await redis_of(session, one) == "ok"

        await until(is_back)
        three = await spawn("proxy", env, home=comes)
        assert [await ask(session, child) for child in (three, one)] == [429, 429]
    assert len(vendor.requests) == 3


async def test_a_machine_that_comes_back_brings_what_its_record_says(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P11, F28: all were stopped, and Redis has lost everything."""
    env = with_redis(redis, vendor, MOGINE_DAILY_BUDGET_CNY="3")
    both = homes(tmp_path, 2)
    async with aiohttp.ClientSession() as session:
        for home, count in zip(both, (2, 1), strict=True):
            child = await spawn("proxy", env, home=home)
            assert [await ask(session, child) for _ in range(count)] == [200] * count
            child.send(signal.SIGTERM)
            assert await child.ended() == 0
        redis.kill()
        redis.start()
        children = [await spawn("proxy", env, home=home) for home in both]
        assert [await ask(session, child) for child in children] == [429, 429]


# --- vendors -------------------------------------------------------------------------------------


async def breakers(session: aiohttp.ClientSession, *children: object) -> list[str]:
    return [(await ready(session, child))["providers"]["doubao"]["breaker"] for child in children]  # type: ignore[arg-type]


async def test_a_vendor_that_fails_one_proxy_is_left_alone_by_all_and_tried_by_one(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """F1, F28."""
    vendor.play(refuse(500))
    env = with_redis(redis, vendor, MOGINE_MAX_STREAMS_PER_VISITOR="100")
    children = await asyncio.gather(*(spawn("proxy", env, home=one) for one in homes(tmp_path, 3)))
    one, *others = children
    async with aiohttp.ClientSession() as session, raw(redis) as client:
        assert [await ask(session, one) for _ in range(5)] == [502] * 5
        asked = len(vendor.requests)
        for child in children:
            assert await ask(session, child) == 503
        assert len(vendor.requests) == asked, "nobody has asked the vendor"
        assert await breakers(session, *children) == ["open"] * 3

        async def is_due() -> None:
            await client.hset(f"{PREFIX}vendors", "open:doubao", 1)

        await is_due()
        statuses = await asyncio.gather(*(ask(session, child) for _ in range(10) for child in others))
        assert Counter(statuses) == {502: 1, 503: 19}, "one trial, which fails"
        vendor.play(ONE_CNY)
        assert await ask(session, one) == 503, "the next one is due in ten seconds"
        await is_due()
        assert await ask(session, others[0]) == 200
        assert [await ask(session, child) for child in (one, others[1])] == [200, 200]
        assert await breakers(session, *children) == ["closed"] * 3
    for child in children:
        assert child.stderr.count("left alone") == child.stderr.count("answers again") == 1
        assert "Traceback" not in child.stderr


async def test_without_redis_each_proxy_tries_a_vendor_by_itself(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """F28: what was open stays so, and what one learns meanwhile is told when Redis is back."""
    vendor.play(refuse(500))
    env = with_redis(redis, vendor)
    one, two = [await spawn("proxy", env, home=home) for home in homes(tmp_path, 2)]
    async with aiohttp.ClientSession() as session:
        redis.kill()
        assert [await ask(session, one) for _ in range(6)] == [502] * 5 + [503]
        assert await ask(session, two) == 502
        redis.start()

        async def is_shared() -> bool:
            states = [await redis_of(session, child) for child in (one, two)]
            return states == ["ok", "ok"]

        await until(is_shared)
        assert [await ask(session, child) for child in (one, two)] == [503, 503]


async def test_a_key_that_one_proxy_was_refused_with_rests_for_all(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P18: and Redis does not hold it."""
    vendor.keys = frozenset(("test-key-good",))
    keys = "test-key-refused,test-key-good"
    env = with_redis(redis, vendor, DOUBAO_API_KEY=keys)
    one, two = [await spawn("proxy", env, home=home) for home in homes(tmp_path, 2)]
    async with aiohttp.ClientSession() as session, raw(redis) as client:
        assert await ask(session, one) == 200
        assert [request.bearer for request in vendor.requests] == ["test-key-refused", "test-key-good"]
        assert [await ask(session, two) for _ in range(3)] == [200] * 3
        assert [request.bearer for request in vendor.requests[2:]] == ["test-key-good"] * 3
        assert (await ready(session, two))["providers"]["doubao"]["keys_resting"] == 1
        known = await client.hgetall(f"{PREFIX}vendors")
        assert len(known) == 1 and "test-key" not in str(known)
