"""The chat page as the proxy itself serves it, with its own answers."""

import re
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import Browser, expect

from mogine.serve.proxy import create_app
from mogine.settings import load_settings
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import hang, say, script, think
from tests.web.conftest import PageServer, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_page_of_the_real_proxy_streams_stops_and_is_told_errors(browser: Browser, home: Path) -> None:
    (home / "site.toml").write_text(
        '[assistant]\nname = "小净"\ngreeting = "您好"\nstarter_questions = ["退货？"]\n'
    )
    answers = script(think("hm"), say("七天", "**可退**")), script(say("half"), hang())
    async with DoubaoFake(*answers) as fake:
        environ = {**fake.environ, "MOGINE_KB_URL": "http://127.0.0.1:9", "MOGINE_RATE_LIMIT": "2/minute"}
        runner = web.AppRunner(
            create_app(load_settings(environ, home)), handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with visit(browser, PageServer(origin, f"{origin}/")) as v:
                v.expected = ("429",)
                await expect(v.page).to_have_url(f"{origin}/chat/")
                await expect(v.page.locator("#greeting")).to_have_text("您好")
                assert await v.page.title() == "小净"
                await v.page.get_by_role("button", name="退货？").click()
                await expect(v.page.locator(".prose strong")).to_have_text("可退")
                await expect(v.page.locator(".thoughts summary")).to_have_text("Thoughts")
                await v.page.fill("#question", "and now?")
                await v.page.press("#question", "Enter")
                await expect(v.page.locator(".prose").nth(1)).to_have_text("half")
                await v.page.get_by_role("button", name="Stop").click()
                await fake.wait_disconnect(1)
                said = [m["content"] for m in fake.requests[1].json["messages"] if m["role"] != "system"]
                assert said == ["退货？", "七天**可退**", "and now?"]
                await v.page.fill("#question", "third")
                await v.page.press("#question", "Enter")
                await expect(v.page.locator(".problem button")).to_have_text(
                    re.compile(r"Ask again in \d+ s")
                )
        finally:
            await runner.cleanup()
