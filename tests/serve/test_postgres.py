"""Servers of two machines on one PostgreSQL: one record, one budget, and answers while it is away."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row
from tests.servers import ADMIN_TOKEN, Child, Spawn
from tests.upstreams.postgres import PASSWORD, Database
from tests.waiting import until

HEADERS = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
        yield client


@pytest.fixture
def other_home(tmp_path: Path) -> Path:
    """The home of a second machine."""
    home = tmp_path / "other"
    home.mkdir()
    (home / ".env").touch(mode=0o600)
    return home


async def ask(client: aiohttp.ClientSession, child: Child, question: str) -> str:
    async with client.post(f"{child.url()}/api/chat", json={"question": question}) as answer:
        assert answer.status == 200
        return await answer.text()


async def look(client: aiohttp.ClientSession, child: Child, path: str) -> tuple[int, Any]:
    async with client.get(f"{child.url('analytics')}/api/analytics/{path}", headers=HEADERS) as answer:
        return answer.status, await answer.json()


async def test_two_machines_have_one_record(
    spawn: Spawn, other_home: Path, postgres: Database, client: aiohttp.ClientSession
) -> None:
    env = {"MOGINE_DATABASE_URL": postgres.url}
    one, two = await spawn("all", env), await spawn("all", env, home=other_home)
    for n in range(5):
        await asyncio.gather(ask(client, one, f"如何退款 {n}"), ask(client, two, f"怎么开发票 {n}"))

    async def are_told() -> bool:
        _, found = await look(client, two, "statistics?days=1")
        return bool(found["totals"]["questions"] == 10)

    await until(are_told, 60)
    status, found = await look(client, one, "queries?q=发票&limit=100")
    assert status == 200 and len(found["queries"]) == 5

    async def have_gaps() -> bool:  # which are looked for behind the first answer
        status, found = await look(client, one, "gaps")
        return status == 200 and bool(sum(gap["asked"] for gap in found["gaps"]))

    await until(have_gaps, 60)
    for child in (one, two):
        assert PASSWORD not in child.stderr and PASSWORD not in child.command_line
        assert not (child.home / "data/analytics.db").exists()


async def test_what_one_machine_spends_is_spent_on_all(
    spawn: Spawn, other_home: Path, postgres: Database, client: aiohttp.ClientSession
) -> None:
    env = {
        "MOGINE_DATABASE_URL": postgres.url,
        "MOGINE_DAILY_BUDGET_CNY": "5",
        "DOUBAO_API_KEY": "test-key",
        "DOUBAO_BASE_URL": "http://127.0.0.1:1",
    }
    one, two = await spawn("proxy", env), await spawn("proxy", env, home=other_home)
    store = AnalyticsStore(other_home / "data/analytics.db", postgres.url)
    store.insert([row(at=datetime.now(UTC), cost_cny=6.0)])
    store.close()

    async def is_refused(child: Child) -> bool:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        async with client.post(f"{child.url()}/api/llm/doubao", json=body) as answer:
            return answer.status == 429 and (await answer.json())["error"]["reason"] == "budget_exhausted"

    for child in (one, two):
        await until(partial(is_refused, child), 60)


async def test_while_postgresql_is_paused_answers_go_on_and_no_row_is_lost(
    spawn: Spawn, own_postgres: Database, client: aiohttp.ClientSession
) -> None:
    """P43, F28: paused."""
    child = await spawn("all", {"MOGINE_DATABASE_URL": own_postgres.url})
    await ask(client, child, "前")
    own_postgres.server.pause()
    began = asyncio.get_running_loop().time()
    for n in range(20):
        await ask(client, child, f"中 {n}")
    assert asyncio.get_running_loop().time() - began < 30, "each would have waited for 3 s"
    status, body = await look(client, child, "statistics?days=1")
    assert status == 503 and "PostgreSQL" in body["error"]["message"]
    spool = child.home / "data/spool"
    await until(
        lambda: asyncio.to_thread(lambda: sum(p.stat().st_size for p in spool.glob("*.jsonl")) > 0), 60
    )
    own_postgres.server.resume()

    async def is_back() -> bool:
        status, found = await look(client, child, "statistics?days=1")
        return status == 200 and found["totals"]["questions"] == 21

    await until(is_back, 60)
    assert own_postgres.query("SELECT count(*), count(DISTINCT id) FROM queries") == [(21, 21)]
