"""Several proxies on one Redis: helpers of the tests that look at what they share."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from mogine.errors import MogineError
from mogine.redis_client import PREFIX
from mogine.serve.fleet import Fleet, joined
from mogine.serve.keys import ServerState
from mogine.serve.limits import Limits, Place
from mogine.settings import AccessSettings
from tests.serve.conftest import question
from tests.servers import Child
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.redis import RedisServer

LLM = "/api/llm/doubao"


class Proxy:
    """What a process asks: its own limits first, then the others."""

    def __init__(self, limits: Limits, fleet: Fleet) -> None:
        self.limits = limits
        self.fleet = fleet

    async def open(self, visitor: str) -> Place:
        place = self.limits.open(visitor)
        with contextlib.ExitStack() as undo:
            undo.enter_context(place)
            await self.fleet.admit(place, visitor)
            undo.pop_all()
        return place

    async def told(self, visitor: str) -> str:
        """Why one more question is refused; "" when it is not, and then its answer is over at once."""
        try:
            place = await self.open(visitor)
        except MogineError as error:
            return error.reason
        place.__exit__()
        return ""


@asynccontextmanager
async def proxies(
    url: str,
    count: int = 2,
    *,
    lease_s: float = 15.0,
    retry_s: float = 0.05,
    timeout_s: float = 5.0,
    **access: Any,
) -> AsyncIterator[list[Proxy]]:
    rules = AccessSettings(**access)
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in range(count):
            fleet = Fleet(url, rules, f"home {number}", lease_s=lease_s, retry_s=retry_s, timeout_s=timeout_s)
            await stack.enter_async_context(joined(fleet))
            found.append(Proxy(Limits(rules, ServerState()), fleet))
        yield found


async def open_answers(client: Any) -> list[int]:
    """How many each process has open, as Redis knows it."""
    lives = await client.zrange(f"{PREFIX}alive", 0, -1)
    return sorted([await client.hlen(f"{PREFIX}open:{life}") for life in lives])


@asynccontextmanager
async def raw(redis: RedisServer) -> AsyncIterator[Any]:
    """A client of the test's own."""
    async with Redis.from_url(redis.url, decode_responses=True) as client:
        yield client


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log warned of, in a word each."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [line.removeprefix("Redis is ")[:4] for line in lines]


def with_redis(redis: RedisServer, fake: DoubaoFake, **more: str) -> dict[str, str]:
    return {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_REDIS_URL": redis.url, **more}


async def ask(session: aiohttp.ClientSession, child: Child, headers: Mapping[str, str] | None = None) -> int:
    """The status of one question."""
    async with session.post(child.url() + LLM, json=question(), headers=headers) as response:
        await response.read()
        return response.status


async def ready(session: aiohttp.ClientSession, child: Child) -> Any:
    """What a proxy says of itself."""
    async with session.get(child.url() + "/readyz") as response:
        return await response.json()


async def redis_of(session: aiohttp.ClientSession, child: Child) -> str:
    """What a proxy says of Redis."""
    return str((await ready(session, child))["redis"])


async def value(session: aiohttp.ClientSession, child: Child, name: str) -> float:
    """A number of a proxy's metrics."""
    async with session.get(child.url() + "/metrics") as response:
        text = await response.text()
    (family,) = [family for family in text_string_to_metric_families(text) if family.name == name]
    return family.samples[0].value


def homes(folder: Path, count: int) -> list[Path]:
    """Homes of as many machines."""
    found = [folder / f"machine-{number}" for number in range(count)]
    for home in found:
        home.mkdir()
    return found
