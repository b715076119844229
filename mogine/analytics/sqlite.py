"""The record in one SQLite file: opening and upgrades, locks, damage, space, rows in bulk."""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mogine.analytics.engine import BUSY_MS, FETCH_ROWS, PATIENT_BUSY_MS, TOO_LONG, Bound, Connection, Damaged
from mogine.analytics.schema import APPLICATION_ID, MIGRATION_SET, ROW_COLUMNS
from mogine.analytics.tables import BULK_SIZES, Bulk
from mogine.errors import Locked, StoreError, Unavailable

# SQLite's own waiting looks ever more seldom, up to every 100 ms, and misses short rests of who deletes.
POLL_S = 0.002
EMPTIED_AFTER_S = 0.015  # of writing behind the writers: a hundred pages or so, whose fsync is short
PROGRESS_STEPS = 4_000  # virtual machine steps between two looks at the clock: well under a millisecond

_ROW = f"({', '.join('?' * len(ROW_COLUMNS))})"
_INSERT_ROWS = {
    size: f"INSERT INTO queries ({', '.join(ROW_COLUMNS)}) "  # noqa: S608 - our own column names
    f"VALUES {', '.join([_ROW] * size)} ON CONFLICT (id) DO NOTHING"
    for size in BULK_SIZES
}
_INSERT_MANY_TEXTS = Bulk("INSERT OR REPLACE INTO texts (seq, question, answer) VALUES ", 3)
_INSERT_MANY_CITATIONS = Bulk("INSERT OR REPLACE INTO citations VALUES ", 7)


class SqliteConnection(sqlite3.Connection):
    """What an engine's connection can do beyond the standard library's."""

    takes_columns = False

    def parts(self, sql: str, params: Sequence[Any] = ()) -> Iterator[list[tuple[Any, ...]]]:
        """Rows as mere tuples: a third quicker."""
        cursor = self.cursor()
        cursor.row_factory = None
        cursor.execute(sql, params)
        return iter(partial(cursor.fetchmany, FETCH_ROWS), [])

    def plain(self, sql: str, params: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The same, one by one."""
        return chain.from_iterable(self.parts(sql, params))

    def as_bytes(self, sql: str, params: Sequence[Any] = (), *, is_repeated: bool = False) -> tuple[Any, ...]:
        """Bytes need not be made into text first, and back again later. The driver keeps all statements."""
        self.text_factory = bytes
        try:
            return next(self.plain(sql, params))
        finally:
            self.text_factory = str

    def load(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """One statement for all of them."""
        places = ", ".join("?" * len(columns))
        self.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", rows)  # noqa: S608

    def set_deadline(self, deadline_s: float | None) -> None:
        """Statements from here on are interrupted after so long."""
        if deadline_s is None:
            return
        end = time.monotonic() + deadline_s
        self.set_progress_handler(lambda: time.monotonic() > end, PROGRESS_STEPS)


class SqliteEngine:
    """The file at `path`. Reading never creates it: an absent one reads as an empty record.

    Writing keeps one connection, which several threads may share one at a time; it is opened when
    first needed, and again when the file was replaced behind our back. Several processes may write.
    """

    def __init__(self, path: Path, steps: Sequence[tuple[str, str]], clock: Callable[[], datetime]) -> None:
        self.path = path
        self.name = f"{path.parent.name}/{path.name}"
        self.visits = 0
        self.held_s = 0.0
        self.silent_s = 0.0
        self._unmoved_s = 0.0
        self._steps = steps
        self._clock = clock
        self._lock = threading.Lock()
        self._writer: SqliteConnection | None = None
        self._inode = 0
        self._durable = True
        self._version = 0

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
        self, busy_ms: int = PATIENT_BUSY_MS, *, durable: bool = True, shared: bool = False
    ) -> Iterator[SqliteConnection]:
        """One write transaction, alone whether `shared` or not: SQLite knows no other.

        After any failure the connection is thrown away. What is not `durable` may be undone by a power cut,
        though never by halves.
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

    def give_back(self, pages: int, spare: int) -> bool:
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
                # The second keeps writers out: what it would take long over is done by the first.
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    def size_bytes(self) -> int:
        """The file and its journal."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def soundness(self) -> str:
        """ "ok", or what its pages say of each other."""
        with self.translated(), contextlib.closing(self.open_reader()) as connection:
            return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])

    def sweep(self) -> None:
        """Nothing: free pages are given back."""

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """A file beside the record, locked."""
        with locked_file(self.path.with_name(f"{name}.lock"), wait=wait):
            yield

    def renumber(self, writer: Connection, table: str) -> None:
        """Nothing: SQLite counts on from the largest number it has seen."""

    def is_current(self) -> bool:
        """Whether the file of the writing connection is still the one at `path`."""
        return self._inode == self._current_inode()

    def insert(self, writer: Connection, rows: list[Bound]) -> list[Bound]:
        """Those of `rows` that are new, as they are there now.

        All at once; one by one only when some row is known or two keys meet.
        """
        new = _insert_all(writer, rows)
        _INSERT_MANY_TEXTS.run(writer, [(row[0], *texts) for row, texts, _ in new if any(texts)])
        cited = [(row[0], *citation) for row, _, citations in new for citation in citations]
        _INSERT_MANY_CITATIONS.run(writer, cited)
        return new

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

    def open_reader(self) -> SqliteConnection:
        """A read-only connection, which the caller closes; to an empty record where there is none."""
        if not self.exists():
            connection = sqlite3.connect(":memory:", isolation_level=None, factory=SqliteConnection)
            connection.row_factory = sqlite3.Row
            for _, sql in self._steps:
                connection.executescript(sql)
            return connection
        if pending := self._pending(PATIENT_BUSY_MS):
            raise StoreError(
                f"{self.name} was written by an older mogine (it lacks {pending[0]}): "
                "start `mogine serve` once, which upgrades it after a backup"
            )
        connection = _connect(self.path, read_only=True, busy_ms=PATIENT_BUSY_MS)
        # The shortest decimal form of a number, for those of which SQLite has none.
        connection.create_function("exact", 1, repr, deterministic=True)
        return connection


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
    # A step that is made although its tables are there: what told that it was done is lost.
    is_forgotten = primary == sqlite3.SQLITE_ERROR and str(error).endswith("already exists")
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) or is_forgotten:
        return Damaged(f"{name} is damaged ({error}): the next `mogine serve` moves it aside and begins anew")
    if primary == sqlite3.SQLITE_INTERRUPT:
        return Unavailable(TOO_LONG)
    return StoreError(f"{name} cannot be used: {error}; is the disk full, or the folder read-only?")


def _step(sql: str) -> Callable[[Any], None]:
    def apply(db: Any) -> None:
        # Not executescript: it would commit the transaction that holds the whole upgrade.
        for statement in sql.split(";"):
            if statement.strip():
                db.conn.execute(statement)

    return apply


def _connect(path: Path, *, busy_ms: int, read_only: bool = False) -> SqliteConnection:
    uri = f"file:{quote(str(path.absolute()))}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(
        uri,
        uri=True,
        timeout=busy_ms / 1000,
        isolation_level=None,
        check_same_thread=False,
        factory=SqliteConnection,
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


def _insert_all(writer: Connection, rows: list[Bound]) -> list[Bound]:
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
    return inserted


def _insert_many(writer: Connection, rows: list[Bound]) -> int:
    new = place = 0
    for size in BULK_SIZES:
        while len(rows) - place >= size:
            values = [value for row, _, _ in rows[place : place + size] for value in row]
            new += writer.execute(_INSERT_ROWS[size], values).rowcount
            place += size
    return new


def _insert(writer: Connection, bound: Bound) -> Bound | None:
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
