"""Limits that several processes share through a real Redis: exact together, healing, and safe without it."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st

from mogine.errors import MogineError, SettingsError
from mogine.redis_client import PREFIX
from mogine.serve.fleet import Fleet, joined
from mogine.serve.keys import ServerState
from mogine.serve.limits import Limits, Place, TooOften
from mogine.serve.logs import known_secrets
from mogine.settings import AccessSettings, RateLimit, load_settings
from tests.serve.conftest import ONE_CNY, question
from tests.serve.fleets import (
    LLM,
    Proxy,
    ask,
    homes,
    open_answers,
    proxies,
    raw,
    redis_of,
    said,
    value,
    with_redis,
)
from tests.servers import Spawn
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.raw import closed_port
from tests.upstreams.redis import RedisServer
from tests.upstreams.script import hang, say, script, usage
from tests.upstreams.tls import certificate_files
from tests.waiting import until

# --- together as one -----------------------------------------------------------------------------


async def test_no_visitor_gets_one_question_more_than_allowed_from_all_proxies_together(
    redis: RedisServer,
) -> None:
    rates = (RateLimit(20, 3600), RateLimit(50, 86400))
    async with proxies(redis.url, 4, rate_limit=rates, max_streams_per_visitor=1000) as several:
        asked = [proxy.told(visitor) for _ in range(30) for proxy in several for visitor in ("a", "b")]
        answers = await asyncio.gather(*asked)
    assert Counter(answers) == {"": 40, "rate_limited": 200}


async def test_the_site_has_one_rate_for_all_proxies(redis: RedisServer) -> None:
    async with proxies(redis.url, 3, site_rate_limit=(RateLimit(10, 3600),)) as several:
        answers = await asyncio.gather(*(p.told(f"v{n}") for n in range(10) for p in several))
    assert Counter(answers) == {"": 10, "rate_limited": 20}


async def test_a_refusal_by_all_takes_nothing_from_the_rate_and_is_recorded_once(redis: RedisServer) -> None:
    async with proxies(redis.url, 2, rate_limit=(RateLimit(2, 1),)) as (one, two):
        assert [await one.told("a"), await one.told("a")] == ["", ""]
        repeated = []
        for _ in range(5):
            with pytest.raises(TooOften, match="from you: 2/second") as refused:
                await two.open("a")
            repeated.append(refused.value.repeated)
            assert refused.value.retry_after_s is not None and 0 < refused.value.retry_after_s <= 1
        assert repeated == [False, True, True, True, True]

        async def may_again() -> bool:
            return await two.told("a") == ""

        await until(may_again)


async def test_open_answers_are_counted_over_all_proxies(redis: RedisServer) -> None:
    async with proxies(redis.url, 3, max_streams=5, max_streams_per_visitor=3) as several:
        places = [await proxy.open("a") for proxy in several]
        for proxy in several:
            assert await proxy.told("a") == "too_many_streams"
        places += [await several[0].open("b"), await several[1].open("c")]
        for proxy in several:
            assert await proxy.told("d") == "overloaded"
        for place in places:
            place.__exit__()
        async with raw(redis) as client:

            async def is_known() -> bool:
                return not any(await open_answers(client))

            await until(is_known)
        assert await several[2].told("a") == ""


async def test_who_leaves_while_redis_is_asked_leaves_nothing_behind(redis: RedisServer) -> None:
    async with proxies(redis.url, 2, max_streams_per_visitor=1, rate_limit=(RateLimit(10**6, 1),)) as (
        one,
        two,
    ):
        for _ in range(50):
            asking = asyncio.create_task(one.open("a"))
            await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await asking).__exit__()

        async def is_free() -> bool:
            return await two.told("a") == ""

        await until(is_free)


async def test_a_process_that_ends_tells_what_is_left_and_waits_for_nothing(redis: RedisServer) -> None:
    """P39: with the connection busy, where the package may swallow that it is cancelled."""
    for _ in range(20):
        async with asyncio.timeout(10), proxies(redis.url, 2, max_streams_per_visitor=100) as several:
            places = [await proxy.open("a") for proxy in several for _ in range(5)]
            for place in places:
                place.__exit__()
            await asyncio.sleep(0)
        async with raw(redis) as client:
            assert not await client.exists(f"{PREFIX}alive"), "and is no more at once"
            await client.flushall()


async def test_redis_is_asked_by_question_and_not_by_token(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake
) -> None:
    """P1, P43: once before an answer and once after it, however long that is."""
    child = await spawn("proxy", with_redis(redis, vendor, MOGINE_DAILY_BUDGET_CNY="1000"))
    calls = []
    async with aiohttp.ClientSession() as session, raw(redis) as client:
        for words in (1, 500):
            vendor.play(script(*(say("好") for _ in range(words)), usage(1, words)))
            await client.config_resetstat()
            async with session.post(child.url() + LLM, json=question(stream=True)) as response:
                assert (await response.text()).count("好") == words

            async def is_over() -> bool:
                return await open_answers(client) == [0]

            await until(is_over)
            calls.append((await client.info("commandstats"))["cmdstat_evalsha"]["calls"])
    # Between the two there may be a call that comes with time, not with tokens.
    assert 3 <= calls[0] <= 5 and 3 <= calls[1] <= 5


@given(
    asks=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.booleans()), max_size=60),
    count=st.integers(1, 4),
    streams=st.integers(1, 3),
)
@how(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_proxies_decide_as_one_alone_would(
    redis: RedisServer, asks: list[tuple[int, str, bool]], count: int, streams: int
) -> None:
    rules = AccessSettings(
        rate_limit=(RateLimit(count, 3600), RateLimit(count + 2, 86400)),
        site_rate_limit=(RateLimit(7, 3600),),
        max_streams=4,
        max_streams_per_visitor=streams,
    )

    async def compare() -> None:
        async with raw(redis) as client:
            await client.flushall()
        alone = Limits(rules, ServerState())
        async with contextlib.AsyncExitStack() as stack:
            several = []
            for number in range(3):
                fleet = await stack.enter_async_context(joined(Fleet(redis.url, rules, f"{number}")))
                several.append(Proxy(Limits(rules, ServerState()), fleet))
            async with raw(redis) as client:
                await _same_answers(alone, several, asks, client)

    asyncio.run(compare())


REASONS = ("overloaded", "too_many_streams", "rate_limited")


async def _same_answers(
    alone: Limits, several: list[Proxy], asks: list[tuple[int, str, bool]], client: Any
) -> None:
    open_now: list[tuple[Place, Place]] = []

    async def is_known() -> bool:
        return sum(await open_answers(client)) == len(open_now)

    for who, visitor, ends in asks:
        if ends and open_now:
            for place in open_now.pop(0):
                place.__exit__()
            await until(is_known)
            continue
        expected = ""
        try:
            mine = alone.open(visitor).__enter__()
        except MogineError as error:
            expected = error.reason
        try:
            theirs = await several[who].open(visitor)
        except MogineError as error:
            # Its own limits are asked first, and may name what comes later in the order of one alone.
            assert error.reason in REASONS[REASONS.index(expected) :]
        else:
            assert expected == ""
            open_now.append((mine, theirs))
    for pair in open_now:
        for place in pair:
            place.__exit__()


# --- Redis is away -------------------------------------------------------------------------------


async def test_without_redis_each_process_holds_its_own_limits_and_comes_back_by_itself(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """P43, F28: killed, and started again empty."""
    rules: Any = {"rate_limit": (RateLimit(3, 3600),), "max_streams_per_visitor": 5}
    async with proxies(redis.url, 2, **rules) as (one, two):
        place = await one.open("a")
        redis.kill()
        await until(lambda: one.fleet.trouble and two.fleet.trouble)
        assert [await one.told("a") for _ in range(4)] == ["", "", "rate_limited", "rate_limited"]
        assert [await two.told("a") for _ in range(4)] == ["", "", "", "rate_limited"]
        held = await two.open("b")
        redis.start()
        await until(lambda: not (one.fleet.trouble or two.fleet.trouble))
        for _ in range(3):
            assert await one.told("c") == ""
        assert await two.told("c") == "rate_limited", "they count together again"
        async with raw(redis) as client:
            assert await open_answers(client) == [1, 1]
        place.__exit__()
        held.__exit__()
    assert said(caplog) == ["away", "away", "back", "back"], "each process says each once"


async def test_a_redis_that_says_nothing_costs_one_wait_and_no_answer(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """P43, F28: paused."""
    async with proxies(redis.url, 1, timeout_s=0.1, rate_limit=(RateLimit(50, 3600),)) as (proxy,):
        assert await proxy.told("a") == ""
        redis.pause()
        assert await asyncio.gather(*(proxy.told(f"v{n}") for n in range(20))) == [""] * 20
        assert proxy.fleet.trouble
        assert [await proxy.told("a") for _ in range(50)] == [""] * 49 + ["rate_limited"]
        redis.resume()
        await until(lambda: not proxy.fleet.trouble)
    assert said(caplog) == ["away", "back"]


async def test_questions_that_a_paused_redis_was_not_asked_about_count_when_it_is_back(
    redis: RedisServer,
) -> None:
    """F28."""
    rules: Any = {"rate_limit": (RateLimit(3, 3600),), "site_rate_limit": (RateLimit(9, 3600),)}
    async with proxies(redis.url, 2, timeout_s=0.1, **rules) as (one, two):
        assert await one.told("a") == ""
        redis.pause()
        assert [await one.told("b"), await two.told("b"), await two.told("b")] == ["", "", ""]
        redis.resume()
        await until(lambda: not (one.fleet.trouble or two.fleet.trouble))
        for proxy in (one, two):
            assert await proxy.told("b") == "rate_limited"
        assert [await two.told("a"), await two.told("a"), await two.told("a")] == ["", "", "rate_limited"]


async def test_a_slow_redis_is_waited_for_as_long_as_it_may_take(redis: RedisServer) -> None:
    """F28."""
    rules: Any = {"rate_limit": (RateLimit(3, 3600),), "max_streams_per_visitor": 10}
    async with proxies(redis.url, 2, **rules) as several, raw(redis) as client:
        await client.client_pause(300)
        answers = await asyncio.gather(*(proxy.told("a") for proxy in several for _ in range(5)))
        assert Counter(answers) == {"": 3, "rate_limited": 7}
        assert not any(proxy.fleet.trouble for proxy in several)


async def test_a_redis_that_is_emptied_while_it_runs_is_told_again(redis: RedisServer) -> None:
    """F28: nobody notices by a broken connection."""
    async with proxies(redis.url, 2, lease_s=0.3, rate_limit=(RateLimit(3, 3600),)) as (one, two):
        assert [await one.told("a") for _ in range(3)] == [""] * 3
        async with raw(redis) as client:
            await client.flushall()

            async def is_told() -> bool:
                assert await one.told("b") in ("", "rate_limited"), "a question does not hide it"
                return any([key async for key in client.scan_iter(f"{PREFIX}memory")])

            await until(is_told)

        async def is_refused() -> bool:
            return await two.told("a") == "rate_limited"

        await until(is_refused)


async def test_what_a_paused_redis_takes_up_late_is_not_open_for_ever(redis: RedisServer) -> None:
    async with proxies(redis.url, 2, lease_s=0.6, timeout_s=0.15, max_streams_per_visitor=1) as (one, two):
        redis.pause()
        assert await one.told("a") == "", "Redis is away, its own limits say yes"
        redis.resume()  # and only now reads the question
        await until(lambda: not (one.fleet.trouble or two.fleet.trouble))

        async def is_free() -> bool:
            return await two.told("a") == ""

        await until(is_free)


async def test_what_redis_has_forgotten_is_told_again(redis: RedisServer) -> None:
    async with proxies(redis.url, 2, lease_s=0.3, max_streams_per_visitor=1) as (one, two):
        place = await one.open("a")
        async with raw(redis) as client:
            await client.flushall()

        async def is_known() -> bool:
            return await two.told("a") == "too_many_streams"

        await until(is_known)
        place.__exit__()


async def test_a_clock_that_is_set_back_locks_nobody_out(redis: RedisServer) -> None:
    """F21: all times are those of Redis, and it may be wrong."""
    async with proxies(redis.url, 1, rate_limit=(RateLimit(1, 3600),), max_streams_per_visitor=1) as (proxy,):
        assert await proxy.told("a") == ""
        async with raw(redis) as client:
            year = 365 * 86400 * 10**6
            (key,) = [key async for key in client.scan_iter(f"{PREFIX}rate:*")]
            await client.rpush(key, int(await client.rpop(key)) + year)
            await client.zadd(f"{PREFIX}alive", {"dead": 10**18})
            await client.hset(f"{PREFIX}visitors:dead", key.rpartition(":")[2], 5)
        fresh = Proxy(Limits(AccessSettings(), ServerState()), proxy.fleet)
        assert await fresh.told("a") == ""


# --- as in production ----------------------------------------------------------------------------


async def test_processes_of_several_homes_hold_one_limit(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    env = with_redis(redis, vendor, MOGINE_RATE_LIMIT="9/hour")
    others = homes(tmp_path, 2)
    children = [await spawn("proxy", env)]
    children += [await spawn("proxy", env, home=home) for home in others]
    children.append(await spawn("proxy", env, "--workers", "2", home=others[0]))
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        statuses = [await ask(session, children[number % 4]) for number in range(16)]
        assert statuses == [200] * 9 + [429] * 7
        for child in children:
            assert await redis_of(session, child) == "ok"
        assert await value(session, children[0], "mogine_redis_away") == 0
    assert len(vendor.requests) == 9


async def test_answers_of_a_process_that_is_killed_are_open_no_longer(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake
) -> None:
    vendor.play(script(say("一"), hang()))
    env = with_redis(redis, vendor, MOGINE_MAX_STREAMS_PER_VISITOR="2")
    victim, heir = await spawn("proxy", env), await spawn("proxy", env)
    async with aiohttp.ClientSession() as session:
        body = question(stream=True)
        running = [asyncio.create_task(session.post(victim.url() + LLM, json=body)) for _ in range(2)]
        await vendor.wait_requests(2, timeout_s=20)
        vendor.play(ONE_CNY)
        assert await ask(session, heir) == 429
        os.kill(victim.process.pid, signal.SIGKILL)
        # Its lease of 15 s is over: what Redis does by itself then, without the wait.
        async with raw(redis) as client:
            lives = await client.zrange(f"{PREFIX}alive", 0, -1)
            ttls = [await client.pttl(f"{PREFIX}open:{life}") for life in lives]
            assert [0 < ttl <= 15_000 for ttl in ttls if ttl != -2] == [True]
            (dead,) = [life for life, ttl in zip(lives, ttls, strict=True) if ttl != -2]
            await client.pexpire(f"{PREFIX}open:{dead}", 1)
            await client.pexpire(f"{PREFIX}visitors:{dead}", 1)

        async def is_free() -> bool:
            return await ask(session, heir) == 200

        await until(is_free)
        for task in running:
            (await task).close()


async def test_a_proxy_without_its_redis_serves_says_so_and_recovers(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake
) -> None:
    """P43, F28."""
    child = await spawn("proxy", with_redis(redis, vendor, MOGINE_RATE_LIMIT="3/hour"))
    async with aiohttp.ClientSession() as session:

        async def redis_is(state: str) -> bool:
            return bool(re.fullmatch(state, await redis_of(session, child)))

        assert await ask(session, child) == 200
        redis.kill()
        await until(lambda: redis_is(r"away \(\w+\)"))
        assert await value(session, child, "mogine_redis_away") == 1
        assert [await ask(session, child) for _ in range(3)] == [200, 200, 429]
        redis.start()
        await until(lambda: redis_is("ok"))
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert child.stderr.count("Redis is away") == child.stderr.count("Redis is back") == 1
    assert "Traceback" not in child.stderr


async def test_a_password_of_redis_is_used_and_told_to_nobody(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake
) -> None:
    """P18."""
    async with raw(redis) as client:
        await client.config_set("requirepass", "test-password-redis")
    children = [
        await spawn(
            "proxy", with_redis(redis, vendor, MOGINE_REDIS_URL=redis.url.replace("//", f"//:{word}@"))
        )
        for word in ("test-password-redis", "test-password-wrong")
    ]
    found = []
    async with aiohttp.ClientSession() as session:
        for child in children:
            assert await ask(session, child) == 200
            found.append(await redis_of(session, child))
            assert "test-password" not in child.stderr
    assert found == ["ok", "away (ConnectionError)"]
    assert "username-password" in children[1].stderr


async def test_redis_is_reached_over_tls(
    spawn: Spawn, vendor: DoubaoFake, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """P43: the certificate is checked."""
    certificate, key = certificate_files()
    with closed_port() as free:
        port = free
    tls = (
        "--tls-port",
        port,
        "--tls-cert-file",
        certificate,
        "--tls-key-file",
        key,
        "--tls-auth-clients",
        "no",
    )
    server = RedisServer(tmp_path_factory.mktemp("redis"), *map(str, tls)).start()
    try:
        urls = [f"rediss://127.0.0.1:{port}/0{trust}" for trust in (f"?ssl_ca_certs={certificate}", "")]
        found = []
        async with aiohttp.ClientSession() as session:
            for url, home in zip(urls, homes(tmp_path, 2), strict=True):
                child = await spawn("proxy", with_redis(server, vendor, MOGINE_REDIS_URL=url), home=home)
                found.append(await redis_of(session, child))
        assert found == ["ok", "away (ConnectionError)"]
    finally:
        server.kill()


async def test_a_proxy_starts_without_its_redis(spawn: Spawn, redis: RedisServer, vendor: DoubaoFake) -> None:
    redis.kill()
    child = await spawn("proxy", with_redis(redis, vendor, MOGINE_RATE_LIMIT="2/hour"))
    async with aiohttp.ClientSession() as session:
        assert [await ask(session, child) for _ in range(3)] == [200, 200, 429]


async def test_three_proxies_asked_all_at_once_give_exactly_the_limit(
    spawn: Spawn, redis: RedisServer, vendor: DoubaoFake, tmp_path: Path
) -> None:
    """P43, P8: processes of their own, as on three machines; also after Redis was paused, and killed."""
    env = with_redis(redis, vendor, MOGINE_RATE_LIMIT="25/hour", MOGINE_MAX_STREAMS_PER_VISITOR="500")
    children = await asyncio.gather(*(spawn("proxy", env, home=one) for one in homes(tmp_path, 3)))
    asked = 0

    async def fire(visitor: str) -> Counter[int]:
        nonlocal asked
        headers = {"X-Forwarded-For": visitor}
        statuses = await asyncio.gather(
            *(ask(session, child, headers) for _ in range(20) for child in children)
        )
        asked += 25
        return Counter(statuses)

    async def is_used(state: str) -> bool:
        return all([await redis_of(session, child) == state for child in children])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        assert await fire("198.51.100.1") == {200: 25, 429: 35}
        redis.pause()
        assert await ask(session, children[0], {"X-Forwarded-For": "198.51.100.2"}) == 200
        redis.resume()
        await until(lambda: is_used("ok"))
        assert await fire("198.51.100.3") == {200: 25, 429: 35}
        redis.kill()
        await until(lambda: is_used("away (ConnectionError)"))
        redis.start()
        await until(lambda: is_used("ok"))
        assert await fire("198.51.100.4") == {200: 25, 429: 35}
        for visitor in (1, 3):
            for child in children:
                assert await ask(session, child, {"X-Forwarded-For": f"198.51.100.{visitor}"}) == 429
    assert len(vendor.requests) == asked + 1


# --- settings ------------------------------------------------------------------------------------


def test_without_the_setting_the_package_is_not_even_imported() -> None:
    code = (
        "import sys, mogine.serve.proxy; "
        "sys.exit(any(name.split('.')[0] == 'redis' or name.endswith('fleet') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("redis://10.0.0.1:6379/2", "redis://10.0.0.1:6379/2"),
        ("valkey://:secret@host", "redis://:secret@host"),
        ("rediss://user:secret@host:6380/0", "rediss://user:secret@host:6380/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_an_address_of_redis_is_taken_in_the_usual_spellings(home: Path, written: str, read: str) -> None:
    assert load_settings({"MOGINE_REDIS_URL": written}, home).access.redis_url == read


@pytest.mark.parametrize(
    "written",
    [
        *("localhost:6379", "http://host", "redis://", "redis://host/name", "unix://", "redis://host:0"),
        *(f"redis://user:test{sign}pass@host" for sign in "/?#"),
        *(f"redis://:test-pass@host{rest}" for rest in (":65536", "/0?db=x", "?socket_timeout=1", "/0#1")),
    ],
)
def test_a_wrong_address_of_redis_is_told_without_its_password(home: Path, written: str) -> None:
    """P18."""
    with pytest.raises(SettingsError, match="MOGINE_REDIS_URL") as told:
        load_settings({"MOGINE_REDIS_URL": written}, home)
    assert "pass@" not in told.value.message and "test" not in told.value.message


def test_a_password_in_an_address_is_taken_out_of_the_log_by_itself(home: Path) -> None:
    """P18."""
    settings = load_settings({"MOGINE_REDIS_URL": "redis://user:test%2Fpassword@host"}, home)
    assert {"test%2Fpassword", "test/password", settings.access.redis_url} <= set(known_secrets(settings))
