"""Recording never disturbs an answer, and every row ends up stored, spooled or counted."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from mogine.analytics.masking import PHONE, TextPolicy
from mogine.analytics.recorder import Recorder, RecorderStats, open_recorder
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore
from mogine.errors import StoreError
from mogine.settings import Settings
from tests.analytics.rows import in_a_file, row
from tests.conftest import ROOT, clean_environ


async def until(recorder: Recorder, wanted: Callable[[RecorderStats], bool]) -> RecorderStats:
    async with asyncio.timeout(20):
        while not wanted(stats := recorder.stats()):  # noqa: ASYNC110 - the recorder has no event to wait for
            await asyncio.sleep(0.02)
    return stats


def files(data: Path, pattern: str = "*") -> list[Path]:
    return [path for path in data.rglob(pattern) if path.is_file()]


def damage(store: AnalyticsStore) -> None:
    """Puts nonsense in the place of the file, at one stroke: nothing can be written in between."""
    nonsense = store.path.with_name("nonsense")
    nonsense.write_bytes(b"\xff" * 65536)
    nonsense.replace(store.path)


@contextmanager
def locked(store: AnalyticsStore) -> Iterator[None]:
    connection = sqlite3.connect(store.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


async def test_rows_are_stored_together_and_soon(store: AnalyticsStore) -> None:
    rows = [row() for _ in range(1200)]
    async with Recorder(store) as recorder:
        for each in rows:
            recorder.record(each)
        assert await recorder.flush()
        stats = recorder.stats()
    assert (stats.stored, stats.waiting, stats.spooled, stats.dropped) == (1200, 0, 0, 0)
    assert stats.last_write_at is not None and not stats.degraded
    assert {r.id for r in store.iterate()} == {r.id for r in rows}


async def test_leaving_writes_what_waits(store: AnalyticsStore) -> None:
    async with Recorder(store, linger_s=60) as recorder:
        for _ in range(700):
            recorder.record(row())
    assert store.summary().rows == 700


async def test_the_same_question_recorded_twice_is_one_row(store: AnalyticsStore) -> None:
    asked = row()
    async with Recorder(store) as recorder:
        recorder.record(asked)
        await recorder.flush()
        recorder.record(asked)
    assert store.summary().rows == 1


@in_a_file
async def test_numbers_of_persons_never_reach_the_disk(store: AnalyticsStore, data: Path) -> None:
    secret = "13812345678"
    async with Recorder(store) as recorder:
        recorder.record(
            row(question=f"我是{secret}", answer=f"您好{secret}", page_url=f"https://x.cn/?tel={secret}")
        )
        await recorder.flush()
        with locked(store):
            recorder.record(row(question=f"我是{secret}", session=secret))
            await recorder.flush()
            assert recorder.stats().spooled == 1
            assert len(files(data)) > 2
            assert not [f for f in files(data) if secret.encode() in f.read_bytes()]
    assert store.page().records[0].question == f"我是{PHONE}"


@in_a_file
async def test_a_locked_database_costs_nothing_and_loses_nothing(store: AnalyticsStore) -> None:
    rows = [row() for _ in range(30)]
    async with Recorder(store) as recorder:
        recorder.record(rows[0])
        assert await recorder.flush()
        with locked(store):
            for each in rows[1:]:
                recorder.record(each)
            assert await recorder.flush()
            stats = recorder.stats()
            assert stats.degraded and "in use" in stats.problem
            assert (stats.stored, stats.spooled, stats.dropped) == (1, 29, 0)
        await until(recorder, lambda s: s.stored == 30 and not s.spooled and not s.degraded)
    assert {r.id for r in store.iterate()} == {r.id for r in rows}
    assert Spool(store.path.parent / "spool").files() == []


@in_a_file
async def test_a_start_with_a_locked_database_succeeds(store: AnalyticsStore) -> None:
    store.prepare()
    with locked(store):
        async with Recorder(store) as recorder:
            recorder.record(row())
            assert await recorder.flush()
            assert recorder.stats().spooled == 1
    async with Recorder(store) as recorder:
        await until(recorder, lambda s: s.stored == 1)
    assert store.summary().rows == 1


async def test_rows_left_in_the_spool_by_a_dead_process_are_taken_up(
    store: AnalyticsStore, data: Path
) -> None:
    spool = Spool(data / "spool")
    left = [row() for _ in range(1300)]
    spool.append(left)
    spool.release()
    store.insert(left[:100])  # it died after the commit, before it could delete the file
    async with Recorder(store) as recorder:
        await until(recorder, lambda s: s.stored == 1200)
    assert store.summary().rows == 1300
    assert spool.files() == []


@in_a_file
async def test_damaged_lines_of_the_spool_are_counted_in_the_record(
    store: AnalyticsStore, data: Path
) -> None:
    spool = Spool(data / "spool")
    spool.append([row(), row()])
    spool.release()
    (file,) = spool.files()
    file.write_bytes(file.read_bytes()[:-10])
    async with Recorder(store) as recorder:
        await until(recorder, lambda s: s.dropped == 1)
    assert (store.summary().rows, store.summary().lost) == (1, 1)


@in_a_file
async def test_without_any_disk_rows_wait_in_memory_and_the_oldest_fall(
    store: AnalyticsStore, data: Path
) -> None:
    (data / "spool").write_text("no folder can be made here")
    rows = [row() for _ in range(20)]
    async with Recorder(store, capacity=10) as recorder:
        recorder.record(rows[0])
        assert await recorder.flush()
        with locked(store):
            for each in rows[1:]:
                recorder.record(each)
                await asyncio.sleep(0.005)
            stats = recorder.stats()
            assert (stats.waiting, stats.dropped) == (10, 9)
            assert not await recorder.flush(timeout_s=0.05)
        await until(recorder, lambda s: s.stored == 11)
        (data / "spool").unlink()
    assert store.summary().lost == 9
    assert rows[-1].id in {r.id for r in store.iterate()}


@in_a_file
async def test_leaving_without_any_disk_ends_in_time_and_counts(store: AnalyticsStore, data: Path) -> None:
    (data / "spool").write_text("no folder can be made here")
    store.prepare()
    with locked(store):
        async with Recorder(store, closing_s=0.05) as recorder:
            recorder.record(row())
    assert recorder.stats().dropped == 1
    assert recorder.stats().waiting == 0


@in_a_file
async def test_a_database_damaged_while_running_is_moved_aside_and_begun_anew(
    store: AnalyticsStore, data: Path
) -> None:
    async with Recorder(store) as recorder:
        recorder.record(row())
        await recorder.flush()
        damage(store)
        recorder.record(row())
        recorder.record(row())
        await recorder.flush()
        await until(recorder, lambda s: s.stored == 3 and not s.degraded)
    assert store.summary().rows == 2
    (aside,) = files(data, "analytics.db.damaged-*Z")
    assert aside.read_bytes() == b"\xff" * 65536


@in_a_file
async def test_damage_found_while_nobody_asks_is_repaired_too(store: AnalyticsStore, data: Path) -> None:
    """Locked until the row lies in the spool, damaged when it is taken up: no new row is needed."""
    store.prepare()
    async with Recorder(store) as recorder:
        with locked(store):
            recorder.record(row())
            assert await recorder.flush()
            assert recorder.stats().spooled == 1
        damage(store)
        await until(recorder, lambda s: s.stored == 1 and not s.degraded)
    assert store.summary().rows == 1
    assert len(files(data, "analytics.db.damaged-*Z")) == 1


@in_a_file
async def test_a_start_on_a_damaged_database_begins_anew(store: AnalyticsStore, data: Path) -> None:
    store.path.write_bytes(b"not a database at all" * 100)
    async with Recorder(store) as recorder:
        recorder.record(row())
    assert store.summary().rows == 1
    assert len(files(data, "analytics.db.damaged-*Z")) == 1


@in_a_file
async def test_a_database_deleted_while_running_is_made_again(store: AnalyticsStore, data: Path) -> None:
    async with Recorder(store) as recorder:
        recorder.record(row())
        await recorder.flush()
        for file in files(data, "analytics.db*"):
            file.unlink()
        recorder.record(row())
        assert await recorder.flush()
    assert store.summary().rows == 1


@in_a_file
async def test_a_newer_database_keeps_the_server_from_starting(store: AnalyticsStore) -> None:
    store.insert([row()])
    connection = sqlite3.connect(store.path)
    connection.execute(
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('analytics', 'z', '')"
    )
    connection.commit()
    connection.close()
    store.close()
    with pytest.raises(StoreError, match="newer mogine"):
        async with Recorder(store):
            pass


async def test_an_unusable_row_does_not_take_others_with_it(store: AnalyticsStore) -> None:
    good = row()
    async with Recorder(store) as recorder:
        recorder.record(replace(good, id="bad", question=cast(Any, object())))
        recorder.record(replace(good, id="bad2", prompt_tokens=cast(Any, "many")))
        recorder.record(good)
        assert await recorder.flush()
        assert recorder.stats().dropped == 2
    assert [r.id for r in store.iterate()] == [good.id]


async def test_recording_after_the_end_does_not_raise(store: AnalyticsStore) -> None:
    async with Recorder(store) as recorder:
        pass
    recorder.record(row())


async def test_texts_are_kept_as_the_settings_say(settings: Settings) -> None:
    settings = replace(
        settings, analytics=replace(settings.analytics, store_answers=False, store_questions="hash")
    )
    settings.data_path.mkdir()
    async with open_recorder(settings) as recorder:
        recorder.record(row(question="如何退款？"))
        recorder.record(row(question="如何退款？ "))
    first, second = AnalyticsStore(settings.analytics_path).page().records
    assert first.question == second.question
    assert first.question.startswith("hmac:")
    assert (first.answer, second.answer) == ("", "")


async def test_no_text_at_all_leaves_the_numbers(store: AnalyticsStore) -> None:
    async with Recorder(store, policy=TextPolicy(questions="none", answers=False)) as recorder:
        recorder.record(row())
    (kept,) = store.page().records
    assert (kept.question, kept.answer, kept.prompt_tokens) == ("", "", 100)


async def test_two_recorders_share_one_record(
    store: AnalyticsStore, open_again: Callable[[], AnalyticsStore]
) -> None:
    async with Recorder(store) as one, Recorder(open_again()) as two:
        for _ in range(300):
            one.record(row())
            two.record(row())
        await until(one, lambda s: s.stored == 300 or s.stored + two.stats().stored == 600)
        await until(two, lambda s: s.stored + one.stats().stored == 600)
    assert store.summary().rows == 600


WRITER = """
import asyncio, sys
from pathlib import Path
from mogine.analytics.recorder import Recorder
from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row

async def main():
    async with Recorder(AnalyticsStore(Path(sys.argv[1]))) as recorder:
        while True:
            each = row()
            recorder.record(each)
            if await recorder.flush():
                print(each.id, flush=True)

asyncio.run(main())
"""


@in_a_file
def test_what_was_acknowledged_survives_kill_9(store: AnalyticsStore) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path)],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environ(),
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().strip() for _ in range(10)]
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += [line.strip() for line in child.stdout.read().splitlines() if line]
    stored = [r.id for r in store.iterate()]
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored)) <= len(acknowledged) + 1
    connection = sqlite3.connect(store.path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
