"""What is done behind the writer: rows are put into segments of the search index, sums are built anew."""

import logging
import threading
import time
from array import array
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import islice

from mogine.analytics import rollups, search
from mogine.analytics.fold import ASKED_QUARTERS, QUARTER_MS
from mogine.analytics.records import epoch_ms
from mogine.analytics.rollups import LEVELS
from mogine.analytics.schema import BUCKET_BITS, SEQ_BITS
from mogine.analytics.sqlite import POLL_S
from mogine.analytics.store import AnalyticsStore, first_seq
from mogine.analytics.tables import state
from mogine.errors import Locked, MogineError, StoreError

# Answers take minutes at most: rows older than this have nothing to come between them any more.
SETTLED = timedelta(minutes=10)
# Few answers take longer than this. Rows that come later are summed by themselves, which costs more a row.
SUMMED_AFTER = timedelta(minutes=1)
# So many rows that statistics would feel them: then even less is left to be summed by the reader.
CROWD_ROWS = 2_000
CROWDED = timedelta(seconds=10)
LOOK_EVERY_S = 5.0
SLICE_S = 0.01
ALONE_S = 0.025
GAP_S = 2 * POLL_S
COLLECT_ROWS = 128
STOP_S = 2.0
HOUR_MS = 4 * QUARTER_MS
REACH_MS = 3 << BUCKET_BITS - SEQ_BITS  # how far back a visitor is looked for; see REACH of fold.py

END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)

log = logging.getLogger(__name__)

Sleep = Callable[[float], None]


def index_once(
    store: AnalyticsStore, *, now: datetime | None = None, sleep: Sleep = time.sleep, wait: bool = False
) -> int:
    """Puts the next rows into a segment of the search index; how many, 0 while there are too few.

    Works in small pieces, with a rest after each as long as it took. Raises Locked while another process
    is at it, or deletes rows.
    """
    before = first_seq((now or datetime.now(UTC)) - SETTLED)
    if not store.exists():
        return 0
    with store.reader() as reader:
        if not search.waiting(reader.connection, before):
            return 0
    with store.lock("index", wait=wait):
        purge_index(store, sleep=sleep)
        with store.reader() as reader:
            seqs = search.waiting(reader.connection, before)
        if not seqs:
            return 0
        index: dict[str, array[int]] = {}
        for first in range(0, len(seqs), COLLECT_ROWS):
            began = time.monotonic()
            with store.reader() as reader:
                search.collect(reader.connection, seqs[first : first + COLLECT_ROWS], first, index)
            sleep(time.monotonic() - began)
        with store.transaction() as writer:
            segment = search.new_segment(writer)
        entries = iter(sorted(index.items()))
        pace = Pace(store, 200, 50, 20_000, sleep)
        done = False
        while not done:
            with pace as limit, store.transaction(durable=False) as writer:
                part = list(islice(entries, limit))
                search.write_terms(writer, segment, part)
                done = len(part) < limit
        with store.transaction() as writer:
            search.seal(writer, segment, seqs)
    return len(seqs)


def purge_index(store: AnalyticsStore, *, sleep: Sleep = time.sleep) -> None:
    """Deletes the terms of segments that are out of use."""
    pace = Pace(store, 100, 20, 20_000, sleep)
    more = True
    while more:
        with pace as limit:
            more = store.purge_index(limit)


def sum_up(
    store: AnalyticsStore, *, before: datetime | None = None, wait: bool = False, sleep: Sleep = time.sleep
) -> int:
    """Adds the rows that began before `before`, and are not summed yet, to the sums; how many.

    Without `before` the rows of the last minute are left alone: others still come between them, and those
    would have to be summed by themselves. Raises Locked while another process is at it, unless told
    to `wait`.
    """
    if not store.exists():
        return 0
    high = first_seq(before or datetime.now(UTC) - SUMMED_AFTER)
    rows = 0
    pace = Pace(store, 25, 20, 5_000, sleep)
    with store.lock("sums", wait=wait):
        while True:
            with pace as limit, store.transaction(durable=False) as writer:
                done = rollups.sum_up(writer, limit, high)
            rows += done
            if done < limit:
                return rows


class Pace:
    """Slices of work in transactions that are not durable: every `with` gives how much to do.

    While others write too, a slice is to keep them out for SLICE_S, and rests for longer than all of it took:
    a busy disk has less to do. While nobody does it is to take ALONE_S, and leaves just the gap in which a
    writer who has come meanwhile gets in.
    """

    def __init__(
        self, store: AnalyticsStore, start: int, least: int, most: int, sleep: Callable[[float], None]
    ) -> None:
        self._store = store
        # Statements go to PostgreSQL and back: a slice of few rows takes as long as one of some hundred.
        times = 1 if store.is_file else 10
        self._size, self._least, self._most = start * times, least * times, most
        self._sleep = sleep
        self._began = 0.0
        self._visits = store.visits

    def __enter__(self) -> int:
        self._began = time.monotonic()
        return self._size

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        took = time.monotonic() - self._began
        if error is None:
            # Waiting for others and for the disk is no part of it: of that the size of a slice tells nothing.
            held = self._store.held_s
            is_alone = self._store.visits == self._visits
            self._visits = self._store.visits
            goal = ALONE_S if is_alone else SLICE_S
            wanted = int(self._size * min(2.0, goal / max(held, 0.001)))
            self._size = max(self._least, min(self._most, wanted))
            self._sleep(GAP_S if is_alone else max(GAP_S, took + held))


class Upkeep:
    """A thread that sums and indexes what was recorded, now and then, until it is stopped."""

    def __init__(self, store: AnalyticsStore, *, every_s: float = 60.0) -> None:
        self._store = store
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when it has ended, which is soon, or waits for a database that says nothing."""
        self._stopped.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        due = time.monotonic() + self._every_s
        told = ""
        rest_s = 0.0  # an upgrade may have left everything to be summed
        while not self._stopped.wait(rest_s):
            rest_s = min(LOOK_EVERY_S, self._every_s)
            try:
                self.sum_crowd()
                if time.monotonic() >= due:
                    due = time.monotonic() + self._every_s
                    self.once()
            except _Stopped:
                return
            except Locked:
                continue  # another process does it
            except Exception as error:
                words = error.message if isinstance(error, MogineError) else repr(error)
                if words != told:
                    log.warning("the record cannot be summed up just now: %s", words)
                told = words

    def once(self) -> None:
        """Does what there is to do."""
        sum_up(self._store, sleep=self._rest)
        self.sum_crowd()
        while index_once(self._store, sleep=self._rest):
            pass

    def sum_crowd(self) -> None:
        """Sums what was recorded seconds ago, if that is much."""
        if self._store.exists() and self._store.is_crowded(CROWD_ROWS):
            sum_up(self._store, before=datetime.now(UTC) - CROWDED, sleep=self._rest)

    def _rest(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopped


class _Stopped(Exception):
    """The thread is to end: there is nothing that the next one could not begin anew."""


def rebuild(store: AnalyticsStore, *, now: datetime | None = None, sleep: Sleep = time.sleep) -> int:
    """Sums all hours anew whose rows are all there; how many rows that were.

    The sums of hours that `cleanup` has deleted from, and of the two days after them, stay as they are. Each
    hour is one transaction, so that nobody waits long, and what is written meanwhile is counted too.
    Raises Locked while `cleanup` runs.
    """
    rows = 0
    with store.lock("cleanup"):
        store.prepare()
        sum_up(store, before=END_OF_TIME, wait=True, sleep=sleep)
        with store.reader() as reader:
            known = state(reader.connection)
            if known["moving"]:
                raise StoreError(f"rows are still to come into {store.name}: let `mogine migrate` end before")
            hours = [
                row[0]
                for row in reader.all(
                    "SELECT DISTINCT slot FROM rollups WHERE dimension IN ('all', 'bot') AND level = 1 "
                    "UNION SELECT DISTINCT (seq >> ?) / ? FROM queries ORDER BY 1",
                    (SEQ_BITS, HOUR_MS),
                )
            ]
        # Shortly after what was deleted nobody can tell any more who had been there before.
        whole = -(-(known["deleted_before"] + REACH_MS) // HOUR_MS) if known["deleted_before"] else 0
        for hour in hours:
            if hour >= whole:
                with store.transaction(durable=False) as writer:
                    rows += rollups.rebuild_hour(writer, hour)
                sleep(0.002)
        for level in (2, 3):
            for slot in sorted({hour * LEVELS[1] // LEVELS[level] for hour in hours}):
                with store.transaction(durable=False) as writer:
                    rollups.rebuild_slot(writer, level, slot)
        running = epoch_ms(now or datetime.now(UTC)) // QUARTER_MS // ASKED_QUARTERS
        for slot in sorted({hour * LEVELS[1] // ASKED_QUARTERS for hour in hours if hour >= whole}):
            # What goes on is left to the next summing up, and 8 hours that were cut into to what is known.
            if slot < running and slot * ASKED_QUARTERS * QUARTER_MS >= known["deleted_before"]:
                with store.transaction(durable=False) as writer:
                    rollups.rebuild_asked(writer, slot)
        store.recount()
    return rows
