"""Rows as lines of a file, any number of them, made ahead of who takes them.

The database puts them together, in a thread; the rest is done as they are taken: the database goes on
meanwhile, and one batch alone is there in both forms. With SQLite more threads only wait for its one lock on
memory: what is to be quicker is done by a second process, which does every other batch. PostgreSQL has its
own.
"""

import contextlib
import fcntl
import json
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from mogine.analytics.export import BOM, COLUMNS, check_format, heading
from mogine.analytics.records import Selection
from mogine.analytics.sqllines import Hand, Piece, Unfinished, keep_room
from mogine.analytics.store import AnalyticsStore
from mogine.children import import_path

# Rows, of some 1.5 kB each. A server is asked less often: each time costs as much as some thirty rows.
BATCH_OF_FILE, BATCH_OF_SERVER = 500, 1500
AHEAD = 4  # batches that are being read, or wait for a slow taker
# With PostgreSQL each has a process there that puts lines together; one more than there are cores, because
# what one has brought must be received here while others are finished, and meanwhile it has nothing to do.
HANDS = 3
# Until then a second process would hardly have started.
HELPED_AFTER = 10_000

_PIPE_BYTES = 1024**2
_HEAD = struct.Struct(">II")
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from mogine.analytics.lines import help_out; help_out(*sys.argv[1:3])"
)


class Reads(Protocol):
    """Who brings the rows of a batch: Hand, here or in a second process."""

    def read(self, condition: str, params: Sequence[Any]) -> Unfinished: ...
    def close(self) -> None: ...


def render_rows(
    store: AnalyticsStore,
    selection: Selection,
    format: str,
    *,
    bom: bool = False,
    deadline_s: float | None = None,
    helped: bool = False,
) -> Iterator[Piece]:
    """Every row of `selection` in `format`, oldest first, in pieces; whatever their number, memory stays.

    Each batch is one state of the record, and nothing is held open between them: a slow taker never keeps
    the journal from being emptied. `helped` has a second process take part, on a second core; it knows no
    deadline. Raises RequestError for an unknown format, StoreError.
    """
    check_format(format)
    if format == "csv":
        yield Piece(((BOM if bom else "") + heading(COLUMNS)).encode(), 0)
    elif format == "json":
        yield Piece(b"[", 0)
    first = True
    for batch in _ahead(store, selection, format, deadline_s, helped):
        data = batch.data
        if format == "json" and batch.rows:
            # Each line begins with a comma, which the first one has no use for.
            data, first = (data[1:] if first else data), False
        yield Piece(data, batch.rows)
    if format == "json":
        yield Piece(b"]\n" if first else b"\n]\n", 0)


def _ahead(
    store: AnalyticsStore, selection: Selection, format: str, deadline_s: float | None, helped: bool
) -> Iterator[Piece]:
    """Batches in their order, a few of them being made while the one before is taken."""

    hands = list[Reads]()
    idle: SimpleQueue[Reads] = SimpleQueue()

    def employ(hand: Reads) -> None:
        hands.append(hand)
        idle.put(hand)

    def read(condition: str, params: Sequence[Any]) -> Unfinished:
        hand = idle.get()
        try:
            return hand.read(condition, params)
        finally:
            idle.put(hand)

    waiting: deque[Future[Unfinished]] = deque()
    size = BATCH_OF_FILE if store.is_file else BATCH_OF_SERVER
    try:
        for hand in _first_hands(store, selection, format, deadline_s, helped):
            employ(hand)
        with ThreadPoolExecutor(max(2, len(hands)), "export") as pool:
            try:
                for number, keys in enumerate(store.batches(selection, size, deadline_s)):
                    if helped and store.is_file and number * size == HELPED_AFTER:
                        employ(Helper(store, format))
                    waiting.append(pool.submit(read, *keys))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result().finish()
                while waiting:
                    yield waiting.popleft().result().finish()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        for hand in hands:
            hand.close()


def _first_hands(
    store: AnalyticsStore, selection: Selection, format: str, deadline_s: float | None, helped: bool
) -> list[Reads]:
    if helped:
        keep_room()
    count = 1 if store.is_file else HANDS if helped else 2
    return [Hand(store, format, deadline_s, in_spans=selection.is_span) for _ in range(count)]


# --- the second process --------------------------------------------------------------------------


class Helper:
    """A Hand in a process of its own; when that breaks off, one here does its work and tells its errors."""

    def __init__(self, store: AnalyticsStore, format: str) -> None:
        self._stand_in = Hand(store, format)
        self._child = subprocess.Popen(  # noqa: S603 (our own interpreter and a fixed program)
            [
                *(sys.executable, "-I", "-B", "-X", "utf8", "-c", _START),
                *(str(store.path.absolute()), format, *import_path()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        if self._child.stdout is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(OSError):  # a smaller pipe only needs more turns
                fcntl.fcntl(self._child.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def read(self, condition: str, params: Sequence[Any]) -> Unfinished:
        """As `Hand.read`, and finished already."""
        if self._child.poll() is None:
            with contextlib.suppress(OSError, ValueError, struct.error):
                return self._ask(condition, params)
        self._child.kill()
        return self._stand_in.read(condition, params)

    def _ask(self, condition: str, params: Sequence[Any]) -> Piece:
        asked, answered = self._child.stdin, self._child.stdout
        if asked is None or answered is None:
            raise ValueError("no pipes")
        asked.write(json.dumps([condition, params]).encode() + b"\n")
        asked.flush()
        size, rows = _HEAD.unpack(answered.read(_HEAD.size))
        data = answered.read(size)
        if len(data) < size:
            raise ValueError("cut off")
        return Piece(data, rows)

    def close(self) -> None:
        """Ends the child."""
        self._child.kill()
        with contextlib.suppress(OSError), self._child:  # what it was asked last need not reach it
            self._stand_in.close()


def help_out(path: str, format: str) -> None:
    """The second process: a batch for each line of standard input, until that ends."""
    keep_room()
    hand = Hand(AnalyticsStore(Path(path)), format)
    for line in sys.stdin.buffer:
        piece = hand.read(*json.loads(line)).finish()
        sys.stdout.buffer.write(_HEAD.pack(len(piece.data), piece.rows))
        sys.stdout.buffer.write(piece.data)
        sys.stdout.buffer.flush()
