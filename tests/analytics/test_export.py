"""Exports are exact in JSON, harmless in a spreadsheet, and never held whole."""

import csv
import io
import json
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mogine.analytics.export import COLUMNS, cell, render, render_records, to_dict
from mogine.analytics.lines import render_rows
from mogine.analytics.records import SIGNALS, QueryRecord, Selection
from mogine.analytics.store import AnalyticsStore
from mogine.chat import Citation
from mogine.errors import RequestError
from tests.analytics.rows import cite, in_a_file, row

HOSTILE = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1",
    "\u3000=1", "\xa0=1", "\ufeff=1", "\u200b=1",
    "＝1", "＋1", "－1", "＠x", " ＝1", "\x00=1", "=HYPERLINK(\"http://x\",\"y\")", "-2+3+cmd|' /C calc'!A0",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_can_begin_a_formula(text: str) -> None:
    """B15, P31."""
    assert cell(text).startswith("'")


@given(st.text())
def test_cells_hold_no_line_breaks_and_no_formula(text: str) -> None:
    shown = cell(text)
    assert len(shown.splitlines()) <= 1
    assert not shown.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))


@pytest.mark.parametrize("text", ["退款", "a=b", "1-2", "x@y", 'Hello, "you"', "", "a b"])
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert cell(text) == text


def test_numbers_stay_numbers_and_nothing_is_empty() -> None:
    assert [cell(v) for v in (None, True, -5, 0.25)] == ["", "true", "-5", "0.25"]


def test_csv_is_quoted_throughout_and_reads_back() -> None:
    rows = [row(question='say "hi", 你好\nsecond line'), row(question="=1+1", cost_cny=None)]
    text = "".join(render_records(rows, "csv"))
    lines = text.split("\r\n")
    assert len(lines) == 4 and lines[3] == ""
    assert all(line.startswith('"') and line.endswith('"') for line in lines[:3])
    read = list(csv.DictReader(io.StringIO(text)))
    assert tuple(read[0]) == COLUMNS
    assert read[0]["question"] == 'say "hi", 你好 second line'
    assert (read[1]["question"], read[1]["cost_cny"]) == ("'=1+1", "")
    assert json.loads(read[0]["citations"])[0]["source"] == "docs/refund.md"


def test_excel_is_told_that_it_is_utf8() -> None:
    assert "".join(render_records([], "csv", bom=True)).startswith('\ufeff"id"')
    assert not "".join(render_records([], "csv")).startswith("\ufeff")
    assert not "".join(render_records([], "json", bom=True)).startswith("\ufeff")


@pytest.mark.parametrize("format", ["json", "ndjson"])
def test_json_is_exact(format: str) -> None:
    rows = [
        row(question=text, citations=(cite("a"), cite("b", number=2))) for text in [*HOSTILE, "\u2028", '"\\']
    ]
    text = "".join(render_records(rows, format))
    read = json.loads(text) if format == "json" else [json.loads(line) for line in text.split("\n")[:-1]]
    assert read == [to_dict(r) for r in rows]


def test_nothing_is_still_a_valid_file() -> None:
    assert json.loads("".join(render([], "json"))) == []
    assert "".join(render([], "ndjson")) == ""
    assert "".join(render_records([], "csv")).count("\r\n") == 1


@pytest.mark.parametrize("format", ["xlsx", "", "CSV", "csv\n"])
def test_an_unknown_format_is_refused_by_name(format: str) -> None:
    with pytest.raises(RequestError) as refused:
        list(render_records([row()], format))
    assert (refused.value.reason, refused.value.param) == ("bad_filter", "format")


@pytest.mark.parametrize("format", ["csv", "json", "ndjson"])
def test_rows_are_taken_one_by_one(format: str) -> None:
    """Pieces come while the rows have no end: nothing is collected."""

    def endless() -> Iterator[QueryRecord]:
        while True:
            yield row()

    pieces = render_records(endless(), format)
    assert len([next(pieces) for _ in range(50)]) == 50


# --- by SQLite itself ----------------------------------------------------------------------------

NASTY = st.text(
    st.sampled_from(
        "ab1=+-@＝＋－＠﹢﹣﹦﹫\t\r\n\x01\x08\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x85\u2028\u2029"
        "\ufeff\ufffe\u200b\u2060\xa0\u3000 \"',;|<%\\退款鿿ꀀ😀\x7f\x00\ud7ff\ud800\udfff\ue000"
    ),
    max_size=12,
)
NUMBERS = st.one_of(st.none(), st.floats(-1e14, 1e14), st.floats(0, 1).map(lambda x: round(x, 4)))


@st.composite
def nasty_rows(draw: st.DrawFn) -> QueryRecord:
    """A row of which every field may be anything that fits."""
    words: dict[str, Any] = {
        name: draw(NASTY)
        for name in (
            "session",
            "visitor",
            "page_url",
            "provider",
            "model",
            "question",
            "answer",
            "error_type",
        )
    }
    cited = draw(st.lists(st.tuples(NASTY, NASTY, NASTY, NASTY, NUMBERS), max_size=3))
    return row(
        timedelta(milliseconds=draw(st.integers(0, 10**9))),
        citations=tuple(
            Citation(number, title, source, heading, url, "", score or 0.0)
            for number, (title, source, heading, url, score) in enumerate(cited, start=1)
        ),
        top_score=draw(NUMBERS),
        cost_cny=draw(NUMBERS),
        prompt_tokens=draw(st.none() | st.integers(0, 2**60)),
        first_token_ms=draw(st.none() | st.integers(0, 10**6)),
        search_ms=draw(st.none() | st.integers(0, 10**6)),
        tokens_estimated=draw(st.booleans()),
        bot=draw(st.booleans()),
        signals=tuple(s for s in SIGNALS if draw(st.booleans())),
        **words,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(nasty_rows(), max_size=4))
@example(rows=[row(cost_cny=x, top_score=-x) for x in (0.0, 1.0, 123456789.0, 1e-5, 2.5e-308)])
def test_lines_of_the_database_are_those_of_python_to_the_byte(
    store: AnalyticsStore, rows: list[QueryRecord]
) -> None:
    store.prepare()
    with store.reader() as reader:
        old = [seq for (seq,) in reader.all("SELECT seq FROM queries")]
    store.delete_rows(old)
    store.insert(rows, busy_ms=5000)
    for format in ("csv", "json", "ndjson"):
        for bom in (False, True):
            wanted = "".join(render_records(store.iterate(), format, bom=bom)).encode()
            assert b"".join(p.data for p in render_rows(store, Selection(), format, bom=bom)) == wanted


CONTROLS = [chr(code) for code in range(1, 32)]
MARKS = "\x1c\x1d\x1e\x1f"  # between values of PostgreSQL, and a text may have them


@pytest.mark.parametrize("format", ["csv", "json", "ndjson"])
def test_lines_are_those_of_python_for_each_sign_in_each_place(store: AnalyticsStore, format: str) -> None:
    signs = [*HOSTILE, *CONTROLS, "\x85", "\u2028", "\u2029", '"', "\\", "\r\n", "%s", "退", "", "\ufffe"]
    names = ("question", "answer", "session", "model", "page_url")
    rows = [
        row(
            timedelta(seconds=len(HOSTILE) + len(names) * n + place),
            citations=(Citation(2, f"t{sign}", sign, f"{sign}h", sign * 2, "", 0.5), cite(f"a{sign}b")),
            signals=SIGNALS[:place],
            id=f"{n}-{place}-{kind}",
            **dict[str, Any]({name: text}),
        )
        for n, sign in enumerate(signs)
        for place, name in enumerate(names)
        for kind, text in enumerate((sign, f"{sign}a{sign}\nb", f" {sign}"))
    ]
    # Without marks all are made the quick way, with them the slow one.
    for some in ([r for r in rows if not set(MARKS) & set(r.citations[0].source)], rows):
        store.insert(some, busy_ms=5000)
        assert lines_of(store, format) == "".join(render_records(store.iterate(), format)).encode()
        assert store.count(Selection()) == len(some)


def lines_of(store: AnalyticsStore, format: str, selection: Selection = Selection()) -> bytes:  # noqa: B008
    return b"".join(piece.data for piece in render_rows(store, selection, format))


class Quick(AnalyticsStore):
    """A record whose rows are never read as objects."""

    def chosen(self, *args: Any) -> Any:
        raise AssertionError("read as objects")


@pytest.mark.parametrize("format", ["csv", "json", "ndjson"])
def test_only_rows_with_a_mark_in_a_text_are_written_the_slow_way(
    store: AnalyticsStore, data: Path, database_url: str, format: str
) -> None:
    """Otherwise a wrong count would go unnoticed, but for the time it takes."""
    harmless = "".join(c for c in [*CONTROLS, *HOSTILE, '"\\\u2028退'] if c not in MARKS)
    rows = [
        row(
            timedelta(seconds=n),
            question=harmless * (n % 3),
            answer="" if n % 4 else harmless,
            citations=tuple(cite(harmless, number=k) for k in range(n % 5)),
            signals=tuple(s for place, s in enumerate(SIGNALS) if n >> place & 1),
            status="ok" if n % 2 else "error",
        )
        for n in range(64)
    ]
    store.insert(rows, busy_ms=5000)
    quick = Quick(data / "analytics.db", database_url)
    try:
        for selection in (Selection(), Selection(status="error"), Selection(search="退")):
            wanted = "".join(render_records(store.iterate(selection), format)).encode()
            assert wanted.count(b"\n") > 20 and lines_of(quick, format, selection) == wanted
        for n, mark in enumerate(MARKS):
            store.insert([row(timedelta(seconds=-n), page_url=f"a{mark}b")], busy_ms=5000)
            wanted = "".join(render_records(store.iterate(), format)).encode()
            assert lines_of(store, format) == wanted
            if database_url:
                with pytest.raises(AssertionError, match="read as objects"):
                    lines_of(quick, format)
    finally:
        quick.close()


def test_lines_come_in_their_order_whatever_the_batches(store: AnalyticsStore) -> None:
    rows = [row(timedelta(seconds=n), id=f"r{n}", status="ok" if n % 3 else "error") for n in range(4321)]
    store.insert(rows, busy_ms=5000)
    for selection in (
        Selection(),
        Selection(status="error"),
        Selection(search="退款"),
        Selection(search="xyz"),
    ):
        for format in ("csv", "json", "ndjson"):
            pieces = list(render_rows(store, selection, format))
            wanted = "".join(render_records(store.iterate(selection), format))
            assert b"".join(p.data for p in pieces).decode() == wanted
            assert sum(p.rows for p in pieces) == store.count(selection)


def children() -> set[int]:
    """Processes that this one has started."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@in_a_file
@pytest.mark.parametrize("format", ["csv", "json", "ndjson"])
def test_a_second_process_writes_the_same_lines_and_when_it_is_lost_none_is(
    store: AnalyticsStore, format: str
) -> None:
    rows = [row(timedelta(seconds=n), question=f'退款 "{n}"\r\n=1', cost_cny=n / 7) for n in range(16_000)]
    store.insert(rows, busy_ms=5000)
    before = children()
    for selection in (Selection(), Selection(search="退款")):
        wanted = b"".join(p.data for p in render_rows(store, selection, format))
        assert b"".join(p.data for p in render_rows(store, selection, format, helped=True)) == wanted
        assert children() == before
        pieces = render_rows(store, selection, format, helped=True)
        begun = b"".join(next(pieces).data for _ in range(20))
        (helper,) = children() - before
        os.kill(helper, signal.SIGKILL)
        assert begun + b"".join(p.data for p in pieces) == wanted


@in_a_file
def test_who_stops_taking_lines_ends_the_second_process(store: AnalyticsStore) -> None:
    store.insert([row(timedelta(seconds=n)) for n in range(16_000)], busy_ms=5000)
    before = children()
    pieces = render_rows(store, Selection(), "csv", helped=True)
    assert [next(pieces) for _ in range(24)] and len(children() - before) == 1
    del pieces
    assert children() == before


@in_a_file
def test_an_absent_record_is_an_empty_file(store: AnalyticsStore) -> None:
    assert b"".join(p.data for p in render_rows(store, Selection(), "json")) == b"[]\n"
    with pytest.raises(RequestError):
        list(render_rows(store, Selection(), "xls"))
