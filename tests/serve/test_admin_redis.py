"""The owner's links and sessions where several machines share a real Redis: once, and for all of them."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from mogine.errors import NotFound, Unavailable
from mogine.redis_client import PREFIX
from mogine.serve.admin_redis import RedisShelf
from mogine.serve.admin_sessions import COOKIE, AdminSessions, Files, end_all, open_sessions
from mogine.settings import load_settings
from tests.conftest import Run
from tests.serve.conftest import Served, Start
from tests.serve.fleets import homes, raw
from tests.servers import ADMIN_TOKEN, DEFAULTS
from tests.upstreams.redis import RedisServer

SESSION = "/api/analytics/session"


def machine(redis: RedisServer, folder: Path, timeout_s: float = 5.0) -> AdminSessions:
    """The sessions as one machine knows them."""
    now = [0.0]

    def clock() -> float:
        now[0] += 60  # it is always tried again
        return now[0]

    files = Files(folder)
    return AdminSessions(RedisShelf(redis.url, files, clock=clock, timeout_s=timeout_s), lambda: "t" * 40)


async def redeem(served: Served, link: str) -> tuple[int, str]:
    """Status, and the cookie."""
    url = served.url(SESSION, "analytics")
    async with served.session.post(url, json={"link": link}) as response:
        found = response.cookies.get(COOKIE)
        return response.status, found.value if found else ""


async def test_a_link_of_one_machine_works_once_on_any_and_so_does_its_session(
    serve: Start, redis: RedisServer, tmp_path: Path
) -> None:
    """P43."""
    env = {"MOGINE_REDIS_URL": redis.url}
    both = homes(tmp_path, 2)
    one, two = [await serve("analytics", env=env, home=home) for home in both]
    link = open_sessions(load_settings({**DEFAULTS, **env}, both[0])).new_link()
    found = await asyncio.gather(*(redeem(served, link) for _ in range(8) for served in (one, two)))
    assert Counter(status for status, _ in found) == {200: 1, 404: 15}
    (cookie,) = [cookie for _, cookie in found if cookie]
    headers = {"Cookie": f"{COOKIE}={cookie}"}
    for served in (one, two):
        assert (await served.ask("GET", SESSION, server="analytics", headers=headers)).status == 200
    origin = {"Origin": one.url("", "analytics")}
    assert (await one.ask("DELETE", SESSION, server="analytics", headers=headers | origin)).status == 200
    for served in (one, two):
        assert (await served.ask("GET", SESSION, server="analytics", headers=headers)).status == 401
    for home in both:
        assert not (home / "data/admin").exists(), "nothing lies on one machine alone"


async def test_redis_holds_no_secret_of_the_owner_and_forgets_in_time(
    redis: RedisServer, tmp_path: Path
) -> None:
    """P18."""
    sessions = machine(redis, tmp_path)
    secrets = [sessions.new_link()]
    secrets += [sessions.redeem(secrets[0]).value, sessions.new_link(), "t" * 40]
    async with raw(redis) as client:
        keys = [key async for key in client.scan_iter(f"{PREFIX}admin:*")]
        assert len(keys) == 2
        for key in keys:
            kept = key + await client.get(key)
            assert not any(secret in kept for secret in secrets)
            assert 0 < await client.ttl(key) <= 12 * 3600


def test_a_link_made_while_redis_is_away_works_on_its_machine(redis: RedisServer, tmp_path: Path) -> None:
    """P43, F28."""
    one, two = machine(redis, tmp_path / "one"), machine(redis, tmp_path / "two")
    shared = one.new_link()
    assert not one.is_alone
    redis.kill()
    link = one.new_link()
    assert one.is_alone
    with pytest.raises(NotFound):
        two.redeem(link)
    session = one.redeem(link)
    assert one.find(session.value) and not two.find(session.value)
    with pytest.raises(NotFound):
        one.redeem(link)
    with pytest.raises(NotFound):
        one.redeem(shared)
    redis.start()
    with pytest.raises(NotFound):
        two.redeem(shared)
    assert one.find(session.value)
    one.end(session.value)
    assert not one.find(session.value)


def test_nobody_is_told_that_a_session_has_ended_when_that_is_not_sure(
    redis: RedisServer, tmp_path: Path
) -> None:
    """F28."""
    sessions = machine(redis, tmp_path, timeout_s=0.1)
    session = sessions.redeem(sessions.new_link())
    redis.pause()
    with pytest.raises(Unavailable):
        sessions.end(session.value)
    redis.resume()
    sessions.end(session.value)
    assert not sessions.find(session.value)


def test_a_new_token_ends_what_all_machines_know(redis: RedisServer, home: Path) -> None:
    """B8."""
    settings = load_settings({"MOGINE_REDIS_URL": redis.url, "MOGINE_ADMIN_TOKEN": ADMIN_TOKEN}, home)
    sessions = open_sessions(settings)
    session, link = sessions.redeem(sessions.new_link()), sessions.new_link()
    end_all(settings)
    assert sessions.find(session.value) is None
    with pytest.raises(NotFound):
        sessions.redeem(link)


def test_the_command_says_when_a_link_is_good_on_this_machine_only(
    redis: RedisServer, mogine: Run, home: Path
) -> None:
    """P43."""
    (home / "data").mkdir(mode=0o700)
    env = {"MOGINE_REDIS_URL": redis.url.replace("//", "//:test-password@")}
    found = mogine("admin", "link", env=env)
    assert found.returncode == 0 and "this machine only" in found.stderr, "a wrong password"
    assert "test-password" not in found.stdout + found.stderr
    found = mogine("admin", "link", env={"MOGINE_REDIS_URL": redis.url})
    assert found.returncode == 0 and "this machine only" not in found.stderr
