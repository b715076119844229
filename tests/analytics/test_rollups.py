"""Sums tell the same as the rows: however and whenever they were made, and after the rows have gone."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from mogine.analytics import rollups, upkeep
from mogine.analytics.records import QueryRecord, Window
from mogine.analytics.reports import statistics
from mogine.analytics.retention import cleanup
from mogine.analytics.store import AnalyticsStore, first_seq
from mogine.analytics.upkeep import END_OF_TIME, rebuild, sum_up
from mogine.errors import Locked
from tests.analytics.rows import cite, row

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY = timedelta(days=1)
ZONES = ("Asia/Shanghai", "Asia/Kathmandu", "America/New_York")


def rest(seconds: float) -> None:
    """Tests need no rest."""


def some_rows(count: int = 400, seed: int = 1, days: float = 9) -> list[QueryRecord]:
    """Rows of every kind, over some days, with visitors, pages and questions that repeat."""
    dice = random.Random(seed)
    made = []
    for number in range(count):
        status = dice.choice(("ok", "ok", "ok", "error", "aborted", "refused"))
        ago = timedelta(seconds=dice.uniform(0, days * 86_400))
        day = (NOW - ago + timedelta(hours=8)).date().toordinal()
        made.append(
            row(
                ago,
                at=NOW,
                id=f"{seed}-{number}",
                status=status,
                visitor=f"{dice.randint(1, 12):02d}{day}",
                session=f"s{dice.randint(1, 20)}{day}",
                provider=dice.choice(("doubao", "dashscope")),
                page_url=f"https://example.com/{dice.randint(1, 6)}",
                question=f"问题 {dice.randint(1, 15)}",
                answered=dice.choice(("yes", "no", "unknown")),
                citations=tuple(cite(f"docs/{dice.randint(1, 4)}.md", number=n) for n in range(1, 3)),
                feedback=dice.choice(("", "", "up", "down")),
                cost_cny=dice.choice((None, 0.01, 0.25)),
                first_token_ms=dice.choice((None, dice.randint(50, 9000))),
                duration_ms=dice.randint(50, 60_000),
                bot=dice.random() < 0.1,
            )
        )
    return made


def numbers(store: AnalyticsStore, days: int = 7) -> list[dict[str, Any]]:
    """Everything that statistics tell, in several zones and groupings; money without its last digits."""
    found = []
    for zone in ZONES:
        for by in ("day", "hour", "page", "source"):
            told = statistics(store, Window.last_days(days, NOW, ZoneInfo(zone)), by=by).to_dict()
            found.append(_rounded(told))
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def without_texts(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: part for name, part in told.items() if name != "top_questions"} for told in found]


def without_places(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without visitors and sessions, which count where they were first seen."""

    def rest_of(numbers: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in numbers.items() if name not in ("visitors", "sessions")}

    return [
        {
            **told,
            "series": [rest_of(r) for r in told["series"]],
            **{name: rest_of(told[name]) for name in ("totals", "previous")},
        }
        for told in without_texts(found)
    ]


def whole(store: AnalyticsStore) -> None:
    sum_up(store, before=END_OF_TIME, sleep=rest)


def in_pieces(store: AnalyticsStore) -> None:
    for hours in range(24 * 10, -1, -5):
        sum_up(store, before=NOW - timedelta(hours=hours), sleep=rest)
    whole(store)


def twice(store: AnalyticsStore) -> None:
    whole(store)
    whole(store)


def anew(store: AnalyticsStore) -> None:
    whole(store)
    rebuild(store, now=NOW, sleep=rest)


@pytest.mark.parametrize("make", [whole, in_pieces, twice, anew])
def test_sums_tell_what_the_rows_tell(store: AnalyticsStore, make: Callable[[AnalyticsStore], None]) -> None:
    store.insert(some_rows(), busy_ms=5000)
    before = numbers(store)
    make(store)
    assert numbers(store) == before


def test_visitors_are_those_that_one_counts_by_hand(store: AnalyticsStore) -> None:
    rows = some_rows()
    store.insert(rows, busy_ms=5000)
    window = Window.last_days(7, NOW, ZoneInfo("Asia/Shanghai"))
    by_hand = {r.visitor for r in rows if not r.bot and window.since <= r.started_at < window.until}
    for make in (lambda store: None, whole, anew):
        make(store)
        assert statistics(store, window).totals["visitors"] == len(by_hand)


def with_late_rows(store: AnalyticsStore, every: int) -> list[dict[str, Any]]:
    """Every `every`th row comes when all others are summed; the numbers then."""
    rows = some_rows()
    late = rows[::every]
    store.insert([r for r in rows if r not in late], busy_ms=5000)
    whole(store)
    store.insert(late, busy_ms=5000)
    return numbers(store)


def test_rows_that_come_late_are_counted_once(store: AnalyticsStore) -> None:
    waiting = with_late_rows(store, every=7)
    whole(store)
    assert without_texts(numbers(store)) == without_texts(waiting)
    rebuild(store, now=NOW, sleep=rest)
    # Only where a visitor was first seen may be another hour, and so on the border of a window another side.
    assert without_places(numbers(store)) == without_places(waiting)
    assert numbers(store)[0]["totals"]["visitors"] == waiting[0]["totals"]["visitors"]


def test_late_rows_are_summed_in_slices(store: AnalyticsStore) -> None:
    waiting = with_late_rows(store, every=5)
    slices = []
    for _ in range(3):
        with store.transaction() as writer:
            slices.append(rollups.sum_up(writer, 30, first_seq(END_OF_TIME)))
        assert without_texts(numbers(store)) == without_texts(waiting)
    assert slices == [30, 30, 20]


def test_what_one_answer_cites_twice_counts_its_question_once(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(
                DAY,
                at=NOW,
                citations=(cite("a"), cite("b", number=2, score=0.5), cite("a", number=3, score=0.2)),
            ),
            row(DAY * 2, at=NOW, citations=(cite("a"), cite("b", number=2, score=0.7), cite("a", number=3))),
            row(DAY, at=NOW, bot=True, citations=(cite("c"),)),
            row(DAY, at=NOW, citations=()),
        ],
        busy_ms=5000,
    )
    for make in (lambda store: None, whole, anew):
        make(store)
        found = statistics(store, Window.last_days(7, NOW, ZoneInfo("UTC")), by="source")
        assert [(r["source"], r["questions"]) for r in found.series.to_dicts()] == [("a", 2), ("b", 2)]
        scores = {r["source"]: (r["title"], r["score"]) for r in found.top_sources.to_dicts()}
        assert scores == {"a": ("Title of a", 0.65), "b": ("Title of b", 0.6)}


def test_numbers_stay_when_the_rows_have_gone(store: AnalyticsStore) -> None:
    store.insert(some_rows(), busy_ms=5000)
    before = numbers(store)
    cleanup(store, 3, now=NOW, force=True, sleep=rest)
    assert store.summary().rows < 200
    assert without_texts(numbers(store)) == without_texts(before)
    rebuild(store, now=NOW, sleep=rest)
    assert without_texts(numbers(store)) == without_texts(before), "what is gone cannot be counted anew"


def test_a_thumb_on_a_summed_row_moves_the_sums(store: AnalyticsStore) -> None:
    store.insert([row(DAY, at=NOW, id="a", feedback="up"), row(DAY, at=NOW, id="b")], busy_ms=5000)
    whole(store)
    store.give_feedback("a", "down", at=NOW)
    store.give_feedback("b", "down", at=NOW)
    store.give_feedback("b", "down", at=NOW)
    totals = numbers(store)[0]["totals"]
    assert (totals["thumbs_up"], totals["thumbs_down"]) == (0, 2)


def test_wrong_sums_are_set_right_by_rebuilding(store: AnalyticsStore) -> None:
    store.insert(some_rows(), busy_ms=5000)
    before = numbers(store)
    whole(store)
    with store.transaction() as writer:
        writer.execute("UPDATE rollups SET questions = questions + 5, cost_cny = 0")
        writer.execute("DELETE FROM waits WHERE level > 0")
    assert numbers(store) != before
    assert rebuild(store, now=NOW, sleep=rest) == 400
    assert numbers(store) == before


def test_pages_beyond_a_thousand_a_day_are_told_together(
    store: AnalyticsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "MAX_PAGES", 3)
    pages = [f"https://example.com/{n}" for n in range(6) for _ in range(6 - n)]
    store.insert([row(DAY, at=NOW, page_url=page) for page in pages], busy_ms=5000)
    whole(store)
    found = statistics(store, Window.last_days(7, NOW, ZoneInfo("UTC")), by="page").to_dict()["series"]
    assert {r["page"]: r["questions"] for r in found} == {
        "https://example.com/0": 6,
        "https://example.com/1": 5,
        "https://example.com/2": 4,
        rollups.OTHER_PAGES: 6,
    }


def test_two_do_not_sum_up_at_once(store: AnalyticsStore) -> None:
    store.insert(some_rows(10), busy_ms=5000)
    with store.lock("sums"), pytest.raises(Locked):
        sum_up(store, before=END_OF_TIME, sleep=rest)
    with store.lock("cleanup"), pytest.raises(Locked):
        rebuild(store, sleep=rest)


def test_the_count_of_rows_is_right_whatever_was_summed_and_deleted(store: AnalyticsStore) -> None:
    store.insert(some_rows(200), busy_ms=5000)
    whole(store)
    store.insert(some_rows(50, seed=2), busy_ms=5000)
    store.delete_rows([r[0] for r in _keys(store)[:7]])
    assert store.summary().rows == 243 == len(_keys(store))
    rebuild(store, now=NOW, sleep=rest)
    assert store.summary().rows == 243


def _keys(store: AnalyticsStore) -> list[Any]:
    with store.reader() as reader:
        return reader.all("SELECT seq FROM queries")


def test_a_crowd_of_new_rows_is_summed_sooner(store: AnalyticsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CROWD_ROWS", 50)
    monkeypatch.setattr(upkeep, "SUMMED_AFTER", timedelta(hours=1))
    now = datetime.now(UTC)
    store.insert([row(timedelta(minutes=2), at=now) for _ in range(40)], busy_ms=5000)
    upkeep.Upkeep(store).once()
    assert store.is_crowded(39) and not store.is_crowded(40)
    store.insert([row(timedelta(minutes=2), at=now) for _ in range(40)], busy_ms=5000)
    upkeep.Upkeep(store).once()
    assert not store.is_crowded(0)
    assert store.summary().rows == 80
