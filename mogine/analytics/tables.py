"""Small things that every table needs: many rows in one statement, and numbers remembered in the file."""

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

BULK_SIZES = (64, 16, 4, 1)


class Bulk:
    """A statement with many rows of values at once.

    Each statement hands the interpreter to the threads that give answers, and must win it back: a few long
    ones cost less than many short ones. Of a few sizes only, so that they are prepared once.
    """

    def __init__(self, head: str, width: int, tail: str = "") -> None:
        row = f"({', '.join('?' * width)})"
        self._sql = {size: head + ", ".join([row] * size) + tail for size in BULK_SIZES}

    def run(self, writer: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> None:
        """All of `rows`."""
        place = 0
        for size in BULK_SIZES:
            while len(rows) - place >= size:
                values = [value for row in rows[place : place + size] for value in row]
                writer.execute(self._sql[size], values)
                place += size


_SET_STATE = Bulk("INSERT OR REPLACE INTO state (name, value) VALUES ", 2)


def state(reader: sqlite3.Connection) -> dict[str, int]:
    """The numbers that are remembered in the file; one that was never set is 0."""
    return defaultdict(int, reader.execute("SELECT name, value FROM state").fetchall())


def set_state(writer: sqlite3.Connection, **values: int) -> None:
    """Remembers numbers."""
    _SET_STATE.run(writer, list(values.items()))
