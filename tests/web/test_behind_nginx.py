"""The pages through a real nginx with TLS, at the root and behind a prefix, before a real proxy."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Browser, expect

from mogine.serve.proxy import create_app
from mogine.settings import load_settings
from tests.fronts.nginx import PREFIX, Fronted
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import hang, pause, say, script
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
