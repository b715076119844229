"""Rows as lines of a file, written by SQLite itself: many times faster than by way of objects.

What a line looks like is told by export.py, and a test compares the two. A thread makes the next lines while
those before are taken; more threads only wait for SQLite's one lock on memory.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from mogine.analytics.export import (
    BOM,
    COLUMNS,
    FORMATS,
    FORMULA_SIGNS,
    check_format,
    heading,
    render_records,
)
from mogine.analytics.records import SIGNALS, QueryRecord, Selection, signals_of
from mogine.analytics.store import COST_DIGITS, AnalyticsStore, LastingReader

BATCH = 1000
AHEAD = 3  # batches that wait for a slow taker, of some hundred kilobytes each

_NUMBERS = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_token_ms", "duration_ms", "search_ms",
)  # fmt: skip
_REALS = ("top_score", "cost_cny")
_FLAGS = ("tokens_estimated", "bot")
_OWN_WORDS = ("id", "kind", "visitor", "provider", "status", "error_type", "answered", "feedback")
_BREAKS = ("\r\n", *"\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
# What may stand before a formula without keeping a spreadsheet from seeing it; tabs and line ends are signs.
_BLANKS = "".join(
    sign
    for sign in map(chr, range(0x10000))
    if re.match(r"[\s\ufeff\u200b-\u200f\u2060\x01-\x1f]", sign) and sign not in "\t\r\n"
)


class Piece(NamedTuple):
    """Some lines, as bytes of UTF-8, and how many rows they are."""

    data: bytes
    rows: int


def render_rows(
    store: AnalyticsStore,
    selection: Selection,
    format: str,
    *,
    bom: bool = False,
    deadline_s: float | None = None,
) -> Iterator[Piece]:
    """Every row of `selection` in `format`, oldest first, in pieces; whatever their number, memory stays.

    Each batch is one state of the record, and nothing is held open between them: a slow taker never keeps
    the journal from being emptied. Raises RequestError for an unknown format, StoreError.
    """
    check_format(format)
    if not store.is_file:
        yield from _by_objects(store, selection, format, bom, deadline_s)
        return
    if format == "csv":
        yield Piece(((BOM if bom else "") + heading(COLUMNS)).encode(), 0)
    elif format == "json":
        yield Piece(b"[", 0)
    first = True
    for batch in _ahead(store, selection, _SQL[format], deadline_s):
        data = batch.data
        if format == "json" and batch.rows:
            # Each line begins with a comma, which the first one has no use for.
            data, first = (data[1:] if first else data), False
        yield Piece(data, batch.rows)
    if format == "json":
        yield Piece(b"]\n" if first else b"\n]\n", 0)


def _by_objects(
    store: AnalyticsStore, selection: Selection, format: str, bom: bool, deadline_s: float | None
) -> Iterator[Piece]:
    """The same lines by way of objects, for a database that cannot write them."""
    taken = 0

    def rows() -> Iterator[QueryRecord]:
        nonlocal taken
        for record in store.iterate(selection, batch=BATCH, deadline_s=deadline_s):
            taken += 1
            yield record

    lines: list[str] = []
    for line in render_records(rows(), format, bom=bom):
        lines.append(line)
        if len(lines) >= BATCH:
            yield Piece("".join(lines).encode(), taken)
            lines, taken = [], 0
    if lines:
        yield Piece("".join(lines).encode(), taken)


def _ahead(
    store: AnalyticsStore, selection: Selection, line: str, deadline_s: float | None
) -> Iterator[Piece]:
    """Batches in their order, a few of them being made while the one before is taken."""

    lasting = LastingReader(store, deadline_s)

    def render(keys: Sequence[Any]) -> Piece:
        condition, params = keys
        with lasting.look() as reader:
            data, rows = reader.one(
                f"SELECT CAST(group_concat(line, '') AS BLOB), count(*) FROM (SELECT {line} AS line "  # noqa: S608
                f"FROM queries q LEFT JOIN texts t ON t.seq = q.seq WHERE {condition} ORDER BY q.seq)",
                params,
            )
        return Piece(data or b"", rows)

    waiting: deque[Future[Piece]] = deque()
    with ThreadPoolExecutor(1, "export") as pool:
        try:
            for keys in store.batches(selection, BATCH, deadline_s):
                waiting.append(pool.submit(render, keys))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
    lasting.close()


# --- one row as SQL ------------------------------------------------------------------------------


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _char(text: str) -> str:
    return f"char({', '.join(str(ord(sign)) for sign in text)})"


def _real(column: str) -> str:
    """The shortest form that gives the number back: SQLite's own for numbers of few digits, as ours are;
    of others Python is asked."""
    return (
        f"CASE WHEN {column} IS NULL THEN '' WHEN {column} = round({column}, {COST_DIGITS}) "
        f"AND abs({column}) BETWEEN 0.0001 AND 1000 THEN printf('%!.15g', {column}) ELSE exact({column}) END"
    )


def _started_at() -> str:
    at_ms = "(q.seq >> 20)"
    return f"strftime('%Y-%m-%dT%H:%M:%S', {at_ms} / 1000, 'unixepoch') || printf('.%03dZ', {at_ms} % 1000)"


def _signals(comma: str) -> str:
    lists = (json.dumps(list(signals_of(bits)), separators=(comma, ":")) for bits in range(1 << len(SIGNALS)))
    named = (f"WHEN {bits} THEN {_literal(text)}" for bits, text in enumerate(lists))
    return f"CASE q.signals {' '.join(named)} ELSE '[]' END"


def _citations(comma: str, colon: str) -> str:
    """A list of objects, as `json.dumps` writes it with these signs between."""
    names = ("number", "title", "source", "heading", "url", "score")
    form = comma.join(f'"{name}"{colon}%s' for name in names)
    words = (f"json_quote(c.{name})" for name in names[1:-1])
    entry = f"printf({_literal('{' + form + '}')}, c.number, {', '.join(words)}, {_real('c.score')})"
    return (
        f"(SELECT '[' || coalesce(group_concat({entry}, {_literal(comma)}), '') || ']' FROM "  # noqa: S608
        "(SELECT * FROM citations c WHERE c.seq = q.seq ORDER BY c.number) c)"
    )


def _column(name: str) -> str:
    return f"coalesce(t.{name}, '')" if name in ("question", "answer") else f"q.{name}"


def _one_line(value: str, breaks: Iterable[str] = _BREAKS) -> str:
    for sign in breaks:
        value = f"replace({value}, {_char(sign)}, ' ')"
    return value


def _harmless(value: str, *, is_own: bool = False) -> str:
    """On one line, and nothing that a spreadsheet takes for a formula; see `export.cell`."""
    signs = ", ".join(_char(sign) for sign in FORMULA_SIGNS)
    mark = f"CASE WHEN substr(ltrim({value}, {_literal(_BLANKS)}), 1, 1) IN ({signs}) THEN '''' ELSE '' END"
    # Most are words of plain ASCII, which need none of that.
    if is_own:  # one look is enough where a word of letters and digits is expected
        is_plain = f"{value} NOT GLOB '*[^0-9A-Za-z_]*'"
    else:
        is_plain = f"{value} = '' OR ({value} GLOB '[A-Za-z0-9]*' AND {value} NOT GLOB '*[^ -~]*')"
    return f"CASE WHEN {is_plain} THEN {value} ELSE {mark} || {_one_line(value)} END"


def _csv() -> str:
    """All cells quoted: `%w` doubles the quotation marks within."""
    values = []
    for name in COLUMNS:
        column = _column(name)
        if name == "started_at":
            value = _started_at()
        elif name in _NUMBERS:
            value = column
        elif name in _REALS:
            value = _real(column)
        elif name in _FLAGS:
            value = f"CASE WHEN {column} THEN 'true' ELSE 'false' END"
        elif name == "signals":
            value = _signals(", ")
        elif name == "citations":
            value = _one_line(_citations(", ", ": "), "\x85\u2028\u2029")  # all else is escaped in JSON
        else:
            value = _harmless(column, is_own=name in _OWN_WORDS)
        values.append(f"coalesce({value}, '')")  # `%w` would write a NULL out
    form = ",".join(['"%w"'] * len(values))
    return f"printf({_literal(form)}, {', '.join(values)}) || char(13, 10)"


def _object() -> str:
    values = []
    for name in COLUMNS:
        column = _column(name)
        if name == "started_at":
            value = f"'\"' || {_started_at()} || '\"'"
        elif name in _NUMBERS:
            value = f"coalesce({column}, 'null')"
        elif name in _REALS:
            value = f"CASE WHEN {column} IS NULL THEN 'null' ELSE {_real(column)} END"
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
