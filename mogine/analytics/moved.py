"""The list of what was moved into a record: which rows of another one, and what was thought of them."""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from mogine.analytics.engine import Connection, Reader

MOVED_BITS = 42  # a bucket of the list is 70 minutes
LAST_SEQ = 2**63 - 1
GAPS = {
    "gaps": ("id", "status", "question", "embedder", "vector", "test", "nearest", "evidence", "reason",
             "opened_ms"),
    "gap_questions": ("seq", "gap"),
    "gap_events": ("gap", "at_ms", "status", "detail"),
}  # fmt: skip
GAPS_ORDER = {"gaps": "id", "gap_questions": "seq", "gap_events": "rowid"}
MARKED = (
    "SELECT q.seq, q.feedback, q.signals, coalesce(f.given_ms, 0) FROM queries q "
    "LEFT JOIN feedback f ON f.seq = q.seq"
)

# A thumb, signals, and when it was last said what was thought of the answer.
Mark = tuple[str, int, int]

NO_MARK: Mark = ("", 0, 0)


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
        if mark != NO_MARK:
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


def changed_marks(old: Bucket, new: Bucket) -> list[int]:
    """Rows in both whose marks are not the same."""
    known = set(old.seqs)
    seqs = sorted((old.marks.keys() | new.marks.keys()) & known)
    still = set(new.seqs)
    return [
        seq for seq in seqs if seq in still and old.marks.get(seq, NO_MARK) != new.marks.get(seq, NO_MARK)
    ]


def by_bucket(marked: Iterable[Sequence[Any]]) -> Iterator[tuple[int, Bucket]]:
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


def buckets(reader: Reader, low: int, high: int) -> dict[int, Bucket]:
    """The rows of a record from `low` to `high`."""
    marked = reader.connection.plain(f"{MARKED} WHERE q.seq >= ? AND q.seq <= ? ORDER BY q.seq", (low, high))
    return dict(by_bucket(marked))


def listed(reader: Reader, low: int, high: int) -> dict[int, Bucket]:
    """The list of a record, of buckets from the key `low` to `high`."""
    rows = reader.all(
        "SELECT bucket, copied, seqs, marks FROM moved WHERE bucket >= ? AND bucket <= ? ORDER BY bucket",
        (low >> MOVED_BITS, high >> MOVED_BITS),
    )
    return {number: Bucket.unpack(copied, seqs, marks) for number, copied, seqs, marks in rows}


def digest_gaps(connection: Connection) -> int:
    """A number for all that is known of gaps."""
    digest = blake2b(digest_size=8)
    for table, columns in GAPS.items():
        rows = connection.execute(
            f"SELECT {', '.join(columns)} FROM {table} ORDER BY {GAPS_ORDER[table]}"  # noqa: S608
        )
        for row in rows:
            digest.update(repr(tuple(row)).encode())
    return int.from_bytes(digest.digest(), "big") >> 2 | 1


NO_GAPS = int.from_bytes(blake2b(digest_size=8).digest(), "big") >> 2 | 1
