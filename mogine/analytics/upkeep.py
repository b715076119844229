"""What is done behind the writer: rows are put into segments of the search index, sums are built anew."""

import time
from array import array
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import islice

from mogine.analytics import rollups, search
from mogine.analytics.records import epoch_ms
from mogine.analytics.rollups import ASKED_QUARTERS, LEVELS, QUARTER_MS
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore, locked_file
from mogine.analytics.tables import state

# Answers take minutes at most: rows older than this have nothing to come between them any more.
SETTLED = timedelta(minutes=10)
SLICE_S = 0.03
COLLECT_ROWS = 128
WRITE_TERMS = 4_000
HOUR_MS = 4 * QUARTER_MS

Sleep = Callable[[float], None]


def index_once(
    store: AnalyticsStore, *, now: datetime | None = None, sleep: Sleep = time.sleep, wait: bool = False
) -> int:
    """Puts the next rows into a segment of the search index; how many, 0 while there are too few.

    Works in small pieces, with a rest after each as long as it took. Raises Locked while another process
    is at it, or deletes rows.
    """
    before = epoch_ms((now or datetime.now(UTC)) - SETTLED) << SEQ_BITS
    if not store.exists():
        return 0
    with store.reader() as reader:
        if not search.waiting(reader.connection, before):
            return 0
    with locked_file(store.path.with_name("index.lock"), wait=wait):
        while store.purge_index(WRITE_TERMS):
            sleep(0.01)
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
        while part := list(islice(entries, WRITE_TERMS)):
            began = time.monotonic()
            with store.transaction(durable=False) as writer:
                search.write_terms(writer, segment, part)
            sleep(time.monotonic() - began)
        with store.transaction() as writer:
            search.seal(writer, segment, seqs)
    return len(seqs)


def sum_up(
    store: AnalyticsStore,
    *,
    now: datetime | None = None,
    everything: bool = False,
    sleep: Sleep = time.sleep,
) -> int:
    """Adds the rows that are not summed yet to the sums; how many.

    Those of the last minutes are left alone, unless `everything` is wanted: rows still come between them,
    and each of these would have to be summed by itself. Raises Locked while another process is at it.
    """
    if not store.exists():
        return 0
    before = 2**63 - 1 if everything else epoch_ms((now or datetime.now(UTC)) - SETTLED) << SEQ_BITS
    rows = 0
    with locked_file(store.path.with_name("sums.lock"), wait=everything):
        limit = 250
        while True:
            began = time.monotonic()
            with store.transaction(durable=False) as writer:
                done = rollups.sum_up(writer, limit, before)
            took = time.monotonic() - began
            rows += done
            if done < limit:
                return rows
            limit = max(100, min(5_000, int(limit * min(2.0, SLICE_S / max(took, 0.001)))))
            sleep(took)


def rebuild(store: AnalyticsStore, *, now: datetime | None = None, sleep: Sleep = time.sleep) -> int:
    """Sums all hours anew whose rows are all there; how many rows that were.

    The sums of hours that `cleanup` has deleted from stay as they are. Each hour is one transaction, so
    that nobody waits long, and what is written meanwhile is counted too. Raises Locked while `cleanup` runs.
    """
    rows = 0
    with locked_file(store.path.with_name("cleanup.lock")):
        store.prepare()
        sum_up(store, now=now, everything=True, sleep=sleep)
        with store.reader() as reader:
            known = state(reader.connection)
            hours = [
                row[0]
                for row in reader.all(
                    "SELECT DISTINCT slot FROM rollups WHERE dimension IN ('all', 'bot') AND level = 1 "
                    "UNION SELECT DISTINCT (seq >> ?) / ? FROM queries ORDER BY 1",
                    (SEQ_BITS, HOUR_MS),
                )
            ]
        whole = -(-known["deleted_before"] // HOUR_MS)
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
