"""A real Chromium, and a small real server of the pages whose answers a test writes piece by piece."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Page, async_playwright

WEB = Path(__file__).parents[2] / "mogine" / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)
# Without these a browser in a closed network looks up hosts of its maker at every start.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
CONFIG = {
    "title": "晨星助手",
    "greeting": "您好，我是晨星家居的智能助手。",
    "starters": ["退货政策是什么？", "How long is the warranty?"],
    "language": "zh-CN",
    "ai_notice": "回答由人工智能生成，仅供参考。",
    "max_question_chars": 200,
}


class Exchange:
    """One question on its way; the test answers it."""

    def __init__(self, request: web.Request, body: dict[str, Any]) -> None:
        self.request = request
        self.body = body
        self.left = asyncio.Event()
        self._done = asyncio.Event()
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})

    async def send(self, event: str, data: Any) -> None:
        """One event with JSON data."""
        await self.send_bytes(f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode())

    async def send_bytes(self, data: bytes) -> None:
        """Bytes as they are, in one piece."""
        if not self._response.prepared:
            await self._response.prepare(self.request)
        await self._response.write(data)

    async def delta(self, text: str) -> None:
        await self.send("delta", {"text": text})

    async def done(self, reason: str = "stop") -> None:
        await self.send(
            "done", {"finish_reason": reason, "request_id": "r1", "provider": "doubao", "model": "m"}
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
    """`mogine/web` under a prefix, `/api/chat/config`, and `/api/chat` for which tests write the answers."""

    origin: str
    url: str
    config: dict[str, Any] | None = field(default_factory=lambda: dict(CONFIG))
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

    async def file(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        path += "index.html" if path.endswith("/") else ""
        if not (WEB / path).is_file():
            return web.Response(status=404)
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return web.FileResponse(WEB / path, headers=headers)


@asynccontextmanager
async def serve_pages(prefix: str) -> AsyncGenerator[PageServer, None]:
    """A PageServer on a free loopback port, its pages below `prefix`."""
    server = PageServer("", "")
    app = web.Application()
    app.router.add_post(f"{prefix}api/chat", server.chat)
    app.router.add_get(f"{prefix}api/chat/config", server.chat_config)
    app.router.add_get(prefix + "{path:.*}", server.file)
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
async def visit(browser: Browser, server: PageServer, **context_options: Any) -> AsyncGenerator[Visit, None]:
    """The chat page, loaded; `context_options` are Playwright's (locale, viewport, color_scheme ...)."""
    options: dict[str, Any] = {"locale": "en-US", **context_options}
    context = await browser.new_context(**options)
    try:
        visit = Visit(await context.new_page(), server.origin)
        await visit.page.goto(server.url)
        yield visit
        assert visit.problems == []
    finally:
        await context.close()
