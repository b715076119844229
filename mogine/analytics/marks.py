"""From what a database has put together to the lines of a file, for a thousand rows at once.

The database writes values as they are, and marks between them: bytes that no value should have. Here signs in
texts are escaped, and only then the marks become what stands between values in the format. That is a few
passes over all bytes, which cost less than one call for each text would.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from mogine.analytics.export import COLUMNS, FORMULA_SIGNS
from mogine.analytics.records import SIGNALS, signals_of

# Columns that are no strings in JSON, and those that are no text of which a cell could be a formula.
BARE = (
    "citations", "top_score", "prompt_tokens", "completion_tokens", "reasoning_tokens", "tokens_estimated",
    "cost_cny", "first_token_ms", "duration_ms", "bot", "signals", "search_ms",
)  # fmt: skip
NO_TEXTS = ("started_at", *BARE)
CITED = ("number", "title", "source", "heading", "url", "score")

_ESCAPES = tuple(
    (sign.encode(), json.dumps(sign)[1:-1].encode()) for sign in ("\\", '"', *map(chr, range(32)))
)
_SHORT_BREAKS = tuple(sign.encode() for sign in "\n\r\x0b\x0c\x1c\x1d\x1e")
_SEPARATORS = re.compile(rb"\xe2\x80[\xa8\xa9]")  # U+2028, U+2029
# What may stand before a formula without keeping a spreadsheet from seeing it.
_BLANKS = "".join(
    sign
    for sign in map(chr, [*range(0x3001), 0xFEFF])
    if sign.isspace() or sign < " " or sign in "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
)


class Marks(NamedTuple):
    """One byte each, none of them a line break.

    `quote`, or `text` before a text that may be a formula, stands for a quotation mark of CSV, `place` for a
    row's citations there; `end` comes after a row's cells (of JSON: after each cell) or citations. `cited`
    are six, one before each value of a citation.
    """

    quote: bytes
    text: bytes
    place: bytes
    end: bytes
    cited: bytes


class Finish(Protocol):
    """Makes lines of one format."""

    def lines(self, data: bytes, cited: bytes, rows: int, citations: int | None) -> bytes | None:
        """The lines of so many rows with so many citations, which `cited` lists; None when there are other
        marks than that, so that some text must have one. They are not counted when nobody knows how many."""


class _Lists:
    """Citations as the lists of JSON that they are in all formats."""

    def __init__(self, marks: Marks, comma: str, colon: str, quote: str) -> None:
        self._end = marks.end
        self._marks = marks.cited + marks.end
        self._escapes = _escapes(self._marks)
        self._signs = list[tuple[bytes, bytes]]()
        after = "{"
        for place, name in enumerate(CITED):
            around = "" if name in ("number", "score") else quote
            sign = f"{after}{quote}{name}{quote}{colon}{around}"
            self._signs.append((marks.cited[place : place + 1], sign.encode()))
            after = around + comma

    def are_as_told(self, data: bytes, rows: int, citations: int | None) -> bool:
        return citations is None or _count(data, self._marks) == rows + citations * len(CITED)

    def escaped(self, data: bytes) -> bytes:
        return _escape(data, self._escapes)

    def split(self, data: bytes) -> list[bytes]:
        """A list for each row, of what is escaped already."""
        for mark, sign in self._signs:
            data = data.replace(mark, sign)
        return data.split(self._end)[:-1]


class JsonFinish:
    """Cells are cut at their marks, and joined with their names between them."""

    def __init__(self, marks: Marks, *, in_list: bool) -> None:
        self._end = marks.end
        self._escapes = _escapes(marks.end)
        self._lists = _Lists(marks, ",", ":", '"')
        around = ['"' if name not in BARE else "" for name in COLUMNS]
        before = [f'{around[n - 1]},"{name}":{around[n]}' for n, name in enumerate(COLUMNS)]
        opens, closes = (",\n{", "}") if in_list else ("{", "}\n")
        self._first = (opens + before[0].removeprefix(around[-1] + ",")).encode()
        self._last = (around[-1] + closes).encode()
        self._names = [self._last + self._first, *(part.encode() for part in before[1:])]
        self._signals = {
            b"%d" % bits: json.dumps(signals_of(bits), separators=(",", ":")).encode()
            for bits in range(1 << len(SIGNALS))
        }

    def lines(self, data: bytes, cited: bytes, rows: int, citations: int | None) -> bytes | None:
        """See Finish."""
        width = len(COLUMNS)
        cells = _escape(data, self._escapes).split(self._end)
        if len(cells) != rows * width + 1 or not self._lists.are_as_told(cited, rows, citations):
            return None
        cells.pop()
        cells[COLUMNS.index("citations") :: width] = self._lists.split(self._lists.escaped(cited))
        signals = COLUMNS.index("signals")
        cells[signals::width] = [self._signals.get(bits, b"[]") for bits in cells[signals::width]]
        pieces = [b""] * (2 * rows * width)
        pieces[::2], pieces[1::2] = self._names * rows, cells
        pieces[0] = self._first
        pieces.append(self._last)
        return b"".join(pieces)


class CsvFinish:
    """Marks become quotation marks, all at once."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._all = marks.quote + marks.text + marks.place + marks.end
        self._per_row = 2 * len(COLUMNS) + 2
        self._lists = _Lists(marks, ", ", ": ", '""')
        self._quotes = bytes.maketrans(marks.quote + marks.text, b'""')
        # Most texts begin with a letter, a digit or a Chinese character, or are none: that is told first.
        harmless = rb"[0-9A-Za-z\xe4-\xe9" + re.escape(marks.quote) + rb"]"
        blanks = [sign for sign in _BLANKS if sign.encode() not in self._all]
        formula = rb"(?:" + _any_of(blanks) + rb")*(?:" + _any_of(FORMULA_SIGNS) + rb")"
        self._formula = re.compile(re.escape(marks.text) + rb"(?!" + harmless + rb")(?=" + formula + rb")")

    def lines(self, data: bytes, cited: bytes, rows: int, citations: int | None) -> bytes | None:
        """See Finish."""
        if citations is not None and _count(data, self._all) != rows * self._per_row:
            return None
        if not self._lists.are_as_told(cited, rows, citations):
            return None
        marks = self._marks
        data = _one_line(self._formula.sub(marks.text + b"'", data))
        around = data.translate(self._quotes).replace(marks.end, b"\r\n").split(marks.place)
        pieces = [b""] * (2 * rows + 1)
        # In a cell a list is a text as any other.
        pieces[::2], pieces[1::2] = around, self._lists.split(_one_line(self._lists.escaped(cited)))
        return b"".join(pieces)


def _count(data: bytes, marks: bytes) -> int:
    return len(data) - len(data.translate(None, marks))


def _escapes(marks: bytes) -> list[tuple[bytes, bytes]]:
    return [(sign, escape) for sign, escape in _ESCAPES if sign not in marks]


def _escape(data: bytes, escapes: Sequence[tuple[bytes, bytes]]) -> bytes:
    """What strings of JSON cannot hold as it is; marks stay."""
    for sign, escape in escapes:
        data = data.replace(sign, escape)  # a single byte that is not there is looked for in no time
    return data


def _one_line(data: bytes) -> bytes:
    """What would end a cell, or a line; marks stay."""
    data = data.replace(b'"', b'""')
    if b"\r" in data:
        data = data.replace(b"\r\n", b" ")
    for sign in _SHORT_BREAKS:
        data = data.replace(sign, b" ")
    if b"\xc2" in data:
        data = data.replace("\x85".encode(), b" ")
    if _SEPARATORS.search(data):
        data = _SEPARATORS.sub(b" ", data)
    return data


def _any_of(signs: Iterable[str]) -> bytes:
    return b"|".join(re.escape(sign.encode()) for sign in signs)
