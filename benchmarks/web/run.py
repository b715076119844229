"""What the pages cost a visitor, in a real Chromium: `python -m benchmarks.web.run` prints JSON.

A proxy as in production answers through a fake vendor. Measured are: what an idle widget loads, what an
opened one has loaded before the first question, how long opening takes, and how smoothly an answer of 3,000
tokens is drawn (frames a second, tasks of more than 50 ms). Then the dashboard's first paint, and for each
screen the time until its data stand there, over --rows invented rows, or over the record of --home:
`benchmarks.analytics.run --copies 10 --folder` makes one of ten million rows. --only measures one of the two.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from aiohttp import web
from playwright.async_api import Browser, Page, Request, async_playwright

from benchmarks.analytics.rows import rows, sentences
from benchmarks.startup import machine
from mogine.analytics import upkeep
from mogine.analytics.store import AnalyticsStore
from mogine.serve import runner
from mogine.serve.admin_sessions import open_sessions
from mogine.settings import load_settings
from tests.servers import DEFAULTS
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import Script, pause, say, script

# Each screen, and what an owner asks of the longest.
SCREENS = {
    "overview": "days=30",
    "overview_90_days": "days=90",
    "conversations": "view=conversations",
    "conversations_90_days": "view=conversations&days=90",
    "conversations_failed": "view=conversations&status=error",
    "conversations_disliked": "view=conversations&feedback=down",
    "conversations_of_a_provider": "view=conversations&provider=openai",
    "conversations_with_words": "view=conversations&q=%E9%80%80%E6%AC%BE",
    "conversations_with_rare_words": "view=conversations&q=%E6%B2%A1%E6%9C%89%E8%BF%99%E5%8F%A5%E8%AF%9D",
    "gaps": "view=gaps",
    "knowledge": "view=knowledge",
    "cost": "view=cost",
    "quality": "view=quality",
    "system": "view=system",
}
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
TOKENS = 3000
PIECE_S = 0.004  # 250 tokens a second, faster than any vendor
ROUNDS = 9
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
COMPANY = (
    '<!doctype html><html lang="zh-CN"><head><meta charset="utf-8"><title>c</title>'
    '<link rel="icon" href="data:,"></head><body><h1>c</h1>'
    '<script async src="{}/widget.js"></script></body></html>'
)
WATCH = """() => {
  window.seen = { frames: 0, longest: 0, long: 0, gaps: [] };
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      seen.long += 1;
      seen.longest = Math.max(seen.longest, entry.duration);
    }
  }).observe({ type: "longtask" });
  let last = performance.now();
  const frame = (now) => {
    seen.frames += 1;
    seen.gaps.push(now - last);
    last = now;
    window.again = requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  seen.began = last;
}"""


def answer() -> Script:
    """Some 3,000 tokens of Markdown as models write it: paragraphs, lists, a table, code, citations."""
    words = sentences()
    parts = [f"## {words[0]}\n\n", "| a | b |\n|---|---|\n| 1 | 2 |\n\n", "```py\nprint(1)\n```\n\n"]
    parts += [
        f"{n}. **{text[:6]}** {text} [1]\n" if n % 3 else f"\n{text}\n\n"
        for n, text in zip(range(1, 200), words * 9, strict=False)
    ]
    text = "".join(parts)[: TOKENS * 2]
    pieces = [text[at : at + 2] for at in range(0, len(text), 2)]
    return script(*[step for piece in pieces for step in (say(piece), pause(PIECE_S))])


@asynccontextmanager
async def company(proxy: str) -> AsyncIterator[str]:
    """A page of another origin with the widget on it; its address."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=COMPANY.format(proxy), content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    server = web.AppRunner(app)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{server.addresses[0][1]}/"
    finally:
        await server.cleanup()


class Traffic:
    """What a page has loaded from the proxy: how many requests, how many bytes as they came."""

    def __init__(self, page: Page, origin: str) -> None:
        self._requests: list[Request] = []
        self._origin = origin
        self._allowed = ("data:", "blob:", origin)
        page.on("requestfinished", lambda request: self._requests.append(request))

    @property
    def foreign(self) -> list[str]:
        """Addresses elsewhere."""
        return [one.url for one in self._requests if not one.url.startswith(self._allowed)]

    async def told(self) -> dict[str, int]:
        sizes = [await one.sizes() for one in self._requests if one.url.startswith(self._origin)]
        return {"requests": len(sizes), "bytes": sum(size["responseBodySize"] for size in sizes)}


async def widget(browser: Browser, home: Path) -> dict[str, Any]:
    """Everything about the widget."""
    async with DoubaoFake(answer()) as fake:
        origin = ""
        environ = {
            **DEFAULTS,
            **fake.environ,
            "MOGINE_ALLOWED_ORIGINS": "*",
            "MOGINE_KB_URL": "http://127.0.0.1:9",
        }
        async with runner.started(load_settings(environ, home), ["proxy"]) as running:
            origin = running.url("proxy")
            async with company(origin) as address:
                idle, opened = await loaded(browser, address, origin)
                times = [await opening(browser, address) for _ in range(ROUNDS)]
                drawn = await drawing(browser, address)
    return {
        "idle": idle,
        "opened": opened,
        "opening_ms": told(times),
        f"answer_of_{TOKENS}_tokens": drawn,
    }


async def loaded(browser: Browser, address: str, origin: str) -> tuple[dict[str, int], dict[str, int]]:
    """Before the bubble is pressed, and after, both from an empty cache."""
    page = await browser.new_page()
    traffic = Traffic(page, origin)
    await page.goto(address)
    await page.wait_for_load_state("networkidle")
    idle = await traffic.told()
    async with page.expect_response("**/api/chat/config*") as last:
        await page.locator(".bubble").click()
    await (await last.value).finished()
    await page.locator("#question").wait_for()
    opened = await traffic.told()
    others = [url for url in traffic.foreign if not url.startswith(address)]
    if others:
        raise SystemExit(f"requests to other hosts: {others}")
    await page.close()
    return idle, opened


async def opening(browser: Browser, address: str) -> float:
    """Milliseconds from the press, with the pointer on the bubble, until the field can be written in."""
    page = await browser.new_page()
    await page.goto(address)
    await page.locator(".bubble").hover()
    await page.wait_for_load_state("networkidle")
    took = await page.evaluate(
        """() => new Promise((resolve) => {
          const { shadowRoot } = document.querySelector("mogine-widget");
          const began = performance.now();
          const look = () => {
            const field = shadowRoot.querySelector("#question");
            if (field && shadowRoot.activeElement === field) {
              requestAnimationFrame(() => resolve(performance.now() - began));
            } else setTimeout(look, 1);
          };
          shadowRoot.querySelector(".bubble").click();
          look();
        })"""
    )
    await page.close()
    return float(took)


async def drawing(browser: Browser, address: str) -> dict[str, Any]:
    """Frames and long tasks while an answer comes."""
    page = await browser.new_page()
    await page.goto(address)
    await page.locator(".bubble").click()
    await page.fill("#question", "q")
    await page.press("#question", "Enter")
    await page.locator(".prose").filter(has_text="1").first.wait_for()
    await page.evaluate(WATCH)
    await page.locator(".actions").wait_for(timeout=120_000)
    seen = await page.evaluate("() => ({ ...seen, lasted: performance.now() - seen.began })")
    gaps = sorted(seen["gaps"][1:])
    await page.close()
    return {
        "seconds": round(seen["lasted"] / 1000, 1),
        "frames_per_second": round(seen["frames"] / seen["lasted"] * 1000, 1),
        "frame_ms_p99": round(gaps[int(len(gaps) * 0.99)], 1),
        "tasks_over_50_ms": seen["long"],
        "longest_task_ms": round(seen["longest"], 1),
    }


async def dashboard(browser: Browser, home: Path) -> dict[str, Any]:
    """First paint, and of each screen the time until its data stand there, from a cold page."""
    settings = load_settings({**DEFAULTS, "MOGINE_EMBEDDER": "none"}, home)
    paints: list[float] = []
    fills: dict[str, list[float]] = {name: [] for name in SCREENS}
    async with runner.started(settings, ["analytics", "kb"]) as running:
        base = running.url("analytics")
        for _ in range(ROUNDS):
            context = await browser.new_context()
            page = await context.new_page()
            await page.goto(f"{base}/dashboard/#link={open_sessions(running.settings).new_link()}")
            await page.locator(".tile").first.wait_for(timeout=60_000)
            for name, query in SCREENS.items():
                await page.goto(f"{base}/dashboard/?{query}")
                await page.locator("#content[aria-busy=false]").wait_for(timeout=60_000)
                fills[name].append(await page.evaluate("() => performance.now()"))
                paints.append(await page.evaluate(PAINT))
            await context.close()
        count = AnalyticsStore(settings.analytics_path).summary().rows
    return {"rows": count, "first_paint_ms": told(paints), **{name: told(ms) for name, ms in fills.items()}}


def told(ms: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(ms), 1), "worst": round(max(ms), 1)}


def build(home: Path, count: int) -> None:
    """A record of so many invented rows over 100 days."""
    store = AnalyticsStore(load_settings(DEFAULTS, home).analytics_path)
    made = rows(count, 100, datetime.now(UTC))
    while batch := list(islice(made, 2000)):
        store.insert(batch)
    upkeep.sum_up(store, before=upkeep.END_OF_TIME, sleep=lambda _: None)


async def measure(home: Path | None, count: int, only: str) -> dict[str, Any]:
    """All of it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium is installed: run scripts/test-system")
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        (own / "data").mkdir()
        if home is None and only != "widget":
            await asyncio.to_thread(build, own, count)
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            found: dict[str, Any] = {"machine": {**machine(), "chromium": browser.version}}
            if only != "dashboard":
                found["widget"] = await widget(browser, own)
            if only != "widget":
                found["dashboard"] = await dashboard(browser, home or own)
            await browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of the dashboard's record")
    parser.add_argument("--home", type=Path, help="a home whose data/analytics.db the dashboard shows")
    parser.add_argument("--only", choices=("widget", "dashboard"), default="")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.home, options.rows, options.only)), indent=2))


if __name__ == "__main__":
    main()
