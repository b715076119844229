"""Servers of ours started as in production, their rows, and the one check of every error."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mogine.analytics.records import QueryRecord, Selection
from mogine.analytics.store import AnalyticsStore
from mogine.serve import runner
from mogine.serve.desk import DESK
from mogine.serve.keys import STATE
from mogine.settings import Settings, load_settings
from tests.servers import DEFAULTS
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import say, script, usage

ONE_CNY = script(say("好"), usage(0, 66_667))  # of tests.upstreams.doubao.MODEL, 15 CNY a million


@dataclass
class Reply:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The named events of a stream, comments left out."""
        return events_of(self.body)

    @property
    def frames(self) -> list[Any]:
        """The data of OpenAI-style frames, `[DONE]` as it is."""
        return [data for _, data in self.events]


def events_of(body: bytes) -> list[tuple[str, Any]]:
    """An independent, simple reading of an event stream: name and data of each event."""
    found: list[tuple[str, Any]] = []
    for block in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        name, data = "", ""
        for line in block.split(b"\n"):
            field, _, value = line.decode("utf-8").partition(":")
            if field == "event":
                name = value.strip()
            elif field == "data":
                data += value.strip()
        if data:
            found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


@dataclass
class Served:
    """Servers that run, and a client of them."""

    running: runner.Running
    session: aiohttp.ClientSession

    @property
    def settings(self) -> Settings:
        return self.running.settings

    def url(self, path: str, server: str = "proxy") -> str:
        return self.running.url(server) + path

    def port(self, server: str = "proxy") -> int:
        return int(getattr(self.settings, server).port)

    async def ask(self, method: str, path: str, *, server: str = "proxy", **how: Any) -> Reply:
        """One request, its answer read to the end."""
        async with self.session.request(
            method, self.url(path, server), allow_redirects=False, **how
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Any, **how: Any) -> Reply:
        return await self.ask("POST", path, json=body, **how)

    @property
    def answers(self) -> int:
        """Answers that are being given."""
        return self.running.answers

    async def rows(self) -> list[QueryRecord]:
        """All recorded questions, oldest first, with their texts."""
        await self.running.apps["proxy"][DESK].recorder.flush()
        return read_rows(self.settings.home)

    async def until(self, true: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Return once `true()`; TimeoutError otherwise."""
        async with asyncio.timeout(timeout_s):
            while not true():  # noqa: ASYNC110 - many things, one way to wait for them
                await asyncio.sleep(0.005)

    async def row_with(self, status: str) -> QueryRecord:
        """The only row, as soon as it is there."""
        async with asyncio.timeout(5):
            while not (rows := await self.rows()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [row.status for row in rows] == [status], rows
        return rows[0]


def read_rows(home: Path) -> list[QueryRecord]:
    """All recorded questions of a home, oldest first."""
    page = AnalyticsStore(home / "data/analytics.db").page(Selection(), limit=500)
    return list(reversed(page.records))


Start = Callable[..., Any]


@pytest.fixture
async def serve(home: Path) -> AsyncIterator[Start]:
    """Starts servers of the home: `await serve("proxy", {"MOGINE_MAX_STREAMS": "1"})` gives a `Served`."""
    async with AsyncExitStack() as stack:

        async def start(*names: str, env: Mapping[str, str] | None = None, home: Path = home) -> Served:
            settings = load_settings({**DEFAULTS, **(env or {})}, home)
            running = await stack.enter_async_context(runner.started(settings, names or ("proxy",)))
            session = await stack.enter_async_context(aiohttp.ClientSession(trust_env=False))
            return Served(running, session)

        yield start


@pytest.fixture
async def vendor() -> AsyncIterator[DoubaoFake]:
    """One whose every answer costs one CNY, with `DOUBAO_MODEL` as MODEL."""
    async with DoubaoFake(ONE_CNY) as fake:
        yield fake


def assert_envelope(reply: Reply, status: int, reason: str, param: str | None = None) -> str:
    """The error is the contract's, whole and with nothing beside it; its message."""
    assert reply.status == status, reply.body
    assert reply.headers["Content-Type"].startswith("application/json")
    body = reply.json
    assert list(body) == ["error"]
    error = body["error"]
    assert (error["code"], error["reason"]) == (status, reason), error
    assert set(error) <= {
        *("message", "type", "code", "reason", "request_id", "param", "upstream_status", "upstream_code")
    }
    assert error["request_id"] == reply.headers["X-Request-Id"]
    assert len(error["request_id"]) == 44
    assert param is None or error["param"] == param
    assert "Traceback" not in error["message"] and "/" + "tmp" not in error["message"]
    if status in (429, 503):
        assert 1 <= int(reply.headers["Retry-After"]) <= 120
    return str(error["message"])


def question(text: str = "你好", **fields: Any) -> dict[str, Any]:
    """An OpenAI-style body with one question."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def is_idle(served: Served) -> bool:
    """No answer is counted as open anywhere."""
    proxy = served.running.apps["proxy"]
    return not proxy[STATE].running and not proxy[DESK].limits.open_by_visitor
