"""What one question costs: CPU and memory of nginx, proxy, knowledge base, record and their engines.

    python -m benchmarks.scale.question [--shared] [--passages 10000] [--home FOLDER] [--write]

Starts the services as processes of their own, nginx before and a stand-in for the vendor behind them, and
asks `/api/chat` questions that differ, 250 tokens an answer. With --shared limits are in Redis and rows in
PostgreSQL. Prints JSON; --write keeps it in costs.json, from where benchmarks.scale.simulate takes it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.kb.run import build
from benchmarks.kb.texts import Invented
from benchmarks.proxy.run import HERE as PROXY_FOLDER
from benchmarks.proxy.run import KEY, ROOT, Gateway, free_port, vendor
from benchmarks.scale.simulate import COSTS
from benchmarks.startup import machine
from tests.upstreams.postgres import PostgresServer
from tests.upstreams.redis import RedisServer

TOKENS = 250
WARM_UP = 20
TOKEN = "bench-admin-token-" * 3


def service(name: str, home: Path, port: int, env: dict[str, str]) -> Gateway:
    command = [sys.executable, "-m", "mogine", "--home", str(home), "serve", name]
    return Gateway(
        name, command, port, "/", env={"PYTHONPATH": str(ROOT), **env}, cwd=home, ready_path="/healthz"
    )


def front(work: Path, proxy_port: int) -> Gateway:
    """nginx with what `mogine deploy nginx` writes of a streamed answer, without TLS."""
    port = free_port()
    conf = work / "front.conf"
    conf.write_text(f"""
daemon off; worker_processes 1; pid {work}/front.pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log {work}/access.log; client_body_temp_path {work}/b; proxy_temp_path {work}/p;
  fastcgi_temp_path {work}/f; uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
  upstream proxies {{ least_conn; server 127.0.0.1:{proxy_port}; keepalive 100; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://proxies; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; proxy_read_timeout 300s;
    }}
  }}
}}
""")
    return Gateway("nginx", ["nginx", "-c", str(conf), "-p", str(work)], port, "/", ready_path="/healthz")


async def ask(port: int, questions: list[str], at_once: int, tokens: int) -> list[float]:
    """Asks them all, so many at once; milliseconds to the citations, which come before the first token."""
    waited: list[float] = []
    places = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, question: str) -> None:
        async with places:
            started = time.perf_counter()
            body = {"question": f"{question} TOKENS={tokens} RATE=50"}
            async with client.stream("POST", "/api/chat", json=body) as response:
                if response.status_code != 200:
                    raise SystemExit(f"{response.status_code} {(await response.aread())[:300]!r}")
                first, last = True, b""
                async for part in response.aiter_raw():
                    if first:
                        waited.append((time.perf_counter() - started) * 1000)
                        first = False
                    last = (last + part)[-2000:]
                if b"event: done" not in last:
                    raise SystemExit(f"an answer was cut: {last!r}")

    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, question) for question in questions))
    return waited


@contextlib.contextmanager
def engines(work: Path, *, shared: bool) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Settings that lead to Redis and PostgreSQL, and the first process of each; else nothing."""
    if not shared:
        yield {}, {}
        return
    with contextlib.ExitStack() as stack:
        redis = RedisServer(work).start()
        stack.callback(redis.kill)
        folder = work / "postgres"
        folder.mkdir()
        postgres = PostgresServer(folder, durable=True).start()
        stack.callback(postgres.stop)
        settings = {"MOGINE_REDIS_URL": redis.url, "MOGINE_DATABASE_URL": postgres.url()}
        yield settings, {"redis": redis.pid, "postgres": postgres.pid}


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of those that it started, also of those that have ended."""
    total = 0.0
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                own = sum(map(int, fields[11:15])) if int(entry.name) == pid else sum(map(int, fields[11:13]))
                times[int(entry.name)] = own / os.sysconf("SC_CLK_TCK")
    left = [pid]
    while left:
        each = left.pop()
        total += times.get(each, 0.0)
        left += children.get(each, [])
    return total


def measure(work: Path, home: Path, passages: int, count: int, *, shared: bool) -> dict[str, Any]:
    for name in ("upstream",):
        subprocess.run(["cc", "-O2", "-o", work / name, PROXY_FOLDER / f"{name}.c"], check=True)
    home.mkdir(parents=True, exist_ok=True)
    build(home, passages)
    ports = {name: free_port() for name in ("proxy", "kb", "analytics")}
    with contextlib.ExitStack() as stack:
        settings, pids = stack.enter_context(engines(work, shared=shared))
        stand_in = stack.enter_context(vendor(work, tls=False))
        env = {
            **settings,
            **{f"MOGINE_{name.upper()}_PORT": str(port) for name, port in ports.items()},
            "MOGINE_KB_URL": f"http://127.0.0.1:{ports['kb']}",
            "MOGINE_ADMIN_TOKEN": TOKEN,
            "DOUBAO_API_KEY": KEY,
            "DOUBAO_MODEL": "bench-model",
            "DOUBAO_BASE_URL": f"{stand_in.url}/api/v3",
            "MOGINE_RATE_LIMIT": "100000000/minute",
            "MOGINE_SITE_RATE_LIMIT": "100000000/minute",
            "MOGINE_MAX_STREAMS_PER_VISITOR": "10000",
        }
        services = {}
        for name, port in ports.items():
            gateway = service(name, home, port, env)
            services[name] = stack.enter_context(gateway.running(work / f"{name}.log"))
        services["nginx"] = stack.enter_context(front(work, ports["proxy"]).running(work / "nginx.log"))

        def spent() -> dict[str, float]:
            own = {name: each.cpu_s() for name, each in services.items()}
            return own | {name: family_cpu_s(pid) for name, pid in pids.items()}

        questions = Invented(seed=int(time.time())).questions(2 * count + WARM_UP)
        asyncio.run(ask(services["nginx"].port, questions[:WARM_UP], 10, 10))
        time.sleep(2)

        def run(part: list[str], tokens: int) -> tuple[dict[str, float], list[float]]:
            before = spent()
            waited = asyncio.run(ask(services["nginx"].port, part, 20, tokens))
            time.sleep(2)  # what is written and summed behind the answers belongs to them
            return {name: (after - before[name]) / len(part) * 1e6 for name, after in spent().items()}, waited

        short, waited = run(questions[WARM_UP : WARM_UP + count], 1)
        long, _ = run(questions[WARM_UP + count :], TOKENS)
        token = {name: (long[name] - short[name]) / (TOKENS - 1) for name in ("nginx", "proxy")}
        costs = {
            "nginx_question": short["nginx"] - token["nginx"],
            "nginx_token": token["nginx"],
            "proxy_question": short["proxy"] - token["proxy"],
            "proxy_token": token["proxy"],
            "kb_search": short["kb"],
            "record_row": short["analytics"] + short.get("postgres", 0.0),
            "redis_check": short.get("redis", 0.0),
            "proxy_mb": services["proxy"].rss_kib() / 1024,
            "kb_mb": services["kb"].rss_kib() / 1024,
            "stream_kib": 25.0,  # benchmarks/proxy/run.py: 5,000 open streams
        }
    return {
        "machine": machine(),
        "shared": shared,
        "passages": passages,
        "questions": count,
        "citations_after_ms_p50": round(statistics.median(waited), 1),
        "cpu_us_per_question": {name: round(us) for name, us in long.items()},
        "costs": {name: round(value, 1) for name, value in costs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shared", action="store_true", help="limits in Redis, rows in PostgreSQL")
    parser.add_argument("--home", type=Path, help="where the built base is kept; default: a temporary folder")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=300, help="of each kind: with 1 token, with 250")
    parser.add_argument("--write", action="store_true", help="keep the costs for benchmarks.scale.simulate")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # PostgreSQL runs as another user when we are root  # noqa: S103
        home = arguments.home or Path(folder) / "home"
        result = measure(Path(folder), home, arguments.passages, arguments.questions, shared=arguments.shared)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.write:
        COSTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
