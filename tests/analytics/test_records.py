"""Ids, windows of whole local days, and what a row insists on."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from mogine.analytics.records import QueryRecord, Window, epoch_ms, from_epoch_ms, new_id
from mogine.errors import RequestError

SHANGHAI = ZoneInfo("Asia/Shanghai")
BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 3, 10, 20, 30, tzinfo=UTC)


def test_ids_sort_by_time_and_never_repeat() -> None:
    ids = [new_id(NOW + timedelta(milliseconds=n)) for n in range(1000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 1000
    assert len({new_id(NOW) for _ in range(1000)}) == 1000


def test_an_id_has_128_random_bits_after_its_time() -> None:
    assert new_id(NOW)[:12] == f"{epoch_ms(NOW):012x}"
    assert len(new_id(NOW)) == 12 + 32


def test_a_row_without_id_gets_one_of_its_own_time() -> None:
    row = QueryRecord(started_at=NOW, kind="chat", provider="extract", status="ok")
    assert int(row.id[:12], 16) == epoch_ms(NOW)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        QueryRecord(started_at=datetime(2026, 3, 10), kind="chat", provider="extract", status="ok")


@pytest.mark.parametrize("ms", [0, 1, 999, 1_773_146_400_123, 253_402_300_799_999])
def test_milliseconds_come_back_exactly(ms: int) -> None:
    assert epoch_ms(from_epoch_ms(ms)) == ms


def test_last_days_are_whole_local_days_with_today() -> None:
    window = Window.last_days(3, NOW, SHANGHAI)  # there it is the 11th already
    assert window.since == datetime(2026, 3, 9, tzinfo=SHANGHAI)
    assert window.until == datetime(2026, 3, 12, tzinfo=SHANGHAI)
    assert window.days == 3


def test_the_window_before_is_as_long_and_ends_where_this_begins() -> None:
    window = Window.last_days(7, NOW, SHANGHAI)
    before = window.before()
    assert before.until == window.since
    assert before.days == 7
    assert before.since == datetime(2026, 2, 26, tzinfo=SHANGHAI)


def test_days_of_a_clock_change_have_23_and_25_hours() -> None:
    spring = Window.last_days(1, datetime(2026, 3, 29, 12, tzinfo=UTC), BERLIN)
    autumn = Window.last_days(1, datetime(2026, 10, 25, 12, tzinfo=UTC), BERLIN)
    assert spring.until - spring.since == timedelta(hours=23)
    assert autumn.until - autumn.since == timedelta(hours=25)
    assert spring.days == autumn.days == 1
    assert spring.before().until - spring.before().since == timedelta(hours=24)


@pytest.mark.parametrize("days", [0, -1, 3661, 1_000_000_000])
def test_impossible_days_are_refused_by_name(days: int) -> None:
    with pytest.raises(RequestError) as refused:
        Window.last_days(days, NOW, SHANGHAI)
    assert (refused.value.reason, refused.value.param) == ("bad_filter", "days")
