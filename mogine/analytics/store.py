"""The record of questions in one SQLite file: creation and upgrades, rows in, rows out, rows deleted."""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zlib import crc32

from mogine.analytics.records import QueryRecord, Selection, epoch_ms, from_epoch_ms
from mogine.analytics.schema import APPLICATION_ID, MIGRATION_SET, SEQ_BITS, STEPS
from mogine.chat import Citation
from mogine.errors import Locked, RequestError, StoreError, Unavailable

BUSY_MS = 100
PATIENT_BUSY_MS = 5_000
MAX_SEARCH_CHARS = 100
MAX_TEXT_CHARS = 128 * 1024
MAX_WORD_CHARS = 512
MAX_INTEGER = 2**53
PROGRESS_STEPS = 4_000  # virtual machine steps between two looks at the clock: well under a millisecond

_NUMBERS = (
    "kind", "session", "visitor", "page_url", "provider", "model", "status", "error_type", "answered",
    "top_score", "prompt_tokens", "completion_tokens", "reasoning_tokens", "tokens_estimated", "cost_cny",
    "first_token_ms", "duration_ms", "feedback",
)  # fmt: skip
_INSERT_ROW = (
    f"INSERT INTO queries (seq, id, {', '.join(_NUMBERS)}) "  # noqa: S608 - our own column names
    f"VALUES ({', '.join('?' * (len(_NUMBERS) + 2))}) ON CONFLICT (id) DO NOTHING"
)
BULK_SIZES = (64, 16, 4, 1)
_ROW = f"({', '.join('?' * (len(_NUMBERS) + 2))})"
_INSERT_ROWS = {
    size: f"INSERT INTO queries (seq, id, {', '.join(_NUMBERS)}) "  # noqa: S608 - our own column names
    f"VALUES {', '.join([_ROW] * size)} ON CONFLICT (id) DO NOTHING"
    for size in BULK_SIZES
}
_INSERT_MANY_TEXTS = {
    size: "INSERT OR REPLACE INTO texts (seq, question, answer) VALUES "  # noqa: S608 - no value of others
    + ", ".join(["(?, ?, ?)"] * size)
    for size in BULK_SIZES
}
_INSERT_TEXTS = "INSERT OR REPLACE INTO texts (seq, question, answer) VALUES (?, ?, ?)"
_INSERT_CITATION = "INSERT OR REPLACE INTO citations VALUES (?, ?, ?, ?, ?, ?, ?)"
_SELECT_CITATIONS = (
    "SELECT seq, number, title, source, heading, url, score FROM citations "
    "WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq, number"
)
_SELECT_ROWS = (
    f"SELECT q.seq, q.id, {', '.join('q.' + name for name in _NUMBERS)}, "  # noqa: S608
    "t.question, t.answer FROM queries q LEFT JOIN texts t ON t.seq = q.seq"
)


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
    """A thumb with its words, and what it is about."""

    id: str
    started_at: datetime
    given_at: datetime
    rating: str
    reason: str
    comment: str
    question: str


class Reader:
    """A read-only connection; every statement must end within `deadline_s`."""

    def __init__(self, connection: sqlite3.Connection, deadline_s: float | None, name: str) -> None:
        self._connection = connection
        self._deadline_s = deadline_s
        self._name = name

    def all(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        """Every row of one statement."""
        if self._deadline_s is not None:
            end = time.monotonic() + self._deadline_s
            self._connection.set_progress_handler(lambda: time.monotonic() > end, PROGRESS_STEPS)
        try:
            return self._connection.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise translate(error, self._name) from error

    def one(self, sql: str, params: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Row:
        """The first row; for statements that always have one."""
        return self.all(sql, params)[0]


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

    # --- opening ---------------------------------------------------------------------------------

    def prepare(self, *, busy_ms: int = PATIENT_BUSY_MS) -> None:
        """Creates the file, or upgrades it after a backup; does nothing when it is up to date.

        Raises StoreError when it cannot be written, is of a newer mogine or no record of ours (the
        file stays untouched), Damaged when it is no sound database, Locked when somebody holds it.
        """
        with self._translated():
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
                connection.execute("ROLLBACK")
                raise

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
    def _translated(self) -> Iterator[None]:
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
    def _transaction(self, busy_ms: int) -> Iterator[sqlite3.Connection]:
        """One write transaction. After any failure the connection is thrown away."""
        with self._lock, self._translated():
            if self._writer is None or self._inode != self._current_inode():
                self._drop_writer()
                self.prepare(busy_ms=busy_ms)
                self._writer = _connect(self.path, busy_ms=busy_ms)
                self._inode = self._current_inode()
            writer = self._writer
            try:
                writer.execute(f"PRAGMA busy_timeout = {busy_ms:d}")
                writer.execute("BEGIN IMMEDIATE")
                yield writer
                writer.execute("COMMIT")
            except BaseException:
                self._drop_writer()  # closing rolls back
                raise

    # --- writing ---------------------------------------------------------------------------------

    def insert(self, records: Iterable[QueryRecord], *, busy_ms: int = BUSY_MS) -> int:
        """Commits `records` together; those whose id is known already stay as they are.

        Returns how many were new, when they are on the disk. Raises Locked after `busy_ms`.
        """
        rows = [as_row(record) for record in records]
        while True:
            with self._transaction(busy_ms) as writer:
                new = _insert_all(writer, rows)
            # A file that was moved aside while we wrote took these rows with it.
            if self._inode == self._current_inode():
                return new

    def give_feedback(
        self, id: str, rating: str, *, reason: str = "", comment: str = "", at: datetime | None = None
    ) -> bool:
        """Ties a thumb to the row of `id`; the last one counts. False when there is no such row."""
        with self._transaction(PATIENT_BUSY_MS) as writer:
            found = writer.execute("SELECT seq FROM queries WHERE id = ?", (id,)).fetchone()
            if found is None:
                return False
            given_ms = epoch_ms(at or self._clock())
            writer.execute("UPDATE queries SET feedback = ? WHERE seq = ?", (_word(rating), found[0]))
            writer.execute(
                "INSERT OR REPLACE INTO feedback (seq, reason, comment, given_ms) VALUES (?, ?, ?, ?)",
                (found[0], _word(reason), _text(comment), given_ms),
            )
            return True

    def note_loss(self, rows: int, reason: str) -> None:
        """Writes down that `rows` questions could not be kept."""
        with self._transaction(BUSY_MS) as writer:
            writer.execute(
                "INSERT INTO losses (at_ms, rows, reason) VALUES (?, ?, ?)",
                (epoch_ms(self._clock()), rows, _word(reason)),
            )

    def delete_before(self, before: datetime, *, limit: int = 500) -> int:
        """Deletes the oldest rows that began before `before`, at most `limit`, in one transaction."""
        with self._transaction(PATIENT_BUSY_MS) as writer:
            oldest = writer.execute(
                "SELECT seq FROM queries WHERE seq < ? ORDER BY seq LIMIT ?", (_first_seq(before), limit)
            ).fetchall()
            if oldest:
                for table in ("texts", "citations", "feedback", "queries"):
                    writer.execute(f"DELETE FROM {table} WHERE seq <= ?", (oldest[-1][0],))  # noqa: S608
            return len(oldest)

    def give_back(self, pages: int = 500) -> bool:
        """Hands up to `pages` free pages back to the disk; False when there are none left."""
        with self._transaction(PATIENT_BUSY_MS) as writer:
            if not writer.execute("PRAGMA freelist_count").fetchone()[0]:
                return False
            # The pragma frees one page for each step, so it must be read to its end.
            writer.execute(f"PRAGMA incremental_vacuum({pages:d})").fetchall()
            return True

    def checkpoint(self) -> bool:
        """Moves the journal into the file and empties it; False when a reader was in the way."""
        with self._lock, self._translated():
            with contextlib.closing(_connect(self.path, busy_ms=BUSY_MS)) as connection:
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    def move_aside(self, damage: Damaged) -> Path | None:
        """Renames the damaged file (and its journal), so that a new one can begin.

        None when the file that `damage` speaks of is not there any more: another process was quicker.
        """
        with self._lock, self._translated():
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
        with self._translated():
            connection = self._open_reader()
        with contextlib.closing(connection), self._translated():
            connection.execute("BEGIN")
            yield Reader(connection, deadline_s, self.name)

    def _open_reader(self) -> sqlite3.Connection:
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
            rows, lost = reader.one(
                "SELECT (SELECT count(*) FROM queries), (SELECT coalesce(sum(rows), 0) FROM losses)"
            )
            newest = reader.all(
                "SELECT started_ms + coalesce(duration_ms, 0) FROM queries ORDER BY seq DESC LIMIT 1"
            )
        return Summary(rows, from_epoch_ms(newest[0][0]) if newest else None, lost)

    def newest_at(self) -> datetime | None:
        """When the newest question was asked."""
        with self.reader() as reader:
            found = reader.all("SELECT started_ms FROM queries ORDER BY seq DESC LIMIT 1")
        return from_epoch_ms(found[0][0]) if found else None

    def count_before(self, before: datetime) -> int:
        """How many rows began before `before`."""
        with self.reader() as reader:
            found: int = reader.one("SELECT count(*) FROM queries WHERE seq < ?", (_first_seq(before),))[0]
        return found

    def count(self, selection: Selection) -> int:
        """How many rows are picked by `selection`."""
        where, params = _where(selection)
        join = "LEFT JOIN texts t ON t.seq = q.seq" if selection.search else ""
        with self.reader() as reader:
            found: int = reader.one(f"SELECT count(*) FROM queries q {join} WHERE {where}", params)[0]  # noqa: S608
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
        where, params = _where(selection)
        if before:
            where, params = f"{where} AND q.seq < ?", [*params, decode_cursor(before)]
        with self.reader(deadline_s) as reader:
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
        where, params = _where(selection)
        after = -1
        while True:
            with self.reader(deadline_s) as reader:
                rows = reader.all(
                    f"{_SELECT_ROWS} WHERE {where} AND q.seq > ? ORDER BY q.seq LIMIT ?",
                    [*params, after, batch],
                )
                records = _records(reader, rows)
            yield from records
            if len(rows) < batch:
                return
            after = rows[-1]["seq"]

    def iterate_feedback(
        self, since: datetime | None = None, *, batch: int = 1000
    ) -> Iterator[GivenFeedback]:
        """Every thumb on questions asked since then, oldest question first."""
        after = _first_seq(since) - 1 if since else -1
        while True:
            with self.reader() as reader:
                rows = reader.all(
                    "SELECT q.seq, q.id, f.given_ms, q.feedback, f.reason, f.comment, t.question "
                    "FROM feedback f JOIN queries q ON q.seq = f.seq LEFT JOIN texts t ON t.seq = f.seq "
                    "WHERE f.seq > ? ORDER BY f.seq LIMIT ?",
                    (after, batch),
                )
            for seq, id, given_ms, rating, reason, comment, question in rows:
                at = from_epoch_ms(seq >> SEQ_BITS)
                given_at = from_epoch_ms(given_ms)
                yield GivenFeedback(id, at, given_at, rating, reason, comment, question or "")
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


def translate(error: sqlite3.Error, name: str) -> StoreError | Locked | Unavailable:
    """A SQLite error in our words."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Locked(f"{name} is in use by another program; try again in a moment")
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return Damaged(f"{name} is damaged ({error}): the next `mogine serve` moves it aside and begins anew")
    if primary == sqlite3.SQLITE_INTERRUPT:
        return Unavailable("this would take too long; ask for fewer days or a narrower filter")
    return StoreError(f"{name} cannot be used: {error}; is the disk full, or the folder read-only?")


def like(text: str) -> str:
    """A LIKE pattern (with ESCAPE backslash) that finds exactly `text`, anywhere."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


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


def _applied(connection: sqlite3.Connection) -> list[str] | None:
    """Names of the steps the file has; None when it is not ours (or has nothing in it yet)."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return None
    rows = connection.execute(
        "SELECT name FROM _sqlite_migrations WHERE migration_set = ? ORDER BY id", (MIGRATION_SET,)
    )
    return [row[0] for row in rows]


Bound = tuple[list[Any], tuple[str, str], list[tuple[Any, ...]]]


def _insert_all(writer: sqlite3.Connection, rows: list[Bound]) -> int:
    """How many of `rows` are new, and now there.

    Each statement hands the interpreter to the threads that give answers and must win it back, so a
    group goes in by a few long statements; one by one only when some row is known or two keys meet.
    """
    if len(rows) == 1:
        return _insert(writer, *rows[0])
    writer.execute("SAVEPOINT bulk")
    try:
        new = sum(_insert_many(writer, part) for part in _parts(rows))
    except sqlite3.IntegrityError:
        new = -1
    if new != len(rows):
        writer.execute("ROLLBACK TO bulk")
        new = sum(_insert(writer, *row) for row in rows)
    writer.execute("RELEASE bulk")
    return new


def _parts(rows: list[Bound]) -> Iterator[list[Bound]]:
    """`rows` in parts of a few sizes only, whose statements are prepared once."""
    place = 0
    for size in BULK_SIZES:
        while len(rows) - place >= size:
            yield rows[place : place + size]
            place += size


def _insert_many(writer: sqlite3.Connection, rows: list[Bound]) -> int:
    values = [value for row, _, _ in rows for value in row]
    new = writer.execute(_INSERT_ROWS[len(rows)], values).rowcount
    if new == len(rows):
        texts = [value for row, text, _ in rows for value in (row[0], *text)]
        writer.execute(_INSERT_MANY_TEXTS[len(rows)], texts)
        citations = [(row[0], *citation) for row, _, cited in rows for citation in cited]
        if citations:
            writer.executemany(_INSERT_CITATION, citations)
    return new


def _insert(
    writer: sqlite3.Connection, row: list[Any], texts: tuple[str, str], citations: list[tuple[Any, ...]]
) -> int:
    while True:
        try:
            if not writer.execute(_INSERT_ROW, row).rowcount:
                return 0
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname != "SQLITE_CONSTRAINT_PRIMARYKEY":
                raise
            row = [row[0] + 1, *row[1:]]  # two rows of one millisecond fell on one key
            continue
        if any(texts):
            writer.execute(_INSERT_TEXTS, (row[0], *texts))
        for citation in citations:
            writer.execute(_INSERT_CITATION, (row[0], *citation))
        return 1


def _first_seq(at: datetime) -> int:
    return min(epoch_ms(at) << SEQ_BITS, 2**63 - 1)  # a filter may name the year 9999


def as_row(record: QueryRecord) -> tuple[list[Any], tuple[str, str], list[tuple[Any, ...]]]:
    """What is bound for one record: every value fit for SQLite, whatever a visitor sent."""
    seq = _first_seq(record.started_at) | (
        crc32(record.id.encode("utf-8", "replace")) & ((1 << SEQ_BITS) - 1)
    )
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
        _real(record.cost_cny),
        _integer(record.first_token_ms),
        _integer(record.duration_ms),
        _word(record.feedback),
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
    return QueryRecord(
        id=row["id"],
        started_at=from_epoch_ms(row["seq"] >> SEQ_BITS),
        question=row["question"] or "",
        answer=row["answer"] or "",
        citations=citations,
        **values,
    )


def _where(selection: Selection) -> tuple[str, list[Any]]:
    """The condition on `queries q` (and `texts t` for a search), values bound, columns our own."""
    terms, params = ["1"], list[Any]()
    if selection.since is not None:
        terms.append("q.seq >= ?")
        params.append(_first_seq(selection.since))
    if selection.until is not None:
        terms.append("q.seq < ?")
        params.append(_first_seq(selection.until))
    for name in ("provider", "model", "kind", "status", "answered", "visitor", "session", "feedback"):
        if value := getattr(selection, name):
            terms.append("q.feedback <> ''" if (name, value) == ("feedback", "any") else f"q.{name} = ?")
            params += [] if (name, value) == ("feedback", "any") else [_word(value)]
    if selection.search:
        pattern = like(_text(selection.search, MAX_SEARCH_CHARS))
        terms.append("(t.question LIKE ? ESCAPE '\\' OR t.answer LIKE ? ESCAPE '\\')")
        params += [pattern, pattern]
    return " AND ".join(terms), params


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


def _real(value: float | None) -> float | None:
    # SQLite keeps NaN as NULL; infinity would spoil every sum.
    return None if value is None or value - value != 0 else float(value)
