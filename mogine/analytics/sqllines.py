"""Some rows as the lines of a file, written by the database itself: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from mogine.analytics.export import COLUMNS, FORMULA_SIGNS
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
# PostgreSQL has no such bytes: there they are breaks, of which it has made blanks wherever texts have them.
_CELL_BREAK, _ROW_BREAK = "\x1c", "\x1d"


class Piece(NamedTuple):
    """Some lines, as bytes of UTF-8, and how many rows they are."""

    data: bytes
    rows: int


class Hand:
    """Writes batches of rows as lines, each from one state of the record. For one thread at a time."""

    def __init__(self, store: AnalyticsStore, format: str, deadline_s: float | None = None) -> None:
        self._reader = LastingReader(store, deadline_s)
        self._is_csv = format == "csv"
        words: _Words = _Sqlite() if store.is_file else _Postgres()
        self._sql = (
            f"SELECT {words.every}, count(*) FROM (SELECT {_line(words, format)} AS line "  # noqa: S608
            "FROM queries q LEFT JOIN texts t ON t.seq = q.seq WHERE {condition} ORDER BY q.seq) AS lines"
        )

    def write(self, condition: str, params: Sequence[Any]) -> Piece:
        """The rows that meet `condition`, oldest first; in JSON each line begins with a comma.

        Raises StoreError.
        """
        with self._reader.look() as reader:
            data, rows = reader.one(self._sql.replace("{condition}", condition), params)
        if isinstance(data, str):  # of PostgreSQL
            data = data.encode()
            if self._is_csv:
                data = data.replace(_CELL_BREAK.encode(), _CELL_END).replace(_ROW_BREAK.encode(), _ROW_END)
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

_MS = "(q.seq >> 20)"
_CITED = ("number", "title", "source", "heading", "url", "score")


class _Words(Protocol):
    """What one database says otherwise than the other. Values are columns, `absent` is told for NULL."""

    every: str  # all lines as one value
    started_at: str

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        """`values` between the parts of `form`, which are one more."""

    def sign(self, sign: str) -> str: ...
    def whole(self, value: str, absent: str) -> str: ...
    def real(self, value: str, absent: str) -> str:
        """The shortest form that gives the number back, as Python writes it."""

    def quoted(self, value: str) -> str:
        """As a string of JSON."""

    def cell(self, value: str) -> str:
        """As text in which nothing ends a cell."""

    def begins_well(self, value: str) -> str:
        """Whether it begins with a letter, a digit or a Chinese character, as most do."""

    def list(self, value: str, comma: str) -> str:
        """`value` of each citation, in the order of their numbers."""


class _Sqlite:
    every = "CAST(group_concat(line, '') AS BLOB)"
    started_at = f"strftime('%Y-%m-%dT%H:%M:%S', {_MS} / 1000, 'unixepoch') || printf('.%03dZ', {_MS} % 1000)"

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        whole = "%s".join(form).encode("latin-1")
        return f"printf(CAST(x'{whole.hex()}' AS TEXT), {', '.join(values)})"

    def sign(self, sign: str) -> str:
        return f"char({ord(sign)})"

    def whole(self, value: str, absent: str) -> str:
        return f"coalesce({value}, {_literal(absent)})"

    def real(self, value: str, absent: str) -> str:
        # SQLite's own form for numbers of few digits, as ours are (then a whole number divided gives just the
        # same); of others Python is asked.
        unit = f"1e{COST_DIGITS}"
        return (
            f"CASE WHEN CAST({value} * {unit} + 0.5 AS INTEGER) / {unit} = {value} "
            f"AND {value} BETWEEN 0.0001 AND 1000 THEN printf('%!.15g', {value}) "
            f"WHEN {value} IS NULL THEN {_literal(absent)} ELSE exact({value}) END"
        )

    def quoted(self, value: str) -> str:
        return f"json_quote({value})"

    def cell(self, value: str) -> str:
        return value

    def begins_well(self, value: str) -> str:
        return f"{value} GLOB '[0-9A-Za-z\u4e00-\u9fff]*'"

    def list(self, value: str, comma: str) -> str:
        # The table has no other order than that of its key, which is the one that is wanted.
        return f"group_concat({value}, {_literal(comma)})"


class _Postgres:
    every = "string_agg(line, '')"
    started_at = (
        f"to_char(to_timestamp({_MS} / 1000), 'YYYY-MM-DD\"T\"HH24:MI:SS.') "
        f"|| lpad(({_MS} % 1000)::text, 3, '0') || 'Z'"
    )

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        literals = [_literal(part.replace("\xff", _CELL_BREAK).replace("\xfe", _ROW_BREAK)) for part in form]
        parts = [part for pair in zip(literals, [*values, "''"], strict=True) for part in pair]
        return " || ".join(f"({part})" for part in parts if part != "''")

    def sign(self, sign: str) -> str:
        return f"chr({ord(sign)})"

    def whole(self, value: str, absent: str) -> str:
        return f"coalesce({value}::text, {_literal(absent)})"

    def real(self, value: str, absent: str) -> str:
        # Digits are the shortest, as Python's; beyond 1e15 they may be one more, of the same number.
        return (
            f"CASE WHEN {value} IS NULL THEN {_literal(absent)} "
            f"WHEN {value} = trunc({value}) AND abs({value}) < 1e15 THEN {value}::text || '.0' "
            f"ELSE {value}::text END"
        )

    def quoted(self, value: str) -> str:
        return f"to_json({value})::text"

    def cell(self, value: str) -> str:
        return f"translate({value}, {_literal(_CELL_BREAK + _ROW_BREAK)}, '  ')"

    def begins_well(self, value: str) -> str:
        ranges = (("0", ":"), ("A", "["), ("a", "{"), ("\u4e00", "\ua000"))
        return " OR ".join(f"{value} >= '{low}' AND {value} < '{past}'" for low, past in ranges)

    def list(self, value: str, comma: str) -> str:
        return f"string_agg({value}, {_literal(comma)} ORDER BY c.number)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _signals(comma: str) -> str:
    lists = (json.dumps(list(signals_of(bits)), separators=(comma, ":")) for bits in range(1 << len(SIGNALS)))
    named = (f"WHEN {bits} THEN {_literal(text)}" for bits, text in enumerate(lists))
    return f"CASE q.signals {' '.join(named)} ELSE '[]' END"


def _citations(words: _Words, comma: str, colon: str) -> str:
    """A list of objects, as `json.dumps` writes it with these signs between."""
    form = [f'"{name}"{colon}' for name in _CITED]
    form = ["{" + form[0], *(comma + part for part in form[1:]), "}"]
    texts = (words.quoted(f"c.{name}") for name in _CITED[1:-1])
    entry = words.row(form, [words.whole("c.number", ""), *texts, words.real("c.score", "")])
    return (
        f"(SELECT '[' || coalesce({words.list(entry, comma)}, '') || ']' "  # noqa: S608
        "FROM citations c WHERE c.seq = q.seq)"
    )


def _column(name: str) -> str:
    return f"coalesce(t.{name}, '')" if name in ("question", "answer") else f"q.{name}"


def _harmless(words: _Words, value: str) -> str:
    """Nothing that a spreadsheet takes for a formula; see `export.cell`."""
    signs = ", ".join(map(words.sign, FORMULA_SIGNS))
    mark = f"CASE WHEN substr(ltrim({value}, {_literal(_BLANKS)}), 1, 1) IN ({signs}) THEN '''' ELSE '' END"
    cell = words.cell(value)
    return f"CASE WHEN {words.begins_well(value)} OR {value} = '' THEN {cell} ELSE {mark} || {cell} END"


def _value(words: _Words, name: str, *, is_csv: bool) -> str:
    column, absent = _column(name), "" if is_csv else "null"
    if name == "started_at":
        return words.started_at if is_csv else f"'\"' || {words.started_at} || '\"'"
    if name in _NUMBERS:
        return words.whole(column, absent)
    if name in _REALS:
        return words.real(column, absent)
    if name in _FLAGS:
        return f"CASE WHEN {column} <> 0 THEN 'true' ELSE 'false' END"
    if name == "signals":
        return _signals(", " if is_csv else ",")
    if name == "citations":
        return _citations(words, ", ", ": ") if is_csv else _citations(words, ",", ":")
    return _harmless(words, column) if is_csv else words.quoted(column)


def _line(words: _Words, format: str) -> str:
    """A row in `format`: in CSV cells as they are, for `_quoted`."""
    values = [_value(words, name, is_csv=format == "csv") for name in COLUMNS]
    if format == "csv":
        return words.row(["", *["\xff"] * (len(values) - 1), "\xfe"], values)
    form = [f'"{name}":' for name in COLUMNS]
    line = words.row(["{" + form[0], *("," + part for part in form[1:]), "}"], values)
    newline = words.sign("\n")
    return f"',' || {newline} || {line}" if format == "json" else f"{line} || {newline}"
