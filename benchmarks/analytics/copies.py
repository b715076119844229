"""The same rows again, further back in time, within PostgreSQL: how millions of rows get there in minutes."""

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mogine.analytics import fold, rollups
from mogine.analytics.engine import Connection
from mogine.analytics.store import AnalyticsStore

HOURS_S = 4 * 3600.0


def repeat(store: AnalyticsStore, copies: int, days: int) -> None:
    """All rows again, each time `days` days further back, with all sums and segments.

    Other indexes than those of keys are taken away meanwhile, and built in the end.
    """
    with store.transaction(durable=False) as db:
        indexes = db.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'queries' "
            "AND schemaname = current_schema() AND indexname LIKE 'queries_by_%'"
        ).fetchall()
        low, high = db.execute("SELECT min(seq), max(seq) FROM queries").fetchone()
        segments = db.execute("SELECT id, first_seq, last_seq, seqs FROM segments WHERE live = 1").fetchall()
        columns = {
            table: [
                row[0]
                for row in db.execute(
                    "SELECT column_name FROM information_schema.columns WHERE table_name = ? AND "
                    "table_schema = current_schema() AND is_generated = 'NEVER' ORDER BY ordinal_position",
                    (table,),
                )
            ]
            for table in ("queries", "texts", "citations", "rollups", "waits", "asked")
        }
        for name, _ in indexes:
            db.execute(f"DROP INDEX {name}")
    for copy in range(1, copies):
        _copy(store, columns, copy, days, low, high)
        _copy_segments(store, segments, copy * days * 86_400_000 << 20)
        print(f"  copy {copy + 1} of {copies}", file=sys.stderr, flush=True)
    for name, definition in indexes:
        with _patiently(store) as db:
            db.execute(definition)
        print(f"  {name}", file=sys.stderr, flush=True)
    lowest = (low >> 20) // fold.QUARTER_MS - (copies - 1) * days * rollups.LEVELS[2]
    for block in range(lowest // 1536, (high >> 20) // fold.QUARTER_MS // 1536 + 1):
        with store.transaction(durable=False) as db:
            rollups.rebuild_slot(db, 3, block)


@contextmanager
def _patiently(store: AnalyticsStore) -> Iterator[Connection]:
    """A transaction whose statements take as long as they take."""
    with store.transaction(durable=False) as db:
        db.set_deadline(HOURS_S)
        db.execute("SET LOCAL maintenance_work_mem = '512MB'")
        yield db
        db.set_deadline(None)


def _copy(
    store: AnalyticsStore, columns: Mapping[str, Sequence[str]], copy: int, days: int, low: int, high: int
) -> None:
    back = copy * days * 86_400_000 << 20
    low_slot, high_slot = (low >> 20) // fold.QUARTER_MS, (high >> 20) // fold.QUARTER_MS
    quarters = days * rollups.LEVELS[2]
    changed = {
        "seq": f"seq - {back}",
        "id": f"lpad(to_hex((seq - {back}) >> 20), 12, '0') || substr(id, 13)",
        "visitor": f"lpad(to_hex({copy}), 2, '0') || substr(visitor, 3)",
        "session": f"lpad(to_hex({copy}), 2, '0') || substr(session, 3)",
    }
    with _patiently(store) as db:
        for table in ("queries", "texts", "citations"):
            names = columns[table]
            chosen = ", ".join(changed.get(n, n) for n in names)
            db.execute(
                f"INSERT INTO {table} ({', '.join(names)}) SELECT {chosen} "
                f"FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq",
                (low, high),
            )
        for table in ("rollups", "waits"):
            for level, size in enumerate(rollups.LEVELS[:3]):
                names = columns[table]
                chosen = ", ".join(f"slot - {copy * quarters // size}" if n == "slot" else n for n in names)
                db.execute(
                    f"INSERT INTO {table} ({', '.join(names)}) SELECT {chosen} FROM {table} "
                    "WHERE level = ? AND slot >= ? AND slot <= ?",
                    (level, low_slot // size, high_slot // size),
                )
        db.execute(
            "INSERT INTO asked (slot, key, seq, questions, unanswered) "
            f"SELECT slot - {copy * quarters // 32}, key, seq - {back}, questions, unanswered "
            "FROM asked WHERE slot >= ? AND slot <= ?",
            (low_slot // 32, high_slot // 32),
        )


def _copy_segments(store: AnalyticsStore, segments: Sequence[Any], back: int) -> None:
    with _patiently(store) as db:
        for number, low, high, packed in segments:
            moved = array("q", (seq - back for seq in array("q", packed)))
            (new,) = db.execute(
                "INSERT INTO segments (live, first_seq, last_seq, seqs) VALUES (1, ?, ?, ?) RETURNING id",
                (low - back, high - back, moved.tobytes()),
            ).fetchone()
            db.execute(
                "INSERT INTO terms (segment, term, places) "
                f"SELECT {new}, term, places FROM terms WHERE segment = ? ORDER BY term",
                (number,),
            )
