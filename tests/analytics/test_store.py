"""The record's file: made, upgraded, refused; rows in and out, exactly once and whole."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.analytics.engine import Damaged
from mogine.analytics.records import QueryRecord, Selection
from mogine.analytics.schema import STEPS
from mogine.analytics.store import AnalyticsStore, _where, decode_cursor, encode_cursor
from mogine.errors import Locked, RequestError, StoreError, Unavailable
from tests.analytics.rows import NOON, cite, in_a_file, row

MINUTE = timedelta(minutes=1)


@in_a_file
def test_reading_an_absent_record_creates_nothing(store: AnalyticsStore, data: Path) -> None:
    assert store.page().records == ()
    assert list(store.iterate()) == []
    assert store.summary().rows == 0
    assert store.newest_at() is None
    assert list(data.iterdir()) == []


def test_a_row_comes_back_as_it_was(store: AnalyticsStore) -> None:
    full = row(
        tokens_estimated=True,
        feedback="up",
        error_type="x",
        citations=(cite("a"), cite("b", number=2)),
        search_ms=14,
    )
    bare = QueryRecord(started_at=NOON + MINUTE, kind="llm", provider="extract", status="refused")
    assert store.insert([full, bare]) == 2
    assert store.page().records == (bare, full)
    assert list(store.iterate()) == [full, bare]


def test_the_same_row_is_stored_once(store: AnalyticsStore) -> None:
    first = row()
    assert store.insert([first, first]) == 1
    assert store.insert([first]) == 0
    assert store.summary().rows == 1


def test_rows_of_one_millisecond_are_all_kept(store: AnalyticsStore) -> None:
    """Keys are 20 bits within a millisecond: with 3,000 rows some of them collide."""
    rows = [row() for _ in range(3000)]
    assert store.insert(rows) == 3000
    assert {r.id for r in store.iterate(batch=700)} == {r.id for r in rows}


@pytest.mark.parametrize("size", [2, 5, 21, 85, 200])
def test_a_group_of_any_size_is_stored_with_all_its_texts(store: AnalyticsStore, size: int) -> None:
    rows = [row(MINUTE * number, question=f"q{number}", answer="") for number in range(size)]
    assert store.insert(rows) == size
    assert list(store.iterate()) == rows[::-1]


def test_a_group_with_known_rows_leaves_those_as_they_are(store: AnalyticsStore) -> None:
    known = row(question="first")
    assert store.insert([known]) == 1
    again = row(id=known.id, question="second")
    others = [row(MINUTE * number) for number in range(1, 40)]
    assert store.insert([*others[:20], again, *others[20:], others[3]]) == 39
    stored = {r.id: r for r in store.iterate()}
    assert stored == {r.id: r for r in (known, *others)}


def test_rows_that_come_late_take_their_place_in_time(store: AnalyticsStore) -> None:
    late, early = row(), row(MINUTE)
    store.insert([late])
    store.insert([early])
    assert [r.id for r in store.iterate()] == [early.id, late.id]


@in_a_file
def test_the_file_is_for_its_owner_alone_in_wal_mode_and_gives_space_back(
    store: AnalyticsStore, data: Path
) -> None:
    store.insert([row()])
    assert {f.stat().st_mode & 0o077 for f in data.iterdir()} == {0}
    connection = sqlite3.connect(store.path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    connection.close()
    with store.transaction(100) as writer:
        assert writer.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert writer.execute("PRAGMA secure_delete").fetchone()[0] == 1


def test_a_wrong_home_is_not_created(tmp_path: Path) -> None:
    store = AnalyticsStore(tmp_path / "nowhere" / "data" / "analytics.db")
    with pytest.raises(StoreError, match="cannot be used"):
        store.insert([row()])
    assert list(tmp_path.iterdir()) == []


@in_a_file
def test_a_newer_record_is_refused_and_left_alone(store: AnalyticsStore) -> None:
    store.insert([row()])
    store.close()
    connection = sqlite3.connect(store.path)
    connection.execute(
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('analytics', '999', '')"
    )
    connection.commit()
    connection.close()
    before = store.path.read_bytes()
    fresh = AnalyticsStore(store.path)
    for attempt in (fresh.prepare, lambda: fresh.insert([row()]), lambda: fresh.page()):
        with pytest.raises(StoreError, match="newer mogine"):
            attempt()
    assert store.path.read_bytes() == before


NEXT = (*STEPS, ("002_next", "ALTER TABLE queries ADD COLUMN region TEXT NOT NULL DEFAULT ''"))


@in_a_file
def test_an_older_record_is_upgraded_after_a_private_backup(store: AnalyticsStore, data: Path) -> None:
    rows = [row(MINUTE * n) for n in range(50)]
    store.insert(rows)
    newer = AnalyticsStore(store.path, steps=NEXT)
    newer.prepare()
    newer.prepare()
    (backup,) = data.glob("*.before-002_next.*.bak")
    assert backup.stat().st_mode & 0o777 == 0o600
    assert sum(1 for _ in AnalyticsStore(backup).iterate()) == 50
    assert newer.summary().rows == 50
    with newer.reader() as reader:
        assert reader.one("SELECT count(*) FROM queries WHERE region = ''")[0] == 50
    with pytest.raises(StoreError, match="newer mogine"):
        store.insert([row()])  # the older program, whose connection was open all the time
        AnalyticsStore(store.path).prepare()


@in_a_file
def test_an_upgrade_that_fails_changes_nothing(store: AnalyticsStore) -> None:
    store.insert([row()])
    broken = AnalyticsStore(store.path, steps=(*NEXT, ("003_broken", "CREATE TABLE queries (a)")))
    with pytest.raises(StoreError):
        broken.prepare()
    assert store.summary().rows == 1, "and it is still read by this mogine"
    with store.reader() as reader:
        columns = [column[1] for column in reader.all("PRAGMA table_info(queries)")]
    assert "region" not in columns
    assert store.summary().rows == 1


@in_a_file
def test_an_older_record_is_not_read_but_said_to_be_old(store: AnalyticsStore) -> None:
    store.insert([row()])
    with pytest.raises(StoreError, match="older mogine"):
        AnalyticsStore(store.path, steps=NEXT).page()


@pytest.mark.parametrize(
    "content", [b"this is no database, only text\n" * 100, b"\0" * 4096, b"SQLite format 3\0" + b"x" * 5000]
)
@in_a_file
def test_a_file_that_is_no_database_is_told_and_left_alone(store: AnalyticsStore, content: bytes) -> None:
    store.path.write_bytes(content)
    for attempt in (store.prepare, lambda: store.page(), lambda: store.insert([row()])):
        with pytest.raises(Damaged, match=r"data/analytics\.db is damaged"):
            attempt()
    assert store.path.read_bytes() == content


@in_a_file
def test_somebody_elses_database_is_not_touched(store: AnalyticsStore) -> None:
    connection = sqlite3.connect(store.path)
    connection.execute("CREATE TABLE theirs (a)")
    connection.commit()
    connection.close()
    before = store.path.read_bytes()
    with pytest.raises(StoreError, match="no record of mogine"):
        store.insert([row()])
    assert store.path.read_bytes() == before


@in_a_file
def test_a_damaged_file_is_moved_aside_once(store: AnalyticsStore, data: Path) -> None:
    store.path.write_bytes(b"nothing that can be read" * 200)
    with pytest.raises(Damaged) as damage:
        store.prepare()
    aside = store.move_aside(damage.value)
    assert aside is not None
    assert aside.read_bytes().startswith(b"nothing")
    store.insert([row()])
    assert store.move_aside(damage.value) is None  # the healthy one that stands there now
    assert store.summary().rows == 1


@in_a_file
def test_a_file_replaced_while_we_write_is_noticed(store: AnalyticsStore, data: Path) -> None:
    store.insert([row()])
    shutil.move(store.path, data / "elsewhere.db")
    second = row(MINUTE)
    assert store.insert([second]) == 1
    assert [r.id for r in store.iterate()] == [second.id]


@in_a_file
def test_a_lock_held_by_another_program_is_told_as_such(store: AnalyticsStore) -> None:
    store.prepare()
    hold = (
        "import sqlite3, sys\n"
        f"c = sqlite3.connect({str(store.path)!r}, isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(Locked, match="in use by another program"):
            store.insert([row()], busy_ms=20)
        assert store.page().records == ()  # readers do not care
        other.communicate("")
    assert store.insert([row()]) == 1


def test_threads_and_processes_may_write_at_once(
    store: AnalyticsStore, open_again: Callable[[], AnalyticsStore]
) -> None:
    stores = [store, open_again()]
    threads = [
        threading.Thread(
            target=lambda s=s, n=n: [s.insert([row(MINUTE * n)], busy_ms=60_000) for _ in range(20)]
        )
        for n, s in enumerate(stores * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.summary().rows == 80
    for each in stores:
        each.close()


def test_pages_follow_each_other_without_gap_or_repeat(store: AnalyticsStore) -> None:
    rows = [row(MINUTE * n) for n in range(25)]
    store.insert(rows)
    seen: list[str] = []
    cursor = ""
    while True:
        page = store.page(limit=10, before=cursor)
        seen += [r.id for r in page.records]
        cursor = page.next
        if not cursor:
            break
    assert seen == [r.id for r in rows]


@in_a_file
def test_a_cursor_survives_its_row_being_deleted(store: AnalyticsStore) -> None:
    rows = [row(MINUTE * n) for n in range(4)]
    store.insert(rows)
    cursor = store.page(limit=2).next
    connection = sqlite3.connect(store.path)
    connection.execute("DELETE FROM queries WHERE id = ?", (rows[1].id,))
    connection.commit()
    connection.close()
    assert [r.id for r in store.page(before=cursor).records] == [rows[2].id, rows[3].id]


@pytest.mark.parametrize(
    "cursor", ["x", "0", "1" * 24, "' OR 1=1 --", encode_cursor(5)[:-1], "-" + encode_cursor(5)[1:], "٣" * 24]
)
def test_a_made_up_cursor_is_refused(store: AnalyticsStore, cursor: str) -> None:
    with pytest.raises(RequestError) as refused:
        store.page(before=cursor)
    assert (refused.value.reason, refused.value.param) == ("bad_filter", "before")


@given(st.integers(0, 2**63 - 1))
def test_cursors_come_back(seq: int) -> None:
    assert decode_cursor(encode_cursor(seq)) == seq


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(provider="dashscope"), {"b"}),
        (Selection(status="error"), {"c"}),
        (Selection(kind="v1"), {"b"}),
        (Selection(answered="no"), {"c"}),
        (Selection(visitor="v9", session="s9"), {"d"}),
        (Selection(model="other"), {"d"}),
        (Selection(feedback="down"), {"a"}),
        (Selection(feedback="any"), {"a"}),
        (Selection(bot="yes"), {"c"}),
        (Selection(bot="no"), {"a", "b", "d"}),
        (Selection(bot="no", search="退款"), {"a", "b"}),
        (Selection(since=NOON - MINUTE, until=NOON), {"b"}),
        (Selection(since=datetime(9999, 12, 31, tzinfo=UTC)), set()),
        (Selection(until=datetime(9999, 12, 31, tzinfo=UTC)), {"a", "b", "c", "d"}),
        (Selection(search="100%"), {"c"}),
        (Selection(search="_"), {"d"}),
        (Selection(search="%"), {"c"}),
        (Selection(search="退款"), {"a", "b"}),
        (Selection(search="ONLY IN ANSWER"), {"d"}),
        (Selection(search="' OR '1'='1"), set()),
        (Selection(provider="x' OR 1=1 --"), set()),
    ],
)
def test_filters(store: AnalyticsStore, selection: Selection, expected: set[str]) -> None:
    store.insert(
        [
            row(id="a", feedback="down"),
            row(MINUTE, id="b", provider="dashscope", kind="v1"),
            row(
                2 * MINUTE,
                id="c",
                status="error",
                answered="no",
                question="100% cotton?",
                answer="",
                bot=True,
            ),
            row(
                3 * MINUTE,
                id="d",
                visitor="v9",
                session="s9",
                model="other",
                question="a_b",
                answer="only in answer",
            ),
        ]
    )
    assert {r.id for r in store.page(selection).records} == expected
    assert {r.id for r in store.iterate(selection, batch=1)} == expected
    assert store.count(selection) == len(expected)


def test_a_query_past_its_deadline_ends(store: AnalyticsStore) -> None:
    store.prepare()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    with pytest.raises(Unavailable, match="fewer days"), store.reader(deadline_s=0.05) as reader:
        reader.all(endless)


def test_values_nobody_expects_are_stored_tame(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(
                question="a\ud800b\0c",
                answer="x" * 300_000,
                prompt_tokens=10**30,
                completion_tokens=-5,
                cost_cny=float("inf"),
                top_score=float("nan"),
                provider="p" * 5000,
            )
        ]
    )
    (kept,) = store.page().records
    assert kept.question == "a?b\ufffdc"
    assert len(kept.answer) == 128 * 1024
    assert (kept.prompt_tokens, kept.completion_tokens) == (2**53, 0)
    assert (kept.cost_cny, kept.top_score) == (None, None)
    assert len(kept.provider) == 512


def test_feedback_is_tied_to_its_row_and_the_last_counts(store: AnalyticsStore) -> None:
    asked = row()
    store.insert([asked])
    assert store.give_feedback(asked.id, "up", at=NOON)
    assert store.give_feedback(asked.id, "down", reason="wrong", comment="old price", at=NOON + MINUTE)
    assert not store.give_feedback("unknown", "up")
    (given,) = store.iterate_feedback()
    assert (given.id, given.rating, given.reason, given.comment) == (asked.id, "down", "wrong", "old price")
    assert (given.started_at, given.given_at, given.question) == (NOON, NOON + MINUTE, asked.question)
    assert store.page().records[0].feedback == "down"
    assert list(store.iterate_feedback(NOON + MINUTE)) == []


def test_losses_are_part_of_the_summary(store: AnalyticsStore) -> None:
    store.note_loss(3, "no room")
    store.note_loss(4, "no room")
    assert store.summary().lost == 7


def test_the_newest_write_is_when_the_newest_answer_ended(store: AnalyticsStore) -> None:
    store.insert([row(MINUTE), row(duration_ms=1500)])
    assert store.summary().last_write_at == NOON + timedelta(milliseconds=1500)
    assert store.newest_at() == NOON


@pytest.mark.parametrize(
    "column", ["provider", "model", "kind", "status", "answered", "visitor", "session", "feedback", "bot"]
)
@in_a_file
def test_every_filter_is_served_by_an_index(store: AnalyticsStore, column: str) -> None:
    store.insert([row()])
    chosen: dict[str, Any] = {column: "yes" if column == "bot" else "x"}
    where, params = _where(Selection(**chosen))
    with store.reader() as reader:
        plan = reader.all(
            f"EXPLAIN QUERY PLAN SELECT q.seq FROM queries q WHERE {where} ORDER BY q.seq DESC LIMIT 101",  # noqa: S608
            params,
        )
    told = [line["detail"] for line in plan]
    assert any(f"queries_by_{column}" in line for line in told), told
    assert not any(line.startswith("SCAN q") for line in told), told
