"""Kills writers of the record at moments drawn by lot: `python -m benchmarks.analytics.kill --rounds 100`.

Two processes record side by side and tell each row once it is on the disk. After each SIGKILL the record must
hold every row that was told, none twice, and be sound.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import asyncio, sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from benchmarks.analytics.rows import rows
from mogine.analytics.recorder import Recorder
from mogine.analytics.records import new_id
from mogine.analytics.store import AnalyticsStore

async def main():
    pool = list(rows(50, 1, datetime.now(UTC)))
    async with Recorder(AnalyticsStore(Path(sys.argv[1]))) as recorder:
        while True:
            at = datetime.now(UTC)
            group = [replace(row, id=new_id(at), started_at=at) for row in pool[:5]]
            for row in group:
                recorder.record(row)
            if await recorder.flush():
                print("\\n".join(row.id for row in group), flush=True)

asyncio.run(main())
"""


def rounds(path: Path, count: int, seed: int) -> list[str]:
    """What was wrong after `count` kills; nothing when all is as it must be."""
    dice = random.Random(seed)
    told: set[str] = set()
    for number in range(count):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None  # noqa: S101
            told.add(writer.stdout.readline().strip())
        time.sleep(dice.uniform(0, 0.1))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        for writer in writers:
            assert writer.stdout is not None  # noqa: S101
            told |= {line.strip() for line in writer.stdout.read().splitlines() if len(line.strip()) == 44}
            writer.stdout.close()
            writer.wait()
        if wrong := problems(path, told):
            return [f"round {number} (seed {seed}): {problem}" for problem in wrong]
    return []


def problems(path: Path, told: set[str]) -> list[str]:
    """What is missing of `told`, and whether the file is sound."""
    found = []
    stored = [row.id for row in AnalyticsStore(path).iterate()]
    spooled = {
        json.loads(line[9:])["id"]
        for file in Spool(path.parent / "spool").files()
        for line in file.read_bytes().splitlines(keepends=True)
        if line.endswith(b"}\n")
    }
    if missing := told - set(stored) - spooled:
        found.append(f"{len(missing)} rows are missing of {len(told)}")
    if len(stored) != len(set(stored)):
        found.append("a row is there twice")
    connection = sqlite3.connect(path)
    if (sound := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
        found.append(f"the file is damaged: {sound}")
    connection.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = rounds(Path(folder) / "analytics.db", given.rounds, given.seed)
    print("\n".join(wrong) or f"{given.rounds} kills, seed {given.seed}: every row that was told is there")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
