"""Kills, full disks, failing calls, damaged files, clocks that jump: no row is lost without being counted."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.analytics.inject import run
from benchmarks.analytics.kill import rounds
from mogine.analytics.recorder import Recorder
from mogine.analytics.records import Window
from mogine.analytics.reports import statistics
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import END_OF_TIME, sum_up
from tests.analytics.rows import in_a_file, row
from tests.conftest import ROOT, Run, clean_environ
from tests.waiting import wait_until

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
needs_faketime = pytest.mark.skipif(
    FAKETIME is None, reason="libfaketime is not installed: scripts/test-system"
)
needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="strace is not installed: scripts/test-system"
)


def is_sound(path: Path) -> bool:
    connection = sqlite3.connect(path)
    try:
        return bool(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    finally:
        connection.close()


@in_a_file
def test_writers_that_are_killed_lose_nothing_that_they_told(store: AnalyticsStore) -> None:
    assert rounds(store.path, 4, seed=random.randrange(10**6)) == []


STEADY = """
import asyncio, json, sys
from pathlib import Path
from mogine.analytics.recorder import Recorder
from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row

async def main():
    sent = 0
    async with Recorder(AnalyticsStore(Path(sys.argv[1]))) as recorder:
        while not Path(sys.argv[1] + ".stop").exists():
            recorder.record(row())
            sent += 1
            stats = recorder.stats()
            told = {"sent": sent, "degraded": stats.degraded, "waiting": stats.waiting}
            print(json.dumps(told), flush=True)
            await asyncio.sleep(0.02)
    print(json.dumps({"sent": sent, "dropped": recorder.stats().dropped}), flush=True)

asyncio.run(main())
"""


@in_a_file
def test_a_full_disk_costs_no_answer_and_no_row(store: AnalyticsStore) -> None:
    """The kernel refuses every write for a while, as it does on a full disk."""
    stop = Path(f"{store.path}.stop")
    with subprocess.Popen(
        [sys.executable, "-c", STEADY, str(store.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environ(),
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None

        def told(wanted: Callable[[dict[str, int]], bool]) -> None:
            assert child.stdout is not None
            while not wanted(json.loads(child.stdout.readline())):
                pass

        told(lambda state: state["sent"] >= 20)
        soft, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        told(lambda state: bool(state["degraded"]) and state["waiting"] >= 20)
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (soft, hard))
        told(lambda state: not state["degraded"] and state["waiting"] < 20)
        stop.touch()
        *_, last = child.stdout.read().splitlines()
        end = json.loads(last)
    assert child.returncode == 0
    assert end["dropped"] == 0
    assert store.summary().rows == end["sent"]
    assert is_sound(store.path)


@needs_strace
@pytest.mark.parametrize(
    ("call", "number", "error"),
    [
        *(("pwrite64", n, "ENOSPC") for n in (1, 4, 9, 15)),
        *(("pwrite64", n, "EIO") for n in (2, 30)),
        *(("fdatasync", n, e) for n in (1, 3) for e in ("EIO", "ENOSPC")),
        ("fsync", 1, "EIO"),
    ],
)
@in_a_file
def test_whichever_call_fails_every_row_is_stored_spooled_or_counted(
    store: AnalyticsStore, call: str, number: int, error: str
) -> None:
    assert run(store.path, call, number, error) == ""


def flip(path: Path, place: float, size: int = 64) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * place))
        file.write(os.urandom(size))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "head": lambda path: flip(path, 0),
    "first pages": lambda path: flip(path, 0.02, 4096),
    "middle": lambda path: flip(path, 0.5, 4096),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "journal": lambda path: Path(f"{path}-wal").write_bytes(os.urandom(9000)),
    "index of the journal": lambda path: Path(f"{path}-shm").write_bytes(os.urandom(32768)),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
@in_a_file
async def test_after_damage_of_any_kind_new_rows_are_kept(store: AnalyticsStore, kind: str) -> None:
    store.insert([row(timedelta(seconds=n), question=f"{n} " * 50) for n in range(500)], busy_ms=5000)
    store.checkpoint()
    store.close()
    DAMAGE[kind](store.path)
    new = [row(at=datetime.now(UTC)) for _ in range(5)]
    async with Recorder(store) as recorder:
        for each in new:
            recorder.record(each)
        assert await recorder.flush(20)
        stats = recorder.stats()
    assert stats.dropped == 0
    with store.reader() as reader:
        ids = json.dumps([each.id for each in new])
        found = reader.one(
            "SELECT count(*) FROM queries WHERE id IN (SELECT value FROM json_each(?))", (ids,)
        )
    assert found[0] == 5
    aside = list(store.path.parent.glob("*.damaged-*"))
    assert kind in ("empty", "gone") or aside or store.summary().rows == 505, "never a silent empty log"


@in_a_file
def test_cleanup_killed_half_way_leaves_no_lock_and_the_numbers_right(store: AnalyticsStore) -> None:
    now = datetime.now(UTC)
    rows = [row(timedelta(days=20, minutes=n % 9000), at=now, visitor=f"v{n % 50}") for n in range(6000)]
    store.insert([*rows, *(row(timedelta(days=1), at=now) for _ in range(50))], busy_ms=5000)
    sum_up(store, before=END_OF_TIME, sleep=lambda s: None)
    window = Window.last_days(30, now, Window(now, now).timezone)
    before = statistics(store, window).totals
    home = store.path.parent.parent
    (home / ".env").touch()
    command = [sys.executable, "-m", "mogine", "--home", str(home), "cleanup", "--older-than", "10d"]
    with subprocess.Popen(command, env=clean_environ(), cwd=ROOT) as child:
        wait_until(lambda: store.summary().rows < 6050)
        child.send_signal(signal.SIGKILL)
    half = store.summary().rows
    assert half >= 50 and is_sound(store.path)
    done = subprocess.run(command, env=clean_environ(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert store.summary().rows == 50
    assert statistics(store, window).totals == before
    assert is_sound(store.path)


def fake_clock(shift: str) -> dict[str, str]:
    """An environment in which every program's clock is wrong; time goes on at its pace."""
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@needs_faketime
@pytest.mark.parametrize("shift", ["+400d", "-400d"])
def test_a_wrong_clock_makes_cleanup_refuse(mogine: Run, home: Path, shift: str) -> None:
    (home / "data").mkdir()
    store = AnalyticsStore(home / "data/analytics.db")
    now = datetime.now(UTC)
    store.insert([row(timedelta(days=n), at=now) for n in range(0, 900, 100)], busy_ms=5000)
    done = mogine("cleanup", "--older-than", "30d", env=fake_clock(shift))
    assert done.returncode == 2 and "--force" in done.stderr
    assert store.summary().rows == 9


@needs_faketime
@in_a_file
def test_rows_are_kept_when_the_clock_jumps_while_they_are_recorded(
    store: AnalyticsStore, tmp_path: Path
) -> None:
    control = tmp_path / "faketime"
    control.write_text("+0")
    env = clean_environ(
        {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(control),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    )
    script = STEADY.replace("row()", "row(at=datetime.now(UTC))").replace(
        "import asyncio", "from datetime import UTC, datetime\nimport asyncio", 1
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(store.path)], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        for shift in ("+0", "+400d", "-400d", "+1h"):
            control.write_text(shift)
            for _ in range(25):
                child.stdout.readline()
        Path(f"{store.path}.stop").touch()
        *_, last = child.stdout.read().splitlines()
    end = json.loads(last)
    assert (child.returncode, end["dropped"]) == (0, 0)
    assert store.summary().rows == end["sent"]
    started = [record.started_at for record in store.iterate()]
    assert started == sorted(started), "the order is that of the rows' own time"
    assert started[-1] - started[0] > timedelta(days=700)


@in_a_file
def test_an_export_to_somebody_who_reads_slowly_and_leaves_takes_little_memory(store: AnalyticsStore) -> None:
    rows = [row(timedelta(seconds=n), answer="退款七天到账。" * 40) for n in range(20_000)]
    store.insert(rows, busy_ms=5000)
    home = store.path.parent.parent
    (home / ".env").touch()
    with subprocess.Popen(
        [sys.executable, "-m", "mogine", "--home", str(home), "export", "--format", "ndjson"],
        env=clean_environ(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        for _ in range(10):
            assert child.stdout.read(1024)
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        child.stdout.close()
        assert child.wait(30) != 0
    assert peak_kib < 110 * 1024
    store.checkpoint()
    assert not Path(f"{store.path}-wal").exists() or Path(f"{store.path}-wal").stat().st_size == 0
