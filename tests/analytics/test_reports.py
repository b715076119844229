"""The numbers, counted by hand on small records, and across clock changes."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.analytics import histogram
from mogine.analytics.records import Window
from mogine.analytics.reports import (
    DEFINITIONS,
    REPORTS,
    by_day,
    hour_weekday,
    offsets,
    open_numbers,
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
    with open_numbers(store, window) as numbers_:
        (only,) = by_day(numbers_, window).to_dicts()
        grid = hour_weekday(numbers_, window)
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
@given(st.datetimes(datetime(2010, 1, 1), datetime(2035, 1, 1)), st.sampled_from(ZONES), st.integers(1, 400))
def test_a_window_is_cut_exactly_where_its_clock_changes(now: datetime, zone: str, days: int) -> None:
    window = Window.last_days(days, now.replace(tzinfo=UTC), ZoneInfo(zone))
    spans = offsets(window)
    assert spans[0][0] * 900 == window.since.timestamp()
    assert spans[-1][1] * 900 == window.until.timestamp()
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    for low, high, offset_s in spans:
        assert low < high
        for quarter in {low, (low + high) // 2, high - 1}:
            local = datetime.fromtimestamp(quarter * 900, UTC).astimezone(window.timezone)
            assert local.utcoffset() == timedelta(seconds=offset_s)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 3 * 24 * 3600 - 1), min_size=1, max_size=60),
    st.sampled_from(ZONES),
    st.sampled_from([datetime(2026, 3, 29, 20), datetime(2026, 4, 5, 3), datetime(2026, 10, 25, 23)]),
)
def test_days_and_hours_of_every_zone_are_counted_as_one_would_by_hand(
    tmp_path_factory: pytest.TempPathFactory, seconds: list[int], zone: str, now: datetime
) -> None:
    store = AnalyticsStore(tmp_path_factory.mktemp("data") / "analytics.db")
    window = Window.last_days(2, now.replace(tzinfo=UTC), ZoneInfo(zone))
    times = [window.since + timedelta(seconds=n) for n in seconds]
    store.insert([row(at=at) for at in times])
    found = statistics(store, window).to_dict()
    by = statistics(store, window, by="hour").to_dict()["series"]
    store.close()
    local = [at.astimezone(window.timezone) for at in times if at < window.until]
    assert {d["day"]: d["questions"] for d in found["series"] if d["questions"]} == Counter(
        str(at.date()) for at in local
    )
    assert {h["hour"]: h["questions"] for h in by if h["questions"]} == Counter(
        f"{at.hour:02d}" for at in local
    )
    grid = Counter((at.weekday(), at.hour) for at in local)
    assert all(found["hour_weekday"][d][h] == grid[d, h] for d in range(7) for h in range(24))
    assert found["totals"]["questions"] == found["by_provider"][0]["questions"] if local else True


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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=200))
def test_percentiles_are_within_one_percent_of_the_nearest_rank(values: list[int]) -> None:
    parts = [values[::2], values[1::2]]
    packed = [histogram.add(b"", Counter(map(histogram.bucket, part))) for part in parts]
    counts = histogram.unpack(packed)
    ordered = sorted(values)
    for percent in (50, 95, 99):
        exact = ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
        found = histogram.percentile(counts, percent)
        assert found is not None
        assert abs(found - exact) <= max(0.5, exact * histogram.ERROR + 0.5)
        assert found == exact or exact >= 50


def near(value: int) -> Any:
    return pytest.approx(value, rel=0.01, abs=0.5)


def test_latency_leaves_out_what_was_not_measured(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(at=NOW, duration_ms=1000, first_token_ms=None),
            row(at=NOW, duration_ms=3000, first_token_ms=200),
            row(at=NOW, duration_ms=1, first_token_ms=None, status="refused"),
        ]
    )
    assert numbers(store)["latency"] == {
        "first_token_ms": dict.fromkeys(("p50", "p95", "p99"), near(200)),
        "duration_ms": {"p50": near(1000), "p95": near(3000), "p99": near(3000)},
    }


def test_every_number_has_its_definition(store: AnalyticsStore) -> None:
    found = numbers(store)
    told = " ".join([*DEFINITIONS, *DEFINITIONS.values()])
    names = {*found["totals"], *found} - {"definitions", "totals", "latency", "series", "previous"}
    assert [name for name in sorted(names) if not name.startswith("by_") and name not in told] == []
    assert found["definitions"] == dict(DEFINITIONS)


def test_an_unknown_grouping_is_refused_by_name(store: AnalyticsStore) -> None:
    with pytest.raises(RequestError) as refused:
        numbers(store, by="day; DROP TABLE queries")
    assert (refused.value.reason, refused.value.param) == ("bad_filter", "by")


def test_a_report_that_takes_too_long_is_ended(store: AnalyticsStore) -> None:
    store.insert([row(at=NOW) for _ in range(3000)])
    with pytest.raises(Unavailable):
        statistics(store, Window.last_days(7, NOW, SHANGHAI), deadline_s=0)
