"""Some rows as the lines of a file, put together by the database: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two. What texts need is done in marks.py.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from mogine.analytics.engine import Reader
from mogine.analytics.export import COLUMNS, render_records
from mogine.analytics.marks import CITED, NO_TEXTS, CsvFinish, Finish, JsonFinish, Marks
from mogine.analytics.records import SIGNALS, signals_of
from mogine.analytics.store import COST_DIGITS, AnalyticsStore, LastingReader

LONG_AFTER = 3  # batches; who writes more of them writes many
ROOM_BYTES = 4_000_000

_NUMBERS = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_token_ms", "duration_ms", "search_ms",
)  # fmt: skip
_REALS = ("top_score", "cost_cny")
_FLAGS = ("tokens_estimated", "bot")
_NOTHING = "''"
_MS = "(q.seq >> 20)"


class Piece(NamedTuple):
    """Some lines, as bytes of UTF-8, and how many rows they are."""

    data: bytes
    rows: int


class Hand:
    """Writes batches of rows as lines, each from one state of the record. For one thread at a time.

    `in_spans`: each batch is all rows between two keys.
    """

    def __init__(
        self, store: AnalyticsStore, format: str, deadline_s: float | None = None, *, in_spans: bool = False
    ) -> None:
        words: _Words = _Sqlite() if store.is_file else _Postgres(in_spans=in_spans)
        self._store = store
        self._format = format
        self._reader = LastingReader(store, deadline_s, words.begin)
        self._words = words
        self._written = 0
        self._finish: Finish
        if format == "csv":
            self._finish, line = CsvFinish(words.marks), _csv_line(words)
        else:
            self._finish, line = JsonFinish(words.marks, in_list=format == "json"), _json_line(words)
        self._sql = words.select(line, _entry(words), ", " if format == "csv" else ",")

    def write(self, condition: str, params: Sequence[Any]) -> Piece:
        """The rows that meet `condition`, oldest first; in JSON each line begins with a comma.

        Raises StoreError.
        """
        sql = self._words.within(self._sql, condition)
        times = sql.count("?") // max(1, condition.count("?"))
        with self._reader.look() as reader:
            if self._written == LONG_AFTER and self._words.settle:
                reader.all(self._words.settle)
            self._written += 1
            data, cited, rows, citations = reader.as_bytes(sql, [*params] * times)
            lines = self._finish.lines(data, cited, rows, citations) if rows else b""
            if lines is None:
                lines = self._one_by_one(reader, condition, params)
        return Piece(lines, rows)

    def _one_by_one(self, reader: Reader, condition: str, params: Sequence[Any]) -> bytes:
        """The slow way, for rows with a text that has a mark in it."""
        records = self._store.chosen(reader, condition, params)
        if self._format == "csv":
            return "".join(islice(render_records(records, "csv"), 1, None)).encode()
        lines = render_records(records, "ndjson")
        if self._format == "json":
            lines = (f",\n{line[:-1]}" for line in lines)
        return "".join(lines).encode()

    def close(self) -> None:
        """Closes what it reads from."""
        self._reader.close()


# --- one row as SQL ------------------------------------------------------------------------------


class _Words(Protocol):
    """What one database says otherwise than the other. Values are columns, `absent` is told for NULL."""

    marks: Marks
    begin: str
    settle: str  # before a long export; "" for nothing
    started_at: str

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        """`values` between the parts of `form`, which are one more; nothing for NULL."""

    def whole(self, value: str, absent: str) -> str: ...
    def real(self, value: str, absent: str) -> str:
        """The shortest form that gives the number back, as Python writes it."""

    def select(self, line: str, entry: str, comma: str) -> str:
        """All lines as one text, and all lists of citations, of which `entry` tells one, in the order of
        their numbers; how many rows; how many citations, unless marks need not be counted."""

    def within(self, select: str, condition: str) -> str:
        """`select` of the rows that meet a condition on `q`."""


class _Sqlite:
    marks = Marks(b"\xff", b"\xfe", b"\xfd", b"\xfc", bytes(range(0xF5, 0xFB)))  # none is ever in UTF-8
    begin, settle = "BEGIN", ""
    started_at = f"strftime('%Y-%m-%dT%H:%M:%S', {_MS} / 1000, 'unixepoch') || printf('.%03dZ', {_MS} % 1000)"

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        whole = "%s".join(form).encode("latin-1")
        return f"printf(CAST(x'{whole.hex()}' AS TEXT), {', '.join(values)})"

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

    def select(self, line: str, entry: str, comma: str) -> str:
        # The table of citations has no other order than that of its key, which is the one that is wanted.
        entries = f"SELECT group_concat({entry}, {_literal(comma)}) FROM citations c WHERE c.seq = q.seq"  # noqa: S608
        return (
            "SELECT group_concat(line, ''), group_concat(cited, ''), count(*), NULL "  # noqa: S608
            f"FROM (SELECT {line} AS line, {_list(self, f'({entries})')} AS cited "
            "FROM queries q LEFT JOIN texts t ON t.seq = q.seq WHERE {condition} ORDER BY q.seq) AS lines"
        )

    def within(self, select: str, condition: str) -> str:
        return select.replace("{condition}", condition)


class _Postgres:
    marks = Marks(b"\x10", b"\x11", b"\x12", b"\x13", bytes(range(0x14, 0x1A)))  # a text may have them
    # The C library gives the memory of large values back to the system after each statement, and takes it
    # page by page for the next, a quarter of all the time; unless there has been a larger value before.
    settle = f"SELECT octet_length(repeat(' ', {ROOM_BYTES}))"
    started_at = (
        f"to_char(to_timestamp({_MS} / 1000), 'YYYY-MM-DD\"T\"HH24:MI:SS.') "
        f"|| lpad(({_MS} % 1000)::text, 3, '0') || 'Z'"
    )

    def __init__(self, *, in_spans: bool) -> None:
        self._in_spans = in_spans
        self.begin = "BEGIN"
        if in_spans:  # three walks side by side take half the time of two steps down an index for each row
            self.begin += "; SET LOCAL enable_mergejoin = on; SET LOCAL enable_nestloop = off"

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        texts = [f"coalesce(({value})::text, '')" for value in values]
        parts = [part for pair in zip(map(_literal, form), [*texts, _NOTHING], strict=True) for part in pair]
        return _joined([part for part in parts if part != _NOTHING])

    def whole(self, value: str, absent: str) -> str:
        return f"coalesce({value}::text, {_literal(absent)})" if absent else value

    def real(self, value: str, absent: str) -> str:
        # Digits are the shortest, as Python's; beyond 1e15 they may be one more, of the same number.
        return (
            f"CASE WHEN {value} IS NULL THEN {_literal(absent)} "
            f"WHEN {value} = trunc({value}) AND abs({value}) < 1e15 THEN {value}::text || '.0' "
            f"ELSE {value}::text END"
        )

    def select(self, line: str, entry: str, comma: str) -> str:
        citations = f"count(*) AS n, string_agg({entry}, {_literal(comma)}) AS entries"
        if self._in_spans:
            cited = f"(SELECT c.seq, {citations} FROM ({self._ordered('{c}')}) AS c GROUP BY c.seq)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq AND {t}", "c.seq = q.seq"
        else:
            cited = f"LATERAL (SELECT {citations} FROM ({self._ordered('c.seq = q.seq')}) AS c)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq", "true"
        return (
            "SELECT string_agg(line, ''), string_agg(cited, ''), count(*), CAST(sum(n) AS bigint) "  # noqa: S608
            f"FROM (SELECT {line} AS line, {_list(self, 'c.entries')} AS cited, coalesce(c.n, 0) AS n "
            f"FROM queries q LEFT JOIN texts t ON {on_texts} LEFT JOIN {cited} AS c ON {on_cited} "
            "WHERE {q} ORDER BY q.seq) AS lines"
        )

    def _ordered(self, condition: str) -> str:
        return f"SELECT * FROM citations c WHERE {condition} ORDER BY c.seq, c.number"  # noqa: S608

    def within(self, select: str, condition: str) -> str:
        for name in "tcq":
            select = select.replace(f"{{{name}}}", condition.replace("q.seq", f"{name}.seq"))
        return select


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _joined(parts: Sequence[str]) -> str:
    """Each half by itself: one after another, what is there already would be copied at every step."""
    half = len(parts) // 2
    return f"({_joined(parts[:half])} || {_joined(parts[half:])})" if half else parts[0]


def _list(words: _Words, entries: str) -> str:
    return words.row(["[", "]" + words.marks.end.decode("latin-1")], [entries])


def _csv_line(words: _Words) -> str:
    """A row but for its citations, in quotes."""
    quote, text, place, end, _ = (mark.decode("latin-1") for mark in words.marks)
    form, values = [""], list[str]()
    for name in COLUMNS:
        form[-1] += ("," if values else "") + (quote if name in NO_TEXTS else text)
        if name == "citations":
            form[-1] += place + quote
        else:
            values.append(_value(words, name, is_csv=True))
            form.append(quote)
    form[-1] += end
    return words.row(form, values)


def _json_line(words: _Words) -> str:
    """A row's cells, of which that of the citations is empty."""
    end = words.marks.end.decode("latin-1")
    form, values = [""], list[str]()
    for name in COLUMNS:
        if name == "citations":
            form[-1] += end
        else:
            values.append(_value(words, name, is_csv=False))
            form.append(end)
    return words.row(form, values)


def _entry(words: _Words) -> str:
    """A citation, to be made an object."""
    form = [*words.marks.cited.decode("latin-1"), "}"]
    return words.row(form, [words.real("c.score", "") if name == "score" else f"c.{name}" for name in CITED])


def _value(words: _Words, name: str, *, is_csv: bool) -> str:
    column, absent = ("t." if name in ("question", "answer") else "q.") + name, "" if is_csv else "null"
    if name == "started_at":
        return words.started_at
    if name in _NUMBERS:
        return words.whole(column, absent)
    if name in _REALS:
        return words.real(column, absent)
    if name in _FLAGS:
        return f"CASE WHEN {column} <> 0 THEN 'true' ELSE 'false' END"
    if name == "signals" and is_csv:
        lists = enumerate(json.dumps(signals_of(bits)) for bits in range(1 << len(SIGNALS)))
        return (
            f"CASE q.signals {' '.join(f'WHEN {n} THEN {_literal(text)}' for n, text in lists)} ELSE '[]' END"
        )
    return column
