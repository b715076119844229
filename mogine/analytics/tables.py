"""Small things that every table needs: many rows in one statement, lists of keys, numbers remembered."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mogine.analytics.engine import Connection

BULK_SIZES = (64, 16, 4, 1)


class Bulk:
    """A statement with many rows of values at once.

    Each statement hands the interpreter to the threads that give answers, and must win it back: a few long
    ones cost less than many short ones. Of a few sizes only, so that they are prepared once.
    """

    def __init__(self, head: str, width: int, tail: str = "") -> None:
        row = f"({', '.join('?' * width)})"
        self._sql = {size: head + ", ".join([row] * size) + tail for size in BULK_SIZES}

    def run(self, writer: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """All of `rows`."""
        place = 0
        for size in BULK_SIZES:
            while len(rows) - place >= size:
                values = [value for row in rows[place : place + size] for value in row]
                writer.execute(self._sql[size], values)
                place += size


class Listing(str):
    """A list of keys or words, bound as one value: JSON, which SQLite reads, and `values` for others."""

    values: list[Any]

    def __new__(cls, values: Sequence[Any]) -> "Listing":
        listing = super().__new__(cls, json.dumps(values := list(values)))
        listing.values = values
        return listing


# Conditions and rows of a Listing. PostgreSQL has words of its own for these; see postgres.py.
LISTED = "IN (SELECT value FROM json_each(?))"
NOT_LISTED = "NOT " + LISTED
FROM_LIST = "SELECT value FROM json_each(?)"

_SET_STATE = Bulk(
    "INSERT INTO state (name, value) VALUES ", 2, " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)


def state(reader: Connection) -> dict[str, int]:
    """The numbers that are remembered; one that was never set is 0."""
    return defaultdict(int, reader.execute("SELECT name, value FROM state").fetchall())


def set_state(writer: Connection, **values: int) -> None:
    """Remembers numbers."""
    _SET_STATE.run(writer, list(values.items()))
