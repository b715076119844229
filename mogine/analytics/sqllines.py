"""Some rows as the lines of a file, put together by the database: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two. What texts need is done in marks.py.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, Protocol

from mogine.analytics.export import COLUMNS, render_records
from mogine.analytics.marks import CsvFinish, JsonFinish, Marks
from mogine.analytics.records import SIGNALS, signals_of
from mogine.analytics.store import COST_DIGITS, AnalyticsStore, LastingReader

LONG_AFTER = 3  # batches; who writes more of them writes many
_ROOM_BYTES = 8_000_000
_SERVER_ROOM_BYTES = 30_000_000

_NUMBERS = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_token_ms", "duration_ms", "search_ms",
)  # fmt: skip
_REALS = ("top_score", "cost_cny")
_FLAGS = ("tokens_estimated", "bot")
_BARE = ("signals", *_NUMBERS, *_REALS, *_FLAGS)
_NO_TEXTS = ("started_at", "citations", *_BARE)
_CITED = ("number", "title", "source", "heading", "url", "score")
_NOTHING = "''"
_MS = "(q.seq >> 20)"


def keep_room() -> None:
    """Lets this process keep the memory of smaller values; see `settle` of _Postgres."""
    bytes(_ROOM_BYTES)


class Piece(NamedTuple):
    """Some lines, as bytes of UTF-8, and how many rows they are."""

    data: bytes
    rows: int

    def finish(self) -> "Piece":
        """Itself."""
        return self


class Unfinished(Protocol):
    """What becomes a Piece when somebody takes it."""

    def finish(self) -> Piece: ...


class Read(NamedTuple):
    """Some rows as the database has put them together, and how many marks must be there."""

    data: list[bytes]
    rows: int
    marks: int | None
    lines: Callable[..., bytes | None]
    one_by_one: Callable[[], Piece]

    def finish(self) -> Piece:
        """The lines of a file. Raises StoreError."""
        lines = self.lines(self.marks, *self.data)
        return self.one_by_one() if lines is None else Piece(lines, self.rows)


class Hand:
    """Reads batches of rows that become lines, each from one state of the record. One thread at a time reads.

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
        self._in_spans = in_spans
        self._batches = 0
        self._lock = Lock()
        self._sql, self._marks_per_row = _select(words, format)
        self._finish: Callable[..., bytes | None] = (
            CsvFinish(words.marks).lines if format == "csv" else JsonFinish(words.marks).lines
        )

    def read(self, condition: str, params: Sequence[Any]) -> Unfinished:
        """The rows that meet `condition`, oldest first; in JSON each line begins with a comma.

        Raises StoreError.
        """
        sql = self._words.within(self._sql, condition)
        times = sql.count("?") // max(1, condition.count("?"))
        with self._lock, self._reader.look() as reader:
            if self._batches == LONG_AFTER and self._words.settle:
                reader.all(self._words.settle)
            self._batches += 1
            rows, more, *data = reader.as_bytes(sql, [*params] * times, is_repeated=self._in_spans)
        if not rows:
            return Piece(b"", 0)
        marks = None if more is None else rows * self._marks_per_row + more
        return Read(data, rows, marks, self._finish, partial(self._one_by_one, condition, params))

    def _one_by_one(self, condition: str, params: Sequence[Any]) -> Piece:
        """The slow way, for rows with a text that has a mark in it, as they are now."""
        with self._lock, self._reader.look() as reader:
            records = self._store.chosen(reader, condition, params)
        if self._format == "csv":
            lines: Iterator[str] = islice(render_records(records, "csv"), 1, None)
        else:
            lines = render_records(records, "ndjson")
            if self._format == "json":
                lines = (f",\n{line[:-1]}" for line in lines)
        return Piece("".join(lines).encode(), len(records))

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

    def literal(self, text: str) -> str:
        """Text with marks in it."""

    def row(self, form: Sequence[str], values: Sequence[str]) -> str:
        """`values` between the parts of `form`, which are one more; nothing for NULL."""

    def whole(self, value: str, absent: str) -> str: ...
    def real(self, value: str, absent: str) -> str:
        """The shortest form that gives the number back, as Python writes it."""

    def cited(self, entry: str, comma: str) -> str:
        """A row's citations, of which `entry` tells one, in the order of their numbers."""

    def select(self, columns: Sequence[str], entry: str, comma: str, more: str) -> str:
        """How many rows, the sum of `more` where marks must be counted, and each column of all rows as one
        text; {condition} stands for one on `q`."""

    def within(self, select: str, condition: str) -> str:
        """`select` of the rows that meet a condition on `q`."""


class _Sqlite:
    marks = Marks(b"\xff", b"\xfe", b"\xfd", b"\xfc")  # no text of UTF-8 has such bytes
    begin, settle = "BEGIN", ""
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

    def cited(self, entry: str, comma: str) -> str:
        # The table has no other order than that of its key, which is the one that is wanted.
        return f"(SELECT group_concat({entry}, {_literal(comma)}) FROM citations c WHERE c.seq = q.seq)"  # noqa: S608

    def select(self, columns: Sequence[str], entry: str, comma: str, more: str) -> str:
        return (
            f"SELECT count(*), NULL{_each('group_concat', columns)} FROM (SELECT {_named(columns)} "  # noqa: S608
            "FROM queries q LEFT JOIN texts t ON t.seq = q.seq WHERE {condition} ORDER BY q.seq) AS lines"
        )

    def within(self, select: str, condition: str) -> str:
        return select.replace("{condition}", condition)


class _Postgres:
    marks = Marks(b"\x1c", b"\x1d", b"\x1e", b"\x1f")  # which a text may have: so they are counted
    # The C library gives the memory of large values back to the system after each statement, and takes it
    # page by page for the next, a quarter of all the time; unless there has been a larger value before (up to
    # 32 MB) than all of a statement together.
    settle = f"SELECT octet_length(repeat(' ', {_SERVER_ROOM_BYTES}))"
    started_at = (
        f"to_char(to_timestamp({_MS} / 1000), 'YYYY-MM-DD\"T\"HH24:MI:SS.') "
        f"|| lpad(({_MS} % 1000)::text, 3, '0') || 'Z'"
    )

    def __init__(self, *, in_spans: bool) -> None:
        self._in_spans = in_spans
        self.begin = "BEGIN"
        if in_spans:
            # Three walks side by side take half the time of two steps down an index for each row. They need
            # no plan of their own for each batch: to read and plan it takes a millisecond.
            self.begin += (
                "; SET LOCAL enable_mergejoin = on; SET LOCAL enable_nestloop = off"
                "; SET LOCAL plan_cache_mode = force_generic_plan"
            )

    def literal(self, text: str) -> str:
        return _literal(text)

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

    def cited(self, entry: str, comma: str) -> str:
        return "c.entries"

    def select(self, columns: Sequence[str], entry: str, comma: str, more: str) -> str:
        citations = f"count(*) AS n, string_agg({entry}, {_literal(comma)}) AS entries"
        if self._in_spans:
            cited = f"(SELECT c.seq, {citations} FROM ({self._ordered('{c}')}) AS c GROUP BY c.seq)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq AND {t}", "c.seq = q.seq"
        else:
            cited = f"LATERAL (SELECT {citations} FROM ({self._ordered('c.seq = q.seq')}) AS c)"  # noqa: S608
            on_texts, on_cited = "t.seq = q.seq", "true"
        return (
            f"SELECT count(*), CAST(sum(more) AS bigint){_each('string_agg', columns)} "  # noqa: S608
            f"FROM (SELECT {more} AS more, {_named(columns)} "
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


def _named(columns: Sequence[str]) -> str:
    return ", ".join(f"{column} AS column_{place}" for place, column in enumerate(columns))


def _each(aggregate: str, columns: Sequence[str]) -> str:
    return "".join(f", {aggregate}(column_{place}, '')" for place in range(len(columns)))


def _select(words: _Words, format: str) -> tuple[str, int]:
    """What brings rows in `format`, and how many marks there are for each, but for those that it counts."""
    is_csv = format == "csv"
    comma, colon = (", ", ": ") if is_csv else (",", ":")
    quote = words.marks.quote.decode("latin-1")
    # In a cell of CSV a quotation mark stands twice.
    entry_form, entry_values = _entry(words, comma, colon, quote * 2 if is_csv else quote)
    entry = words.row(entry_form, entry_values)
    cited = words.cited(entry, comma)
    if is_csv:  # citations are JSON first, and then the text of a cell: they come by themselves
        form, values = _csv_line(words)
        list_form = ["", words.marks.end.decode("latin-1")]
        columns = [words.row(form, values), words.row(list_form, [cited])]
        form += list_form
    else:
        form, values = _json_line(words, cited, in_list=format == "json")
        columns = [words.row(form, values)]
    quotes = _by_signals(lambda signals: "0" if is_csv else str(2 * len(signals)))
    more = f"coalesce(c.n, 0) * {_marks(words, entry_form)} + {quotes}"
    return words.select(columns, entry, comma, more), _marks(words, form)


def _marks(words: _Words, form: Sequence[str]) -> int:
    return words.marks.found_in("".join(form).encode("latin-1"))


def _csv_line(words: _Words) -> tuple[list[str], list[str]]:
    """A row but for its citations: parts, and the values between them."""
    quote, text, end, place = (mark.decode("latin-1") for mark in words.marks)
    form, values = [""], list[str]()
    for name in COLUMNS:
        form[-1] += ("," if values else "") + (quote if name in _NO_TEXTS else text)
        if name == "citations":
            form[-1] += f"[{place}]{quote}"
        else:
            values.append(_value(words, name, is_csv=True))
            form.append(quote)
    form[-1] += end
    return form, values


def _json_line(words: _Words, cited: str, *, in_list: bool) -> tuple[list[str], list[str]]:
    """A row: parts, and the values between them; `in_list` in a list of JSON, after what is before it."""
    quote, _, end, _ = (mark.decode("latin-1") for mark in words.marks)
    form, values = [f",{end}{{" if in_list else "{"], list[str]()
    for name in COLUMNS:
        before, after = ("[", "]") if name == "citations" else ("", "") if name in _BARE else (quote, quote)
        form[-1] += ("," if values else "") + f"{quote}{name}{quote}:{before}"
        values.append(cited if name == "citations" else _value(words, name, is_csv=False))
        form.append(after)
    form[-1] += "}" if in_list else "}" + end
    return form, values


def _entry(words: _Words, comma: str, colon: str, quote: str) -> tuple[list[str], list[str]]:
    """A citation as an object, as `json.dumps` writes it with these signs between and around."""
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
