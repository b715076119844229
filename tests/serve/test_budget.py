"""Budgets: kept over restarts and between processes, and what happens when they are used up."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mogine.analytics.records import QueryRecord, new_id
from mogine.analytics.retention import cleanup
from mogine.analytics.spending import Spending
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import END_OF_TIME, sum_up
from mogine.serve.budget import Amounts, Budget
from mogine.serve.desk import DESK
from tests.serve.conftest import ONE_CNY, Served, Start, assert_envelope, question
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.script import pause, say, script, usage

SHANGHAI = ZoneInfo("Asia/Shanghai")
NOON = datetime(2026, 11, 23, 4, tzinfo=UTC)
CHEAP = "doubao-seed-2-0-mini-260428"


class Now:
    def __init__(self, at: datetime = NOON) -> None:
        self.at = at

    def __call__(self) -> datetime:
        return self.at


def row(at: datetime, cost: float | None, id: str = "") -> QueryRecord:
    return QueryRecord(
        id=id or new_id(at), started_at=at, kind="llm", provider="doubao", status="ok", cost_cny=cost
    )


@pytest.fixture
def store(tmp_path: Path) -> AnalyticsStore:
    store = AnalyticsStore(tmp_path / "analytics.db")
    store.prepare()
    return store


def budget_of(
    store: AnalyticsStore, now: Now, daily: float | None = 10, monthly: float | None = 100
) -> Budget:
    return Budget(Amounts(daily, monthly), SHANGHAI, Spending(store, timedelta(minutes=6)), now)


def test_a_restart_forgets_nothing_and_days_are_local(store: AnalyticsStore) -> None:
    now = Now()
    store.insert(
        [
            row(NOON - timedelta(hours=1), 1.0),
            row(NOON - timedelta(minutes=1), 2.0),
            row(datetime(2026, 11, 22, 16, 0, tzinfo=UTC), 4.0),  # midnight in Shanghai
            row(datetime(2026, 11, 22, 15, 59, tzinfo=UTC), 8.0),
            row(datetime(2026, 10, 31, 16, 0, tzinfo=UTC), 16.0),
            row(datetime(2026, 10, 31, 15, 59, tzinfo=UTC), 32.0),
            row(NOON, None),
        ]
    )
    budget = budget_of(store, now)
    budget.look()
    assert (budget.today_cny, budget.month_cny, budget.share) == (7.0, 31.0, 0.7)
    now.at += timedelta(hours=12, seconds=1)
    budget.look()
    assert (budget.today_cny, budget.month_cny) == (0.0, 31.0)


def test_nothing_counts_twice_and_nothing_is_lost_on_its_way_to_the_record(store: AnalyticsStore) -> None:
    budget = budget_of(store, Now())
    budget.look()
    rows = [row(NOON, 1.0) for _ in range(3)]
    for one in rows:
        budget.add(one.id, one.started_at, 1.0)
    assert budget.today_cny == 3.0
    store.insert(rows[:2])
    budget.look()
    assert budget.today_cny == 3.0
    store.insert([row(NOON, 5.0)])
    store.insert(rows[2:])
    budget.look()
    assert (budget.today_cny, budget.tight, budget.spent) == (8.0, True, False)


def test_sums_stay_right_while_time_goes_on(store: AnalyticsStore) -> None:
    now = Now()
    budget = budget_of(store, now, daily=1000)
    for _ in range(40):
        store.insert([row(now.at, 1.0)])
        budget.look()
        now.at += timedelta(minutes=2)
    assert budget.today_cny == 40.0


def test_what_was_heard_of_a_period_ends_with_it(store: AnalyticsStore) -> None:
    now = Now(datetime(2026, 11, 23, 15, 59, tzinfo=UTC))  # a minute before midnight in Shanghai
    budget = budget_of(store, now)
    told: list[tuple[str, ...]] = []
    budget.tell = lambda at, cost: told.append(budget.periods(at))
    budget.look()
    budget.hear({"2026-11-23": (1.0, 2.0), "2026-11": (10.0, 20.0)})
    budget.add(new_id(now.at), now.at, 0.5)
    assert (budget.today_cny, budget.month_cny) == (3.0, 30.0)
    before, now.at = now.at, now.at + timedelta(minutes=2)
    budget.add(new_id(before), before, 0.25)  # it began yesterday
    assert told == [("2026-11-23", "2026-11")] * 2
    assert budget.own_cny() == {"2026-11-23": 0.75, "2026-11": 0.75}, "as of the last look"
    budget.look()
    assert budget.own_cny() == {"2026-11-24": 0.0, "2026-11": 0.75}
    assert (budget.today_cny, budget.month_cny) == (0.0, 30.0)
    budget.hear({"2026-11-24": (0.0, 5.0), "2026-11": (10.0, 25.0)})
    assert (budget.today_cny, budget.month_cny) == (5.0, 35.0)


def test_a_late_row_from_the_spool_is_found(store: AnalyticsStore) -> None:
    now = Now()
    budget = budget_of(store, now)
    budget.look()
    store.insert([row(NOON - timedelta(hours=2), 3.0)])
    now.at += timedelta(minutes=7)
    budget.look()
    assert budget.today_cny == 3.0


def test_a_cleanup_takes_nothing_from_the_budget(store: AnalyticsStore) -> None:
    """Rows of this month may be deleted: what they cost was spent."""
    now = Now(datetime(2026, 11, 28, 4, 10, tzinfo=UTC))
    store.insert([row(now.at - timedelta(days=day, minutes=7), 1.0) for day in range(40)])
    store.insert([replace(row(now.at - timedelta(days=9), 4.0), bot=True)])
    budget = budget_of(store, now)
    budget.look()
    before = budget.month_cny
    assert (budget.today_cny, before) == (1.0, 28.0 + 4.0)
    assert cleanup(store, 7, now=now.at, sleep=lambda s: None).rows == 34
    for later in (budget, budget_of(store, now)):
        later.look()
        assert (later.today_cny, later.month_cny) == (1.0, before)
    store.insert([row(now.at - timedelta(days=2), 2.0), row(now.at, 3.0)])
    sum_up(store, before=END_OF_TIME, wait=True, sleep=lambda s: None)
    store.insert([row(now.at - timedelta(days=1), 5.0)])
    fresh = budget_of(store, now)
    fresh.look()
    assert (fresh.today_cny, fresh.month_cny) == (4.0, before + 10.0)


@given(
    ages=st.lists(st.tuples(st.integers(0, 50 * 1440), st.booleans()), max_size=30),
    steps=st.lists(st.sampled_from(["sum", "clean", "insert", "look"]), max_size=12),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_summed_or_deleted_the_month_stays_the_same(
    tmp_path: Path, ages: list[tuple[int, bool]], steps: list[str]
) -> None:
    now = Now(datetime(2026, 11, 20, 9, 3, tzinfo=UTC))
    folder = tmp_path / new_id(now.at)
    folder.mkdir()
    store = AnalyticsStore(folder / "analytics.db")
    store.prepare()
    budget, waiting, expected = budget_of(store, now), list(ages), 0.0
    month = datetime(2026, 10, 31, 16, tzinfo=UTC)
    for step in [*steps, "insert", "look"]:
        if step == "insert":
            for age, bot in waiting[:5]:
                at = now.at - timedelta(minutes=age)
                store.insert([replace(row(at, 1.0), bot=bot)])
                expected += at >= month
            waiting = waiting[5:]
        elif step == "sum":
            sum_up(store, before=END_OF_TIME, wait=True, sleep=lambda s: None)
        elif step == "clean":
            cleanup(store, 3, now=now.at, force=True, sleep=lambda s: None)
        else:
            now.at += timedelta(minutes=7)
            budget.look()
            assert budget.month_cny == expected


def test_a_budget_of_nothing_is_spent_and_no_budget_never_is(store: AnalyticsStore) -> None:
    none = budget_of(store, Now(), daily=0, monthly=None)
    none.look()
    assert none.spent
    free = budget_of(store, Now(), daily=None, monthly=None)
    free.add("x", NOON, 1e9)
    assert (free.share, free.spent) == (0.0, False)


@pytest.mark.parametrize(
    ("daily", "monthly", "wait_s"), [(1.0, None, 12 * 3600), (None, 1.0, (7 * 24 + 12) * 3600)]
)
def test_who_is_refused_is_told_until_when(
    daily: float | None, monthly: float | None, wait_s: float, store: AnalyticsStore
) -> None:
    budget = budget_of(store, Now(), daily, monthly)
    budget.add("x", NOON, 2.0)
    error = budget.refuse()
    assert (error.reason, error.retry_after_s) == ("budget_exhausted", wait_s)


# --- in the proxy ------------------------------------------------------------------------------------


def environ(fake: Any, **more: str) -> dict[str, str]:
    return {**fake.environ, "DOUBAO_MODEL": MODEL, **more}


async def spend(served: Served) -> None:
    assert (await served.post("/api/llm/doubao", question())).status == 200


async def test_each_row_bears_its_cost(serve: Start) -> None:
    async with DoubaoFake(script(say("好"), usage(1000, 500, 100, 400))) as fake:
        served = await serve(env=environ(fake))
        await spend(served)
    row = await served.row_with("ok")
    assert row.cost_cny == pytest.approx((600 * 3 + 400 * 0.6 + 500 * 15) / 1e6)
    assert not row.tokens_estimated


@pytest.mark.parametrize("first_word", [True, False])
async def test_an_abandoned_answer_is_counted_by_estimate(first_word: bool, serve: Start) -> None:
    play = script(say("一" * 50), pause(30)) if first_word else script(pause(30), say("一"))
    async with DoubaoFake(play) as fake:
        served = await serve(env=environ(fake))
        body = question("问" * 100, stream=True)
        task = asyncio.create_task(served.post("/api/llm/doubao", body))
        await fake.wait_requests()
        if first_word:
            await served.until(lambda: fake.requests[0].bytes_sent > 0)
            await asyncio.sleep(0.05)
        task.cancel()
        row = await served.row_with("aborted")
    assert row.tokens_estimated and row.prompt_tokens == 100
    assert (row.completion_tokens or 0) == (50 if first_word else 0)
    assert row.cost_cny == pytest.approx((100 * 3 + (750 if first_word else 0)) / 1e6)


async def test_the_ladder_goes_down_step_by_step(serve: Start) -> None:
    async with DoubaoFake(ONE_CNY) as fake, OpenAIFake(script(say("好"))) as other:
        env = environ(fake, MOGINE_DAILY_BUDGET_CNY="10", DOUBAO_CHEAP_MODEL=CHEAP)
        served = await serve(env={**env, **other.environ, "OPENAI_MODEL": "test-model"})
        ask = {"question": "你好"}
        first = await served.post("/api/chat", ask)
        assert dict(first.events)["done"]["model"] == MODEL
        for _ in range(7):
            await spend(served)
        saving = await served.post("/api/chat", ask)
        assert fake.requests[-1].json["model"] == CHEAP
        assert dict(saving.events)["done"]["provider"] == "doubao"
        for _ in range(2):
            await spend(served)
        asked = len(fake.requests) + len(other.requests)
        quoted = await served.post("/api/chat", {**ask, "provider": "doubao"})
        assert dict(quoted.events)["done"]["provider"] == "extract"
        for path, body in (
            ("/api/llm/doubao", question()),
            ("/api/llm/openai", question(stream=True)),
            ("/v1/chat/completions", question(model="auto")),
            ("/v1/chat/completions", question(model="doubao", stream=True)),
        ):
            reply = await served.post(path, body)
            assert_envelope(reply, 429, "budget_exhausted")
            assert reply.headers["x-should-retry"] == "false"
        free = await served.post("/v1/chat/completions", question(model="extract"))
        assert free.status == 200
        assert len(fake.requests) + len(other.requests) == asked, "nothing was sent"


async def test_a_restart_does_not_fill_the_purse(serve: Start) -> None:
    """P11."""
    async with DoubaoFake(ONE_CNY) as fake:
        env = environ(fake, MOGINE_MONTHLY_BUDGET_CNY="1")
        first = await serve(env=env)
        await spend(first)
        await first.rows()
        second = await serve(env=env)
        assert_envelope(await second.post("/api/llm/doubao", question()), 429, "budget_exhausted")


async def test_processes_see_each_others_spending(serve: Start) -> None:
    async with DoubaoFake(ONE_CNY) as fake:
        env = environ(fake, MOGINE_DAILY_BUDGET_CNY="1")
        first, second = await serve(env=env), await serve(env=env)
        await spend(first)
        await first.rows()
        budget = second.running.apps["proxy"][DESK].books.budget
        await second.until(lambda: budget.spent, timeout_s=8)
        assert_envelope(await second.post("/api/llm/doubao", question()), 429, "budget_exhausted")


async def test_prices_of_the_site_are_used(home: Path, serve: Start) -> None:
    (home / "site.toml").write_text('[prices."test-model"]\ninput = 1000\noutput = 0\n')
    async with OpenAIFake(script(say("好"), usage(1000, 9))) as fake:
        served = await serve(env={**fake.environ, "OPENAI_MODEL": "test-model"})
        assert (await served.post("/api/llm/openai", question())).status == 200
    assert (await served.row_with("ok")).cost_cny == 1.0
