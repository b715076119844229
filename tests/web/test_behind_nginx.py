"""The pages through a real nginx with TLS, at the root and behind a prefix, before a real proxy."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Browser, Page, expect

from mogine.serve.proxy import create_app
from mogine.settings import load_settings
from tests.fronts.nginx import PREFIX, Fronted, site
from tests.serve.test_workers import site as workers
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import Script, hang, pause, say, script
from tests.web.conftest import PHONE, PageServer, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

# A company's own page, as nginx serves it from the same host.
COMPANY = """
        location = /company {{
            default_type text/html;
            return 200 '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>c</title>
                <meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"></head>
                <body><h1>c</h1><script async src="{prefix}widget.js"></script></body></html>';
        }}
"""


@asynccontextmanager
async def proxy(home: Path, fake: DoubaoFake, **more: str) -> AsyncIterator[int]:
    """A proxy in this process; its port."""
    environ = {
        **fake.environ,
        "MOGINE_KB_URL": "http://127.0.0.1:9",
        "MOGINE_RATE_LIMIT": "99/minute",
        **more,
    }
    app = create_app(load_settings(environ, home))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("prefix", ["/", PREFIX])
@pytest.mark.parametrize("device", [{}, PHONE])
async def test_widget_streams_goes_on_and_stops(
    browser: Browser, home: Path, nginx: Fronted, prefix: str, device: dict[str, Any]
) -> None:
    answers = (
        script(say("first "), pause(0.1), say("and last")),
        script(say("half"), hang()),
    )
    async with DoubaoFake(*answers) as fake, proxy(home, fake) as port:
        front = nginx({prefix: port}, more=COMPANY.format(prefix=prefix))
        server = PageServer(front.origin, "", prefix)
        options = {"ignore_https_errors": True, "reduced_motion": "reduce", **device}
        async with visit(browser, server, "/company", **options) as v:
            await v.page.locator(".bubble").click()
            if device:
                box = await v.page.locator(".panel").bounding_box()
                assert box == {"x": 0, "y": 0, **PHONE["viewport"]}, "a sheet over the whole screen"
            await v.page.fill("#question", "q")
            await v.page.press("#question", "Enter")
            await expect(v.page.locator(".prose")).to_contain_text("first")
            await v.page.reload()
            await expect(v.page.locator(".prose")).to_have_text("first and last")
            await expect(v.page.locator(".actions")).to_be_visible()
            assert len(fake.requests) == 1, "the answer was asked for once"
            await v.page.fill("#question", "again")
            await v.page.press("#question", "Enter")
            await expect(v.page.locator(".prose").last).to_have_text("half")
            await v.page.get_by_role("button", name="Stop").click()
            await fake.wait_disconnect(1)
            said = [m["content"] for m in fake.requests[1].json["messages"] if m["role"] != "system"]
            assert said == ["q", "first and last", "again"]
        assert front.problems() == []


# The question goes to the last of three proxies; what is asked about its answer goes to all of them in turn.
THREE = """
    upstream three {{ server 127.0.0.1:{0}; server 127.0.0.1:{1}; server 127.0.0.1:{2}; }}
    {site}
"""
IN_TURN = """
        location ~ ^/~temp/mogine_agent(/api/chat/(?:resume|stop))$ {
            proxy_pass http://three$1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_buffering off;
            proxy_next_upstream error timeout http_404 http_503 non_idempotent;
        }
"""


async def goes_on_and_stops(page: Page, fake: DoubaoFake, rounds: int) -> None:
    """Ask, leave for the next page, see the rest of the answer there; ask, leave, and press Stop there."""
    for number in range(0, 2 * rounds, 2):
        await page.fill("#question", f"question {number}")
        await page.press("#question", "Enter")
        await expect(page.locator(".prose").last).to_contain_text("first")
        await page.reload()
        await expect(page.locator(".prose").last).to_have_text("first and last")
        await expect(page.locator(".actions").last).to_be_visible()
        await page.fill("#question", "again")
        await page.press("#question", "Enter")
        await expect(page.locator(".prose").last).to_have_text("half")
        await page.reload()
        await expect(page.locator(".prose").last).to_have_text("half")
        await page.get_by_role("button", name="Stop").click()
        await fake.wait_disconnect(number + 1)
    assert len(fake.requests) == 2 * rounds, "nothing was asked for twice"


def spoken(rounds: int) -> list[Script]:
    return [script(say("first "), pause(0.3), say("and last")), script(say("half"), hang())] * rounds


async def test_of_three_proxies_the_one_that_gives_the_answer_is_found(
    browser: Browser, home: Path, nginx: Fronted
) -> None:
    """P5: `Stop` ends the vendor's stream wherever it runs; the grace alone would last a minute."""
    async with DoubaoFake(*spoken(1)) as fake, AsyncExitStack() as stack:
        grace = {"MOGINE_RESUME_GRACE": "60"}
        ports = [await stack.enter_async_context(proxy(home, fake, **grace)) for _ in range(3)]
        places = site({PREFIX: ports[-1]}, IN_TURN + COMPANY.format(prefix=PREFIX))
        front = nginx(servers=THREE.format(*ports, site=places))
        server = PageServer(front.origin, "", PREFIX)
        async with visit(browser, server, "/company", ignore_https_errors=True) as v:
            await v.page.locator(".bubble").click()
            await goes_on_and_stops(v.page, fake, 1)
        assert front.problems() == []


async def test_of_several_workers_the_one_that_gives_the_answer_is_found(
    browser: Browser, home: Path, nginx: Fronted
) -> None:
    """P5: nginx has a new connection for each request, which any of the workers may take."""
    async with DoubaoFake(*spoken(3)) as fake:
        more = {"MOGINE_RESUME_GRACE": "60", "MOGINE_RATE_LIMIT": "99/minute"}
        env = {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_KB_URL": "http://127.0.0.1:9", **more}
        async with workers(home, env, workers=3) as served:
            front = nginx({PREFIX: served.port}, more=COMPANY.format(prefix=PREFIX))
            server = PageServer(front.origin, "", PREFIX)
            async with visit(browser, server, "/company", ignore_https_errors=True) as v:
                await v.page.locator(".bubble").click()
                await goes_on_and_stops(v.page, fake, 3)
            assert front.problems() == []


@pytest.mark.parametrize("prefix", ["/", PREFIX])
async def test_chat_page_works_with_javascript_and_without(
    browser: Browser, home: Path, nginx: Fronted, prefix: str
) -> None:
    async with (
        DoubaoFake(script(say("**yes**")), script(say("**plain**"))) as fake,
        proxy(home, fake) as port,
    ):
        front = nginx({prefix: port})
        server = PageServer(front.origin, "", prefix)
        async with visit(browser, server, f"{prefix}?q=Is+it%3F", ignore_https_errors=True) as v:
            await expect(v.page).to_have_url(front.url("chat/?q=Is+it%3F", prefix))
            await expect(v.page.locator("#question")).to_have_value("Is it?")
            assert fake.requests == [], "a link asks nothing by itself"
            await v.page.press("#question", "Enter")
            await expect(v.page.locator(".prose strong")).to_have_text("yes")
        plain = {"ignore_https_errors": True, "java_script_enabled": False}
        async with visit(browser, server, f"{prefix}chat/", **plain) as v:
            await v.page.locator("#plain-question").fill("Is it?")
            await v.page.get_by_role("button", name="Send").click()
            await expect(v.page.locator(".prose strong")).to_have_text("plain")
            await expect(v.page).to_have_url(front.url("chat/", prefix))


async def test_leaving_for_good_ends_the_answer_after_the_grace(
    browser: Browser, home: Path, nginx: Fronted
) -> None:
    async with (
        DoubaoFake(script(say("half"), hang())) as fake,
        proxy(home, fake, MOGINE_RESUME_GRACE="0.1") as port,
    ):
        front = nginx({PREFIX: port})
        server = PageServer(front.origin, "", PREFIX)
        async with visit(browser, server, f"{PREFIX}chat/", ignore_https_errors=True) as v:
            await v.page.fill("#question", "q")
            await v.page.press("#question", "Enter")
            await expect(v.page.locator(".prose")).to_have_text("half")
            await v.page.goto("about:blank")
            await asyncio.wait_for(fake.wait_disconnect(0), 5)
