"""How many rows a second several proxies record into one PostgreSQL: prints a table, and JSON with --json.

    python -m benchmarks.scale.rows [--seconds 20] [--rate 2100] [--processes 3] [--json]

Starts a PostgreSQL of its own, with fsync as it is by default. Each process records as a proxy does: the same
recorder, a home of its own for the spool, the summing up and indexing of rows behind it. All together record
`rate` rows a second; then every id is looked for in the database. CPU is that of both ends.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.analytics.run import write_steadily
from benchmarks.startup import machine
from mogine.analytics.store import AnalyticsStore
from tests.upstreams.postgres import PostgresServer

WORDS = {
    "recorded": "rows recorded",
    "rows_per_s": "rows a second",
    "lost": "lost",
    "twice": "there twice",
    "dropped": "dropped",
    "spooled": "in the spool at the end",
    "behind_s": "seconds from the last row to the last commit",
    "proxy_cpu_us": "CPU of a row in the proxies, µs",
    "postgres_cpu_us": "CPU of a row in PostgreSQL, µs",
    "load": "load of the machine before and after",
}


def measured(folder: Path, processes: int, rate: int, seconds: float) -> dict[str, Any]:
    server = PostgresServer(folder, durable=True).start()
    try:
        AnalyticsStore(folder / "unused.db", server.url()).prepare()
        return recorded(server, folder, processes, rate, seconds)
    finally:
        server.stop()


def recorded(
    server: PostgresServer, folder: Path, processes: int, rate: int, seconds: float
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ready, out = context.Event(), context.Queue()
    workers = []
    for number in range(processes):
        home = folder / f"machine-{number}" / "data"
        home.mkdir(parents=True)
        share = rate // processes + (number < rate % processes)
        args = (str(home / "analytics.db"), seconds, share, ready, out, server.url())
        workers.append(context.Process(target=write_steadily, args=args))
        workers[-1].start()
    time.sleep(3)
    load = [os.getloadavg()[0]]
    cpu = server.cpu_s()
    ready.set()
    began = time.monotonic()
    told = [out.get() for _ in workers]
    took = time.monotonic() - began
    postgres_s = server.cpu_s() - cpu
    load.append(os.getloadavg()[0])
    for worker in workers:
        worker.join()
    sent = [id for ids, *_ in told for id in ids]
    there = [id for (id,) in server.query("SELECT id FROM queries")]
    return {
        "recorded": len(sent),
        "rows_per_s": round(len(sent) / took),
        "lost": len(set(sent) - set(there)),
        "twice": len(there) - len(set(there)),
        "dropped": sum(dropped for _, dropped, _, _ in told),
        "spooled": sum(spooled for _, _, spooled, _ in told),
        "behind_s": round(max(0.0, took - seconds), 2),
        "proxy_cpu_us": round(sum(cpu_s for *_, cpu_s in told) / len(sent) * 1e6),
        "postgres_cpu_us": round(postgres_s / len(sent) * 1e6),
        "load": [round(one, 1) for one in load],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=int, default=2100, help="rows a second of all together")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rows-", ignore_cleanup_errors=True) as folder:
        found = measured(Path(folder), given.processes, given.rate, given.seconds)
    if given.json:
        print(json.dumps({"machine": machine(), "processes": given.processes, **found}, indent=2))
        return
    print(f"| {given.processes} processes, {given.seconds:.0f} s | |\n|---|---|")
    for name, value in found.items():
        print(f"| {WORDS[name]} | {value} |")


if __name__ == "__main__":
    main()
