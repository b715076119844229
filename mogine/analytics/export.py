"""Rows as CSV, JSON or NDJSON, one piece after another, so that any number of them fits into memory."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from mogine.analytics.records import QueryRecord, time_text
from mogine.analytics.store import GivenFeedback
from mogine.errors import RequestError

FORMATS = ("csv", "json", "ndjson")
MEDIA_TYPES: Mapping[str, str] = {
    "csv": "text/csv",
    "json": "application/json",
    "ndjson": "application/x-ndjson",
}
BOM = "\ufeff"
COLUMNS = ("id", "started_at", *(f.name for f in fields(QueryRecord) if f.name not in ("id", "started_at")))

# A spreadsheet takes a cell that begins so for a formula, also behind blanks and characters of no width.
FORMULA_SIGNS = "=+-@＝＋－＠﹢﹣﹦﹫\t\r\n"
_FORMULA = re.compile(rf"[\s\ufeff\u200b-\u200f\u2060\x00-\x1f]*[{re.escape(FORMULA_SIGNS)}]")
_BREAKS = re.compile(r"\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def to_dict(record: QueryRecord) -> dict[str, Any]:
    """One row as JSON tells it: exact, times in UTC."""
    values: dict[str, Any] = {name: getattr(record, name) for name in COLUMNS}
    values["started_at"] = time_text(record.started_at)
    values["signals"] = list(record.signals)
    values["citations"] = [
        {
            "number": c.number,
            "title": c.title,
            "source": c.source,
            "heading": c.heading,
            "url": c.url,
            "score": c.score,
        }
        for c in record.citations
    ]
    return values


def render(rows: Iterable[Mapping[str, Any]], format: str, *, bom: bool = False) -> Iterator[str]:
    """`rows` in `format`, piece by piece; all rows have the same keys.

    `bom` puts the mark in front by which Excel knows UTF-8. Raises RequestError(reason="bad_filter").
    """
    check_format(format)
    pieces = {"csv": _csv, "json": _json, "ndjson": _ndjson}[format](rows)
    if bom and format == "csv":
        yield BOM
    yield from pieces


def check_format(format: str) -> None:
    """Raises RequestError(reason="bad_filter") for a format that there is not."""
    if format not in FORMATS:
        raise RequestError(f"format must be one of {', '.join(FORMATS)}", reason="bad_filter", param="format")


def heading(columns: Iterable[str]) -> str:
    """The first line of a CSV."""
    return _writer()(columns)


def render_records(records: Iterable[QueryRecord], format: str, *, bom: bool = False) -> Iterator[str]:
    """Recorded questions in `format`; an empty CSV still has its heading."""
    if format != "csv":
        yield from render((to_dict(record) for record in records), format)
        return
    if bom:
        yield BOM
    write = _writer()
    yield write(COLUMNS)
    for record in records:
        yield write(to_dict(record).values())


def feedback_to_dict(given: GivenFeedback) -> dict[str, Any]:
    """One thumb as JSON tells it."""
    return {
        "id": given.id,
        "started_at": time_text(given.started_at),
        "given_at": time_text(given.given_at),
        "rating": given.rating,
        "handoff": given.handoff,
        "reason": given.reason,
        "comment": given.comment,
        "question": given.question,
    }


def cell(value: Any) -> str:
    """A value as the text of one CSV cell, harmless in any spreadsheet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if text.isprintable() and text[:1].isalnum():
        return text  # the common case: no break, nothing in front that a spreadsheet would act on
    formula = _FORMULA.match(text)
    text = _BREAKS.sub(" ", text).replace("\0", "")
    return f"'{text}" if formula else text


class _Line:
    """What `csv` writes to: keeps the one line just written."""

    text = ""

    def write(self, text: str) -> None:
        self.text = text


def _writer() -> Callable[[Iterable[Any]], str]:
    line = _Line()
    writer = csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\r\n")

    def write(values: Iterable[Any]) -> str:
        writer.writerow([cell(value) for value in values])
        return line.text

    return write


def _csv(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    write = _writer()
    for number, row in enumerate(rows):
        if number == 0:
            yield write(row)
        yield write(row.values())


def _json(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    before = "[\n"
    for row in rows:
        yield before + _dump(row)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _ndjson(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield _dump(row) + "\n"


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))
