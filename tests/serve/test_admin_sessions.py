"""The owner's way in by browser: links that work once, cookies that only our own pages can use."""

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from mogine.errors import NotFound
from mogine.serve.access import admin_token
from mogine.serve.admin_sessions import (
    COOKIE,
    LINK_S,
    SESSION_S,
    AdminSessions,
    AdminToken,
    Files,
    end_all,
    open_sessions,
)
from mogine.serve.runner import Running, started
from mogine.settings import Settings, load_settings
from tests.serve.conftest import Reply, assert_envelope

SESSION = "/api/analytics/session"
STATISTICS = "/api/analytics/statistics"
FREE_PORTS = {name: "0" for name in ("MOGINE_PROXY_PORT", "MOGINE_KB_PORT", "MOGINE_ANALYTICS_PORT")}


@dataclass
class Browser:
    """What a browser sends; it keeps its cookies by itself."""

    running: Running
    session: aiohttp.ClientSession
    cookie: str = ""

    def url(self, server: str = "analytics") -> str:
        return self.running.url(server)

    async def ask(self, method: str, path: str, *, server: str = "analytics", **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            named["Cookie"] = f"{COOKIE}={self.cookie}"
        async with self.session.request(method, self.url(server) + path, headers=named) as response:
            return Reply(response.status, response.headers, await response.read())

    async def redeem(self, link: Any, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = self.url() + SESSION
        async with self.session.post(url, json={"link": link}, headers=named) as response:
            found = Reply(response.status, response.headers, await response.read())
        if found.status == 200:
            self.cookie = set_cookie(found).value
        return found


def set_cookie(reply: Reply) -> Any:
    return SimpleCookie(reply.headers["Set-Cookie"])[COOKIE]


@pytest.fixture
def home_settings(home: Path) -> Settings:
    return load_settings({**FREE_PORTS, "MOGINE_EMBEDDER": "none"}, home)


@pytest_asyncio.fixture
async def browser(home_settings: Settings) -> AsyncIterator[Browser]:
    jar = aiohttp.DummyCookieJar()
    async with (
        started(home_settings, ["kb", "analytics"]) as running,
        aiohttp.ClientSession(cookie_jar=jar) as session,
    ):
        yield Browser(running, session)


def link_of(settings: Settings) -> str:
    return open_sessions(settings).new_link()


async def test_a_link_opens_the_admin_routes_of_all_servers(
    browser: Browser, home_settings: Settings
) -> None:
    assert_envelope(await browser.ask("GET", STATISTICS), 401, "unauthorized")
    told = await browser.redeem(link_of(home_settings), Origin=browser.url())
    assert told.status == 200 and told.json["expires_at"]
    assert (await browser.ask("GET", STATISTICS)).status == 200
    assert (await browser.ask("GET", SESSION)).json == told.json
    # The knowledge base has no documents yet; what matters is that it does not ask for a token.
    assert (await browser.ask("GET", "/api/documents", server="kb")).status == 503


async def test_a_link_works_once_also_when_many_try_at_once(
    browser: Browser, home_settings: Settings
) -> None:
    link = link_of(home_settings)
    replies = await asyncio.gather(*(browser.redeem(link) for _ in range(8)))
    assert sorted(reply.status for reply in replies) == [200, *[404] * 7]
    assert_envelope(await browser.redeem(link), 404, "not_found")
    assert len(list((home_settings.data_path / "admin").glob("session-*"))) == 1


@pytest.mark.parametrize("link", ["", "x", "A" * 43, "../admin_token", "ü" * 43, 7, None, ["a"], "A" * 900])
async def test_links_that_nobody_made_open_nothing(browser: Browser, link: Any) -> None:
    reply = await browser.redeem(link)
    assert reply.status in (400, 404) and "Set-Cookie" not in reply.headers


async def test_looking_at_a_link_does_not_use_it_up(browser: Browser, home_settings: Settings) -> None:
    link = link_of(home_settings)
    for method in ("GET", "HEAD"):
        assert (await browser.ask(method, f"{SESSION}?link={link}")).status == 401
    assert (await browser.redeem(link)).status == 200


async def test_cookie_is_closed_to_scripts_and_other_sites(browser: Browser, home_settings: Settings) -> None:
    cookie = set_cookie(await browser.redeem(link_of(home_settings)))
    assert cookie["httponly"] and cookie["samesite"] == "Strict" and not cookie["secure"]
    assert (cookie["path"], int(cookie["max-age"])) == ("/", SESSION_S)


async def test_cookie_behind_https_is_secure_and_stays_below_the_prefix(home: Path) -> None:
    settings = load_settings({**FREE_PORTS, "MOGINE_BASE_PATH": "/~temp/mogine_agent/"}, home)
    jar = aiohttp.DummyCookieJar()
    async with started(settings, ["analytics"]) as running, aiohttp.ClientSession(cookie_jar=jar) as session:
        told = await Browser(running, session).redeem(
            link_of(settings), X_Forwarded_For="198.51.100.7", X_Forwarded_Proto="https"
        )
    cookie = set_cookie(told)
    assert cookie["secure"] and cookie["path"] == "/~temp/mogine_agent/"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
        {"Origin": "{own}", "Sec-Fetch-Site": "same-site"},
        {"Origin": "{own}.evil.example"},
    ],
)
async def test_cookie_changes_nothing_for_pages_of_others(
    browser: Browser, home_settings: Settings, headers: dict[str, str]
) -> None:
    await browser.redeem(link_of(home_settings))
    given = {name: value.format(own=browser.url()) for name, value in headers.items()}
    async with browser.session.post(
        browser.url() + "/api/analytics/cleanup",
        json={"dry_run": True},
        headers={"Cookie": f"{COOKIE}={browser.cookie}", **given},
    ) as response:
        reply = Reply(response.status, response.headers, await response.read())
    assert_envelope(reply, 403, "origin_not_allowed")
    assert_envelope(await browser.ask("DELETE", SESSION, **given), 403, "origin_not_allowed")
    assert (await browser.ask("GET", SESSION)).status == 200


async def test_sites_of_visitors_cannot_use_the_cookie(home: Path) -> None:
    env = {**FREE_PORTS, "MOGINE_ALLOWED_ORIGINS": "https://www.example.com"}
    settings = load_settings(env, home)
    jar = aiohttp.DummyCookieJar()
    async with started(settings, ["analytics"]) as running, aiohttp.ClientSession(cookie_jar=jar) as session:
        browser = Browser(running, session)
        await browser.redeem(link_of(settings))
        for headers in ({"Origin": "https://www.example.com"}, {"Sec_Fetch_Site": "cross-site"}):
            assert_envelope(await browser.ask("GET", STATISTICS, **headers), 403, "origin_not_allowed")
        own = await browser.ask("GET", STATISTICS, Sec_Fetch_Site="same-origin")
        assert own.status == 200 and "Access-Control-Allow-Credentials" not in own.headers


async def test_signing_out_ends_the_session_everywhere(browser: Browser, home_settings: Settings) -> None:
    await browser.redeem(link_of(home_settings))
    gone = await browser.ask("DELETE", SESSION, Origin=browser.url())
    assert gone.status == 200 and set_cookie(gone)["max-age"] == "0"
    assert_envelope(await browser.ask("GET", STATISTICS), 401, "unauthorized")
    assert (await browser.ask("GET", "/api/documents", server="kb")).status == 401


async def test_a_new_token_ends_sessions_and_the_old_token_within_a_second(
    browser: Browser, home_settings: Settings
) -> None:
    old = admin_token(home_settings)
    await browser.redeem(link_of(home_settings))
    waiting = link_of(home_settings)
    assert (await browser.ask("GET", STATISTICS)).status == 200
    (home_settings.data_path / "admin_token").write_text("n" * 43 + "\n")
    began = time.monotonic()
    async with asyncio.timeout(10):
        while (await browser.ask("GET", STATISTICS)).status == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert time.monotonic() - began < 5  # a second on a machine that has time
    assert (await browser.redeem(waiting)).status == 404
    browser.cookie = ""
    assert (await browser.ask("GET", STATISTICS, Authorization=f"Bearer {old}")).status == 401
    assert (await browser.ask("GET", STATISTICS, Authorization=f"Bearer {'n' * 43}")).status == 200


def test_a_token_in_env_is_taken_up_and_half_a_file_is_not(home: Path) -> None:
    env = home / ".env"
    env.write_text(f"MOGINE_ADMIN_TOKEN={'a' * 40}\n")
    os.utime(env, (1, 1))
    now = [0.0]
    token = AdminToken(load_settings({}, home), clock=lambda: now[0])
    assert token() == "a" * 40
    now[0] += 1
    env.write_text(f"MOGINE_ADMIN_TOKEN={'b' * 39}")  # just now: it may go on
    assert token() == "a" * 40
    env.write_text("MOGINE_ADMIN_TOKEN=short\n")
    os.utime(env, (2, 2))
    now[0] += 1
    assert token() == "a" * 40
    env.write_text(f"MOGINE_ADMIN_TOKEN={'b' * 40}\n")
    os.utime(env, (3, 3))
    now[0] += 1
    assert token() == "b" * 40


def test_a_token_of_the_process_environment_stays(home: Path) -> None:
    now = [0.0]
    environ = {"MOGINE_ADMIN_TOKEN": "a" * 40}
    token = AdminToken(load_settings(environ, home), clock=lambda: now[0])
    (home / ".env").write_text(f"MOGINE_ADMIN_TOKEN={'b' * 40}\n")
    os.utime(home / ".env", (1, 1))
    now[0] += 1
    assert token() == "a" * 40


def test_links_and_sessions_end_and_leave_no_file(tmp_path: Path) -> None:
    now = [1_000_000.0]
    sessions = AdminSessions(
        Files(tmp_path / "admin", clock=lambda: now[0]), lambda: "t" * 40, clock=lambda: now[0]
    )
    late, early = sessions.new_link(), sessions.new_link()
    session = sessions.redeem(early)
    now[0] += LINK_S
    with pytest.raises(NotFound, match="30 minutes"):
        sessions.redeem(late)
    assert sessions.find(session.value) == session
    now[0] += SESSION_S
    assert sessions.find(session.value) is None
    last = sessions.new_link()
    assert len(list((tmp_path / "admin").iterdir())) == 1
    now[0] -= 400 * 86_400  # what ends in a year was made under a wrong clock
    with pytest.raises(NotFound):
        sessions.redeem(last)


def test_files_of_sessions_are_private_and_hold_no_secret(tmp_path: Path) -> None:
    sessions = AdminSessions(Files(tmp_path / "admin"), lambda: "t" * 40)
    secrets = [sessions.new_link()]
    secrets += [sessions.redeem(secrets[0]).value, sessions.new_link()]
    assert stat.S_IMODE((tmp_path / "admin").stat().st_mode) == 0o700
    for path in (tmp_path / "admin").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not any(secret in path.name + path.read_text() for secret in secrets)


def test_end_all_leaves_nothing(home_settings: Settings) -> None:
    sessions = open_sessions(home_settings)
    session = sessions.redeem(sessions.new_link())
    sessions.new_link()
    end_all(home_settings)
    assert sessions.find(session.value) is None
    assert list((home_settings.data_path / "admin").iterdir()) == []
