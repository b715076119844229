"""Full-text search over questions and answers, Chinese too: words and pairs of characters, by segments.

A segment holds 16,384 rows and, for each term, the places of the rows that have it; it is built behind the
writer, so recording costs nothing more, and rows that are in none yet are simply read. It is thrown away and
built again when a row of it is deleted: what is deleted is then in no index, which SQLite's own FTS5 promises
from version 3.42 on only. What the index finds is always compared with the text itself.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add

from mogine.analytics.engine import Connection
from mogine.analytics.tables import FROM_LIST, LISTED, NOT_LISTED, Listing, set_state, state

SEGMENT_ROWS = 16_384
BITMAP_BYTES = SEGMENT_ROWS // 8
MAX_TERM_CHARS = 24
MAX_PARTS = 8

_CJK = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3100-\u31bf\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = rf"[^\W\d_{_CJK}]"
_RUNS = re.compile(rf"[{_CJK}]+|\d+|{_WORD}+")
_HAN = re.compile(rf"[{_CJK}]")
_LETTER = re.compile(_WORD)


def terms(*texts: str) -> set[str]:
    """What the texts can be found by: words in lower case, numbers, pairs of Chinese characters, and the
    last character of each Chinese run (so that every single one begins some term)."""
    found: set[str] = set()
    for run in _RUNS.findall("\n".join(texts).lower()):
        if run[0] >= "\u2e80" and _HAN.match(run):
            found.update(map(add, run, run[1:]))
            found.add(run[-1])
        else:
            found.add(run[:MAX_TERM_CHARS])
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """A search: every part of it must stand in the question or the answer, in any order.

    Latin words and numbers are found from their beginning, Chinese anywhere; case does not count.
    """

    parts: tuple[str, ...]
    exact: frozenset[str]
    beginnings: frozenset[str]
    pattern: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, text: str) -> "Wanted":
        parts = tuple(dict.fromkeys(text.lower().split()))[:MAX_PARTS]
        exact: set[str] = set()
        beginnings: set[str] = set()
        for run in (run for part in parts for run in _RUNS.findall(part)):
            if _HAN.match(run):
                exact.update(map(add, run, run[1:]))
                if len(run) == 1:
                    beginnings.add(run)
            else:
                beginnings.add(run[:MAX_TERM_CHARS])
        return cls(parts, frozenset(exact), frozenset(beginnings), tuple(map(_compiled, parts)))

    def fits(self, question: str, answer: str) -> bool:
        """Whether the texts have every part."""
        return all(p.search(question) or p.search(answer) for p in self.pattern)


def _compiled(part: str) -> re.Pattern[str]:
    before = rf"(?<!{_WORD})" if _LETTER.match(part) else r"(?<!\d)" if part[0].isdecimal() else ""
    return re.compile(before + re.escape(part), re.IGNORECASE)


# --- reading -------------------------------------------------------------------------------------


def places(packed: bytes) -> Sequence[int]:
    """The places of a term within its segment."""
    if len(packed) != BITMAP_BYTES:
        return array("H", packed)
    bits = int.from_bytes(packed, "little")
    text = f"{bits:b}"[::-1]
    found: list[int] = []
    at = text.find("1")
    while at >= 0:
        found.append(at)
        at = text.find("1", at + 1)
    return found


def pack(found: "array[int]") -> bytes:
    """Places as bytes: 16 bits each, or one bit for each row when that is shorter."""
    if len(found) * 2 < BITMAP_BYTES:
        return found.tobytes()
    bits = bytearray(BITMAP_BYTES)
    for place in found:
        bits[place >> 3] |= 1 << (place & 7)
    return bytes(bits)


def in_segment(reader: Connection, segment: int, wanted: Wanted) -> list[int]:
    """Places of the rows of `segment` that have every term of `wanted`."""
    lists: list[bytes] = []
    if wanted.exact:
        rows = reader.execute(
            f"SELECT places FROM terms WHERE segment = ? AND term {LISTED}",  # noqa: S608
            (segment, Listing(sorted(wanted.exact))),
        ).fetchall()
        if len(rows) < len(wanted.exact):
            return []
        lists = [row[0] for row in rows]
    unions: list[set[int]] = []
    for beginning in wanted.beginnings:
        rows = reader.execute(
            "SELECT places FROM terms WHERE segment = ? AND term >= ? AND term < ?",
            (segment, beginning, beginning[:-1] + chr(ord(beginning[-1]) + 1)),
        ).fetchall()
        if not rows:
            return []
        unions.append(set().union(*(places(row[0]) for row in rows)))
    if not lists and not unions:
        return list(range(SEGMENT_ROWS))
    lists.sort(key=len)
    found = set(places(lists[0])) if lists else unions.pop()
    for packed in lists[1:] if lists else ():
        if len(packed) == BITMAP_BYTES:
            found = {place for place in found if packed[place >> 3] >> (place & 7) & 1}
        else:
            found.intersection_update(places(packed))
    for union in unions:
        found &= union
    return sorted(found)


# --- building ------------------------------------------------------------------------------------


def waiting(reader: Connection, before_seq: int) -> list[int]:
    """Rows for the next segment; empty while there are not enough to fill it."""
    late = [
        row[0] for row in reader.execute("SELECT seq FROM unindexed ORDER BY seq LIMIT ?", (SEGMENT_ROWS,))
    ]
    fresh = reader.execute(
        "SELECT seq FROM queries WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?",
        (state(reader)["sealed_upto"], before_seq, SEGMENT_ROWS - len(late)),
    )
    found = late + [row[0] for row in fresh]
    return sorted(found) if len(found) == SEGMENT_ROWS else []


def collect(reader: Connection, seqs: Sequence[int], first: int, index: "dict[str, array[int]]") -> None:
    """Adds the terms of `seqs`, whose first one has the place `first`, to `index`."""
    rows = reader.execute(
        f"SELECT seq, question, answer FROM texts WHERE seq >= ? AND seq <= ? AND seq {LISTED}",  # noqa: S608
        (seqs[0], seqs[-1], Listing(seqs)),
    )
    texts = {seq: (question, answer) for seq, question, answer in rows}
    for place, seq in enumerate(seqs, start=first):
        if seq in texts:
            for term in terms(*texts[seq]):
                found = index.get(term)
                if found is None:
                    index[term] = array("H", (place,))
                else:
                    found.append(place)


def write_terms(writer: Connection, segment: int, entries: "Iterable[tuple[str, array[int]]]") -> None:
    """Writes terms of a segment that nobody sees before `seal`."""
    writer.executemany(
        "INSERT INTO terms (segment, term, places) VALUES (?, ?, ?)",
        [(segment, term, pack(found)) for term, found in entries],
    )


def new_segment(writer: Connection) -> int:
    """A number that no segment ever had; it is out of use until it is sealed."""
    return int(
        writer.execute(
            "INSERT INTO segments (live, first_seq, last_seq, seqs) VALUES (0, 0, 0, ?) RETURNING id", (b"",)
        ).fetchone()[0]
    )


def seal(writer: Connection, segment: int, seqs: Sequence[int]) -> None:
    """From here on `seqs` are found through `segment`."""
    upto = state(writer)["sealed_upto"]
    listed = Listing(seqs)
    writer.execute(
        "UPDATE segments SET live = 1, first_seq = ?, last_seq = ?, seqs = ? WHERE id = ?",
        (seqs[0], seqs[-1], array("q", seqs).tobytes(), segment),
    )
    writer.execute(f"DELETE FROM unindexed WHERE seq {LISTED}", (listed,))  # noqa: S608
    if seqs[-1] > upto:
        # What was committed while the segment was built.
        writer.execute(
            "INSERT INTO unindexed (seq) SELECT seq FROM queries WHERE seq > ? AND seq <= ? "  # noqa: S608
            f"AND seq {NOT_LISTED} ON CONFLICT DO NOTHING",
            (upto, seqs[-1], listed),
        )
        set_state(writer, sealed_upto=seqs[-1])


def unseal(writer: Connection, low: int, high: int, kept_from: int = 0) -> None:
    """Takes segments with rows from `low` to `high` out of use: their rows, if not before `kept_from`, are
    found by reading, until they are in a segment again."""
    hit = writer.execute(
        "SELECT id, seqs FROM segments WHERE live = 1 AND first_seq <= ? AND last_seq >= ?", (high, low)
    ).fetchall()
    for segment, packed in hit:
        writer.execute("UPDATE segments SET live = 0, seqs = ? WHERE id = ?", (b"", segment))
        kept = [seq for seq in array("q", packed) if seq >= kept_from]
        writer.execute(
            f"INSERT INTO unindexed (seq) {FROM_LIST} WHERE true ON CONFLICT DO NOTHING",
            (Listing(kept),),
        )


def purge(writer: Connection, limit: int) -> bool:
    """Deletes at most `limit` terms of segments that are out of use; False when there were none."""
    row = writer.execute("SELECT id FROM segments WHERE live = 0 LIMIT 1").fetchone()
    if row is None:
        return False
    gone = writer.execute(
        "DELETE FROM terms WHERE segment = ? AND term IN "
        "(SELECT term FROM terms WHERE segment = ? ORDER BY term LIMIT ?)",
        (row[0], row[0], limit),
    ).rowcount
    if gone < limit:
        writer.execute("DELETE FROM segments WHERE id = ?", (row[0],))
    return True


def newest_first(reader: Connection, low: int, high: int) -> list[tuple[int, int]]:
    """Segments that may hold rows from `low` to before `high`: number and newest row."""
    rows = reader.execute(
        "SELECT id, last_seq FROM segments WHERE live = 1 AND last_seq >= ? AND first_seq < ? "
        "ORDER BY last_seq DESC",
        (low, high),
    )
    return [(segment, last) for segment, last in rows]


def rows_of(reader: Connection, segment: int) -> "array[int]":
    """Every row of a segment, by place."""
    return array("q", reader.execute("SELECT seqs FROM segments WHERE id = ?", (segment,)).fetchone()[0])
