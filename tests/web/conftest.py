"""A real Chromium, and a small real server of the pages whose answers a test writes piece by piece."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Page, async_playwright

from mogine.serve.assets import Asset, Library, asset_route, conditional, page_routes
from mogine.serve.pages import LIBRARY, SETUP

WEB = Path(__file__).parents[2] / "mogine" / "web"
# Without these a browser in a closed network looks up hosts of its maker at every start.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
CONFIG = {
    "title": "晨星助手",
    "greeting": "您好，我是晨星家居的智能助手。",
    "starters": ["退货政策是什么？", "How long is the warranty?"],
    "language": "auto",
    "ai_notice": "回答由人工智能生成，仅供参考。",
    "max_question_chars": 200,
    "handoff": {"text": "", "contacts": ["400-000-0188", "service@songjian.example"], "picture": ""},
    "privacy": {"text": "", "url": ""},
}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 720}, "is_mobile": True, "has_touch": True}
# A company's page with rules that would spoil every button on it, were the widget not apart.
HOST_PAGE = """<!doctype html><html lang="{lang}"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="/company.css"></head>
<body><h1>{name}</h1><p>{text}</p><a id="next" href="{next}">next</a>
<script async src="{prefix}widget.js"></script></body></html>"""
HOST_CSS = """html { font-size: 37.5px; color: #345; } body { margin: 24px; font: 16px/1.6 sans-serif; }
* { letter-spacing: 1px; }
button, a, p, div, textarea { color: red; text-transform: uppercase; border: 3px dashed; }
h1 { font-size: 24px } [hidden] { display: block }"""


class Exchange:
    """One question on its way; the test answers it."""

    def __init__(self, request: web.Request, body: dict[str, Any]) -> None:
        self.request = request
        self.body = body
        self.left = asyncio.Event()
        self._done = asyncio.Event()
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        self._number = 0

    async def send(self, event: str, data: Any) -> None:
        """One event with JSON data, numbered where the page asked for that."""
        number = ""
        if self.body.get("resume"):
            self._number += 1
            number = f"id: {self._number}\n"
        await self.send_bytes(
            f"{number}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        )

    async def send_bytes(self, data: bytes) -> None:
        """Bytes as they are, in one piece."""
        if not self._response.prepared:
            await self._response.prepare(self.request)
        await self._response.write(data)

    async def delta(self, text: str) -> None:
        await self.send("delta", {"text": text})

    async def done(self, reason: str = "stop", answered: str = "unknown") -> None:
        await self.send(
            "done",
            {
                "finish_reason": reason,
                "request_id": "r1",
                "provider": "doubao",
                "model": "m",
                "answered": answered,
            },
        )
        self.close()

    async def refuse(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        """An error before the stream."""
        error = {"message": "m", "type": "t", "code": status, "reason": reason, "request_id": "req-7"}
        self._response = web.json_response({"error": error}, status=status, headers=headers)
        self.close()

    def close(self) -> None:
        """Ends the response, whole or not."""
        self._done.set()

    def cut(self) -> None:
        """Breaks the connection."""
        assert self.request.transport is not None
        self.request.transport.abort()

    async def run(self) -> web.StreamResponse:
        try:
            await self._done.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return self._response


@dataclass
class PageServer:
    """The proxy's pages under a prefix, its configuration, and `/api/chat` for which tests write the answers.

    `/company/1` and `/company/2` are pages with the widget.
    """

    origin: str
    url: str
    prefix: str = "/"
    config: dict[str, Any] | None = field(default_factory=lambda: dict(CONFIG))
    setup: dict[str, Any] = field(default_factory=dict)
    lang: str = "en"
    thumbs: list[dict[str, Any]] = field(default_factory=list)
    stops: list[dict[str, Any]] = field(default_factory=list)
    take_thumbs: asyncio.Event = field(default_factory=asyncio.Event)
    _asked: asyncio.Queue[Exchange] = field(default_factory=asyncio.Queue)

    async def next(self) -> Exchange:
        """The next question that the page asks."""
        return await asyncio.wait_for(self._asked.get(), 10)

    @property
    def waiting(self) -> int:
        """Questions that no test has taken yet."""
        return self._asked.qsize()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        exchange = Exchange(request, await request.json())
        self._asked.put_nowait(exchange)
        return await exchange.run()

    async def chat_config(self, request: web.Request) -> web.Response:
        return web.json_response(self.config) if self.config is not None else web.Response(status=502)

    async def stop(self, request: web.Request) -> web.Response:
        self.stops.append(await request.json())
        return web.json_response({})

    async def feedback(self, request: web.Request) -> web.Response:
        thumb = await request.json()
        await self.take_thumbs.wait()
        self.thumbs.append(thumb)
        return web.json_response({})

    async def widget(self, request: web.Request) -> web.Response:
        library = request.app[LIBRARY]
        setup = json.dumps({**self.setup, "build": library.build}).encode()
        asset = Asset.of(library.source("widget/loader.js").replace(SETUP, setup), ".js")
        return conditional(request, asset, {})

    async def company(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        page = HOST_PAGE.format(
            lang=self.lang,
            name=f"Company page {name}",
            text="Our products and prices. " * 40,
            next=f"/company/{int(name) + 1}",
            prefix=self.prefix,
        )
        return web.Response(text=page, content_type="text/html")

    async def company_css(self, request: web.Request) -> web.Response:
        return web.Response(text=HOST_CSS, content_type="text/css")


@cache
def read_library() -> Library:
    """The files as they are when the tests begin."""
    return Library()


@asynccontextmanager
async def serve_pages(prefix: str) -> AsyncGenerator[PageServer, None]:
    """A PageServer on a free loopback port, its pages below `prefix`."""
    server = PageServer("", "", prefix)
    server.take_thumbs.set()
    library = read_library()
    app = web.Application()
    app[LIBRARY] = library
    app.router.add_post(f"{prefix}api/chat", server.chat)
    app.router.add_post(f"{prefix}api/chat/resume", server.chat)
    app.router.add_post(f"{prefix}api/chat/stop", server.stop)
    app.router.add_post(f"{prefix}api/feedback", server.feedback)
    app.router.add_get(f"{prefix}api/chat/config", server.chat_config)
    app.router.add_get(f"{prefix}widget.js", server.widget)
    for route in (asset_route(library), *page_routes(library, "chat", forms="'self'")):
        app.router.add_get(prefix + route.path.removeprefix("/"), route.handler)
    app.router.add_get("/company/{name}", server.company)
    app.router.add_get("/company.css", server.company_css)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    server.url = f"{server.origin}{prefix}chat/"
    try:
        yield server
    finally:
        await runner.cleanup()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("these tests drive a real Chromium, and none is installed: run scripts/test-system")
    return path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """One Chromium for all tests of the pages; each test has a context of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session", params=["/"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[PageServer]:
    """The pages at `/`, or at the prefix that a test names by indirect parameters."""
    async with serve_pages(request.param) as server:
        yield server


class Visit:
    """A page in its own context that notes what must never happen; `problems` is checked at its end."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.problems: list[str] = []
        self.expected: tuple[str, ...] = ()
        page.on("request", self._on_request)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("console", self._on_console)
        page.on("dialog", self._on_dialog)
        page.on("popup", lambda popup: self.problems.append(f"popup: {popup.url}"))

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self.problems.append(f"request to another host: {request.url}")

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(word in message.text for word in self.expected):
            self.problems.append(f"console: {message.text}")

    async def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        await dialog.dismiss()


@asynccontextmanager
async def visit(
    browser: Browser, server: PageServer, path: str = "", **context_options: Any
) -> AsyncGenerator[Visit, None]:
    """The chat page, or `path`, loaded; `context_options` are Playwright's (locale, viewport ...)."""
    options: dict[str, Any] = {"locale": "en-US", **context_options}
    context = await browser.new_context(**options)
    context.set_default_timeout(10_000)
    try:
        visit = Visit(await context.new_page(), server.origin)
        await visit.page.goto(server.origin + path if path else server.url)
        yield visit
        assert visit.problems == []
    finally:
        await context.close()
