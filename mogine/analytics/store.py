"""The record of questions in one SQLite file: creation and upgrades, rows in, rows out, rows deleted."""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hmac import compare_digest
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zlib import crc32

from mogine.analytics import rollups, search
from mogine.analytics.records import (
    QueryRecord,
    Selection,
    epoch_ms,
    from_epoch_ms,
    signal_bits,
    signals_of,
)
from mogine.analytics.schema import APPLICATION_ID, MIGRATION_SET, SEQ_BITS, STEPS
from mogine.analytics.tables import BULK_SIZES, Bulk, set_state, state
from mogine.chat import Citation
from mogine.errors import Locked, RequestError, StoreError, Unavailable

BUSY_MS = 100
# SQLite's own waiting looks ever more seldom, up to every 100 ms, and misses short rests of who deletes.
POLL_S = 0.002
PATIENT_BUSY_MS = 5_000
EMPTIED_AFTER_S = 0.05  # of writing behind the writers: some hundred pages
MAX_SEARCH_CHARS = 100
MAX_TEXT_CHARS = 128 * 1024
MAX_WORD_CHARS = 512
MAX_INTEGER = 2**53
COST_DIGITS = 10  # behind the point, of CNY: what floating point adds further right is noise
MAX_FEEDBACK_AGE_MS = 24 * 3_600_000
TOO_LONG = "this would take too long; ask for fewer days or a narrower filter"
SEARCH_CHUNK = 256
PROGRESS_STEPS = 4_000  # virtual machine steps between two looks at the clock: well under a millisecond

_NUMBERS = (
    "kind", "session", "visitor", "page_url", "provider", "model", "status", "error_type", "answered",
    "top_score", "prompt_tokens", "completion_tokens", "reasoning_tokens", "tokens_estimated", "cost_cny",
    "first_token_ms", "duration_ms", "feedback", "bot", "signals", "search_ms",
)  # fmt: skip
_ROW = f"({', '.join('?' * (len(_NUMBERS) + 2))})"
_INSERT_ROWS = {
    size: f"INSERT INTO queries (seq, id, {', '.join(_NUMBERS)}) "  # noqa: S608 - our own column names
    f"VALUES {', '.join([_ROW] * size)} ON CONFLICT (id) DO NOTHING"
    for size in BULK_SIZES
}
_INSERT_MANY_TEXTS = Bulk("INSERT OR REPLACE INTO texts (seq, question, answer) VALUES ", 3)
_INSERT_MANY_CITATIONS = Bulk("INSERT OR REPLACE INTO citations VALUES ", 7)
_SELECT_CITATIONS = (
    "SELECT seq, number, title, source, heading, url, score FROM citations "
    "WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq, number"
)
_SELECT_ROWS = (
    f"SELECT q.seq, q.id, {', '.join('q.' + name for name in _NUMBERS)}, "  # noqa: S608
    "t.question, t.answer FROM queries q LEFT JOIN texts t ON t.seq = q.seq"
)


_KEYED_BY_ROW = ("texts", "citations", "feedback", "unindexed", "uncounted", "gap_questions", "queries")

Bound = tuple[list[Any], tuple[str, str], list[tuple[Any, ...]]]


class Damaged(StoreError):
    """The file is no SQLite database, or its pages contradict each other; `inode` tells which file."""

    inode = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, newest first; `next` is the cursor for those before them, "" at the end."""

    records: tuple[QueryRecord, ...]
    next: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What health tells: how many rows, when the newest answer ended, rows known to be lost."""

    rows: int
    last_write_at: datetime | None
    lost: int


@dataclass(frozen=True, slots=True)
class GivenFeedback:
    """A thumb ("" when only a person was asked for) with its words, and what it is about."""

    id: str
    started_at: datetime
    given_at: datetime
    rating: str
    reason: str
    comment: str
    question: str
    handoff: bool = False


@dataclass(frozen=True, slots=True)
class Asker:
    """Who gives feedback: the hash of the visitor, and the session that they can name."""

    visitor: str
    session: str = ""

    def owns(self, visitor: str, session: str) -> bool:
        """Whether a row of this visitor and session is theirs. A session id is random and secret; the hash
        of a visitor changes at midnight."""
        same_session = bool(session) and compare_digest(self.session.encode(), session.encode())
        return same_session or (bool(visitor) and compare_digest(self.visitor.encode(), visitor.encode()))


class Reader:
    """A read-only connection; all that is asked of it must end within `deadline_s`."""

    def __init__(self, connection: sqlite3.Connection, deadline_s: float | None, name: str) -> None:
        self.connection = connection
        self._name = name
        self._end = None if deadline_s is None else time.monotonic() + deadline_s
        if self._end is not None:
            connection.set_progress_handler(self._is_late, PROGRESS_STEPS)

    def _is_late(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def all(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        """Every row of one statement."""
        if self._is_late():
            raise Unavailable(TOO_LONG)
        try:
            return self.connection.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise translate(error, self._name) from error

    def one(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Row:
        """The first row; for statements that always have one."""
        return self.all(sql, params)[0]


class LastingReader:
    """A read-only connection for many short looks, each at one state of the record; in between it holds
    nothing open. For one thread at a time."""

    def __init__(self, store: "AnalyticsStore", deadline_s: float | None) -> None:
        self._store = store
        self._deadline_s = deadline_s
        self._connection: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def look(self) -> Iterator[Reader]:
        """What `AnalyticsStore.reader` gives."""
        with self._store.translated():
            if self._connection is None:
                self._connection = self._store.open_reader()
                # The shortest decimal form of a number, for those of which SQLite has none.
                self._connection.create_function("exact", 1, repr, deterministic=True)
            self._connection.execute("BEGIN")
            try:
                yield Reader(self._connection, self._deadline_s, self._store.name)
            finally:
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        """Closes the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()


class AnalyticsStore:
    """The record at `path`. Reading never creates a file: an absent one reads as an empty record.

    Writing keeps one connection, which several threads may share one at a time; it is opened when
    first needed, and again when the file was replaced behind our back. Several processes may write.
    """

    def __init__(
        self,
        path: Path,
        *,
        steps: Sequence[tuple[str, str]] = STEPS,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self._steps = steps
        self.name = f"{path.parent.name}/{path.name}"
        self._clock = clock
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._inode = 0
        self._durable = True
        self._version = 0
        self.visits = 0
        self.held_s = 0.0  # how long our last transaction has kept others from writing
        self._unmoved_s = 0.0

    # --- opening ---------------------------------------------------------------------------------

    def prepare(self, *, busy_ms: int = PATIENT_BUSY_MS) -> None:
        """Creates the file, or upgrades it after a backup; does nothing when it is up to date.

        Raises StoreError when it cannot be written, is of a newer mogine or no record of ours (the
        file stays untouched), Damaged when it is no sound database, Locked when somebody holds it.
        """
        with self.translated():
            if not self._pending(busy_ms):
                return
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            with locked_file(self.path.with_name(self.path.name + ".lock"), wait=True):
                if pending := self._pending(busy_ms):
                    self._upgrade(pending)

    def _pending(self, busy_ms: int) -> tuple[str, ...]:
        """Names of the steps that the file lacks."""
        every = tuple(name for name, _ in self._steps)
        if not self.exists():
            return every
        with contextlib.closing(_connect(self.path, read_only=True, busy_ms=busy_ms)) as connection:
            # One view of the file for all looks at it: somebody may be making the tables just now.
            connection.execute("BEGIN")
            applied = _applied(connection)
            if applied is None:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise StoreError(f"{self.name} is a database, but no record of mogine; move it away")
                return every
        if newer := [name for name in applied if name not in every]:
            raise StoreError(
                f"{self.name} was written by a newer mogine (it knows {newer[-1]}); "
                "upgrade mogine, or restore an older backup. The file was not touched"
            )
        return tuple(name for name in every if name not in applied)

    def _upgrade(self, pending: tuple[str, ...]) -> None:
        """All pending steps in one transaction, after a copy of a file that has rows in it."""
        # Half a second of imports, needed only when a file is new or old: reports do without.
        from sqlite_utils import Database, Migrations  # noqa: PLC0415

        fresh = not self.exists()
        if fresh:
            # SQLite would make it readable for everybody; -wal and -shm take their mode from it.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        steps = Migrations(MIGRATION_SET)
        for name, sql in self._steps:
            steps(name=name)(_step(sql))
        with contextlib.closing(_connect(self.path, busy_ms=PATIENT_BUSY_MS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                if len(pending) < len(self._steps):
                    self._back_up(pending[0])
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                steps.apply(Database(connection, recursive_triggers=False))
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # after some failures it has been undone already
                    connection.execute("ROLLBACK")
                raise

    def check(self, limit_s: float) -> None:
        """Looks through the pages of the file for at most `limit_s`. Raises Damaged, StoreError."""
        if not self.exists():
            return
        end = time.monotonic() + limit_s
        with self.translated(), contextlib.closing(self.open_reader()) as connection:
            connection.set_progress_handler(lambda: time.monotonic() > end, PROGRESS_STEPS)
            try:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                    return  # as far as it went all is well
                raise
        if found != "ok":
            damage = Damaged(f"{self.name} is damaged ({str(found).splitlines()[0]})")
            damage.inode = self._current_inode()
            raise damage

    def _back_up(self, step: str) -> None:
        stamp = f"{self._clock():%Y%m%dT%H%M%S%fZ}"
        target = self.path.with_name(f"{self.path.name}.before-{step}.{stamp}.bak")
        os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        with (
            contextlib.closing(_connect(self.path, read_only=True, busy_ms=PATIENT_BUSY_MS)) as source,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)

    def exists(self) -> bool:
        """Whether there is a file with anything in it."""
        try:
            return self.path.stat().st_size > 0
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Closes the writing connection, if there is one; the next write opens it again."""
        with self._lock:
            self._drop_writer()

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _current_inode(self) -> int:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """SQLite's errors, and the system's, as ours."""
        inode = self._current_inode()
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # a mistake of ours, not of the file's
        except sqlite3.Error as error:
            translated = translate(error, self.name)
            if isinstance(translated, Damaged):
                translated.inode = inode
            raise translated from error
        except OSError as error:
            raise StoreError(f"{self.name} cannot be used: {error.strerror or error}") from error

    @contextlib.contextmanager
    def transaction(
        self, busy_ms: int = PATIENT_BUSY_MS, *, durable: bool = True
    ) -> Iterator[sqlite3.Connection]:
        """One write transaction. After any failure the connection is thrown away.

        What is not `durable` may be undone by a power cut, though never by halves.
        """
        with self._lock, self.translated():
            if self._writer is None or self._inode != self._current_inode():
                self._drop_writer()
                self.prepare(busy_ms=busy_ms)
                self._writer = _connect(self.path, busy_ms=busy_ms)
                self._inode = self._current_inode()
                self._durable = True
            writer = self._writer
            try:
                if durable is not self._durable:
                    writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                    writer.execute(f"PRAGMA wal_autocheckpoint = {1000 if durable else 0}")
                    self._durable = durable
                _begin(writer, busy_ms)
                self._note_visit(writer, durable)
                began = time.monotonic()
                yield writer
                writer.execute("COMMIT")
                self.held_s = time.monotonic() - began
                if not durable:
                    self._empty_journal(writer)
            except BaseException:
                self._drop_writer()  # closing rolls back
                raise

    def _empty_journal(self, writer: sqlite3.Connection) -> None:
        """Who works behind the writers empties the journal, before one of them has to. That keeps nobody out,
        so it is no part of what a transaction takes."""
        self._unmoved_s += self.held_s
        if self._unmoved_s > EMPTIED_AFTER_S:
            self._unmoved_s = 0.0
            writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _note_visit(self, writer: sqlite3.Connection, durable: bool) -> None:
        """Counts in `visits` transactions of other processes (as one, however many) and our durable ones."""
        (version,) = writer.execute("PRAGMA data_version").fetchone()
        self.visits += durable + (version != self._version)
        self._version = version

    # --- writing ---------------------------------------------------------------------------------

    def insert(self, records: Iterable[QueryRecord], *, busy_ms: int = BUSY_MS) -> int:
        """Commits `records` together; those whose id is known already stay as they are.

        Returns how many were new, when they are on the disk. Raises Locked after `busy_ms`.
        """
        return self.insert_bound([as_row(record) for record in records], busy_ms=busy_ms)

    def insert_bound(self, rows: list[Bound], *, busy_ms: int = BUSY_MS) -> int:
        """`insert` of what `as_row` has made of records."""
        while True:
            with self.transaction(busy_ms) as writer:
                new = _insert_all(writer, rows)
                _note_late(writer, new)
            # A file that was moved aside while we wrote took these rows with it.
            if self._inode == self._current_inode():
                return len(new)

    def give_feedback(
        self,
        id: str,
        rating: str,
        *,
        reason: str = "",
        comment: str = "",
        handoff: bool = False,
        at: datetime | None = None,
        asker: Asker | None = None,
    ) -> bool:
        """Ties a thumb to the row of `id`, or that a person was asked for (`rating` may then be "").

        Of several thumbs the last one counts.

        False when there is no such row, or `asker` is given and it is not theirs: nobody learns which.
        """
        now = at or self._clock()
        with self.transaction(PATIENT_BUSY_MS) as writer:
            found = writer.execute("SELECT seq, visitor, session FROM queries WHERE id = ?", (id,)).fetchone()
            if found is None or (asker is not None and not asker.owns(found["visitor"], found["session"])):
                return False
            seq = found["seq"]
            if asker is not None and epoch_ms(now) - (seq >> SEQ_BITS) > MAX_FEEDBACK_AGE_MS:
                return False
            if rating:
                rollups.change_feedback(writer, seq, _word(rating))
                thumbs = signal_bits(["thumbs_down"])
                writer.execute(
                    "UPDATE queries SET feedback = ?, signals = signals & ~? | ? WHERE seq = ?",
                    (_word(rating), thumbs, thumbs if rating == "down" else 0, seq),
                )
            if handoff:
                writer.execute(
                    "UPDATE queries SET signals = signals | ? WHERE seq = ?", (signal_bits(["handoff"]), seq)
                )
            # Each is told by itself: a thumb takes no wish for a person back, nor the other way round.
            writer.execute(
                "INSERT INTO feedback (seq, reason, comment, given_ms, handoff) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (seq) DO UPDATE SET given_ms = excluded.given_ms, "
                "handoff = max(handoff, excluded.handoff), "
                "reason = CASE WHEN ? THEN excluded.reason ELSE reason END, "
                "comment = CASE WHEN ? THEN excluded.comment ELSE comment END",
                (
                    seq,
                    _word(reason),
                    _text(comment),
                    epoch_ms(now),
                    int(handoff),
                    bool(rating or reason),
                    bool(rating or comment),
                ),
            )
            return True

    def note_loss(self, rows: int, reason: str) -> None:
        """Writes down that `rows` questions could not be kept."""
        with self.transaction(BUSY_MS) as writer:
            writer.execute(
                "INSERT INTO losses (at_ms, rows, reason) VALUES (?, ?, ?)",
                (epoch_ms(self._clock()), rows, _word(reason)),
            )

    def delete_before(self, before: datetime, *, limit: int = 500) -> int:
        """Deletes the oldest rows that began before `before`, at most `limit`, in one transaction."""
        with self.transaction(PATIENT_BUSY_MS, durable=False) as writer:
            oldest = writer.execute(
                "SELECT seq FROM queries WHERE seq < ? ORDER BY seq LIMIT ?", (first_seq(before), limit)
            ).fetchall()
            if oldest:
                self._erase(writer, oldest[0][0], oldest[-1][0], len(oldest), kept_from=first_seq(before))
                known = state(writer)["deleted_before"]
                set_state(writer, deleted_before=max(known, epoch_ms(before)))
            return len(oldest)

    def delete_rows(self, seqs: Sequence[int]) -> int:
        """Deletes these rows, in one transaction; their numbers stay in the sums."""
        with self.transaction(PATIENT_BUSY_MS) as writer:
            there = writer.execute(
                "SELECT seq FROM queries WHERE seq IN (SELECT value FROM json_each(?))", (json.dumps(seqs),)
            ).fetchall()
            for (seq,) in there:
                self._erase(writer, seq, seq, 1)
            return len(there)

    def _erase(
        self, writer: sqlite3.Connection, low: int, high: int, rows: int, *, kept_from: int = 0
    ) -> None:
        """All rows from `low` to `high`, which are `rows`, and every trace of their words.

        Searches need not find those before `kept_from` any more, which are to be deleted next.
        """
        search.unseal(writer, low, high, kept_from)
        known = state(writer)
        unsummed = writer.execute(
            "SELECT count(*) FROM queries WHERE seq >= ?1 AND seq <= ?2 AND (seq > ?3 OR seq IN "
            "(SELECT seq FROM uncounted WHERE seq >= ?1 AND seq <= ?2))",
            (low, high, known["summed_upto"]),
        ).fetchone()[0]
        for table in _KEYED_BY_ROW:
            writer.execute(f"DELETE FROM {table} WHERE seq >= ? AND seq <= ?", (low, high))  # noqa: S608
        quarter = rollups.ASKED_QUARTERS * rollups.QUARTER_MS
        slots = ((low >> SEQ_BITS) // quarter, (high >> SEQ_BITS) // quarter)
        writer.execute(
            "DELETE FROM asked WHERE slot >= ? AND slot <= ? AND seq >= ? AND seq <= ?", (*slots, low, high)
        )
        set_state(writer, gone=known["gone"] + rows - unsummed)

    def recount(self) -> None:
        """Finds out how many of the summed rows are no longer there; nobody may delete meanwhile."""
        with self.reader() as reader:
            known = _rows(reader)
            (rows,) = reader.one("SELECT count(*) FROM queries")
        with self.transaction() as writer:
            set_state(writer, gone=state(writer)["gone"] + known - rows)

    def purge_index(self, limit: int) -> bool:
        """Deletes up to `limit` terms of segments out of use; False when there are none left."""
        with self.transaction(PATIENT_BUSY_MS, durable=False) as writer:
            return search.purge(writer, limit)

    def give_back(self, pages: int = 500, *, spare: int = 0) -> bool:
        """Hands up to `pages` free pages back to the disk; False when there are no more than `spare`."""
        with self.transaction(PATIENT_BUSY_MS, durable=False) as writer:
            if writer.execute("PRAGMA freelist_count").fetchone()[0] <= spare:
                return False
            # The pragma frees one page a step. A cursor takes a single step of what gives no columns, a
            # script all of them; but a script commits first: the pragma is a transaction of its own.
            writer.executescript(f"PRAGMA incremental_vacuum({pages:d})")
            writer.execute("BEGIN")
            return True

    def checkpoint(self) -> bool:
        """Moves the journal into the file and empties it; False when a reader was in the way."""
        with self._lock, self.translated():
            with contextlib.closing(_connect(self.path, busy_ms=BUSY_MS)) as connection:
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    def move_aside(self, damage: Damaged) -> Path | None:
        """Renames the damaged file (and its journal), so that a new one can begin.

        None when the file that `damage` speaks of is not there any more: another process was quicker.
        """
        with self._lock, self.translated():
            self._drop_writer()
            with locked_file(self.path.with_name(self.path.name + ".lock"), wait=True):
                if not damage.inode or damage.inode != self._current_inode():
                    return None
                target = self.path.with_name(f"{self.path.name}.damaged-{self._clock():%Y%m%dT%H%M%S%fZ}")
                for suffix in ("-shm", "-wal", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self.path}{suffix}", f"{target}{suffix}")
                return target

    # --- reading ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reader(self, deadline_s: float | None = None) -> Iterator[Reader]:
        """One consistent state of the record, to be read."""
        with self.translated():
            connection = self.open_reader()
        with contextlib.closing(connection), self.translated():
            connection.execute("BEGIN")
            yield Reader(connection, deadline_s, self.name)

    def open_reader(self) -> sqlite3.Connection:
        """A read-only connection, which the caller closes; to an empty record where there is none."""
        if not self.exists():
            connection = sqlite3.connect(":memory:", isolation_level=None)
            connection.row_factory = sqlite3.Row
            for _, sql in self._steps:
                connection.executescript(sql)
            return connection
        if pending := self._pending(PATIENT_BUSY_MS):
            raise StoreError(
                f"{self.name} was written by an older mogine (it lacks {pending[0]}): "
                "start `mogine serve` once, which upgrades it after a backup"
            )
        return _connect(self.path, read_only=True, busy_ms=PATIENT_BUSY_MS)

    def summary(self, *, deadline_s: float | None = None) -> Summary:
        """How much there is."""
        with self.reader(deadline_s) as reader:
            rows = _rows(reader)
            (lost,) = reader.one("SELECT coalesce(sum(rows), 0) FROM losses")
            newest = reader.all(
                "SELECT started_ms + coalesce(duration_ms, 0) FROM queries ORDER BY seq DESC LIMIT 1"
            )
        return Summary(rows, from_epoch_ms(newest[0][0]) if newest else None, lost)

    def is_crowded(self, rows: int) -> bool:
        """Whether more than so many rows are not summed yet."""
        with self.reader() as reader:
            upto = state(reader.connection)["summed_upto"]
            return bool(
                reader.all("SELECT 1 FROM queries WHERE seq > ? ORDER BY seq LIMIT 1 OFFSET ?", (upto, rows))
            )

    def newest_at(self) -> datetime | None:
        """When the newest question was asked."""
        with self.reader() as reader:
            found = reader.all("SELECT started_ms FROM queries ORDER BY seq DESC LIMIT 1")
        return from_epoch_ms(found[0][0]) if found else None

    def count_before(self, before: datetime) -> int:
        """How many rows began before `before`."""
        with self.reader() as reader:
            found: int = reader.one("SELECT count(*) FROM queries WHERE seq < ?", (first_seq(before),))[0]
        return found

    def count(self, selection: Selection) -> int:
        """How many rows are picked by `selection`."""
        where, params = _where(selection)
        with self.reader() as reader:
            if selection.search:
                return len(_found(reader, selection))
            found: int = reader.one(f"SELECT count(*) FROM queries q WHERE {where}", params)[0]  # noqa: S608
        return found

    def page(
        self,
        selection: Selection = Selection(),  # noqa: B008 - a frozen value
        *,
        limit: int = 100,
        before: str = "",
        deadline_s: float | None = None,
    ) -> Page:
        """The newest rows of `selection`, or those before the cursor `before`.

        Raises RequestError(reason="bad_filter") for a cursor that was never handed out.
        """
        high = decode_cursor(before) if before else None
        where, params = _where(selection, before=high)
        with self.reader(deadline_s) as reader:
            if selection.search:
                seqs = _found(reader, selection, before=high, limit=limit + 1)
                where, params = _LISTED, [json.dumps(seqs.tolist())]
            rows = reader.all(
                f"{_SELECT_ROWS} WHERE {where} ORDER BY q.seq DESC LIMIT ?", [*params, limit + 1]
            )
            more = len(rows) > limit
            records = _records(reader, rows[:limit])
        return Page(records, encode_cursor(rows[limit - 1]["seq"]) if more else "")

    def iterate(
        self,
        selection: Selection = Selection(),  # noqa: B008
        *,
        batch: int = 1000,
        deadline_s: float | None = None,
    ) -> Iterator[QueryRecord]:
        """Every row of `selection`, oldest first, in constant memory.

        Read in batches with nothing held open between them: a slow taker never keeps the journal
        from being emptied.
        """
        if selection.search:
            yield from self._iterate_found(selection, batch, deadline_s)
            return
        after = -1
        while True:
            where, params = _where(selection, after=after)
            with self.reader(deadline_s) as reader:
                rows = reader.all(f"{_SELECT_ROWS} WHERE {where} ORDER BY q.seq LIMIT ?", [*params, batch])
                records = _records(reader, rows)
            yield from records
            if len(rows) < batch:
                return
            after = rows[-1]["seq"]

    def batches(
        self, selection: Selection, size: int, deadline_s: float | None = None
    ) -> Iterator[tuple[str, list[Any]]]:
        """`selection` cut into conditions on `queries q` (with their values), oldest first, that at most
        `size` rows meet each."""
        if selection.search:
            with self.reader(deadline_s) as reader:
                seqs = _found(reader, selection)
            for start in range(len(seqs) - 1, -1, -size):
                yield _LISTED, [json.dumps(seqs[max(0, start - size + 1) : start + 1].tolist())]
            return
        after = -1
        lasting = LastingReader(self, deadline_s)
        while True:
            where, params = _where(selection, after=after)
            with lasting.look() as reader:
                last, rows = reader.one(
                    "SELECT max(seq), count(*) FROM (SELECT q.seq FROM queries q "  # noqa: S608
                    f"WHERE {where} ORDER BY q.seq LIMIT ?)",
                    [*params, size],
                )
            if rows:
                yield _where(selection, after=after, upto=last)
            if rows < size:
                lasting.close()
                return
            after = last

    def _iterate_found(
        self, selection: Selection, batch: int, deadline_s: float | None
    ) -> Iterator[QueryRecord]:
        with self.reader(deadline_s) as reader:
            seqs = _found(reader, selection)
        for start in range(len(seqs) - 1, -1, -batch):
            part = seqs[max(0, start - batch + 1) : start + 1].tolist()
            with self.reader(deadline_s) as reader:
                rows = reader.all(f"{_SELECT_ROWS} WHERE {_LISTED} ORDER BY q.seq", [json.dumps(part)])
                records = _records(reader, rows)
            yield from records

    def iterate_feedback(
        self, since: datetime | None = None, *, batch: int = 1000
    ) -> Iterator[GivenFeedback]:
        """Every thumb on questions asked since then, oldest question first."""
        after = first_seq(since) - 1 if since else -1
        while True:
            with self.reader() as reader:
                rows = reader.all(
                    "SELECT q.seq, q.id, f.given_ms, q.feedback, f.reason, f.comment, t.question, f.handoff "
                    "FROM feedback f JOIN queries q ON q.seq = f.seq LEFT JOIN texts t ON t.seq = f.seq "
                    "WHERE f.seq > ? ORDER BY f.seq LIMIT ?",
                    (after, batch),
                )
            for seq, id, given_ms, rating, reason, comment, question, handoff in rows:
                at = from_epoch_ms(seq >> SEQ_BITS)
                given_at = from_epoch_ms(given_ms)
                words = (rating, reason, comment, question or "")
                yield GivenFeedback(id, at, given_at, *words, handoff=bool(handoff))
            if len(rows) < batch:
                return
            after = rows[-1]["seq"]


@contextlib.contextmanager
def locked_file(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock that ends with the process, however it ends; Locked when it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Locked(f"another run holds {path.name}; let it finish, then try again") from error
        yield
    finally:
        os.close(descriptor)


def size_bytes(path: Path) -> int:
    """The file and its journal."""
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def translate(error: sqlite3.Error, name: str) -> StoreError | Locked | Unavailable:
    """A SQLite error in our words."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Locked(f"{name} is in use by another program; try again in a moment")
    # A step that is made although its tables are there: what told that it was done is lost.
    is_forgotten = primary == sqlite3.SQLITE_ERROR and str(error).endswith("already exists")
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) or is_forgotten:
        return Damaged(f"{name} is damaged ({error}): the next `mogine serve` moves it aside and begins anew")
    if primary == sqlite3.SQLITE_INTERRUPT:
        return Unavailable(TOO_LONG)
    return StoreError(f"{name} cannot be used: {error}; is the disk full, or the folder read-only?")


def encode_cursor(seq: int) -> str:
    """The place of a row, with a checksum: what somebody made up is told from what we handed out."""
    return f"{seq:016x}{crc32(f'cursor:{seq}'.encode()):08x}"


def decode_cursor(text: str) -> int:
    """Raises RequestError(reason="bad_filter") for anything that `encode_cursor` did not make."""
    try:
        seq = int(text[:16], 16)
        if len(text) == 24 and encode_cursor(seq) == text:
            return seq
    except ValueError:
        pass  # told below, as every other made-up cursor
    raise RequestError(
        "before is no cursor of this list; take it from `next` of the answer before",
        reason="bad_filter",
        param="before",
    )


def _step(sql: str) -> Callable[[Any], None]:
    def apply(db: Any) -> None:
        # Not executescript: it would commit the transaction that holds the whole upgrade.
        for statement in sql.split(";"):
            if statement.strip():
                db.conn.execute(statement)

    return apply


def _connect(path: Path, *, busy_ms: int, read_only: bool = False) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=busy_ms / 1000, isolation_level=None, check_same_thread=False
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA temp_store = MEMORY")  # what is being counted goes to no other file
        if not read_only:
            # Only before the first table: free pages can be given back without rewriting the file.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            # A committed row survives a power cut; with a few commits a second this costs nothing.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute(f"PRAGMA journal_size_limit = {64 * 1024**2}")
    except BaseException:
        connection.close()
        raise
    return connection


def _begin(writer: sqlite3.Connection, busy_ms: int) -> None:
    """Begins to write, at the latest after `busy_ms`."""
    end = time.monotonic() + busy_ms / 1000
    writer.execute("PRAGMA busy_timeout = 0")
    while True:
        try:
            writer.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
        time.sleep(POLL_S)
    writer.execute(f"PRAGMA busy_timeout = {busy_ms:d}")


def _applied(connection: sqlite3.Connection) -> list[str] | None:
    """Names of the steps the file has; None when it is not ours (or has nothing in it yet)."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return None
    rows = connection.execute(
        "SELECT name FROM _sqlite_migrations WHERE migration_set = ? ORDER BY id", (MIGRATION_SET,)
    )
    return [row[0] for row in rows]


def _insert_all(writer: sqlite3.Connection, rows: list[Bound]) -> list[Bound]:
    """Those of `rows` that are new, as they are there now.

    All at once; one by one only when some row is known or two keys meet.
    """
    writer.execute("SAVEPOINT bulk")
    try:
        new = _insert_many(writer, rows)
    except sqlite3.IntegrityError:
        new = -1
    if new == len(rows):
        inserted = rows
    else:
        writer.execute("ROLLBACK TO bulk")
        inserted = [there for row in rows if (there := _insert(writer, row)) is not None]
    writer.execute("RELEASE bulk")
    _INSERT_MANY_TEXTS.run(writer, [(row[0], *texts) for row, texts, _ in inserted if any(texts)])
    cited = [(row[0], *citation) for row, _, citations in inserted for citation in citations]
    _INSERT_MANY_CITATIONS.run(writer, cited)
    return inserted


def _insert_many(writer: sqlite3.Connection, rows: list[Bound]) -> int:
    new = place = 0
    for size in BULK_SIZES:
        while len(rows) - place >= size:
            values = [value for row, _, _ in rows[place : place + size] for value in row]
            new += writer.execute(_INSERT_ROWS[size], values).rowcount
            place += size
    return new


def _insert(writer: sqlite3.Connection, bound: Bound) -> Bound | None:
    row, texts, citations = bound
    while True:
        try:
            if not writer.execute(_INSERT_ROWS[1], row).rowcount:
                return None
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname != "SQLITE_CONSTRAINT_PRIMARYKEY":
                raise
            row = [row[0] + 1, *row[1:]]  # two rows of one millisecond fell on one key
            continue
        return row, texts, citations


def first_seq(at: datetime) -> int:
    """The smallest key that a row of this moment can have."""
    return min(epoch_ms(at) << SEQ_BITS, 2**63 - 1)  # a filter may name the year 9999


def as_row(record: QueryRecord) -> Bound:
    """What is bound for one record: every value fit for SQLite, whatever a visitor sent."""
    seq = first_seq(record.started_at) | (crc32(record.id.encode("utf-8", "replace")) & ((1 << SEQ_BITS) - 1))
    row = [
        seq,
        _word(record.id),
        _word(record.kind),
        _word(record.session),
        _word(record.visitor),
        _text(record.page_url, 2048),
        _word(record.provider),
        _word(record.model),
        _word(record.status),
        _word(record.error_type),
        _word(record.answered),
        _real(record.top_score),
        _integer(record.prompt_tokens),
        _integer(record.completion_tokens),
        _integer(record.reasoning_tokens),
        int(record.tokens_estimated),
        _real(record.cost_cny, COST_DIGITS),
        _integer(record.first_token_ms),
        _integer(record.duration_ms),
        _word(record.feedback),
        int(record.bot),
        signal_bits(record.signals),
        _integer(record.search_ms),
    ]
    citations = [
        (
            _integer(c.number),
            _word(c.title),
            _word(c.source),
            _word(c.heading),
            _text(c.url, 2048),
            _real(c.score) or 0.0,
        )
        for c in record.citations
    ]
    return row, (_text(record.question), _text(record.answer)), citations


def _records(reader: Reader, rows: Sequence[sqlite3.Row]) -> tuple[QueryRecord, ...]:
    cited: dict[int, list[Citation]] = {}
    for row in reader.all(_SELECT_CITATIONS, (json.dumps([row["seq"] for row in rows]),)):
        seq, number, title, source, heading, url, score = row
        cited.setdefault(seq, []).append(Citation(number, title, source, heading, url, "", score))
    return tuple(_record(row, tuple(cited.get(row["seq"], ()))) for row in rows)


def _record(row: sqlite3.Row, citations: tuple[Citation, ...]) -> QueryRecord:
    values = {name: row[name] for name in _NUMBERS}
    values["tokens_estimated"] = bool(values["tokens_estimated"])
    values["bot"] = bool(values["bot"])
    values["signals"] = signals_of(values["signals"])
    return QueryRecord(
        id=row["id"],
        started_at=from_epoch_ms(row["seq"] >> SEQ_BITS),
        question=row["question"] or "",
        answer=row["answer"] or "",
        citations=citations,
        **values,
    )


# Every bucket there is: the indexes of visitors and sessions are ordered by bucket first.
_BUCKETS = (
    "q.bucket IN (WITH RECURSIVE b (n) AS (SELECT (SELECT min(seq) FROM queries) >> 46 UNION ALL "
    "SELECT n + 1 FROM b WHERE n < (SELECT max(seq) FROM queries) >> 46) SELECT n FROM b)"
)
_TERMS = {
    "visitor": f"{_BUCKETS} AND q.visitor = ?",
    "session": f"{_BUCKETS} AND q.session = ?",
    "feedback": "q.feedback <> '' AND q.feedback = ?",  # as the index has it
}


def _where(
    selection: Selection, *, after: int | None = None, before: int | None = None, upto: int | None = None
) -> tuple[str, list[Any]]:
    """The condition on `queries q` (and `texts t` for a search), values bound, columns our own.

    There is one bound on each side: of two SQLite takes any, and looks at all that lies between them.
    """
    terms, params = ["1"], list[Any]()
    lows = [after + 1] if after is not None else []
    lows += [first_seq(selection.since)] if selection.since is not None else []
    highs = [bound for bound in (before, upto + 1 if upto is not None else None) if bound is not None]
    highs += [first_seq(selection.until)] if selection.until is not None else []
    if lows:
        terms.append("q.seq >= ?")
        params.append(max(lows))
    if highs:
        terms.append("q.seq < ?")
        params.append(min(highs))
    for name in ("provider", "model", "kind", "status", "answered", "visitor", "session", "feedback"):
        if value := getattr(selection, name):
            if (name, value) == ("feedback", "any"):
                terms.append("q.feedback <> ''")
            else:
                terms.append(_TERMS.get(name, f"q.{name} = ?"))
                params.append(_word(value))
    if selection.unanswered:
        terms.append("q.bot = 0 AND q.signals <> 0")  # as the index has it
    if selection.bot:
        terms.append("q.bot = 1" if selection.bot == "yes" else "q.bot = 0")
    return " AND ".join(terms), params


_LISTED = "q.seq IN (SELECT value FROM json_each(?))"


def _found(
    reader: Reader, selection: Selection, *, before: int | None = None, limit: int | None = None
) -> "array[int]":
    """Keys of the rows that `selection` searches for, newest first."""
    try:
        return _search(reader.connection, selection, before, limit)
    except sqlite3.Error as error:
        raise translate(error, "the record") from error


def _search(
    connection: sqlite3.Connection, selection: Selection, before: int | None, limit: int | None
) -> "array[int]":
    wanted = search.Wanted.of(_text(selection.search, MAX_SEARCH_CHARS))
    low = first_seq(selection.since) if selection.since else 0
    high = min(first_seq(selection.until) if selection.until else 2**63 - 1, before or 2**63 - 1)
    found: list[int] = []

    def look(condition: str, *values: Any, after: int | None = None) -> Iterator[int]:
        """Rows within `condition` that fit, newest first."""
        where, params = _where(selection, after=after, before=before)
        rows = connection.execute(
            "SELECT q.seq, t.question, t.answer FROM queries q JOIN texts t ON t.seq = q.seq "  # noqa: S608
            f"WHERE {where} AND {condition} ORDER BY q.seq DESC",
            [*params, *values],
        )
        return (seq for seq, question, answer in rows if wanted.fits(question, answer))

    # What is in no segment yet is read; it need not be the newest, rows of the spool come late.
    upto = state(connection)["sealed_upto"]
    found += islice(look("1", after=upto), limit)
    found += islice(look("q.seq IN (SELECT seq FROM unindexed)"), limit)
    for segment, last in search.newest_first(connection, low, high):
        found.sort(reverse=True)
        if limit is not None and len(found) >= limit and found[limit - 1] > last:
            break
        places = search.in_segment(connection, segment, wanted)
        if not places:
            continue
        seqs = search.rows_of(connection, segment)
        candidates = [seq for place in reversed(places) if low <= (seq := seqs[place]) < high]
        hits = 0
        for start in range(0, len(candidates), SEARCH_CHUNK):
            part = list(look(_LISTED, json.dumps(candidates[start : start + SEARCH_CHUNK])))
            found += part
            hits += len(part)
            if limit is not None and hits >= limit:
                break
    found.sort(reverse=True)
    return array("q", found[:limit])


def _rows(reader: Reader) -> int:
    """How many rows there are: those in the sums but for the deleted, and those after them."""
    known = state(reader.connection)
    (summed,) = reader.one(
        "SELECT coalesce(sum(questions), 0) FROM rollups WHERE dimension IN ('all', 'bot') AND level = ?",
        (len(rollups.LEVELS) - 1,),
    )
    (after,) = reader.one(
        "SELECT (SELECT count(*) FROM queries WHERE seq > ?) + (SELECT count(*) FROM uncounted)",
        (known["summed_upto"],),
    )
    return max(0, int(summed) - known["gone"] + int(after))


def _note_late(writer: sqlite3.Connection, inserted: list[Bound]) -> None:
    """Rows that belong among those that are summed, or in the index, are done by themselves."""
    known = state(writer)
    for name, table in (("summed_upto", "uncounted"), ("sealed_upto", "unindexed")):
        late = [(row[0],) for row, _, _ in inserted if row[0] <= known[name]]
        if late:
            writer.executemany(f"INSERT OR IGNORE INTO {table} (seq) VALUES (?)", late)  # noqa: S608


def _text(value: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Text that any program can read back: no lone surrogates, no NUL, not without end."""
    if len(value) <= limit and value.isascii() and "\0" not in value:
        return value
    return value[:limit].encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _word(value: str) -> str:
    if value.isascii() and len(value) <= MAX_WORD_CHARS and "\0" not in value:
        return value
    return _text(value, MAX_WORD_CHARS)


def _integer(value: int | None) -> int | None:
    return None if value is None else max(0, min(int(value), MAX_INTEGER))


def _real(value: float | None, digits: int | None = None) -> float | None:
    # SQLite keeps NaN as NULL; infinity would spoil every sum.
    if value is None or value - value != 0:
        return None
    return float(value) if digits is None else round(float(value), digits)
