"""How long mogine takes to start, and what it weighs when idle: `make bench`, or this file by itself.

Prints one JSON object: the machine, the time of `mogine --help`, and for `serve all` and each server alone
the time until it is ready and its memory then; for `serve all` also the first answer and the memory after it.
"""

import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOGINE = [sys.executable, "-m", "mogine"]
PORT_VARIABLES = {"proxy": "MOGINE_PROXY_PORT", "kb": "MOGINE_KB_PORT", "analytics": "MOGINE_ANALYTICS_PORT"}
READY_S = 60.0


def machine() -> dict[str, Any]:
    """What a number from here must be read with."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 1024**3, 1),
    }


def help_seconds(rounds: int = 10) -> dict[str, float]:
    """Wall time of `mogine --help`: the first run (files not yet in memory) and the median of the others."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        subprocess.run([*MOGINE, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return {"first": round(times[0], 3), "median": round(statistics.median(times[1:]), 3)}


def free_ports() -> dict[str, str]:
    """A free port for each server, found by asking for one and giving it back."""
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in PORT_VARIABLES.values()}
    ports = {name: str(each.getsockname()[1]) for name, each in sockets.items()}
    for each in sockets.values():
        each.close()
    return ports


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and proportional memory of a process and its children, in MB."""
    total = {"rss": 0.0, "pss": 0.0}
    for process in [pid, *children(pid)]:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.lower() in total:
                total[name.lower()] += int(rest.split()[0]) * 1024 / 1e6
    return {name: round(value, 1) for name, value in total.items()}


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def is_ready(port: str) -> bool:
    """Whether the server at `port` says that it can serve."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def first_answer_seconds(port: str) -> float:
    """From the question to the whole answer, through the proxy and the knowledge base."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/chat",
        json.dumps({"question": "How long does a refund take?"}).encode(),
        {"Content-Type": "application/json"},
    )
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        body = response.read()
    if b"event: done" not in body:
        raise RuntimeError(f"no whole answer: {body[-300:]!r}")
    return round(time.perf_counter() - begun, 3)


@contextmanager
def serving(home: Path, what: str) -> Iterator[tuple[int, dict[str, str], float]]:
    """`mogine serve WHAT`, ready: its pid, its ports, and the seconds it took."""
    ports = free_ports()
    waited = [ports[name] for server, name in PORT_VARIABLES.items() if what in ("all", server)]
    begun = time.perf_counter()
    child = subprocess.Popen(
        [*MOGINE, "serve", what],
        cwd=home,
        env={**os.environ, **ports},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not all(is_ready(port) for port in waited):
            if child.poll() is not None or time.perf_counter() - begun > READY_S:
                raise RuntimeError(f"`mogine serve {what}` did not become ready")
            time.sleep(0.01)
        yield child.pid, ports, round(time.perf_counter() - begun, 2)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def main() -> None:
    """Measures everything in a home of its own and prints it."""
    result: dict[str, Any] = {"machine": machine(), "help_s": help_seconds()}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        subprocess.run([*MOGINE, "init", str(home)], check=True, capture_output=True)
        begun = time.perf_counter()
        subprocess.run([*MOGINE, "kb", "ingest", "./docs"], cwd=home, check=True, capture_output=True)
        result["ingest_samples_s"] = round(time.perf_counter() - begun, 1)
        for what in ("all", *PORT_VARIABLES):
            with serving(home, what) as (pid, ports, ready_s):
                shown: dict[str, Any] = {"ready_s": ready_s, "idle_mb": memory_mb(pid)}
                if what == "all":
                    shown["first_answer_s"] = first_answer_seconds(ports["MOGINE_PROXY_PORT"])
                    shown["second_answer_s"] = first_answer_seconds(ports["MOGINE_PROXY_PORT"])
                    shown["after_answers_mb"] = memory_mb(pid)
                result[f"serve_{what}"] = shown
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
