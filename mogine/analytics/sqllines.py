"""Some rows as the lines of a file, put together by the database: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two. What texts need is done in marks.py.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from mogine.analytics.engine import Reader
from mogine.analytics.export import COLUMNS, render_records
from mogine.analytics.marks import Finish, Marks
from mogine.analytics.records import SIGNALS, signals_of
from mogine.analytics.store import COST_DIGITS, AnalyticsStore, LastingReader

_NUMBERS = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_token_ms", "duration_ms", "search_ms",
)  # fmt: skip
_REALS = ("top_score", "cost_cny")
_FLAGS = ("tokens_estimated", "bot")
_NO_TEXTS = ("started_at", "citations", "signals", *_NUMBERS, *_REALS, *_FLAGS)
_CITED = ("number", "title", "source", "heading", "url", "score")
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
        self._sql, self._marks_per_row = _select(words, format)
        self._finish = Finish(format, words.marks)

    def write(self, condition: str, params: Sequence[Any]) -> Piece:
        """The rows that meet `condition`, oldest first; in JSON each line begins with a comma.

        Raises StoreError.
        """
        sql = self._words.within(self._sql, condition)
        times = sql.count("?") // max(1, condition.count("?"))
        with self._reader.look() as reader:
            data, cited, rows, more = reader.as_bytes(sql, [*params] * times)
            if not rows:
                return Piece(b"", 0)
            if more is not None and self._found(data, cited) != rows * self._marks_per_row + more:
                return Piece(self._one_by_one(reader, condition, params), rows)
        return Piece(self._finish.lines(data, cited), rows)

    def _found(self, *data: bytes) -> int:
        return sum(map(self._words.marks.found_in, data))

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
    started_at: str

    def literal(self, text: str) -> str:
        """Text with marks in it."""

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        """`values` between the parts of `form`, which are one more; nothing for NULL."""

    def whole(self, value: str, absent: str) -> str: ...
    def real(self, value: str, absent: str) -> str:
        """The shortest form that gives the number back, as Python writes it."""

    def select(self, line: str, entry: str, comma: str, more: str) -> str:
        """Of some rows all lines, all lists of citations (of which `entry` tells one), how many rows, and the
        sum of `more`."""

    def within(self, select: str, condition: str) -> str:
        """`select` of the rows that meet a condition on `q`."""


class _Sqlite:
    marks = Marks(b"\xff", b"\xfe", b"\xfd", b"\xfc")  # no text of UTF-8 has such bytes
    begin = "BEGIN"
    started_at = f"strftime('%Y-%m-%dT%H:%M:%S', {_MS} / 1000, 'unixepoch') || printf('.%03dZ', {_MS} % 1000)"

    def literal(self, text: str) -> str:
        return f"CAST(x'{text.encode('latin-1').hex()}' AS TEXT)"

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        return f"printf({', '.join([self.literal('%s'.join(form)), *values])})"

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

    def select(self, line: str, entry: str, comma: str, more: str) -> str:
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
    marks = Marks(b"\x1c", b"\x1d", b"\x1e", b"\x1f")  # which a text may have: so they are counted
    started_at = (
        f"to_char(to_timestamp({_MS} / 1000), 'YYYY-MM-DD\"T\"HH24:MI:SS.') "
        f"|| lpad(({_MS} % 1000)::text, 3, '0') || 'Z'"
    )

    def __init__(self, *, in_spans: bool) -> None:
        self._in_spans = in_spans
        self.begin = "BEGIN"
        if in_spans:  # three walks side by side take half the time of two steps down an index for each row
            self.begin += "; SET LOCAL enable_mergejoin = on; SET LOCAL enable_nestloop = off"

    def literal(self, text: str) -> str:
        return _literal(text)

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        parts = [part for pair in zip(map(_literal, form), [*values, _NOTHING], strict=True) for part in pair]
        return f"concat({', '.join(filter(_NOTHING.__ne__, parts))})"

    def whole(self, value: str, absent: str) -> str:
        return f"coalesce({value}::text, {_literal(absent)})" if absent else value

    def real(self, value: str, absent: str) -> str:
        # Digits are the shortest, as Python's; beyond 1e15 they may be one more, of the same number.
        return (
            f"CASE WHEN {value} IS NULL THEN {_literal(absent)} "
            f"WHEN {value} = trunc({value}) AND abs({value}) < 1e15 THEN {value}::text || '.0' "
            f"ELSE {value}::text END"
        )

    def select(self, line: str, entry: str, comma: str, more: str) -> str:
        columns = f"count(*) AS n, string_agg({entry}, {_literal(comma)}) AS entries"
        if self._in_spans:
            cited = f"(SELECT c.seq, {columns} FROM ({self._ordered('{c}')}) AS c GROUP BY c.seq)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq AND {t}", "c.seq = q.seq"
        else:
            cited = f"LATERAL (SELECT {columns} FROM ({self._ordered('c.seq = q.seq')}) AS c)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq", "true"
        return (
            "SELECT string_agg(line, ''), string_agg(cited, ''), count(*), CAST(sum(more) AS bigint) "  # noqa: S608
            f"FROM (SELECT {line} AS line, {_list(self, 'c.entries')} AS cited, {more} AS more "
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


def _list(words: _Words, entries: str) -> str:
    """A row's citations, of which `entries` tells each."""
    return words.row(_list_form(words), [entries])


def _list_form(words: _Words) -> list[str]:
    return ["[", "]" + words.marks.end.decode("latin-1")]


def _select(words: _Words, format: str) -> tuple[str, int]:
    """What brings rows in `format`, and how many marks there are for each, but for those that it counts."""
    is_csv = format == "csv"
    comma, colon = (", ", ": ") if is_csv else (",", ":")
    form, values = _line(words, format)
    entry_form, entry_values = _entry(words, comma, colon)
    quoted = _by_signals(lambda signals: "0" if is_csv else str(2 * len(signals)))
    more = f"coalesce(c.n, 0) * {_marks(words, entry_form)} + {quoted}"
    select = words.select(words.row(form, values), words.row(entry_form, entry_values), comma, more)
    return select, _marks(words, form) + _marks(words, _list_form(words))


def _marks(words: _Words, form: Sequence[str]) -> int:
    return words.marks.found_in("".join(form).encode("latin-1"))


def _line(words: _Words, format: str) -> tuple[list[str], list[str]]:
    """A row in `format`, but for its citations: parts, and the values between them."""
    quote, text, end, cited = (mark.decode("latin-1") for mark in words.marks)
    is_csv = format == "csv"
    form, values = [f",{end}" if format == "json" else ""], list[str]()
    for place, name in enumerate(COLUMNS):
        is_text = name not in _NO_TEXTS
        if is_csv:
            before, after = text if is_text else quote, quote
        else:
            after = quote if is_text or name == "started_at" else ""
            before = f"{quote}{name}{quote}:{after}"
        form[-1] += ("," if place else "" if is_csv else "{") + before
        if name == "citations":
            form[-1] += cited + after
        else:
            values.append(_value(words, name, is_csv=is_csv))
            form.append(after)
    form[-1] += {"csv": end, "json": "}", "ndjson": "}" + end}[format]
    return form, values


def _entry(words: _Words, comma: str, colon: str) -> tuple[list[str], list[str]]:
    """A citation as an object, as `json.dumps` writes it with these signs between."""
    quote = words.marks.quote.decode("latin-1")
    form, values = ["{"], list[str]()
    for name in _CITED:
        around = "" if name in ("number", "score") else quote
        form[-1] += (comma if values else "") + f"{quote}{name}{quote}{colon}{around}"
        values.append(words.real("c.score", "") if name == "score" else f"c.{name}")
        form.append(around)
    form[-1] += "}"
    return form, values


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
    if name == "signals":
        quote, comma = ('"', ", ") if is_csv else (words.marks.quote.decode("latin-1"), ",")
        return _by_signals(lambda s: words.literal(f"[{comma.join(quote + name + quote for name in s)}]"))
    return column


def _by_signals(told: Callable[[Sequence[str]], str]) -> str:
    """What is told for each set of signals; nobody knows others."""
    named = (f"WHEN {bits} THEN {told(signals_of(bits))}" for bits in range(1 << len(SIGNALS)))
    return f"CASE q.signals {' '.join(named)} ELSE {told(())} END"
