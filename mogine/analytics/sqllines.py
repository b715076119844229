"""Some rows as the lines of a file, written by SQLite itself: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mogine.analytics.export import COLUMNS, FORMATS, FORMULA_SIGNS
from mogine.analytics.records import SIGNALS, signals_of
from mogine.analytics.store import COST_DIGITS, AnalyticsStore, LastingReader

_NUMBERS = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_token_ms", "duration_ms", "search_ms",
)  # fmt: skip
_REALS = ("top_score", "cost_cny")
_FLAGS = ("tokens_estimated", "bot")
_SHORT_BREAKS = tuple(sign.encode() for sign in "\n\r\x0b\x0c\x1c\x1d\x1e")
_SEPARATORS = re.compile(rb"\xe2\x80[\xa8\xa9]")  # U+2028, U+2029
# What may stand before a formula without keeping a spreadsheet from seeing it; tabs and line ends are signs.
_BLANKS = "".join(
    sign
    for sign in map(chr, [*range(1, 0x3001), 0xFEFF])
    if (sign.isspace() or sign < " " or sign in "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060")
    and sign not in "\t\r\n"
)
# Ends of a cell and of a row, until all is done that must be done to what is in them: bytes that no text has.
_CELL_END, _ROW_END = b"\xff", b"\xfe"


class Piece(NamedTuple):
    """Some lines, as bytes of UTF-8, and how many rows they are."""

    data: bytes
    rows: int


class Hand:
    """Writes batches of rows as lines, each from one state of the record. For one thread at a time."""

    def __init__(self, store: AnalyticsStore, format: str, deadline_s: float | None = None) -> None:
        self._reader = LastingReader(store, deadline_s)
        self._is_csv = format == "csv"
        self._sql = (
            f"SELECT CAST(group_concat(line, '') AS BLOB), count(*) FROM (SELECT {_SQL[format]} AS line "  # noqa: S608
            "FROM queries q LEFT JOIN texts t ON t.seq = q.seq WHERE {condition} ORDER BY q.seq)"
        )

    def write(self, condition: str, params: Sequence[Any]) -> Piece:
        """The rows that meet `condition`, oldest first; in JSON each line begins with a comma.

        Raises StoreError.
        """
        with self._reader.look() as reader:
            data, rows = reader.one(self._sql.replace("{condition}", condition), params)
        return Piece(_quoted(data) if self._is_csv and data else data or b"", rows)

    def close(self) -> None:
        """Closes what it reads from."""
        self._reader.close()


def _quoted(data: bytes) -> bytes:
    """Rows of cells as CSV. In SQL it would take twice the time of all the rest."""
    data = data.removesuffix(_ROW_END).replace(b'"', b'""')
    # A single byte is looked for twenty times as fast as several.
    if b"\r" in data:
        data = data.replace(b"\r\n", b" ")
    for sign in _SHORT_BREAKS:
        data = data.replace(sign, b" ")
    if b"\xc2" in data:
        data = data.replace("\x85".encode(), b" ")
    if _SEPARATORS.search(data):
        data = _SEPARATORS.sub(b" ", data)
    return b'"' + data.replace(_CELL_END, b'","').replace(_ROW_END, b'"\r\n"') + b'"\r\n'


# --- one row as SQL ------------------------------------------------------------------------------


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _char(text: str) -> str:
    return f"char({', '.join(str(ord(sign)) for sign in text)})"


def _real(column: str, absent: str) -> str:
    """The shortest form that gives the number back: SQLite's own for numbers of few digits, as ours are (then
    a whole number divided gives just the same); of others Python is asked."""
    unit = f"1e{COST_DIGITS}"
    return (
        f"CASE WHEN CAST({column} * {unit} + 0.5 AS INTEGER) / {unit} = {column} "
        f"AND {column} BETWEEN 0.0001 AND 1000 THEN printf('%!.15g', {column}) "
        f"WHEN {column} IS NULL THEN {_literal(absent)} ELSE exact({column}) END"
    )


def _started_at() -> str:
    at_ms = "(q.seq >> 20)"
    return f"strftime('%Y-%m-%dT%H:%M:%S', {at_ms} / 1000, 'unixepoch') || printf('.%03dZ', {at_ms} % 1000)"


def _signals(comma: str) -> str:
    lists = (json.dumps(list(signals_of(bits)), separators=(comma, ":")) for bits in range(1 << len(SIGNALS)))
    named = (f"WHEN {bits} THEN {_literal(text)}" for bits, text in enumerate(lists))
    return f"CASE q.signals {' '.join(named)} ELSE '[]' END"


def _citations(comma: str, colon: str) -> str:
    """A list of objects, as `json.dumps` writes it with these signs between.

    The table has no other order than that of its key, which is the one that is wanted.
    """
    names = ("number", "title", "source", "heading", "url", "score")
    form = comma.join(f'"{name}"{colon}%s' for name in names)
    words = (f"json_quote(c.{name})" for name in names[1:-1])
    entry = f"printf({_literal('{' + form + '}')}, c.number, {', '.join(words)}, {_real('c.score', '')})"
    return (
        f"(SELECT '[' || coalesce(group_concat({entry}, {_literal(comma)}), '') || ']' "  # noqa: S608
        "FROM citations c WHERE c.seq = q.seq)"
    )


def _column(name: str) -> str:
    return f"coalesce(t.{name}, '')" if name in ("question", "answer") else f"q.{name}"


def _harmless(value: str) -> str:
    """Nothing that a spreadsheet takes for a formula; see `export.cell`."""
    signs = ", ".join(_char(sign) for sign in FORMULA_SIGNS)
    mark = f"CASE WHEN substr(ltrim({value}, {_literal(_BLANKS)}), 1, 1) IN ({signs}) THEN '''' ELSE '' END"
    # Most begin with a letter, a digit or a Chinese character, or are empty.
    return (
        f"CASE WHEN {value} GLOB '[0-9A-Za-z\u4e00-\u9fff]*' OR {value} = '' THEN {value} "
        f"ELSE {mark} || {value} END"
    )


def _csv() -> str:
    """Cells as they are, for `_quoted`."""
    values = []
    for name in COLUMNS:
        column = _column(name)
        if name == "started_at":
            value = _started_at()
        elif name in _NUMBERS:
            value = column
        elif name in _REALS:
            value = _real(column, "")
        elif name in _FLAGS:
            value = f"CASE WHEN {column} THEN 'true' ELSE 'false' END"
        elif name == "signals":
            value = _signals(", ")
        elif name == "citations":
            value = _citations(", ", ": ")
        else:
            value = _harmless(column)
        values.append(value)
    form = _CELL_END.join([b"%s"] * len(values)) + _ROW_END
    return f"printf(CAST(x'{form.hex()}' AS TEXT), {', '.join(values)})"


def _object() -> str:
    values = []
    for name in COLUMNS:
        column = _column(name)
        if name == "started_at":
            value = f"'\"' || {_started_at()} || '\"'"
        elif name in _NUMBERS:
            value = f"coalesce({column}, 'null')"
        elif name in _REALS:
            value = _real(column, "null")
        elif name in _FLAGS:
            value = f"CASE WHEN {column} THEN 'true' ELSE 'false' END"
        elif name == "signals":
            value = _signals(",")
        elif name == "citations":
            value = _citations(",", ":")
        else:
            value = f"json_quote({column})"
        values.append(value)
    form = "{" + ",".join(f'"{name}":%s' for name in COLUMNS) + "}"
    return f"printf({_literal(form)}, {', '.join(values)})"


_SQL = {
    "csv": _csv(),
    "json": f"',' || char(10) || {_object()}",
    "ndjson": f"{_object()} || char(10)",
}
if set(_SQL) != set(FORMATS):
    raise AssertionError("every format has its lines")
