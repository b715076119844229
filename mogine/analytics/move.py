"""A record moved into another database while both may be in use, by as many runs as it takes.

The first run takes all sums of the source and the list of the rows that are in them, at one state of the
source and in one transaction of the target. From then on the sums of the target are right, and whatever
happens at the source is done again at the target as if it had happened there: a listed row is copied (its
numbers are in the sums), a row that is not listed is recorded (and summed by the target), a thumb is given, a
row that is gone is deleted (its numbers stay). The list says of each row what was done, in the transaction
that did it. So a run may be killed at any moment, and the next one goes on where it ended; what the target
deleted itself is in the list, and does not come back.
"""

import json
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any

from mogine.analytics import rollups, unanswered
from mogine.analytics.engine import Bound, Connection, Reader
from mogine.analytics.records import from_epoch_ms, signal_bits
from mogine.analytics.schema import ROW_COLUMNS, SEQ_BITS
from mogine.analytics.store import AnalyticsStore, LastingReader, mark_summed
from mogine.analytics.tables import LISTED, Listing, set_state, state
from mogine.analytics.upkeep import END_OF_TIME, GAP_S, sum_up
from mogine.errors import SettingsError

MOVED_BITS = 42  # a bucket of the list is 70 minutes
GROUP_ROWS = 2_000
PART_ROWS = 500
ROUNDS = 3
LAST_SEQ = 2**63 - 1
DAY_MS = rollups.LEVELS[rollups.DAY_LEVEL] * rollups.QUARTER_MS

_AT, _ID, _FEEDBACK, _SIGNALS = (ROW_COLUMNS.index(name) for name in ("seq", "id", "feedback", "signals"))
_MOVED = ("bucket", "copied", "seqs", "marks")
_TEXTS = ("seq", "question", "answer")
_CITATIONS = ("seq", "number", "title", "source", "heading", "url", "score")
_GIVEN = ("seq", "reason", "comment", "given_ms", "handoff")
_GAPS = {
    "gaps": ("id", "status", "question", "embedder", "vector", "test", "nearest", "evidence", "reason",
             "opened_ms"),
    "gap_questions": ("seq", "gap"),
    "gap_events": ("gap", "at_ms", "status", "detail"),
}  # fmt: skip
_GAPS_ORDER = {"gaps": "id", "gap_questions": "seq", "gap_events": "rowid"}
_MARKED = (
    "SELECT q.seq, q.feedback, q.signals, coalesce(f.given_ms, 0) FROM queries q "
    "LEFT JOIN feedback f ON f.seq = q.seq"
)
# What is compared of each table beside the number of its rows.
_WEIGHTS = {
    "queries": "(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0) + coalesce(duration_ms, 0)) "
    "& 1073741823",
    "texts": "length(question) + length(answer)",
    "citations": "number + length(title) + length(source) + length(url)",
    "feedback": "length(reason) + length(comment)",
}

# A thumb, signals, and when it was last said what was thought of the answer.
Mark = tuple[str, int, int]
Looks = Callable[[], AbstractContextManager[Reader]]
Told = Callable[[int, int], None]

_NO_MARK: Mark = ("", 0, 0)


@dataclass(slots=True)
class Bucket:
    """Rows of 70 minutes: their keys in order, and the marks of those that have any; `places` tells which
    keys are others at the target."""

    seqs: list[int] = field(default_factory=list)
    marks: dict[int, Mark] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    copied: bool = False

    def see(self, seq: int, mark: Mark) -> None:
        """One more row, of those before."""
        self.seqs.append(seq)
        if mark != _NO_MARK:
            self.marks[seq] = mark

    def is_as(self, other: "Bucket") -> bool:
        """Whether the other has the same rows, with the same marks."""
        return self.seqs == other.seqs and self.marks == other.marks

    def packed(self, bucket: int) -> tuple[int, int, bytes, str]:
        """As the table has it."""
        marks = (
            json.dumps([self.marks, self.places], separators=(",", ":")) if self.marks or self.places else ""
        )
        return bucket, int(self.copied), array("q", self.seqs).tobytes(), marks

    @classmethod
    def unpack(cls, copied: int, seqs: bytes, marks: str) -> "Bucket":
        """The other way round."""
        found, places = json.loads(marks) if marks else ({}, {})
        return cls(
            array("q", bytes(seqs)).tolist(),
            {int(seq): (mark[0], mark[1], mark[2]) for seq, mark in found.items()},
            {int(seq): at for seq, at in places.items()},
            bool(copied),
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One number of both records: at the source, at the target, what the target has of its own, and what of
    the source it has deleted."""

    name: str
    numbers: tuple[float, float, float, float]
    differs: bool


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
        there = _buckets(reader, low, high)
        with target.look() as known_reader:
            known = _listed(known_reader, low, high)
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
        theirs = _digest(snapshot.connection)
        if theirs == known["moved_gaps"]:
            return []
        if _digest(writer) != (known["kept_gaps"] or _EMPTY):
            set_state(writer, moved_gaps=theirs)
            return [
                f"gaps have changed in {self._source.name} and in {self._target.name}: "
                "those of the latter stay"
            ]
        for table, columns in _GAPS.items():
            writer.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names
            rows = snapshot.connection.plain(
                f"SELECT {', '.join(columns)} FROM {table} ORDER BY {_GAPS_ORDER[table]}"  # noqa: S608
            )
            if table == "gap_questions":
                rows = ((self.places.get(seq, seq), gap) for seq, gap in rows)
            writer.load(table, columns, rows)
        self._target.renumber(writer, "gaps")
        unanswered.reword(writer)  # what the target has deleted is in no gap
        set_state(writer, moved_gaps=theirs, kept_gaps=_digest(writer))
        return []


def _take_sums(writer: Connection, snapshot: Reader, record: int) -> None:
    theirs, ours = state(snapshot.connection), state(writer)
    upto = theirs["summed_upto"]
    late = {row[0] for row in snapshot.all("SELECT seq FROM uncounted")}
    marked = snapshot.connection.plain(f"{_MARKED} WHERE q.seq <= ? ORDER BY q.seq", (upto,))
    summed = (row for row in marked if row[0] not in late)
    writer.load("moved", _MOVED, (bucket.packed(number) for number, bucket in _by_bucket(summed)))
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
            before |= {seq: old.marks.get(seq, _NO_MARK) for seq in _changed(old, new)}
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
        for seq in _changed(old, new):
            self._judge(seq, new.places.get(seq, seq), old.marks.get(seq, _NO_MARK))
        new.copied = True

    def _erase(self, seqs: Sequence[int]) -> None:
        known = state(self._writer)
        are_our_gaps = _digest(self._writer) == known["kept_gaps"]
        self._move.deleted += self._target.erase(self._writer, seqs)
        unanswered.reword(self._writer)
        deleted = state(self._writer)["gone"] - known["gone"]
        set_state(self._writer, moved_gone=known["moved_gone"] + deleted)
        if are_our_gaps:
            set_state(self._writer, kept_gaps=_digest(self._writer))

    def _judge(self, seq: int, at: int, before: Mark) -> None:
        """What is thought of the answer `seq`, which is `at` the target: the last word counts."""
        rating, signals, given_ms = self._reader.one(f"{_MARKED} WHERE q.seq = ?", (seq,))[1:]
        ours = self._writer.execute(f"{_MARKED} WHERE q.seq = ?", (at,)).fetchone()
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


def _changed(old: Bucket, new: Bucket) -> list[int]:
    """Rows in both whose marks are not the same."""
    known = set(old.seqs)
    seqs = sorted((old.marks.keys() | new.marks.keys()) & known)
    still = set(new.seqs)
    return [
        seq for seq in seqs if seq in still and old.marks.get(seq, _NO_MARK) != new.marks.get(seq, _NO_MARK)
    ]


def _with_mark(row: Sequence[Any], mark: Mark) -> list[Any]:
    changed = list(row)
    changed[_FEEDBACK], changed[_SIGNALS] = mark[0], mark[1]
    return changed


def _by_bucket(marked: Iterable[Sequence[Any]]) -> Iterator[tuple[int, Bucket]]:
    """Rows with their marks, in the order of their keys, by buckets."""
    number, bucket = -1, Bucket()
    for seq, *mark in marked:
        if seq >> MOVED_BITS != number:
            if bucket.seqs:
                yield number, bucket
            number, bucket = seq >> MOVED_BITS, Bucket()
        bucket.see(seq, (mark[0], mark[1], mark[2]))
    if bucket.seqs:
        yield number, bucket


def _buckets(reader: Reader, low: int, high: int) -> dict[int, Bucket]:
    marked = reader.connection.plain(f"{_MARKED} WHERE q.seq >= ? AND q.seq <= ? ORDER BY q.seq", (low, high))
    return dict(_by_bucket(marked))


def _listed(reader: Reader, low: int, high: int) -> dict[int, Bucket]:
    rows = reader.all(
        "SELECT bucket, copied, seqs, marks FROM moved WHERE bucket >= ? AND bucket <= ? ORDER BY bucket",
        (low >> MOVED_BITS, high >> MOVED_BITS),
    )
    return {number: Bucket.unpack(copied, seqs, marks) for number, copied, seqs, marks in rows}


def _digest(connection: Connection) -> int:
    """A number for all that is known of gaps."""
    digest = blake2b(digest_size=8)
    for table, columns in _GAPS.items():
        rows = connection.execute(
            f"SELECT {', '.join(columns)} FROM {table} ORDER BY {_GAPS_ORDER[table]}"  # noqa: S608
        )
        for row in rows:
            digest.update(repr(tuple(row)).encode())
    return int.from_bytes(digest.digest(), "big") >> 2 | 1


_EMPTY = int.from_bytes(blake2b(digest_size=8).digest(), "big") >> 2 | 1


# --- comparing -------------------------------------------------------------------------------------


def compare(source: Reader, target: Reader) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """Tables by their rows and by what is in them, months of UTC by their sums.

    Rows that the target recorded itself, or deleted itself, are told apart by the list.
    """
    own, gone, listed = _own_and_gone(target)
    known = state(target.connection)
    deleted = known["gone"] - known["moved_gone"]
    theirs, ours = _weigh(source), _weigh(target)
    besides, without = _weigh(target, own), _weigh(source, gone)
    tables: list[Line] = []
    for table in _WEIGHTS:
        for place, name in ((0, table), (1, f"{table}: contents")):
            numbers = theirs[table][place], ours[table][place], besides[table][place], without[table][place]
            expected = numbers[0] - numbers[3] + numbers[2]
            # Who was asked for a thumb may have given it there.
            differs = numbers[1] < expected if name == "feedback" else numbers[1] != expected
            if table == "feedback" and place:
                continue
            if name == "queries":
                differs = differs or numbers[0] != listed or len(gone) > deleted
            if differs or not place:
                tables.append(Line(name, (numbers[0], numbers[1], numbers[2], numbers[3]), differs))
    tables += _small_tables(source, target)
    return tuple(tables), _compare_months(source, target, own, is_exact=deleted <= len(gone))


def _own_and_gone(target: Reader) -> tuple[list[int], list[int], int]:
    """Rows at the target that are not in the list, rows of the list that are not there (by their keys at
    the source), and how long the list is."""
    own: list[int] = []
    gone: list[int] = []
    listed = 0
    there = _by_bucket(target.connection.plain(f"{_MARKED} ORDER BY q.seq"))
    rows = target.connection.plain("SELECT bucket, copied, seqs, marks FROM moved ORDER BY bucket")
    # Two of one millisecond at the edge of a bucket may have moved into the next.
    at_edge: set[int] = set()
    following = next(there, None)
    for number, *packed in rows:
        while following and following[0] < number:
            own += following[1].seqs
            following = next(there, None)
        here = set(following[1].seqs) if following and following[0] == number else set()
        if here:
            following = next(there, None)
        bucket = Bucket.unpack(packed[0], packed[1], packed[2])
        listed += len(bucket.seqs)
        places = {bucket.places.get(seq, seq): seq for seq in bucket.seqs}
        at_edge |= {at for at in places if at >> MOVED_BITS != number}
        gone += [seq for at, seq in places.items() if at not in here and at >> MOVED_BITS == number]
        own += sorted(here - places.keys())
    while following:
        own += following[1].seqs
        following = next(there, None)
    return [seq for seq in own if seq not in at_edge], gone, listed


def _weigh(reader: Reader, seqs: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """Of each table how many rows, and how much is in them: of all, or of those of `seqs`."""
    found = {table: (0, 0) for table in _WEIGHTS}
    for condition, params in _parts(reader, seqs):
        for table, weight in _WEIGHTS.items():
            count, heavy = reader.one(
                f"SELECT count(*), coalesce(sum({weight}), 0) FROM {table} WHERE {condition}",  # noqa: S608
                params,
            )
            found[table] = (found[table][0] + int(count), found[table][1] + int(heavy))
    return found


def _parts(reader: Reader, seqs: Sequence[int] | None) -> Iterator[tuple[str, list[Any]]]:
    """Conditions that together are everything, each of them quick to ask for."""
    if seqs is not None:
        for start in range(0, len(seqs), PART_ROWS):
            yield f"seq {LISTED}", [Listing(seqs[start : start + PART_ROWS])]
        return
    after: int | None = -1
    while after is not None:
        (upto,) = reader.one(
            "SELECT max(seq) FROM (SELECT seq FROM queries WHERE seq > ? ORDER BY seq LIMIT ?) AS following",
            (after, 100 * GROUP_ROWS),
        )
        yield "seq > ? AND seq <= ?", [after, LAST_SEQ if upto is None else upto]
        after = upto


def _small_tables(source: Reader, target: Reader) -> Iterator[Line]:
    lost = [reader.one("SELECT coalesce(sum(rows), 0) FROM losses")[0] for reader in (source, target)]
    yield Line("losses", (lost[0], lost[1], 0, 0), lost[1] < lost[0])
    known = state(target.connection)
    gaps = [reader.one("SELECT count(*) FROM gaps")[0] for reader in (source, target)]
    # The target's own, once somebody has decided on them there.
    are_moved = _digest(target.connection) == known["kept_gaps"]
    differs = are_moved and _digest(source.connection) != known["moved_gaps"]
    yield Line("gaps", (gaps[0], gaps[1], 0, 0), differs)


def _compare_months(
    source: Reader, target: Reader, own: Sequence[int], *, is_exact: bool
) -> tuple[Line, ...]:
    """Questions, tokens and cost of each month; `is_exact` unless the target has deleted rows of its own,
    whose numbers are in its sums."""
    theirs, ours, besides = _months(source), _months(target), _months_of(target, own)
    lines = []
    for month in sorted(theirs.keys() | ours.keys()):
        for place, name in enumerate(("questions", "tokens", "CNY")):
            numbers = [found.get(month, [0, 0, 0.0])[place] for found in (theirs, ours, besides)]
            surplus = numbers[1] - numbers[0] - numbers[2]
            tolerance = 1e-9 * abs(numbers[1]) + 1e-6 if name == "CNY" else 0
            differs = surplus < -tolerance or (is_exact and surplus > tolerance)
            lines.append(Line(f"{month} {name}", (numbers[0], numbers[1], numbers[2], 0), differs))
    return tuple(lines)


def _months(reader: Reader) -> dict[str, list[float]]:
    """What the sums and the rows that are not summed yet come to."""
    rollups.gather_tail(reader.connection, 0, LAST_SEQ)
    summed = (
        "sum(questions), sum(prompt_tokens + completion_tokens), sum(cost_cny) FROM {} "
        "WHERE dimension IN ('all', 'bot')"
    )
    quarters = rollups.LEVELS[rollups.DAY_LEVEL]
    days = reader.all(
        f"SELECT slot, {summed.format('rollups')} AND level = ? GROUP BY slot",
        (rollups.DAY_LEVEL,),
    )
    days += reader.all(f"SELECT slot / {quarters}, {summed.format('fresh')} GROUP BY 1")
    found: dict[str, list[float]] = {}
    for day, *numbers in days:
        _add_to(found, from_epoch_ms(day * DAY_MS), numbers)
    return found


def _months_of(reader: Reader, seqs: Sequence[int]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for condition, params in _parts(reader, seqs):
        rows = reader.all(
            "SELECT seq, coalesce(prompt_tokens, 0), coalesce(completion_tokens, 0), coalesce(cost_cny, 0) "
            f"FROM queries WHERE {condition}",
            params,
        )
        for seq, prompt, completion, cost in rows:
            tokens = min(prompt, rollups.MOST_TOKENS) + min(completion, rollups.MOST_TOKENS)
            _add_to(found, from_epoch_ms(seq >> SEQ_BITS), (1, tokens, min(cost, rollups.MOST_CNY)))
    return found


def _add_to(found: dict[str, list[float]], at: datetime, numbers: Sequence[float]) -> None:
    sums = found.setdefault(f"{at:%Y-%m}", [0, 0, 0.0])
    for place, number in enumerate(numbers):
        sums[place] += number
