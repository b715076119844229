"""The numbers, counted by hand on small records, and across clock changes."""

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.analytics.records import Window
from mogine.analytics.reports import (
    DEFINITIONS,
    REPORTS,
    _hours,
    _percentiles,
    by_day,
    hour_weekday,
    statistics,
)
from mogine.analytics.store import AnalyticsStore
from mogine.errors import RequestError, Unavailable
from tests.analytics.rows import cite, row

SHANGHAI = ZoneInfo("Asia/Shanghai")
BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)  # a Tuesday, 20:00 in Shanghai
DAY = timedelta(days=1)


def numbers(
    store: AnalyticsStore, days: int = 7, zone: ZoneInfo = SHANGHAI, by: str = "day"
) -> dict[str, Any]:
    return statistics(store, Window.last_days(days, NOW, zone), by=by).to_dict()


@pytest.mark.parametrize("by", sorted(REPORTS))
def test_an_empty_record_has_zeros_and_unknowns_not_errors(store: AnalyticsStore, by: str) -> None:
    found = numbers(store, by=by)
    assert found["totals"]["questions"] == found["previous"]["questions"] == 0
    assert found["totals"]["answered_share"] is None
    assert found["latency"]["duration_ms"] == {"p50": None, "p95": None, "p99": None}
    assert found["top_questions"] == found["top_sources"] == found["by_provider"] == []
    assert sum(map(sum, found["hour_weekday"])) == 0


def test_totals_and_the_period_before(store: AnalyticsStore) -> None:
    names = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cost_cny", "first_token_ms")
    unknown: dict[str, Any] = dict.fromkeys(names)
    store.insert(
        [
            row(at=NOW, visitor="v1", feedback="up"),
            row(at=NOW, visitor="v2", status="error", answered="unknown", duration_ms=9),
            row(at=NOW, visitor="v2", status="aborted", answered="no", tokens_estimated=True),
            row(
                at=NOW, visitor="", session="", status="refused", answered="unknown", duration_ms=1, **unknown
            ),
            row(7 * DAY, at=NOW, feedback="down"),
            row(14 * DAY, at=NOW),
            row(-DAY, at=NOW),
        ]
    )
    found = numbers(store)
    totals = found["totals"]
    assert (totals["questions"], totals["visitors"], totals["sessions"]) == (4, 2, 1)
    assert (totals["ok"], totals["errors"], totals["aborted"], totals["refused"]) == (1, 1, 1, 1)
    assert (totals["answered"], totals["unanswered"], totals["answered_share"]) == (1, 1, 0.5)
    assert (totals["thumbs_up"], totals["thumbs_down"], totals["estimated"]) == (1, 0, 1)
    assert (totals["prompt_tokens"], totals["completion_tokens"], totals["reasoning_tokens"]) == (300, 60, 15)
    assert (totals["cost_cny"], totals["error_share"]) == (0.03, 0.25)
    assert totals["duration_ms_mean"] == 2000  # of answers that came to their end
    assert (found["previous"]["questions"], found["previous"]["thumbs_down"]) == (1, 1)


def test_days_are_local_and_none_is_left_out(store: AnalyticsStore) -> None:
    late_evening_utc = datetime(2026, 3, 8, 16, 0, tzinfo=UTC)  # midnight of the 9th in Shanghai
    store.insert([row(at=late_evening_utc), row(timedelta(milliseconds=1), at=late_evening_utc)])
    series = numbers(store, days=3)["series"]
    assert [(day["day"], day["questions"]) for day in series] == [
        ("2026-03-08", 1),
        ("2026-03-09", 1),
        ("2026-03-10", 0),
    ]
    series = numbers(store, days=3, zone=ZoneInfo("UTC"))["series"]
    assert [day["questions"] for day in series] == [2, 0, 0]


@pytest.mark.parametrize(("day", "hours"), [(datetime(2026, 3, 29), 23), (datetime(2026, 10, 25), 25)])
def test_a_day_of_a_clock_change_counts_each_of_its_hours_once(
    store: AnalyticsStore, day: datetime, hours: int
) -> None:
    begin = day.replace(tzinfo=BERLIN).astimezone(UTC)
    store.insert([row(at=begin + timedelta(hours=n, minutes=30)) for n in range(-1, hours + 1)])
    window = Window.last_days(1, begin + timedelta(hours=12), BERLIN)
    with store.reader() as reader:
        (only,) = by_day(reader, window).to_dicts()
        grid = hour_weekday(reader, window)
    assert only["questions"] == sum(map(sum, grid)) == sum(grid[6]) == hours  # a Sunday
    assert grid[6][2] == (0 if hours == 23 else 2)
    assert grid[6][1] == grid[6][3] == 1


ZONES = [
    "Asia/Shanghai",
    "Europe/Berlin",
    "America/St_Johns",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Pacific/Apia",
]


@settings(max_examples=60, deadline=None)
@given(st.datetimes(datetime(2010, 1, 1), datetime(2035, 1, 1)), st.sampled_from(ZONES), st.integers(1, 10))
def test_hours_cover_a_window_without_gap_and_stay_within_one_local_hour(
    now: datetime, zone: str, days: int
) -> None:
    window = Window.last_days(days, now.replace(tzinfo=UTC), ZoneInfo(zone))
    spans = _hours(window)
    assert spans[0][1] >> 20 == int(window.since.timestamp() * 1000)
    assert spans[-1][2] >> 20 == int(window.until.timestamp() * 1000)
    for (local, low, high), (_, following, _) in zip(spans, [*spans[1:], spans[-1]], strict=True):
        assert low < high
        last = datetime.fromtimestamp((high >> 20) / 1000 - 1, UTC).astimezone(window.timezone)
        assert (last.date(), last.hour) == (local.date(), local.hour)
        assert following in (high, low)


def test_hours_of_the_day_are_twenty_four(store: AnalyticsStore) -> None:
    store.insert([row(at=NOW), row(DAY, at=NOW), row(timedelta(hours=1), at=NOW)])
    series = numbers(store, by="hour")["series"]
    assert [h["hour"] for h in series] == [f"{n:02d}" for n in range(24)]
    assert {h["hour"]: h["questions"] for h in series if h["questions"]} == {"19": 1, "20": 2}
    assert numbers(store)["hour_weekday"][1][20] == 1  # Tuesday
    assert numbers(store)["hour_weekday"][0][20] == 1


def test_groups_by_provider_model_status_error_page(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(at=NOW),
            row(at=NOW),
            row(
                at=NOW,
                provider="extract",
                model="",
                status="error",
                error_type="kb_unavailable",
                page_url="https://e.cn/b",
            ),
        ]
    )
    found = numbers(store)
    assert [(g["provider"], g["questions"]) for g in found["by_provider"]] == [("doubao", 2), ("extract", 1)]
    assert [(g["model"], g["questions"]) for g in found["by_model"]] == [("doubao-1-5", 2), ("", 1)]
    assert [(g["status"], g["questions"]) for g in found["by_status"]] == [("ok", 2), ("error", 1)]
    assert [(g["error"], g["questions"]) for g in found["by_error"]] == [("", 2), ("kb_unavailable", 1)]
    assert found["by_page"][1]["page"] == "https://e.cn/b"
    assert numbers(store, by="provider")["series"] == found["by_provider"]


def test_sources_count_questions_not_citations(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(
                at=NOW,
                citations=(
                    cite("a.md", score=0.9),
                    cite("a.md", number=2, score=0.7),
                    cite("b.md", number=3),
                ),
            ),
            row(at=NOW, citations=(cite("a.md", score=0.8),)),
            row(at=NOW, citations=()),
        ]
    )
    found = numbers(store)
    assert [(g["source"], g["questions"]) for g in found["by_source"]] == [("a.md", 2), ("b.md", 1)]
    assert found["top_sources"][0] == {
        "source": "a.md", "title": "Title of a.md", "questions": 2, "score": 0.8,
    }  # fmt: skip


def test_top_questions_do_not_mind_case_and_blanks(store: AnalyticsStore) -> None:
    texts = ["Price?", "price? ", " PRICE?", "退款", "退款", ""]
    store.insert([row(at=NOW, question=text, answered="no" if text == "退款" else "yes") for text in texts])
    top = numbers(store)["top_questions"]
    assert [(t["question"].lower(), t["questions"], t["unanswered"]) for t in top] == [
        ("price?", 3, 0),
        ("退款", 2, 2),
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=120))
def test_percentiles_are_the_exact_nearest_rank(
    tmp_path_factory: pytest.TempPathFactory, values: list[int]
) -> None:
    store = AnalyticsStore(tmp_path_factory.mktemp("data") / "analytics.db")
    store.insert([row(at=NOW, duration_ms=value) for value in values])
    with store.reader() as reader:
        found = _percentiles(reader, Window.last_days(1, NOW, SHANGHAI), "duration_ms", "q.status = 'ok'")
    store.close()
    ordered = sorted(values)
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert found[name] == ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def test_latency_leaves_out_what_was_not_measured(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(at=NOW, duration_ms=1000, first_token_ms=None),
            row(at=NOW, duration_ms=3000, first_token_ms=200),
            row(at=NOW, duration_ms=1, first_token_ms=None, status="refused"),
        ]
    )
    assert numbers(store)["latency"] == {
        "first_token_ms": {"p50": 200, "p95": 200, "p99": 200},
        "duration_ms": {"p50": 1000, "p95": 3000, "p99": 3000},
    }


def test_every_number_has_its_definition(store: AnalyticsStore) -> None:
    found = numbers(store)
    told = " ".join([*DEFINITIONS, *DEFINITIONS.values()])
    skipped = {"first_token_ms_mean", "duration_ms_mean"}
    assert [name for name in found["totals"] if name not in told and name not in skipped] == []
    assert found["definitions"] == dict(DEFINITIONS)


def test_an_unknown_grouping_is_refused_by_name(store: AnalyticsStore) -> None:
    with pytest.raises(RequestError) as refused:
        numbers(store, by="day; DROP TABLE queries")
    assert (refused.value.reason, refused.value.param) == ("bad_filter", "by")


def test_a_report_that_takes_too_long_is_ended(store: AnalyticsStore) -> None:
    store.insert([row(at=NOW) for _ in range(3000)])
    with pytest.raises(Unavailable):
        statistics(store, Window.last_days(7, NOW, SHANGHAI), deadline_s=0)
