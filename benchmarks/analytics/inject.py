"""Lets the n-th write or sync of a recorder fail, for every n: `python -m benchmarks.analytics.inject`.

Needs strace. Each run records some rows while one call of the system fails with EIO or ENOSPC; whatever the
call was, the recorder must end well, and every row must be stored, spooled or counted as lost.
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

from mogine.analytics.store import AnalyticsStore

ROOT = Path(__file__).resolve().parents[2]
ROWS = 40
CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate")
ERRORS = ("EIO", "ENOSPC")
RECORDER = f"""
import asyncio, json, sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from benchmarks.analytics.rows import rows
from mogine.analytics.recorder import Recorder
from mogine.analytics.records import new_id
from mogine.analytics.store import AnalyticsStore

async def main():
    pool = list(rows({ROWS}, 1, datetime.now(UTC)))
    async with Recorder(AnalyticsStore(Path(sys.argv[1]))) as recorder:
        for number, row in enumerate(pool):
            at = datetime.now(UTC)
            recorder.record(replace(row, id=new_id(at), started_at=at))
            if number % 4 == 3:
                await recorder.flush(2)
    print(json.dumps(recorder.stats().dropped))

asyncio.run(main())
"""


def run(path: Path, call: str, number: int, error: str) -> str:
    """What went wrong when the `number`-th `call` of each thread failed; "" when nothing did."""
    store = AnalyticsStore(path)
    store.prepare()
    done = subprocess.run(
        [
            *("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", f"trace={','.join(CALLS)}"),
            *("-e", f"inject={call}:error={error}:when={number}"),
            *(sys.executable, "-c", RECORDER, str(path)),
        ],
        cwd=ROOT,
        # Without what measures coverage: its own file is not to be one of those that fail.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    where = f"{call} number {number} with {error}"
    if done.returncode or "Traceback" in done.stderr:
        # A start that cannot use the file is told, which is all that it can do.
        is_told = "StoreError" in done.stderr and "cannot be used" in done.stderr
        return "" if is_told and not store.summary().rows else f"{where}: {done.stderr[-1500:]}"
    dropped = int(json.loads(done.stdout))
    waiting = sum(file.read_bytes().count(b"\n") for file in (path.parent / "spool").glob("*.jsonl"))
    stored = sum(1 for _ in store.iterate())
    if stored + waiting + dropped < ROWS:
        return f"{where}: {stored} stored, {waiting} spooled, {dropped} counted as lost, of {ROWS}"
    connection = sqlite3.connect(path)
    sound = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    return "" if sound == "ok" else f"{where}: {sound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=200, help="up to which call")
    given = parser.parse_args()
    wrong = []
    for call in CALLS:
        for error in ERRORS:
            for number in range(1, given.most + 1):
                with tempfile.TemporaryDirectory() as folder:
                    if problem := run(Path(folder) / "analytics.db", call, number, error):
                        wrong.append(problem)
                        print(problem, file=sys.stderr, flush=True)
    print(f"{len(CALLS) * len(ERRORS) * given.most} runs, {len(wrong)} went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
