"""Cleanup deletes what is past its time, all of it, nothing else, for good, and lets writers through."""

import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mogine.analytics.records import new_id
from mogine.analytics.retention import cleanup
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import GAP_S, Pace
from mogine.errors import Locked, RequestError
from tests.analytics.rows import in_a_file, row

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def fill(store: AnalyticsStore, old: int = 1200, fresh: int = 30) -> None:
    rows = [
        row(91 * DAY + timedelta(minutes=n), at=NOW, question=f"old question {n}", answer="舊" * 2000)
        for n in range(old)
    ]
    rows += [row(timedelta(minutes=n), at=NOW, question="fresh question") for n in range(fresh)]
    store.insert(rows, busy_ms=5000)
    if rows:
        store.give_feedback(rows[0].id, "down", comment="old comment")


def test_old_rows_go_and_others_stay(store: AnalyticsStore) -> None:
    fill(store)
    edge = [row(90 * DAY, at=NOW), row(90 * DAY + timedelta(milliseconds=1), at=NOW)]
    store.insert(edge)
    pauses: list[float] = []
    done = cleanup(store, 90, now=NOW, sleep=pauses.append)
    assert (done.rows, done.dry_run, done.before) == (1201, False, NOW - 90 * DAY)
    left = [r.id for r in store.iterate()]
    assert len(left) == 31 and edge[0].id in left and edge[1].id not in left
    assert len(pauses) >= 3  # slices of 500, each followed by a turn for the writers


@in_a_file
def test_space_is_really_given_back_and_nothing_can_be_read_in_the_files(
    store: AnalyticsStore, data: Path
) -> None:
    fill(store)
    before = sum(f.stat().st_size for f in data.glob("analytics.db*"))
    done = cleanup(store, 90, now=NOW, sleep=lambda s: None)
    after = sum(f.stat().st_size for f in data.glob("analytics.db*"))
    assert done.bytes_freed > 5_000_000
    assert after < before / 10
    assert done.erased
    for file in data.iterdir():
        content = file.read_bytes()
        assert b"old question" not in content and b"old comment" not in content
    for table, count in (("queries", 30), ("texts", 30), ("citations", 30), ("feedback", 0)):
        connection = sqlite3.connect(store.path)
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,)  # noqa: S608
        connection.close()


def test_a_dry_run_counts_and_changes_nothing(store: AnalyticsStore) -> None:
    fill(store, old=10)
    done = cleanup(store, 90, dry_run=True, now=NOW)
    assert (done.rows, done.bytes_freed, done.dry_run) == (10, 0, True)
    assert done.bytes_estimated > 0
    assert store.summary().rows == 40


def test_a_second_run_has_nothing_to_do(store: AnalyticsStore) -> None:
    fill(store, old=10)
    cleanup(store, 90, now=NOW, sleep=lambda s: None)
    assert cleanup(store, 90, now=NOW).rows == 0


@in_a_file
def test_an_absent_record_is_not_created(store: AnalyticsStore, data: Path) -> None:
    assert cleanup(store, 90, now=NOW).rows == 0
    assert list(data.iterdir()) == []


def test_two_runs_at_once_are_one_and_a_refusal(store: AnalyticsStore, data: Path) -> None:
    fill(store, old=10)
    with store.lock("cleanup"), pytest.raises(Locked) as refused:
        cleanup(store, 90, now=NOW)
    assert refused.value.exit_code == 5
    assert cleanup(store, 90, now=NOW, sleep=lambda s: None).rows == 10  # no lock is left behind


@pytest.mark.parametrize("shift", [timedelta(days=-1), timedelta(days=400), timedelta(days=2, seconds=1)])
def test_a_clock_that_cannot_be_right_deletes_nothing(store: AnalyticsStore, shift: timedelta) -> None:
    fill(store, old=10)
    with pytest.raises(RequestError, match="nothing was deleted"):
        cleanup(store, 90, now=NOW + shift)
    with pytest.raises(RequestError, match="--force"):
        cleanup(store, 90, now=NOW + shift, dry_run=True)
    assert store.summary().rows == 40


def test_force_says_that_the_clock_is_right(store: AnalyticsStore) -> None:
    fill(store, old=10)
    assert cleanup(store, 90, now=NOW + 5 * DAY, force=True, sleep=lambda s: None).rows == 10


def test_a_quiet_site_with_nothing_to_delete_is_left_in_peace(store: AnalyticsStore) -> None:
    fill(store, old=0)
    assert cleanup(store, 90, now=NOW + 5 * DAY).rows == 0


@pytest.mark.parametrize("days", [0, -1, 3661, 10**9])
def test_impossible_ages_are_refused(store: AnalyticsStore, days: int) -> None:
    with pytest.raises(RequestError) as refused:
        cleanup(store, days, now=NOW)
    assert refused.value.param == "older_than_days"


@in_a_file
def test_a_slice_gives_back_as_many_pages_as_it_is_told(store: AnalyticsStore) -> None:
    fill(store)
    store.delete_before(NOW - 90 * DAY, limit=100_000)
    free = _free_pages(store)
    assert free > 100
    assert store.give_back(40)
    assert _free_pages(store) == free - 40
    assert store.give_back(free, spare=10)
    assert not store.give_back(free, spare=10)


def _free_pages(store: AnalyticsStore) -> int:
    with store.reader() as reader:
        count: int = reader.one("PRAGMA freelist_count")[0]
    return count


def test_a_pace_knows_whether_others_write(
    store: AnalyticsStore, open_again: Callable[[], AnalyticsStore]
) -> None:
    fill(store, old=200)
    rests: list[float] = []
    pace = Pace(store, 1, 1, 1, rests.append)
    other = open_again()
    for writes in (None, other.insert, None, store.insert, None):
        if writes:
            writes([row(id=new_id(NOW), at=NOW)], busy_ms=5000)
        with pace as limit:
            store.delete_before(NOW - 90 * DAY, limit=limit)
            time.sleep(0.005)
    other.close()
    assert [rest > GAP_S for rest in rests[1:]] == [True, False, True, False]


def test_writers_get_in_between_the_slices(
    store: AnalyticsStore, open_again: Callable[[], AnalyticsStore]
) -> None:
    fill(store)
    writer = open_again()
    ids: list[str] = []

    def write(_: float) -> None:
        ids.append(new_id(NOW))
        writer.insert([row(id=ids[-1], at=NOW)], busy_ms=0)

    cleanup(store, 90, now=NOW, sleep=write)
    writer.close()
    assert len(ids) > 3
    assert set(ids) <= {r.id for r in store.iterate()}


@in_a_file
def test_a_reader_in_the_way_is_told(store: AnalyticsStore) -> None:
    fill(store, old=10)
    with store.reader() as reader:
        reader.one("SELECT count(*) FROM queries")
        done = cleanup(store, 90, now=NOW, sleep=lambda s: None)
    assert (done.rows, done.erased) == (10, False)
