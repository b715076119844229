"""How fast the record is: `python -m benchmarks.analytics.run` prints a table, and JSON with --json.

One million rows over 40 days are recorded by the writer itself; with --copies 10 they are repeated further
back, with ids, visitors and sessions of their own, to ten million over 400 days. Then everything is measured
that `docs/analytics.md` promises. With --folder the record is kept, and used again.

With --database URL all of it happens in an empty database of PostgreSQL, which stays as it is then.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from benchmarks.analytics import copies as in_postgres
from benchmarks.analytics.rows import rows
from benchmarks.startup import machine
from mogine.analytics import fold, reports, retention, rollups, tables, upkeep
from mogine.analytics.export import FORMATS
from mogine.analytics.recorder import Recorder
from mogine.analytics.records import Selection, Window, new_id
from mogine.analytics.store import AnalyticsStore, as_row
from mogine.analytics.tables import LISTED, Listing

DAYS = 40
BATCH = 2000
ZONE = ZoneInfo("Asia/Shanghai")
FILTERS: tuple[dict[str, Any], ...] = (
    {"provider": "dashscope"}, {"provider": "extract"}, {"provider": "nobody"}, {"model": "deepseek-chat"},
    {"kind": "v1"}, {"kind": "llm"}, {"status": "ok"}, {"status": "error"}, {"status": "refused"},
    {"answered": "no"}, {"feedback": "down"}, {"feedback": "any"}, {"visitor": "?"}, {"session": "?"}, {},
)  # fmt: skip
SEARCHES = (
    "退款",
    "退款多久到账",
    "押金",
    "退",
    "warranty",
    "S900",
    "客服电话 号码",
    "没有这句话",
    "748003",
    "苏州 filter",
)
no_rest: Callable[[float], None] = lambda seconds: None  # noqa: E731


def generate(store: AnalyticsStore, count: int, copies: int, days: int) -> dict[str, Any]:
    """Records `count` rows as the writer does, sums and indexes them, and repeats them."""
    store.prepare()
    # Whole days of UTC, by which sums are kept: repeated further back, they meet without overlapping.
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    made = rows(count, days, today)
    began, cpu, done = time.perf_counter(), time.process_time(), 0
    while batch := list(islice(made, BATCH)):
        store.insert(batch, busy_ms=60_000)
        done += len(batch)
    took = time.perf_counter() - began
    found = {"rows_recorded": done, "recorded_per_s": round(done / took), "record_cpu_us": us(cpu, done)}
    cpu = time.process_time()
    upkeep.sum_up(store, before=upkeep.END_OF_TIME, sleep=no_rest)
    found["sum_up_cpu_us"] = us(cpu, done)
    cpu, indexed = time.process_time(), 0
    while more := upkeep.index_once(store, sleep=no_rest):
        indexed += more
    found["index_cpu_us"] = us(cpu, max(1, indexed))
    if store.is_file:
        repeat(store, copies, days)
    elif copies > 1:
        in_postgres.repeat(store, copies, days)
    store.checkpoint()
    store.sweep()
    return found


def us(cpu: float, count: int) -> float:
    return round((time.process_time() - cpu) / count * 1e6, 1)


def repeat(store: AnalyticsStore, copies: int, days: int) -> None:
    """The same rows again, each time `days` days further back, with all sums and segments."""
    with store.transaction(durable=False) as db:
        first, last = (row for row in db.execute("SELECT min(seq), max(seq) FROM queries").fetchone())
        segments = db.execute("SELECT id, first_seq, last_seq, seqs FROM segments WHERE live").fetchall()
        tail = tables.state(db)["sealed_upto"]
    names = [r[1] for r in sqlite3.connect(store.path).execute("PRAGMA table_info(queries)")][2:]
    quarters = days * rollups.LEVELS[2]
    for copy in range(1, copies):
        back = copy * days * 86_400_000 << 20
        changed = {
            "visitor": f"printf('%x', {copy}) || substr(visitor, 2)",
            "session": f"printf('%x', {copy}) || substr(session, 2)",
        }
        columns = ", ".join(changed.get(n, n) for n in names)
        for low in range(first, last + 1, (last - first) // 20 + 1):
            high = low + (last - first) // 20 + 1
            with store.transaction(durable=False) as db:
                db.execute(
                    f"INSERT INTO queries (seq, id, {', '.join(names)}) SELECT seq - {back}, "
                    f"printf('%012x', (seq - {back}) >> 20) || substr(id, 13), {columns} "
                    "FROM queries WHERE seq >= ? AND seq < ? ORDER BY seq",
                    (low, high),
                )
                db.execute(
                    f"INSERT INTO texts SELECT seq - {back}, question, answer "
                    "FROM texts WHERE seq >= ? AND seq < ?",
                    (low, high),
                )
                db.execute(
                    f"INSERT INTO citations SELECT seq - {back}, number, title, source, heading, url, score "
                    "FROM citations WHERE seq >= ? AND seq < ?",
                    (low, high),
                )
        low_slot, high_slot = (first >> 20) // fold.QUARTER_MS, (last >> 20) // fold.QUARTER_MS
        sums = ", ".join(fold.COLUMNS)
        with store.transaction(durable=False) as db:
            for level in (0, 1, 2):
                size = rollups.LEVELS[level]
                span = (level, low_slot // size, high_slot // size)
                db.execute(
                    f"INSERT INTO rollups SELECT dimension, level, slot - {copy * quarters // size}, value, "
                    f"{sums} FROM rollups WHERE level = ? AND slot >= ? AND slot <= ?",
                    span,
                )
                db.execute(
                    f"INSERT INTO waits SELECT level, slot - {copy * quarters // size}, first_token, "
                    "duration FROM waits WHERE level = ? AND slot >= ? AND slot <= ?",
                    span,
                )
            db.execute(
                f"INSERT INTO asked SELECT slot - {copy * quarters // 32}, key, seq - {back}, questions, "
                "unanswered FROM asked WHERE slot >= ? AND slot <= ?",
                (low_slot // 32, high_slot // 32),
            )
            db.execute("INSERT INTO unindexed SELECT seq - ? FROM queries WHERE seq > ?", (back, tail))
        for number, low, high, packed in segments:
            with store.transaction(durable=False) as db:
                moved = array("q", (seq - back for seq in array("q", packed)))
                new = db.execute(
                    "INSERT INTO segments (live, first_seq, last_seq, seqs) VALUES (1, ?, ?, ?) RETURNING id",
                    (low - back, high - back, moved.tobytes()),
                ).fetchone()[0]
                db.execute(
                    "INSERT INTO terms SELECT ?, term, places FROM terms WHERE segment = ?", (new, number)
                )
        print(f"  {copy + 1} of {copies} million", file=sys.stderr, flush=True)
    with store.transaction(durable=False) as db:
        low_slot = (first >> 20) // fold.QUARTER_MS - (copies - 1) * quarters
        blocks = range(low_slot // 1536, high_slot // 1536 + 1) if copies > 1 else ()
    for block in blocks:
        with store.transaction(durable=False) as db:
            rollups.rebuild_slot(db, 3, block)
    upkeep.sum_up(store, before=upkeep.END_OF_TIME, sleep=no_rest)
    while upkeep.index_once(store, sleep=no_rest):
        pass


def timed(work: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds of `work`, the median of some rounds after a first one."""
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(times), 1)


def reading(store: AnalyticsStore, now: datetime) -> dict[str, Any]:
    """Statistics, lists and searches, each as the server does it."""
    found: dict[str, Any] = {}
    for days in (30, 365):
        for zone in (ZONE, ZoneInfo("Asia/Kathmandu")):
            window = Window.last_days(days, now, zone)
            name = f"statistics_{days}_days" + ("" if zone is ZONE else "_at_45_minutes")
            found[f"{name}_ms"] = timed(partial(reports.statistics, store, window, deadline_s=2))
    some = store.page(limit=50).records[-1]
    for chosen in FILTERS:
        chosen = {k: getattr(some, k) if v == "?" else v for k, v in chosen.items()}
        selection = Selection(**chosen)
        label = next(iter(chosen.items()), ("none", ""))
        found[f"queries_{label[0]}_{'one' if label[0] in ('visitor', 'session') else label[1]}_ms"] = timed(
            partial(store.page, selection, limit=100, deadline_s=2)
        )
    for words in SEARCHES:
        hits = len(store.page(Selection(search=words), limit=100).records)
        found[f"search_{words}_{hits}_ms"] = timed(
            partial(store.page, Selection(search=words), limit=100, deadline_s=2)
        )
    return found


def command(home: Path, url: str, *words: str) -> tuple[float, int]:
    """Seconds and memory (MB, the most that all its processes held together) of a command, start to end."""
    began, most = time.perf_counter(), 0
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "--home", str(home), *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "MOGINE_DATABASE_URL": url},
    )
    while child.poll() is None:
        most = max(most, resident_kib(child.pid))
        time.sleep(0.02)
    assert child.returncode == 0, words  # noqa: S101
    return time.perf_counter() - began, most // 1024


def resident_kib(pid: int) -> int:
    """What a process and its children have in memory; pages that they share count for each."""
    held = 0
    with contextlib.suppress(OSError):  # it has just ended
        status = Path(f"/proc/{pid}/status").read_text()
        held = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            held += sum(map(resident_kib, map(int, (task / "children").read_text().split())))
    return held


def commands(home: Path, url: str, count: int) -> dict[str, Any]:
    times = sorted(command(home, url, "stats", "--days", "30")[0] for _ in range(5))
    found: dict[str, Any] = {"mogine_stats_s": round(times[2], 2)}
    for format in FORMATS:
        took, memory = command(home, url, "export", "--format", format)
        found |= {f"export_{format}_rows_per_s": round(count / took), f"export_{format}_memory_mb": memory}
    return found


def write_steadily(path: str, seconds: float, rate: int, ready: Any, out: Any, url: str = "") -> None:
    """One process that records `rate` rows a second, at `url` if there is one; tells the ids, how many were
    dropped and spooled, and its CPU seconds."""

    async def go() -> None:
        store = AnalyticsStore(Path(path), url)
        pool = list(rows(2000, 1, datetime.now(UTC), seed=os.getpid()))
        ids: list[str] = []
        cpu = time.process_time()
        async with Recorder(store) as recorder:
            ready.wait()
            began = time.monotonic()
            while (gone := time.monotonic() - began) < seconds:
                due = int(gone * rate) - len(ids)
                for _ in range(due):
                    at = datetime.now(UTC)
                    record = replace(pool[len(ids) % 2000], id=new_id(at), started_at=at)
                    ids.append(record.id)
                    recorder.record(record)
                await asyncio.sleep(0.005)
            await recorder.flush(30)
            stats = recorder.stats()
        out.put((ids, stats.dropped, stats.spooled, time.process_time() - cpu))

    asyncio.run(go())


def sustained(path: Path, url: str, seconds: float) -> dict[str, Any]:
    """2,000 rows a second from two processes."""
    context = multiprocessing.get_context("spawn")
    ready, out = context.Event(), context.Queue()
    workers = [
        context.Process(target=write_steadily, args=(str(path), seconds, 1000, ready, out, url))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    time.sleep(3)
    ready.set()
    told = [out.get() for _ in workers]
    for worker in workers:
        worker.join()
    ids = [id for part in told for id in part[0]]
    there = stored(AnalyticsStore(path, url), ids)
    return {
        "sustained_rows_per_s": round(len(ids) / seconds),
        "sustained_lost": len(ids) - there,
        "sustained_dropped": sum(part[1] for part in told),
        "sustained_cpu_us": round(sum(part[3] for part in told) / len(ids) * 1e6),
    }


def stored(store: AnalyticsStore, ids: list[str]) -> int:
    """How many of these rows are there."""
    with store.reader() as reader:
        found = reader.one(f"SELECT count(*) FROM queries WHERE id {LISTED}", (Listing(ids),))
        return int(found[0])


def burst(path: Path, url: str) -> dict[str, Any]:
    """20,000 rows at once, until the last is on the disk."""

    async def go() -> dict[str, Any]:
        store = AnalyticsStore(path, url)
        pool = [replace(r, id=new_id(r.started_at)) for r in rows(20_000, 1, datetime.now(UTC), seed=11)]
        async with Recorder(store, capacity=30_000) as recorder:
            began = time.perf_counter()
            for record in pool:
                recorder.record(record)
            await recorder.flush(60)
            took = time.perf_counter() - began
            stats = recorder.stats()
        there = stored(store, [r.id for r in pool])
        return {"burst_s": round(took, 2), "burst_lost": 20_000 - there, "burst_dropped": stats.dropped}

    return asyncio.run(go())


def write_and_time(path: str, url: str, began: Any, stop: Any, out: Any) -> None:
    """One process that commits 20 rows up to fifty times a second; tells how many milliseconds each took,
    before and after `began`: until it had the database for itself, and until its rows were on the disk."""
    store = AnalyticsStore(Path(path), url)
    pool = list(rows(2000, 1, datetime.now(UTC), seed=3))
    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    while not stop.wait(0.02):
        at = datetime.now(UTC)
        bound = [as_row(replace(r, id=new_id(at), started_at=at)) for r in pool[:20]]
        place, asked = int(began.is_set()), time.perf_counter()
        with store.transaction(10_000, shared=True) as writer:
            waited = time.perf_counter() - asked
            store.add(writer, bound)
        times[place].append((waited * 1000, (time.perf_counter() - asked) * 1000))
    store.close()
    out.put(times)


def cleaning(store: AnalyticsStore, url: str, goal: int, now: datetime) -> dict[str, Any]:
    """Deletes about `goal` rows while another process writes; how long each of its commits took."""
    with store.reader() as reader:
        seq = reader.one("SELECT seq FROM queries ORDER BY seq LIMIT 1 OFFSET ?", (goal,))[0]
    days = (now - datetime.fromtimestamp((seq >> 20) / 1000, UTC)).days
    context = multiprocessing.get_context("spawn")
    began, stop, out = context.Event(), context.Event(), context.Queue()
    writer = context.Process(target=write_and_time, args=(str(store.path), url, began, stop, out))
    writer.start()
    time.sleep(5)
    began.set()
    started, cpu = time.perf_counter(), time.process_time()
    done = retention.cleanup(AnalyticsStore(store.path, url), days, now=now, force=True)
    took = time.perf_counter() - started
    cpu_us = us(cpu, max(1, done.rows))
    stop.set()
    idle, busy = out.get()
    writer.join()
    waits, commits = (sorted(part) for part in zip(*busy, strict=True))
    return {
        "cleanup_rows": done.rows,
        "cleanup_s": round(took, 1),
        "cleanup_cpu_us": cpu_us,
        "cleanup_bytes_freed": done.bytes_freed,
        "cleanup_writer_commits": len(busy),
        "cleanup_writer_idle_max_ms": round(max(whole for _, whole in idle), 1),
        "cleanup_writer_waits_p99_ms": round(waits[len(waits) * 99 // 100], 1),
        "cleanup_writer_waits_longest_ms": [round(ms, 1) for ms in waits[-5:]],
        "cleanup_writer_p99_ms": round(commits[len(commits) * 99 // 100], 1),
        "cleanup_writer_longest_ms": [round(ms, 1) for ms in commits[-5:]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--copies", type=int, default=1, help="10: ten million rows over 400 days")
    parser.add_argument("--folder", type=Path, help="a home to keep and use again")
    parser.add_argument("--days", type=int, default=DAYS, help="that the rows before their copies take")
    parser.add_argument("--database", default="", help="the address of an empty database of PostgreSQL")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clean", type=int, help="rows to delete in the end; half of them otherwise")
    parser.add_argument("--skip", default="", help="parts to leave out: read,command,write,burst,cleanup")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    home = given.folder or Path(tempfile.mkdtemp(prefix="mogine-bench-"))
    store = AnalyticsStore(home / "data" / "analytics.db", url := given.database)
    now = datetime.now(UTC)
    found: dict[str, Any] = {"machine": machine()}
    store.path.parent.mkdir(parents=True, exist_ok=True)
    if not store.exists():
        found |= generate(store, given.rows, given.copies, given.days)
    count = store.summary().rows
    found |= {"rows": count, "bytes_per_row": round(store.size_bytes() / count)}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "read": lambda: reading(store, now),
        "command": lambda: commands(home, url, count),
        "write": lambda: sustained(store.path, url, given.seconds),
        "burst": lambda: burst(store.path, url),
        "cleanup": lambda: cleaning(store, url, given.clean or min(1_000_000, count // 2), now),
    }
    for name, measure in parts.items():
        if name not in given.skip.split(","):
            found |= measure()
            print(f"  {name} done", file=sys.stderr, flush=True)
    found["memory_of_the_benchmark_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if given.folder is None:
        shutil.rmtree(home)
    if given.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    for name, value in found.items():
        print(f"{name:<44} {value}")


if __name__ == "__main__":
    main()
