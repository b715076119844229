"""A record moved into another database while both may be in use, by as many runs as it takes.

The first run takes all sums of the source and the list of the rows that are in them, at one state of the
source and in one transaction of the target. From then on the sums of the target are right, and whatever
happens at the source is done again at the target as if it had happened there: a listed row is copied (its
numbers are in the sums), a row that is not listed is recorded (and summed by the target), a thumb is given, a
row that is gone is deleted (its numbers stay). The list says of each row what was done, in the transaction
that did it. So a run may be killed at any moment, and the next one goes on where it ended; what the target
deleted itself is in the list, and does not come back.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from mogine.analytics import rollups, unanswered
from mogine.analytics.compare import Line, compare
from mogine.analytics.engine import Bound, Connection, Reader
from mogine.analytics.moved import (
    GAPS,
    GAPS_ORDER,
    LAST_SEQ,
    MARKED,
    MOVED_BITS,
    NO_GAPS,
    NO_MARK,
    Bucket,
    Mark,
    buckets,
    by_bucket,
    changed_marks,
    digest_gaps,
    listed,
)
from mogine.analytics.records import signal_bits
from mogine.analytics.schema import ROW_COLUMNS
from mogine.analytics.store import AnalyticsStore, LastingReader, mark_summed
from mogine.analytics.tables import LISTED, Listing, set_state, state
from mogine.analytics.upkeep import END_OF_TIME, GAP_S, sum_up
from mogine.errors import SettingsError

GROUP_ROWS = 2_000
PART_ROWS = 500
ROUNDS = 3

_AT, _ID, _FEEDBACK, _SIGNALS = (ROW_COLUMNS.index(name) for name in ("seq", "id", "feedback", "signals"))
_MOVED = ("bucket", "copied", "seqs", "marks")
_TEXTS = ("seq", "question", "answer")
_CITATIONS = ("seq", "number", "title", "source", "heading", "url", "score")
_GIVEN = ("seq", "reason", "comment", "given_ms", "handoff")

Looks = Callable[[], AbstractContextManager[Reader]]
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, and how both records compare: tables by rows, months by sums."""

    rows: int
    late: int
    feedback: int
    deleted: int
    seconds: float
    tables: tuple[Line, ...]
    months: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether the target has all of the source."""
        return not any(line.differs for line in (*self.tables, *self.months))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would have to do: rows of the source, those of them that have come to the target already,
    and all rows there; `problem` says why it may not."""

    source: int
    moved: int
    target: int
    problem: str = ""


# --- before ----------------------------------------------------------------------------------------


def plan(source: AnalyticsStore, target: AnalyticsStore, *, join: bool = False) -> Plan:
    """Looks at both records and writes nothing. Raises StoreError for tables of another version."""
    with source.reader() as reader:
        known = state(reader.connection)
        (rows,) = reader.one("SELECT count(*) FROM queries")
    with target.reader() as reader:
        there = state(reader.connection)
        (others,) = reader.one("SELECT count(*) FROM queries")
        (moved,) = reader.one("SELECT coalesce(sum(length(seqs)), 0) / 8 FROM moved WHERE copied = 1")
        is_empty = not others and not reader.all("SELECT 1 FROM rollups LIMIT 1")
    return Plan(rows, int(moved), others, _problem(known, there, source, target, is_empty=is_empty or join))


def _problem(
    known: dict[str, int],
    there: dict[str, int],
    source: AnalyticsStore,
    target: AnalyticsStore,
    *,
    is_empty: bool,
) -> str:
    """Why the target cannot take the source."""
    if known["record"] and known["record"] == there["record"]:
        return (
            f"{target.name} is the same record as {source.name}, or a copy of its file: name another target"
        )
    if there["moved_from"]:
        if there["moved_from"] == known["record"]:
            return ""
        return f"{target.name} was filled from another record than {source.name}: name an empty database"
    if not is_empty:
        return (
            f"{target.name} has rows that do not come from {source.name}: name an empty database or file. "
            "If it is this same site that has recorded there meanwhile, say --join, and both are kept"
        )
    return ""


def uncopied(source: AnalyticsStore, target: AnalyticsStore) -> int:
    """How many rows of `source` never came to `target`; all of them when it was not filled from there."""
    with source.reader() as reader:
        record = state(reader.connection)["record"]
        (rows,) = reader.one("SELECT count(*) FROM queries")
    with target.reader() as reader:
        if not record or state(reader.connection)["moved_from"] != record:
            return int(rows)
        (moved,) = reader.one("SELECT coalesce(sum(length(seqs)), 0) / 8 FROM moved WHERE copied = 1")
    return max(0, int(rows) - int(moved))


# --- the move --------------------------------------------------------------------------------------


def move(
    source: AnalyticsStore,
    target: AnalyticsStore,
    *,
    join: bool = False,
    told: Told = lambda done, total: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Brings everything that the target lacks, and compares. Both may be in use, and it may be killed.

    `told` hears how many rows are done, of how many. Raises SettingsError when the target may not take this
    source, StoreError, and Locked while another run is at it.
    """
    if not source.exists():
        raise SettingsError(f"{source.name} is empty: there is nothing to move")
    with source.reader():
        pass  # one of another version is told, and left as it is
    target.prepare()
    with source.lock("move"), target.lock("move"):
        if problem := plan(source, target, join=join).problem:
            raise SettingsError(problem)
        return _Move(source, target, told, sleep).run()


class _Move:
    def __init__(
        self, source: AnalyticsStore, target: AnalyticsStore, told: Told, sleep: Callable[[float], None]
    ) -> None:
        self._source, self._target = source, target
        self._told, self._sleep = told, sleep
        self._started = time.monotonic()
        self._total = 0
        self.rows = self.late = self.feedback = self.deleted = 0
        self.places: dict[int, int] = {}

    def run(self) -> Outcome:
        """All of it."""
        self._begin()
        lasting = LastingReader(self._source, None)
        try:
            for _ in range(ROUNDS):
                before = self.rows + self.late
                self._round(lasting.look)
                if self.rows + self.late - before < GROUP_ROWS:
                    break
        finally:
            lasting.close()
        # The last round and the comparison see one state of the source, whatever goes on there.
        sum_up(self._source, before=END_OF_TIME, wait=True, sleep=self._sleep)
        with self._source.reader() as snapshot:
            self._round(lambda: nullcontext(snapshot))
            notes = self._finish(snapshot)
            sum_up(self._target, before=END_OF_TIME, wait=True, sleep=self._sleep)
            with self._target.reader() as there:
                tables, months = compare(snapshot, there)
        seconds = time.monotonic() - self._started
        return Outcome(
            self.rows, self.late, self.feedback, self.deleted, seconds, tables, months, tuple(notes)
        )

    def _begin(self) -> None:
        """The sums, and the list of what is in them: once, whole or not at all."""
        with self._source.transaction() as writer:
            if not (record := state(writer)["record"]):
                set_state(writer, record=(record := secrets.randbits(62) | 1))
        with self._target.reader() as reader:
            is_begun = bool(state(reader.connection)["moved_from"])
        if not is_begun:
            sum_up(self._source, before=END_OF_TIME, wait=True, sleep=self._sleep)
            with self._source.reader() as snapshot, self._target.transaction() as writer:
                _take_sums(writer, snapshot, record)
        with self._target.reader() as reader:
            (listed,) = reader.one("SELECT coalesce(sum(length(seqs)), 0) / 8 FROM moved WHERE copied = 0")
        self._total = int(listed)

    def _round(self, look: Looks) -> None:
        """Every row of the source once, in order of time; what the list has already takes no transaction."""
        after, is_last = -1, False
        known = LastingReader(self._target, None)
        try:
            while not is_last:
                with look() as reader:
                    last, rows = reader.one(
                        "SELECT max(seq), count(*) FROM "
                        "(SELECT seq FROM queries WHERE seq > ? ORDER BY seq LIMIT ?) AS following",
                        (after, GROUP_ROWS),
                    )
                    is_last = rows < GROUP_ROWS
                    high = LAST_SEQ if is_last else (((last >> MOVED_BITS) + 1) << MOVED_BITS) - 1
                    did_write = self._group(reader, known, after + 1, high)
                if did_write:
                    self._sleep(GAP_S)
                after = high
        finally:
            known.close()

    def _group(self, reader: Reader, target: LastingReader, low: int, high: int) -> bool:
        """The rows from `low` to `high`, which are whole buckets; whether there was anything to do."""
        there = buckets(reader, low, high)
        with target.look() as known_reader:
            known = listed(known_reader, low, high)
        for bucket in known.values():
            self.places.update(bucket.places)
        changed = {
            number: (known.get(number) or Bucket(copied=True), there.get(number, Bucket()))
            for number in sorted(known.keys() | there.keys())
        }
        changed = {
            number: (old, new)
            for number, (old, new) in changed.items()
            if not old.copied or not old.is_as(new)
        }
        if not changed:
            return False
        with self._target.transaction() as writer:
            _Copying(self, self._target, writer, reader).run(changed)
        for _, new in changed.values():
            self.places.update(new.places)
        self._told(self.rows, max(self._total, self.rows))
        return True

    def _finish(self, snapshot: Reader) -> list[str]:
        """What is small is brought as a whole."""
        with self._target.transaction() as writer:
            theirs, ours = state(snapshot.connection), state(writer)
            lost = snapshot.all(
                "SELECT at_ms, rows, reason FROM losses WHERE at_ms > ? ORDER BY at_ms",
                (ours["moved_losses"],),
            )
            writer.load("losses", ("at_ms", "rows", "reason"), [tuple(row) for row in lost])
            notes = [*self._take_gaps(writer, snapshot), *_came_and_went(snapshot, ours["moved_asked"])]
            set_state(
                writer,
                moved_losses=lost[-1][0] if lost else ours["moved_losses"],
                deleted_before=max(theirs["deleted_before"], ours["deleted_before"]),
                rephrased_upto=max(theirs["rephrased_upto"], ours["rephrased_upto"]),
                moving=0,
            )
        return notes

    def _take_gaps(self, writer: Connection, snapshot: Reader) -> list[str]:
        """Gaps are taken as a whole, as long as nobody has decided on any at the target."""
        known = state(writer)
        theirs = digest_gaps(snapshot.connection)
        if theirs == known["moved_gaps"]:
            return []
        if digest_gaps(writer) != (known["kept_gaps"] or NO_GAPS):
            set_state(writer, moved_gaps=theirs)
            return [
                f"gaps have changed in {self._source.name} and in {self._target.name}: "
                "those of the latter stay"
            ]
        for table, columns in GAPS.items():
            writer.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names
            rows = snapshot.connection.plain(
                f"SELECT {', '.join(columns)} FROM {table} ORDER BY {GAPS_ORDER[table]}"  # noqa: S608
            )
            if table == "gap_questions":
                rows = ((self.places.get(seq, seq), gap) for seq, gap in rows)
            writer.load(table, columns, rows)
        self._target.renumber(writer, "gaps")
        unanswered.reword(writer)  # what the target has deleted is in no gap
        set_state(writer, moved_gaps=theirs, kept_gaps=digest_gaps(writer))
        return []


def _take_sums(writer: Connection, snapshot: Reader, record: int) -> None:
    theirs, ours = state(snapshot.connection), state(writer)
    upto = theirs["summed_upto"]
    late = {row[0] for row in snapshot.all("SELECT seq FROM uncounted")}
    marked = snapshot.connection.plain(f"{MARKED} WHERE q.seq <= ? ORDER BY q.seq", (upto,))
    summed = (row for row in marked if row[0] not in late)
    writer.load("moved", _MOVED, (bucket.packed(number) for number, bucket in by_bucket(summed)))
    rollups.take_over(writer, snapshot.connection)
    mark_summed(writer, upto)
    # Rows that are in the sums and not here yet are counted like those that were deleted.
    questions = _summed(snapshot)
    gone = ours["gone"] + questions
    set_state(
        writer,
        moved_from=record,
        moving=1,
        gone=gone,
        moved_gone=gone,
        moved_asked=questions,
        asked_open=max(theirs["asked_open"], ours["asked_open"]),
        deleted_before=max(theirs["deleted_before"], ours["deleted_before"]),
    )


def _summed(reader: Reader) -> int:
    (questions,) = reader.one(
        "SELECT coalesce(sum(questions), 0) FROM rollups WHERE dimension IN ('all', 'bot') AND level = ?",
        (len(rollups.LEVELS) - 1,),
    )
    return int(questions)


def _came_and_went(snapshot: Reader, seen: int) -> Iterator[str]:
    """Nobody can tell any more what the numbers of rows were that no run has seen."""
    (unsummed,) = snapshot.one(
        "SELECT (SELECT count(*) FROM queries WHERE seq > ?) + (SELECT count(*) FROM uncounted)",
        (state(snapshot.connection)["summed_upto"],),
    )
    if lost := _summed(snapshot) + int(unsummed) - seen:
        yield f"{lost:,} questions were recorded and erased between two runs: their numbers stay behind"


class _Copying:
    """Some buckets, in one transaction of the target and at one state of the source."""

    def __init__(self, move: _Move, target: AnalyticsStore, writer: Connection, reader: Reader) -> None:
        self._move, self._target, self._writer, self._reader = move, target, writer, reader

    def run(self, changed: dict[int, tuple[Bucket, Bucket]]) -> None:
        """Buckets as the list has them, and as they are now."""
        self._copy([pair for pair in changed.values() if not pair[0].copied])
        for old, new in changed.values():
            self._catch_up(old, new)
        self._writer.execute(f"DELETE FROM moved WHERE bucket {LISTED}", (Listing(list(changed)),))  # noqa: S608
        rows = [new.packed(number) for number, (_, new) in changed.items() if new.seqs]
        self._writer.load("moved", _MOVED, rows)

    def _copy(self, pairs: Sequence[tuple[Bucket, Bucket]]) -> None:
        """Rows that are in the sums and still there, as the list knows them; what changed comes later."""
        wanted: list[int] = []
        before: dict[int, Mark] = {}
        for old, new in pairs:
            still = set(new.seqs)
            old.seqs = [seq for seq in old.seqs if seq in still]
            old.marks = {seq: mark for seq, mark in old.marks.items() if seq in still}
            before |= {seq: old.marks.get(seq, NO_MARK) for seq in changed_marks(old, new)}
            wanted += old.seqs
        if not wanted:
            return
        taken = self._writer.execute(
            "SELECT 1 FROM queries WHERE seq >= ? AND seq <= ? LIMIT 1", (wanted[0], wanted[-1] + GROUP_ROWS)
        ).fetchone()
        if taken:
            for old, _ in pairs:
                old.places = self._put(old.seqs, before, summed=True)
        else:
            self._load(wanted, before)
        known = state(self._writer)
        set_state(
            self._writer, gone=known["gone"] - len(wanted), moved_gone=known["moved_gone"] - len(wanted)
        )
        self._move.rows += len(wanted)

    def _load(self, wanted: Sequence[int], before: dict[int, Mark]) -> None:
        """Where the target has no row, the quickest way."""
        keys, low, high = set(wanted), wanted[0], wanted[-1]
        self._writer.load(
            "queries",
            ROW_COLUMNS,
            (
                _with_mark(row, before[row[0]]) if row[0] in before else row
                for row in self._read("queries", ROW_COLUMNS, low, high)
                if row[0] in keys
            ),
        )
        for table, columns in (("texts", _TEXTS), ("citations", _CITATIONS)):
            rows = self._read(table, columns, low, high)
            self._writer.load(table, columns, (row for row in rows if row[0] in keys))
        given = self._read("feedback", _GIVEN, low, high)
        self._writer.load(
            "feedback", _GIVEN, (row for row in given if row[0] in keys and row[0] not in before)
        )
        if low <= state(self._writer)["sealed_upto"]:
            self._writer.execute(
                "INSERT INTO unindexed (seq) SELECT seq FROM queries WHERE seq >= ? AND seq <= ? AND seq <= "
                "(SELECT value FROM state WHERE name = 'sealed_upto') ON CONFLICT DO NOTHING",
                (low, high),
            )

    def _put(self, seqs: Sequence[int], before: dict[int, Mark], *, summed: bool) -> dict[int, int]:
        """Rows among those of the target, which may have some of them by another way; the places of those
        whose keys are others there."""
        places: dict[int, int] = {}
        for start in range(0, len(seqs), PART_ROWS):
            part = seqs[start : start + PART_ROWS]
            rows = self._bound(part, before)
            ids = {row[_ID]: row[_AT] for row, _, _ in rows}
            self._target.add(self._writer, rows)
            there = self._writer.execute(
                f"SELECT seq, id FROM queries WHERE id {LISTED}",  # noqa: S608
                (Listing(list(ids)),),
            ).fetchall()
            at = {ids[id]: seq for seq, id in there}
            places |= {seq: place for seq, place in at.items() if seq != place}
            if summed:
                mark_summed(self._writer, max(at.values()))
                self._writer.execute(
                    f"DELETE FROM uncounted WHERE seq {LISTED}",  # noqa: S608
                    (Listing(list(at.values())),),
                )
            keys = set(part)
            for seq, *given in self._read("feedback", _GIVEN, part[0], part[-1]):
                if seq in keys and seq not in before:
                    self._writer.execute(
                        f"INSERT INTO feedback ({', '.join(_GIVEN)}) VALUES (?, ?, ?, ?, ?) "  # noqa: S608
                        "ON CONFLICT DO NOTHING",
                        (at[seq], *given),
                    )
        return places

    def _bound(self, seqs: Sequence[int], before: dict[int, Mark]) -> list[Bound]:
        keys, low, high = set(seqs), seqs[0], seqs[-1]
        texts = {seq: (question, answer) for seq, question, answer in self._read("texts", _TEXTS, low, high)}
        cited: dict[int, list[tuple[Any, ...]]] = {}
        for seq, *citation in self._read("citations", _CITATIONS, low, high):
            cited.setdefault(seq, []).append(tuple(citation))
        return [
            (
                list(_with_mark(row, before[row[0]]) if row[0] in before else row),
                texts.get(row[0], ("", "")),
                cited.get(row[0], []),
            )
            for row in self._read("queries", ROW_COLUMNS, low, high)
            if row[0] in keys
        ]

    def _read(self, table: str, columns: Sequence[str], low: int, high: int) -> Iterator[tuple[Any, ...]]:
        return self._reader.connection.plain(
            f"SELECT {', '.join(columns)} FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq",  # noqa: S608
            (low, high),
        )

    # --- what happened since the list was made -----------------------------------------------------

    def _catch_up(self, old: Bucket, new: Bucket) -> None:
        """Does at the target what was done at the source."""
        known = set(old.seqs)
        if late := [seq for seq in new.seqs if seq not in known]:
            new.places = self._put(late, {}, summed=False)
            self._move.late += len(late)
            set_state(self._writer, moved_asked=state(self._writer)["moved_asked"] + len(late))
        still = set(new.seqs)
        new.places |= {seq: at for seq, at in old.places.items() if seq in still}
        if gone := [old.places.get(seq, seq) for seq in old.seqs if seq not in still]:
            self._erase(gone)
        for seq in changed_marks(old, new):
            self._judge(seq, new.places.get(seq, seq), old.marks.get(seq, NO_MARK))
        new.copied = True

    def _erase(self, seqs: Sequence[int]) -> None:
        known = state(self._writer)
        are_our_gaps = digest_gaps(self._writer) == known["kept_gaps"]
        self._move.deleted += self._target.erase(self._writer, seqs)
        unanswered.reword(self._writer)
        deleted = state(self._writer)["gone"] - known["gone"]
        set_state(self._writer, moved_gone=known["moved_gone"] + deleted)
        if are_our_gaps:
            set_state(self._writer, kept_gaps=digest_gaps(self._writer))

    def _judge(self, seq: int, at: int, before: Mark) -> None:
        """What is thought of the answer `seq`, which is `at` the target: the last word counts."""
        rating, signals, given_ms = self._reader.one(f"{MARKED} WHERE q.seq = ?", (seq,))[1:]
        ours = self._writer.execute(f"{MARKED} WHERE q.seq = ?", (at,)).fetchone()
        if ours is None:
            return  # deleted there
        is_newer = given_ms > ours[3]
        # Who then only asked for a person has not given the thumb anew.
        asked_only = rating == before[0] and signals & ~before[1] & signal_bits(["handoff"])
        rating = rating if is_newer and rating and not asked_only else ours[1]
        if rating != ours[1]:
            rollups.change_feedback(self._writer, at, rating)
        thumb = signal_bits(["thumbs_down"])
        self._writer.execute(
            "UPDATE queries SET feedback = ?, signals = ? WHERE seq = ?",
            (rating, (ours[2] | signals) & ~thumb | (thumb if rating == "down" else 0), at),
        )
        if is_newer:
            (given,) = self._reader.all(f"SELECT {', '.join(_GIVEN)} FROM feedback WHERE seq = ?", (seq,))  # noqa: S608
            self._writer.execute(
                f"INSERT INTO feedback ({', '.join(_GIVEN)}) VALUES (?, ?, ?, ?, ?) "  # noqa: S608
                "ON CONFLICT (seq) DO UPDATE SET reason = excluded.reason, comment = excluded.comment, "
                "given_ms = excluded.given_ms, "
                "handoff = CASE WHEN excluded.handoff > feedback.handoff THEN 1 ELSE feedback.handoff END",
                (at, *tuple(given)[1:]),
            )
        self._move.feedback += 1


def _with_mark(row: Sequence[Any], mark: Mark) -> list[Any]:
    changed = list(row)
    changed[_FEEDBACK], changed[_SIGNALS] = mark[0], mark[1]
    return changed
