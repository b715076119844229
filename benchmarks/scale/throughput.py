"""What a question and a token cost one, two and three proxies behind nginx that share their limits in Redis.

    python -m benchmarks.scale.throughput [--requests 3000] [--rounds 3] [--thin] [--json]

All proxies and nginx have one core together, the vendor and the reader the other. What is compared is CPU
seconds of all of them per request and per streamed token while each proxy gets the same number of requests a
second, however many proxies there are, as if it had a core of its own. Then once more with as many questions
as the core takes, where proxies push each other out of its caches, and each has fewer requests to share what
is done for several in one go. With --thin all proxies together get what one alone does. Requests go to
`/api/llm/doubao`, each with its check of the limits. nginx has the upstream block that `mogine deploy nginx
--upstreams` writes.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.proxy.run import HERE as PROXY_FOLDER
from benchmarks.proxy.run import Gateway, free_port, load, mogine, question, vendor
from benchmarks.startup import machine
from mogine.deploy import nginx
from mogine.deploy.site import Site
from tests.upstreams.redis import RedisServer

MOST = 3
AT_ONCE = 12
PACE = 60  # of a second the vendor thinks: with twelve questions at once some 600 a second for each proxy
STREAMS = 20
TOKENS = 300


def front(work: Path, ports: list[int]) -> Gateway:
    """nginx without TLS and without limits, for the figures are those of the proxies."""
    site = Site(
        home=work,
        executable=Path(sys.executable),
        domain="localhost",
        proxies=tuple(f"127.0.0.1:{port}" for port in ports),
    )
    block = re.search(r"^upstream mogine_questions .*?^}", nginx.render(site)["mogine.conf"], re.M | re.S)
    if block is None:
        raise SystemExit("`mogine deploy nginx` writes no upstream of questions any more")
    port, conf = free_port(), work / "front.conf"
    conf.write_text(f"""
daemon off; worker_processes 1; pid {work}/front.pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
  uwsgi_temp_path {work}/u; scgi_temp_path {work}/s; keepalive_requests 1000000;
  {block[0]}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mogine_questions; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host localhost; proxy_set_header X-Forwarded-For $remote_addr; proxy_buffering off;
    }}
  }}
}}
""")
    command = ["nginx", "-c", str(conf), "-p", str(work)]
    return Gateway("nginx", command, port, "/api/llm/doubao", ready_path="/healthz")


def measured(work: Path, count: int, upstream: str, requests: int, times: int) -> dict[str, float]:
    """One round with so many proxies and so many times the load of one; microseconds of CPU, of the proxies
    and of nginx."""
    work.mkdir()
    for name in ("load", "upstream"):
        (work / name).symlink_to(work.parent / name)
    with ExitStack() as stack:
        redis = RedisServer(work).start()
        stack.callback(redis.kill)
        proxies = []
        for number in range(count):
            folder = work / f"machine-{number}"
            folder.mkdir()
            one = mogine(folder, upstream)
            one = replace(one, env={**one.env, "MOGINE_REDIS_URL": redis.url})
            proxies.append(stack.enter_context(one.running(folder / "log")))
        before = front(work, [one.port for one in proxies])
        stack.enter_context(before.running(work / "front.log"))

        def ask(mode: str, connections: int, asked: int, tokens: int, rate: int) -> tuple[Any, float, float]:
            body = question(tokens, rate, stream=mode == "stream", model="")
            began = [one.cpu_s() for one in (before, *proxies)]
            told = load(work, mode, before.port, before.path, connections, asked, body, ())
            if told["failed"]:
                raise SystemExit(f"{told['failed']} of {asked} failed with {count} proxies")
            spent = [one.cpu_s() - then for one, then in zip((before, *proxies), began, strict=True)]
            return told, sum(spent[1:]) * 1e6, spent[0] * 1e6

        ask("json", AT_ONCE * times, requests // 4 * times, 1, 0)
        paced, paced_us, nginx_us = ask("json", AT_ONCE * times, requests * times, 1, PACE)
        full, full_us, _ = ask("json", AT_ONCE * times, requests * times, 1, 0)
        stream, token_us, _ = ask("stream", STREAMS * times, STREAMS * times, TOKENS, 50)
        return {
            "paced_per_s": paced["answered"] / paced["seconds"],
            "request_us": paced_us / paced["answered"],
            "nginx_request_us": nginx_us / paced["answered"],
            "token_us": token_us / stream["tokens"],
            "full_per_s": full["answered"] / full["seconds"],
            "full_request_us": full_us / full["answered"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--thin", action="store_true", help="as much at once whatever the number of proxies")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in range(1, MOST + 1)}
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        top = Path(folder)
        for name in ("load", "upstream"):
            source = PROXY_FOLDER / f"{name}.c"
            subprocess.run(["cc", "-O2", "-o", str(top / name), str(source)], check=True)
        with vendor(top, tls=False) as stand_in:
            for number in range(args.rounds):
                for count, found in rounds.items():  # in turn, so that a busy minute hits all of them
                    times = 1 if args.thin else count
                    work = top / f"{number}-{count}"
                    found.append(measured(work, count, stand_in.url, args.requests, times))
    figures = {
        count: {name: round(statistics.median(one[name] for one in found), 1) for name in found[0]}
        for count, found in rounds.items()
    }
    for one in figures.values():
        one["of_linear"] = round(figures[1]["request_us"] / one["request_us"], 3)
    if args.json:
        print(json.dumps({"machine": machine(), "proxies": figures}, indent=2))
        return
    columns = ("paced_per_s", "request_us", "nginx_request_us", "token_us", "full_per_s", "full_request_us")
    print(f"| proxies | of linear | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for count, one in figures.items():
        print(f"| {count} | {one['of_linear']:.0%} | {' | '.join(str(one[name]) for name in columns)} |")


if __name__ == "__main__":
    main()
