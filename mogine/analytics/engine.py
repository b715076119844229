"""What a database must do for the record of questions: SQLite in a file, or PostgreSQL.

Statements are shared. They are written in what both understand, with `?` for values; lists of keys are bound
as `Listing`. What differs (connections, locks, errors, space, rows in bulk) is the engine's.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from mogine.errors import StoreError, Unavailable

BUSY_MS = 100
PATIENT_BUSY_MS = 5_000
FETCH_ROWS = 2_000
TOO_LONG = "this would take too long; ask for fewer days or a narrower filter"

# A row of a result: values by place and by name, `keys()`, and as long as a tuple.
Row = Any
# What is bound for one question: its row of `queries`, question and answer, citations.
Bound = tuple[list[Any], tuple[str, str], list[tuple[Any, ...]]]


class Damaged(StoreError):
    """The file is no SQLite database, or its pages contradict each other; `inode` tells which file."""

    inode = 0


class Cursor(Protocol):
    """What a statement brought."""

    @property
    def rowcount(self) -> int: ...
    def fetchall(self) -> list[Row]: ...
    def fetchone(self) -> Row: ...
    def __iter__(self) -> Iterator[Row]: ...


class Connection(Protocol):
    """A connection of either engine. `takes_columns`: a list can be bound as one value, an array."""

    takes_columns: bool

    def execute(self, sql: str, params: Sequence[Any] = (), /) -> Cursor: ...
    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Any: ...
    def parts(self, sql: str, params: Sequence[Any] = ()) -> Iterator[list[tuple[Any, ...]]]:
        """Many rows as mere tuples, some thousand at a time; several may be read beside each other."""

    def plain(self, sql: str, params: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The same, one by one."""

    def as_bytes(self, sql: str, params: Sequence[Any] = (), *, is_repeated: bool = False) -> tuple[Any, ...]:
        """The one row of a statement, its texts as bytes of UTF-8. `is_repeated`: it is asked for again and
        again, and one plan of it serves for all values."""

    def load(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Any number of new rows, as quickly as the database takes them and in constant memory."""

    def set_deadline(self, deadline_s: float | None) -> None:
        """Statements from here on end with an error after so long; None: as long as it takes."""

    def close(self) -> None: ...


class Reader:
    """A connection at one state of the record; all that is asked of it must end within `deadline_s`."""

    def __init__(self, connection: Connection, deadline_s: float | None) -> None:
        self.connection = connection
        self._end = None if deadline_s is None else time.monotonic() + deadline_s
        connection.set_deadline(deadline_s)

    def all(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """Every row of one statement."""
        self._check_time()
        return self.connection.execute(sql, params).fetchall()

    def as_bytes(self, sql: str, params: Sequence[Any] = (), *, is_repeated: bool = False) -> tuple[Any, ...]:
        """See Connection.as_bytes."""
        self._check_time()
        return self.connection.as_bytes(sql, params, is_repeated=is_repeated)

    def one(self, sql: str, params: Sequence[Any] = ()) -> Row:
        """The first row; for statements that always have one."""
        return self.all(sql, params)[0]

    def _check_time(self) -> None:
        if self._end is not None and time.monotonic() > self._end:
            raise Unavailable(TOO_LONG)


class Engine(Protocol):
    """One database. `name` is what messages call it; `visits` grows when others write, or we do durably;
    `held_s` is how long our last transaction alone has kept others from writing, `silent_s` for how long the
    one who brings rows (`shared`) has waited for a word of the server."""

    name: str
    visits: int
    held_s: float

    @property
    def silent_s(self) -> float: ...

    def prepare(self, *, busy_ms: int = PATIENT_BUSY_MS) -> None:
        """Makes or upgrades the tables; see AnalyticsStore.prepare."""

    def exists(self) -> bool:
        """Whether there is a record."""

    def check(self, limit_s: float) -> None:
        """Looks for damage for at most `limit_s`. Raises Damaged, StoreError."""

    def close(self) -> None:
        """Closes what is open; the next use opens it again."""

    def translated(self) -> AbstractContextManager[None]:
        """The driver's errors, and the system's, as ours."""

    def transaction(
        self, busy_ms: int = PATIENT_BUSY_MS, *, durable: bool = True, shared: bool = False
    ) -> AbstractContextManager[Connection]:
        """One write transaction, alone unless `shared`: those of PostgreSQL may then go on beside each other.

        What is not `durable` may be undone by a power cut, though never by halves.
        """

    def open_reader(self) -> Connection:
        """A connection to read with, which the caller closes; it begins with BEGIN, ends with ROLLBACK."""

    def lock(self, name: str, *, wait: bool = False) -> AbstractContextManager[None]:
        """Holds a lock that ends with the process, however it ends; Locked when it is taken."""

    def insert(self, writer: Connection, rows: list[Bound]) -> list[Bound]:
        """Those of `rows` that are new, as they are there now: two that fell on one key have moved apart."""

    def renumber(self, writer: Connection, table: str) -> None:
        """Lets numbers that the database gives to rows of `table` begin behind those that are there."""

    def is_current(self) -> bool:
        """Whether what the last transaction wrote lies where a reader looks for it."""

    def size_bytes(self) -> int:
        """What the record takes on the disk."""

    def soundness(self) -> str:
        """ "ok", or what is wrong with the database."""

    def give_back(self, pages: int, spare: int) -> bool:
        """Hands up to `pages` free pages back to the disk; False when there are no more than `spare`."""

    def checkpoint(self) -> bool:
        """Empties the journal, so that no deleted word is left in it; False when a reader was in the way."""

    def sweep(self) -> None:
        """After much was deleted: whatever the engine needs to use the room again."""

    def move_aside(self, damage: Damaged) -> Path | None:
        """Lets a new record begin beside a damaged one; where that lies now."""
