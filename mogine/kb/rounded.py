"""Vectors a second time, a byte a number, beside the texts: cosines of a few known passages without Chroma.

Chroma finds the nearest in 1.7 ms, and takes as long to give the vectors of forty that words have found.
"""

import sqlite3
from collections.abc import Mapping, Sequence

import numpy as np

from mogine.kb.embedders import Vectors
from mogine.kb.texts import Readers

_MOST = 127


class RoundedWriter:
    """Changes the copies of a draft; the caller holds the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, numbers: Sequence[int], vectors: Vectors) -> None:
        steps = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / _MOST
        parts = np.rint(vectors / steps[:, None]).astype(np.int8)
        self._db.executemany(
            "INSERT INTO rounded_vectors (number, step, parts) VALUES (?, ?, ?)",
            [(n, float(step), row.tobytes()) for n, step, row in zip(numbers, steps, parts, strict=True)],
        )

    def remove(self, numbers: Sequence[int]) -> None:
        self._db.executemany("DELETE FROM rounded_vectors WHERE number = ?", [(n,) for n in numbers])


class RoundedVectors:
    """Reads the copies of a generation; `exist` is False in one of an older mogine."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        with readers.take() as db:
            self.exist = bool(
                db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rounded_vectors'").fetchone()[0]
            )

    def cosines(self, vector: Vectors, numbers: Sequence[int]) -> Mapping[int, float]:
        """The cosine of each of `numbers`, right to about 0.001; one that has no vector is left out."""
        if not numbers:
            return {}
        marks = ", ".join("?" * len(numbers))
        query = f"SELECT number, step, parts FROM rounded_vectors WHERE number IN ({marks})"  # noqa: S608
        with self._readers.take() as db:
            rows = db.execute(query, list(numbers)).fetchall()
        if not rows:
            return {}
        parts = np.frombuffer(b"".join(row[2] for row in rows), np.int8).reshape(len(rows), -1)
        near = parts.astype(np.float32) @ vector
        return {row[0]: float(dot) * row[1] for row, dot in zip(rows, near, strict=True)}
