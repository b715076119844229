"""Searching finds what reading every row would find: in segments, before them, and after deletions."""

import re
from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.analytics import search
from mogine.analytics.records import QueryRecord, Selection
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import index_once
from tests.analytics.rows import NOON, in_a_file, row

SEGMENT = 64
LATER = NOON + timedelta(days=1)
WORDS = (
    "退款多久到账",
    "S800 的滤芯",
    "How long is the warranty",
    "会员卡",
    "订单 748003",
    "filter",
    "发票",
    "押金",
)
SEARCHES = (
    *(
        "退款",
        "多久",
        "退",
        "S800",
        "s8",
        "warranty",
        "WARR",
        "748",
        "74800",
        "滤芯 S800",
        "发票 押金",
        "long how",
    ),
    *("没有这句话", "rranty", "款退", "100%", "_", "\\", "'; DROP TABLE queries; --"),
)


def rest(seconds: float) -> None:
    """Tests need no rest."""


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few rows, so that a test needs few."""
    monkeypatch.setattr(search, "SEGMENT_ROWS", SEGMENT)
    monkeypatch.setattr(search, "BITMAP_BYTES", SEGMENT // 8)


def some(count: int, first: int = 0) -> list[QueryRecord]:
    return [
        row(
            timedelta(minutes=count - number),
            id=f"r{first + number}",
            question=f"{WORDS[number % 8]}？",
            answer=f"{WORDS[number * 3 % 8]}。{WORDS[number // 8 % 8]} {number}",
        )
        for number in range(count)
    ]


def by_reading(rows: Sequence[QueryRecord], words: str) -> list[str]:
    """Every part stands in question or answer; words and numbers from their beginning."""

    def has(record: QueryRecord, part: str) -> bool:
        texts = (record.question.lower(), record.answer.lower())
        before = (
            r"(?<![a-z])"
            if part[0].isalpha() and part[0].isascii()
            else r"(?<!\d)"
            if part[0].isdecimal()
            else ""
        )
        return any(re.search(before + re.escape(part), text) for text in texts)

    found = [r for r in rows if all(has(r, part) for part in words.lower().split())]
    return [r.id for r in sorted(found, key=lambda r: r.started_at, reverse=True)]


def found(store: AnalyticsStore, words: str, limit: int = 1000) -> list[str]:
    return [r.id for r in store.page(Selection(search=words), limit=limit).records]


def index(store: AnalyticsStore) -> int:
    """Every segment there can be; how many rows are in them."""
    rows = 0
    while more := index_once(store, now=LATER, sleep=rest):
        rows += more
    return rows


@pytest.mark.parametrize("words", SEARCHES)
def test_segments_find_what_reading_finds(store: AnalyticsStore, words: str) -> None:
    rows = some(5 * SEGMENT + 9)
    store.insert(rows, busy_ms=5000)
    unindexed = found(store, words)
    assert unindexed == by_reading(rows, words)
    assert index(store) == 5 * SEGMENT
    assert found(store, words) == unindexed
    assert found(store, words, 3) == unindexed[:3]
    assert store.count(Selection(search=words)) == len(unindexed)


def test_pages_of_a_search_follow_each_other(store: AnalyticsStore) -> None:
    rows = some(4 * SEGMENT)
    store.insert(rows, busy_ms=5000)
    index(store)
    taken, before = list[str](), ""
    while True:
        page = store.page(Selection(search="退款"), limit=7, before=before)
        taken += [r.id for r in page.records]
        if not (before := page.next):
            break
    assert taken == by_reading(rows, "退款")
    assert [r.id for r in store.iterate(Selection(search="退款"))] == taken[::-1]


def test_rows_that_come_late_are_found(store: AnalyticsStore) -> None:
    rows = some(3 * SEGMENT)
    store.insert(rows[::2], busy_ms=5000)
    index(store)
    store.insert(rows[1::2], busy_ms=5000)
    assert found(store, "退款") == by_reading(rows, "退款")
    index(store)
    assert found(store, "退款") == by_reading(rows, "退款")


@in_a_file
def test_deleted_words_are_in_no_index(store: AnalyticsStore) -> None:
    rows = some(3 * SEGMENT)
    store.insert(
        [*rows, row(timedelta(minutes=90), id="x", question="张三丰的住址", answer="")], busy_ms=5000
    )
    index(store)
    assert found(store, "张三丰") == ["x"]
    with store.reader() as reader:
        (seq,) = reader.one("SELECT seq FROM queries WHERE id = 'x'")
    store.delete_rows([seq])
    assert found(store, "张三丰") == []
    assert found(store, "退款") == by_reading(rows, "退款")
    while store.purge_index(1000):
        pass
    store.checkpoint()
    assert "张三".encode() not in store.path.read_bytes()
    index(store)
    assert found(store, "退款") == by_reading(rows, "退款")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 16_383), unique=True, max_size=3000))
def test_places_come_back_as_they_were_packed(numbers: list[int]) -> None:
    from array import array  # noqa: PLC0415 - this test alone

    ordered = array("H", sorted(numbers))
    size, search.BITMAP_BYTES = search.BITMAP_BYTES, 2048
    try:
        packed = search.pack(ordered)
        assert len(packed) <= 2048
        assert list(search.places(packed)) == list(ordered)
    finally:
        search.BITMAP_BYTES = size
