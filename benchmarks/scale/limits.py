"""What it costs that several proxies hold one set of limits, and how soon they do so again after a fault.

    python -m benchmarks.scale.limits [--checks 5000] [--proxies 3] [--pause 30] [--json]

Starts a Redis on a free port and on a socket. Each proxy is a process of its own with what a proxy has: its
own limits, a budget, the shared check. A check is `Fleet.admit` as a question waits for it; what a question
tells when it ends is sent behind its back, and is in the CPU but not in the time. Tokens never ask: see
`tests/serve/test_fleet.py`. With --pause 0 the faults are left out.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from benchmarks.startup import machine
from mogine.analytics.spending import Spending
from mogine.analytics.store import AnalyticsStore
from mogine.errors import MogineError
from mogine.redis_client import open_blocking
from mogine.serve.budget import Amounts, Budget
from mogine.serve.fleet import Fleet, joined
from mogine.serve.keys import ServerState
from mogine.serve.limits import Limits
from mogine.settings import AccessSettings, RateLimit
from tests.upstreams.raw import closed_port
from tests.upstreams.redis import RedisServer

WARM_UP = 200
VISITORS = 1000
COST_CNY = 0.000_001
RULES = AccessSettings(  # the windows of the defaults, and nobody is refused
    rate_limit=(RateLimit(100_000, 60), RateLimit(200, 3600)),
    site_rate_limit=(RateLimit(10**8, 60),),
    max_streams_per_visitor=1000,
    max_streams=100_000,
)


def own_budget(folder: Path) -> Budget:
    """One that is never used up."""
    store = AnalyticsStore(folder / "analytics.db")
    store.prepare()
    return Budget(Amounts(10**6, 10**7), ZoneInfo("Asia/Shanghai"), Spending(store, timedelta(minutes=6)))


async def check(
    url: str, folder: Path, number: int, checks: int, at_once: int, every_s: float
) -> dict[str, Any]:
    """Times of as many checks, so many at once and so far apart, and the CPU of one, its end included."""
    limits, budget = Limits(RULES, ServerState()), own_budget(folder)
    budget.look()
    fleet = Fleet(url, RULES, f"home {number}", budget=budget)
    took: list[int] = []

    async def ask(count: int, visitor: int, waits: list[int]) -> None:
        for index in range(count):
            name = f"198.51.{(visitor + index) % VISITORS}"
            with limits.open(name) as place:
                began = time.perf_counter_ns()
                await fleet.admit(place, name, ("doubao",))
                waits.append(time.perf_counter_ns() - began)
            budget.add(f"{number}-{visitor}-{index}", datetime.now(UTC), COST_CNY)
            if every_s:
                await asyncio.sleep(every_s)

    async with joined(fleet), budget.watching(fleet.exchange):
        if fleet.trouble:
            raise SystemExit(f"Redis is not reached: {fleet.trouble}")
        await ask(WARM_UP, 0, [])
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(ask(checks // at_once, 100 * n, took) for n in range(at_once)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    return {
        "took_us": [one / 1000 for one in took],
        "cpu_us": cpu / len(took) * 1e6,
        "per_s": len(took) / wall,
    }


def proxy(url: str, folder: str, number: int, checks: int, at_once: int, every_s: float) -> dict[str, Any]:
    """`check` in a process of its own."""
    own = Path(folder, f"{time.time_ns()}-{number}")
    own.mkdir()
    return asyncio.run(check(url, own, number, checks, at_once, every_s))


def redis_cpu_s(url: str) -> float:
    with open_blocking(url, 5) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def measure(url: str, folder: str, proxies: int, checks: int, at_once: int, every_s: float) -> dict[str, Any]:
    """Several proxies at the same time."""
    before = redis_cpu_s(url)
    jobs = [(url, folder, number, checks, at_once, every_s) for number in range(proxies)]
    with multiprocessing.get_context("spawn").Pool(proxies) as pool:
        found = pool.starmap(proxy, jobs)
    took = sorted(one for each in found for one in each["took_us"])
    return {
        "proxies": proxies,
        "at_once": at_once,
        "every_ms": round(every_s * 1000),
        "checks": len(took),
        **{f"p{share}_us": round(took[len(took) * share // 100]) for share in (50, 95, 99)},
        "proxy_cpu_us": round(statistics.mean(each["cpu_us"] for each in found), 1),
        "redis_cpu_us": round((redis_cpu_s(url) - before) / len(took) * 1e6, 1),
        "per_s": round(sum(each["per_s"] for each in found)),
    }


def alone(checks: int) -> float:
    """Microseconds of the check that a process makes by itself."""
    limits = Limits(RULES, ServerState())
    began = time.process_time()
    for index in range(checks):
        with limits.open(f"198.51.{index % VISITORS}"):
            pass
    return round((time.process_time() - began) / checks * 1e6, 1)


async def recovery(server: RedisServer, url: str, pause_s: float) -> dict[str, float]:
    """Seconds until two proxies hold one limit again, after Redis was paused and after it was killed."""
    rules = AccessSettings(rate_limit=(RateLimit(1, 3600),), max_streams_per_visitor=100)
    fleets = [Fleet(url, rules, f"{number}") for number in range(2)]
    own = [Limits(rules, ServerState()) for _ in fleets]

    async def let_in(visitor: str) -> int:
        count = 0
        for limits, fleet in zip(own, fleets, strict=True):
            try:
                with limits.open(visitor) as place:
                    await fleet.admit(place, visitor)
                count += 1
            except MogineError:
                pass
        return count

    async def until(wanted: int, name: str) -> float:
        began = time.perf_counter()
        for attempt in range(10**6):
            if await let_in(f"{name}-{attempt}") == wanted:
                break
            await asyncio.sleep(0.01)
        return round(time.perf_counter() - began, 2)

    async with joined(fleets[0]), joined(fleets[1]):
        server.pause()
        found = {"paused_until_local_s": await until(2, "pausing")}
        await asyncio.sleep(pause_s)
        server.resume()
        found["resumed_until_shared_s"] = await until(1, "resumed")
        server.kill()
        found["killed_until_local_s"] = await until(2, "killed")
        await asyncio.sleep(2)
        server.start()
        found["started_until_shared_s"] = await until(1, "started")
    return found


def shown(results: dict[str, Any]) -> str:
    """A table for people."""
    shared: dict[str, list[dict[str, Any]]] = results["shared"]
    names = tuple(next(iter(shared.values()))[0])
    lines: list[Sequence[Any]] = [("way", *names)]
    lines += [(way, *(row[name] for name in names)) for way, rows in shared.items() for row in rows]
    widths = [max(len(str(line[place])) for line in lines) for place in range(len(names) + 1)]
    table = "\n".join("  ".join(str(c).rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    faults = "\n".join(f"{name}: {seconds} s" for name, seconds in results["faults"].items())
    return f"{table}\na process by itself: {results['alone_cpu_us']} µs of CPU\n{faults}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks", type=int, default=5000, help="of each proxy")
    parser.add_argument("--proxies", type=int, default=3)
    parser.add_argument("--pause", type=float, default=30.0, help="seconds for which Redis is paused")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine(),
        "alone_cpu_us": alone(20_000),
        "shared": {},
        "faults": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        with closed_port() as free:
            port = free
        server = RedisServer(Path(folder), "--port", str(port)).start()
        try:
            for way, url in (("tcp", f"redis://127.0.0.1:{port}"), ("socket", server.url)):
                results["shared"][way] = [
                    measure(url, folder, *row)
                    for row in (
                        (1, given.checks, 1, 0.0),
                        (given.proxies, given.checks // 5, 1, 0.01),
                        (given.proxies, given.checks, 50, 0.0),
                    )
                ]
            if given.pause:
                results["faults"] = asyncio.run(recovery(server, f"redis://127.0.0.1:{port}", given.pause))
        finally:
            server.kill()
    print(json.dumps(results, indent=1) if given.json else shown(results))


if __name__ == "__main__":
    main()
