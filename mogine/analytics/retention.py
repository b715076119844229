"""What `cleanup` deletes: rows past their time, in slices that let writers through, really gone from disk."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mogine.analytics import unanswered
from mogine.analytics.records import MAX_DAYS
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import SETTLED, Pace, purge_index, sum_up
from mogine.errors import RequestError

MAX_QUIET = timedelta(days=2)
CLOCK_TOLERANCE = timedelta(seconds=5)
CHECKPOINT_TRIES = 20
SPARE_PAGES = 1_000


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What was done, or with `dry_run` would be. `bytes_freed` is what the files on disk lost;
    `erased` is False when a reader kept deleted text in the journal until it ends."""

    older_than_days: int
    before: datetime
    dry_run: bool
    rows: int
    bytes_freed: int
    bytes_estimated: int
    erased: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As the API and `--json` tell it."""
        return {**asdict(self), "before": self.before.isoformat()}


def cleanup(
    store: AnalyticsStore,
    older_than_days: int,
    *,
    dry_run: bool = False,
    force: bool = False,
    now: datetime | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Cleanup:
    """Deletes the rows that began more than `older_than_days` times 24 hours ago; never any other.

    Raises Locked while another run is at it, and RequestError when the clock cannot be right: it
    stands before the newest row, or more than two days after it (`force` says that it is right).
    """
    if not 1 <= older_than_days <= MAX_DAYS:
        raise RequestError(
            f"older_than_days must be a whole number from 1 to {MAX_DAYS}",
            reason="bad_filter",
            param="older_than_days",
        )
    now = now or datetime.now(UTC)
    before = now - timedelta(days=older_than_days)
    rows = store.count_before(before)
    if not rows:
        return Cleanup(older_than_days, before, dry_run, 0, 0, 0)
    if not force:
        _check_clock(now, store.newest_at())
    estimated = store.size_bytes() * rows // max(1, store.summary().rows)
    if dry_run:
        return Cleanup(older_than_days, before, dry_run, rows, 0, estimated)
    with (
        store.lock("cleanup"),
        # A segment of the index that is just being built could take in what is deleted here.
        store.lock("index", wait=True),
    ):
        # Also what stays: whoever asked before and after the cut would count as two visitors later.
        sum_up(store, before=max(before, now - SETTLED), wait=True, sleep=sleep)
        # Neither what the sums take nor what lies in the journal is anything that deleting frees.
        _checkpoint(store, sleep)
        size = store.size_bytes()
        deleted = _in_slices(store, before, sleep)
        erased, freed = tidy(store, size, sleep)
    return Cleanup(older_than_days, before, dry_run, deleted, freed, estimated, erased)


def tidy(store: AnalyticsStore, size: int, sleep: Callable[[float], None]) -> tuple[bool, int]:
    """After rows were deleted: erases what the index still knew, gives space back, empties the journal.

    Whether nothing is left in the journal, and by how many bytes the files are smaller than `size`.
    """
    unanswered.drop_deleted(store)
    purge_index(store, sleep=sleep)
    _give_back(store, Pace(store, 50, 20, 10_000, sleep))
    store.sweep()
    erased = _checkpoint(store, sleep)
    return erased, max(0, size - store.size_bytes())


def _in_slices(store: AnalyticsStore, before: datetime, sleep: Callable[[float], None]) -> int:
    """Deletes rows until there are none left; how many."""
    total = 0
    deleting, giving = Pace(store, 50, 20, 5_000, sleep), Pace(store, 50, 20, 10_000, sleep)
    while True:
        with deleting as limit:
            done = store.delete_before(before, limit=limit)
        total += done
        if not done:
            return total
        # In between: to give a page back SQLite looks through the list of free ones, which must stay short.
        _give_back(store, giving, spare=SPARE_PAGES)


def _give_back(store: AnalyticsStore, pace: Pace, *, spare: int = 0) -> None:
    more = True
    while more:
        with pace as pages:
            more = store.give_back(pages, spare=spare)


def _checkpoint(store: AnalyticsStore, sleep: Callable[[float], None]) -> bool:
    for _ in range(CHECKPOINT_TRIES):
        if store.checkpoint():
            return True
        sleep(0.05)
    return False


def _check_clock(now: datetime, newest: datetime | None) -> None:
    if newest is None:
        return
    times = f"the newest question is of {newest:%Y-%m-%d %H:%M} UTC, the clock says {now:%Y-%m-%d %H:%M} UTC"
    if newest - now > CLOCK_TOLERANCE:
        raise RequestError(
            f"{times}, which is earlier: nothing was deleted. Set the clock; if it is right, say --force"
        )
    if now - newest > MAX_QUIET:
        raise RequestError(
            f"{times}, which is more than two days later: nothing was deleted, since a clock that runs "
            "ahead would delete too much. If the site was just quiet, say --force"
        )
