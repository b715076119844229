"""From what a database has put together to the lines of a file, for all rows of a batch at once.

The database writes values as they are, and marks between them: bytes that no value has. Here signs in texts
are escaped, and only then the marks become signs of the format. That is a few passes over all bytes, which
cost less than one call for each text would.
"""

import json
import re
from typing import NamedTuple

from mogine.analytics.export import FORMULA_SIGNS

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
    """One byte each: a quotation mark, one before a text that may be a formula, the end of a row, and the
    place of a row's citations."""

    quote: bytes
    text: bytes
    end: bytes
    cited: bytes

    def found_in(self, data: bytes) -> int:
        """How many of them are there."""
        return len(data) - len(data.translate(None, b"".join(self)))


class JsonFinish:
    """Makes lines of JSON of what lies between marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._signs = bytes.maketrans(marks.quote + marks.end, b'"\n')
        self._escapes = [(sign, escape) for sign, escape in _ESCAPES if sign not in (marks.quote, marks.end)]

    def lines(self, marks: int | None, rows: bytes) -> bytes | None:
        """`rows` with all their citations in them.

        None when there are not `marks` marks, because a text has one too; with `marks` None no text can.
        """
        if marks is not None and self._marks.found_in(rows) != marks:
            return None
        return self.escaped(rows).translate(self._signs)

    def escaped(self, data: bytes) -> bytes:
        """`data` with what strings of JSON cannot hold as it is; quotes and ends that are marked stay."""
        for sign, escape in self._escapes:
            data = data.replace(sign, escape)  # a single byte that is not there is looked for in no time
        return data


class CsvFinish:
    """Makes lines of CSV of what lies between marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._json = JsonFinish(marks)
        self._quotes = bytes.maketrans(marks.quote + marks.text, b'""')
        self._breaks = [sign for sign in _SHORT_BREAKS if sign not in marks]
        # Most texts begin with a letter, a digit or a Chinese character, or are none: that is told first.
        harmless = rb"[0-9A-Za-z\xe4-\xe9" + re.escape(marks.quote) + rb"]"
        formula = rb"(?:" + _any_of(_BLANKS) + rb")*(?:" + _any_of(FORMULA_SIGNS) + rb")"
        self._formula = re.compile(re.escape(marks.text) + rb"(?!" + harmless + rb")(?=" + formula + rb")")

    def lines(self, marks: int | None, rows: bytes, cited: bytes) -> bytes | None:
        """`rows` with the lists of `cited`, which are JSON, in their places; both end rows with a mark.

        None when there are not `marks` marks, because a text has one too; with `marks` None no text can.
        """
        _, text, end, place = self._marks
        cells, in_cells = self._cells(self._formula.sub(text + b"'", rows))
        lists, in_lists = self._cells(self._json.escaped(cited))
        ended = cells.replace(end, b"\r\n")
        around, within = ended.split(place), lists.split(end)
        if len(around) != len(within):
            return None
        pieces = [b""] * (2 * len(around) - 1)
        pieces[::2], pieces[1::2] = around, within[:-1]
        data = b"".join(pieces)
        if marks is not None:
            # Told by what became of them, which takes half the time of counting them.
            quotes = data.count(b'"') - in_cells - in_lists
            if quotes + len(ended) - len(cells) + len(around) - 1 + len(within) - 1 != marks:
                return None
        return data

    def _cells(self, data: bytes) -> tuple[bytes, int]:
        """`data` with nothing in it that ends a cell, or a line, and quotes for marks; how many quotes there
        are that were no marks."""
        doubled = data.replace(b'"', b'""')
        quotes = 2 * (len(doubled) - len(data))
        data = doubled
        if b"\r" in data:
            data = data.replace(b"\r\n", b" ")
        for sign in self._breaks:
            data = data.replace(sign, b" ")
        if b"\xc2" in data:
            data = data.replace("\x85".encode(), b" ")
        if _SEPARATORS.search(data):
            data = _SEPARATORS.sub(b" ", data)
        return data.translate(self._quotes), quotes


def _any_of(signs: str) -> bytes:
    return b"|".join(re.escape(sign.encode()) for sign in signs)
