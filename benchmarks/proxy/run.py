"""Measures mogine's proxy beside nginx's `proxy_pass` and other gateways, all in one run on loopback.

    python benchmarks/proxy/run.py [--only nginx,mogine] [--tls] [--quick] [--json FILE]

Gateways share one core, the vendor and the reader (C programs beside this file) the other. Figures:
CPU seconds of the gateway's processes per JSON request and per streamed token, latency added, memory
per open stream, how soon the vendor is freed after a visitor leaves, memory for a reader that stopped.
Contenders other than nginx and mogine are installed by `benchmarks/proxy/install-contenders`.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CONTENDERS = ROOT / ".contenders"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KEY = "test-key-bench"


def question(tokens: int, rate: int, *, stream: bool, model: str) -> str:
    """An OpenAI-style body that also tells the stand-in vendor what to do."""
    words = f"Tell me about returns and refunds, please. TOKENS={tokens} RATE={rate}"
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "stream": stream,
    }
    if not model:
        del body["model"]
    return json.dumps(body)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def pinned(cpu: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, {cpu % (os.cpu_count() or 1)})


@dataclass
class Gateway:
    """One contender: how it is started and how it is asked. `env` joins the environment; `beside` runs along
    with it, on the reader's core, and is not counted."""

    name: str
    command: list[str]
    port: int
    path: str
    model: str = ""
    headers: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready_path: str = "/"
    beside: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator["Gateway"]:
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.env},
                cwd=self.cwd,
                preexec_fn=pinned(0),
                start_new_session=True,
            )
        beside = subprocess.Popen(self.beside, preexec_fn=pinned(1)) if self.beside else None
        try:
            wait_for(self.port, self.ready_path, self.process, log)
            yield self
        finally:
            if beside is not None:
                beside.terminate()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """The processes of the gateway's session: workers count, too."""
        if self.process is None:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.process.pid:
                        found.append(int(entry.name))
        return found

    def cpu_s(self) -> float:
        """CPU seconds of every thread of every process: to the nanosecond where the kernel tells."""
        total = 0.0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
                exact_s = 0.0
                with contextlib.suppress(OSError):
                    for task in Path(f"/proc/{pid}/task").iterdir():
                        exact_s += int((task / "schedstat").read_text().split()[0]) / 1e9
                # Ticks also count threads that have ended; the exact figures know only those alive.
                total += exact_s if exact_s > ticks_s - 0.05 else ticks_s
        return total

    def rss_kib(self) -> int:
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        return total


def wait_for(
    port: int, path: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 60
) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2)
            except urllib.error.HTTPError:
                return
            return
        time.sleep(0.1)
    raise SystemExit(f"nothing answers on port {port}; its log ends:\n{log.read_text()[-2000:]}")


# --- the contenders ---------------------------------------------------------------------------------


def nginx(work: Path, upstream: str) -> Gateway:
    port = free_port()
    host = upstream.split("//")[1]
    tls = "proxy_ssl_verify off; proxy_ssl_session_reuse on;" if upstream.startswith("https") else ""
    conf = work / "nginx-gateway.conf"
    conf.write_text(f"""
daemon off; worker_processes 1; worker_rlimit_nofile 65536; pid {work}/gateway.pid; error_log stderr warn;
events {{ worker_connections 20000; }}
http {{
  access_log off; client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
  uwsgi_temp_path {work}/u; scgi_temp_path {work}/s; keepalive_requests 1000000;
  upstream vendor {{ server {host}; keepalive 6000; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass {upstream.split("//")[0]}//vendor; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Authorization "Bearer {KEY}"; proxy_buffering off; proxy_read_timeout 300s; {tls}
    }}
  }}
}}
""")
    command = ["nginx", "-c", str(conf), "-p", str(work)]
    return Gateway(
        "nginx", command, port, "/api/v3/chat/completions", model="bench-model", ready_path="/none"
    )


def mogine(work: Path, upstream: str) -> Gateway:
    home = work / "mogine-home"
    home.mkdir(exist_ok=True)
    port = free_port()
    (home / ".env").write_text(
        f"DOUBAO_API_KEY={KEY}\nDOUBAO_MODEL=bench-model\nDOUBAO_BASE_URL={upstream}/api/v3\n"
        f"MOGINE_PROXY_PORT={port}\nMOGINE_RATE_LIMIT=100000000/minute\nMOGINE_SITE_RATE_LIMIT=100000000/minute\n"
        "MOGINE_MAX_STREAMS=20000\nMOGINE_MAX_STREAMS_PER_VISITOR=10000\nMOGINE_MAX_OUTPUT_TOKENS=65536\n"
    )
    (home / ".env").chmod(0o600)
    env = {"PYTHONPATH": str(ROOT), "SSL_CERT_FILE": str(work / "cert.pem")}
    command = [sys.executable, "-m", "mogine", "--home", str(home), "serve", "proxy"]
    return Gateway("mogine", command, port, "/api/llm/doubao", env=env, cwd=home, ready_path="/healthz")


def mogine_traced(work: Path, upstream: str) -> Gateway:
    """With every question traced; an nginx on the reader's core, which says yes to all, takes the spans."""
    gateway, port = mogine(work, upstream), free_port()
    conf = work / "collector.conf"
    conf.write_text(f"""
daemon off; worker_processes 1; pid {work}/collector.pid; error_log stderr warn;
events {{ }}
http {{
  access_log off; client_body_temp_path {work}/cb; proxy_temp_path {work}/cp; fastcgi_temp_path {work}/cf;
  uwsgi_temp_path {work}/cu; scgi_temp_path {work}/cs; client_max_body_size 64m; keepalive_requests 1000000;
  server {{ listen 127.0.0.1:{port}; location = /v1/traces {{ return 200; }} }}
}}
""")
    gateway.env["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
    return replace(gateway, name="mogine-traced", beside=["nginx", "-c", str(conf), "-p", str(work)])


def litellm(work: Path, upstream: str) -> Gateway:
    port = free_port()
    config = work / "litellm.yaml"
    config.write_text(f"""
model_list:
  - model_name: bench-model
    litellm_params:
      {{model: openai/bench-model, api_base: "{upstream}/api/v3", api_key: {KEY}, ssl_verify: false}}
litellm_settings: {{telemetry: false}}
general_settings: {{disable_spend_logs: true}}
""")
    command = [
        str(CONTENDERS / "litellm/bin/litellm"),
        "--config",
        str(config),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no check of keys: its fastest way
    }
    return Gateway(
        "litellm",
        command,
        port,
        "/v1/chat/completions",
        model="bench-model",
        env=env,
        ready_path="/health/liveliness",
    )


def portkey(work: Path, upstream: str) -> Gateway:
    port = free_port()
    start = CONTENDERS / "portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    headers = (
        "x-portkey-provider: openai",
        f"x-portkey-custom-host: {upstream}/api/v3",
        f"Authorization: Bearer {KEY}",
    )
    command = ["node", str(start), f"--port={port}", "--headless"]
    env = {"NODE_TLS_REJECT_UNAUTHORIZED": "0", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    return Gateway(
        "portkey", command, port, "/v1/chat/completions", model="bench-model", headers=headers, env=env
    )


def ferrogw(work: Path, upstream: str) -> Gateway:
    port = free_port()
    config = work / "ferrogw.yaml"
    config.write_text("strategy:\n  mode: single\ntargets:\n  - virtual_key: openai\n")
    env = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": f"{upstream}/api/v3",
        "PORT": str(port),
        "GATEWAY_CONFIG": str(config),
        "SSL_CERT_FILE": str(work / "cert.pem"),
        "LOG_LEVEL": "error",
        "MASTER_KEY": KEY,
        "HOST": "127.0.0.1",
        "RATE_LIMIT_RPS": "1000000",
        "RATE_LIMIT_BURST": "1000000",
    }
    command = [str(CONTENDERS / "ferrogw/bin/ferrogw"), "serve"]
    headers = (f"Authorization: Bearer {KEY}",)
    return Gateway(
        "ferrogw", command, port, "/v1/chat/completions", model="gpt-4o-mini", headers=headers, env=env
    )


GATEWAYS: dict[str, Callable[[Path, str], Gateway]] = {
    "nginx": nginx,
    "mogine": mogine,
    "mogine-traced": mogine_traced,
    "litellm": litellm,
    "portkey": portkey,
    "ferrogw": ferrogw,
}


# --- the vendor -------------------------------------------------------------------------------------


@dataclass
class Vendor:
    """The stand-in vendor; `lines` grows with what it prints."""

    url: str
    plain_port: int  # without TLS
    output: Path

    def closed(self) -> list[tuple[int, int]]:
        """(nanoseconds, tokens sent) for every connection that ended inside an answer."""
        rows = [line.split() for line in self.output.read_text().splitlines() if line.startswith("closed")]
        return [(int(row[1]), int(row[2])) for row in rows]


@contextlib.contextmanager
def vendor(work: Path, *, tls: bool) -> Iterator[Vendor]:
    """The vendor on a free port; with `tls` behind an nginx that ends TLS, on the reader's core."""
    port = free_port()
    output = work / "vendor.out"
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output.open("wb"))
        process = subprocess.Popen([str(work / "upstream"), str(port)], stdout=out, preexec_fn=pinned(1))
        stack.callback(process.kill)
        url = f"http://127.0.0.1:{port}"
        if tls:
            tls_port = free_port()
            conf = work / "nginx-tls.conf"
            conf.write_text(f"""
daemon off; worker_processes 1; worker_rlimit_nofile 65536; pid {work}/tls.pid; error_log stderr warn;
events {{ worker_connections 20000; }}
http {{
  access_log off; client_body_temp_path {work}/tb; proxy_temp_path {work}/tp; fastcgi_temp_path {work}/tf;
  uwsgi_temp_path {work}/tu; scgi_temp_path {work}/ts; keepalive_requests 1000000;
  upstream vendor {{ server 127.0.0.1:{port}; keepalive 6000; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{tls_port} ssl; ssl_certificate {work}/cert.pem; ssl_certificate_key {work}/key.pem;
    location / {{
      proxy_pass http://vendor; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
""")
            front = subprocess.Popen(
                ["nginx", "-c", str(conf), "-p", str(work)], stderr=subprocess.DEVNULL, preexec_fn=pinned(1)
            )
            stack.callback(front.terminate)
            url = f"https://127.0.0.1:{tls_port}"
        time.sleep(0.3)
        yield Vendor(url, port, output)


# --- the figures ------------------------------------------------------------------------------------


def load(
    work: Path,
    mode: str,
    port: int,
    path: str,
    connections: int,
    requests: int,
    body: str,
    headers: tuple[str, ...],
) -> dict[str, Any]:
    done = subprocess.run(
        [str(work / "load"), mode, str(port), path, str(connections), str(requests), body, *headers],
        capture_output=True,
        text=True,
        preexec_fn=pinned(1),
    )
    if not done.stdout:
        raise SystemExit(f"the reader failed: {done.stderr}")
    return dict(json.loads(done.stdout))


def measure(work: Path, gateway: Gateway, *, quick: bool) -> dict[str, float]:
    """CPU and latency of one started gateway."""
    slow = gateway.name == "litellm"
    requests = 300 if slow else 3000 if quick else 8000
    port, path, headers = gateway.port, gateway.path, gateway.headers

    def ask(mode: str, connections: int, count: int, tokens: int, rate: int) -> tuple[dict[str, Any], float]:
        body = question(tokens, rate, stream=mode == "stream", model=gateway.model)
        before = gateway.cpu_s()
        result = load(work, mode, port, path, connections, count, body, headers)
        if result["failed"]:
            print(f"  {gateway.name}: {result['failed']} of {count} failed ({mode})", file=sys.stderr)
        return result, gateway.cpu_s() - before

    ask("json", 8, requests // 10, 1, 0)
    json_run, json_cpu = ask("json", 8, requests, 1, 0)
    ask("stream", 10, 10, 20, 100)
    seconds = 1 if slow else 3 if quick else 6
    stream_run, stream_cpu = ask("stream", 50, 50, 100 * seconds, 100)
    few, _ = ask("stream", 4, 40 if slow else 200, 20, 200)
    return {
        "json_cpu_us": json_cpu / json_run["answered"] * 1e6,
        "json_p50_us": json_run["whole_p50_us"],
        "token_cpu_us": stream_cpu / max(1, stream_run["tokens"]) * 1e6,
        "token_late_p50_us": stream_run["late_p50_us"],
        "token_late_p99_us": stream_run["late_p99_us"],
        "first_p50_us": few["first_p50_us"],
        "first_p99_us": few["first_p99_us"],
    }


def direct(work: Path, stand_in: Vendor) -> dict[str, float]:
    """The vendor asked without any gateway: what the latencies of the others are to be measured by."""

    def ask(mode: str, connections: int, count: int, tokens: int, rate: int) -> dict[str, Any]:
        body = question(tokens, rate, stream=mode == "stream", model="bench-model")
        return load(work, mode, stand_in.plain_port, "/api/v3/chat/completions", connections, count, body, ())

    stream_run, few = ask("stream", 50, 50, 300, 100), ask("stream", 4, 200, 20, 200)
    return {
        "token_late_p50_us": stream_run["late_p50_us"],
        "first_p50_us": few["first_p50_us"],
        "first_p99_us": few["first_p99_us"],
    }


def ask_raw(gateway: Gateway, tokens: int, rate: int, *, small_buffer: bool = False) -> socket.socket:
    """A question on a socket of its own, for visitors who misbehave."""
    body = question(tokens, rate, stream=True, model=gateway.model)
    sock = socket.socket()
    if small_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", gateway.port))
    head = [
        f"POST {gateway.path} HTTP/1.1",
        f"Host: 127.0.0.1:{gateway.port}",
        "Content-Type: application/json",
    ]
    head += [f"Content-Length: {len(body)}", *gateway.headers, "", body]
    sock.sendall("\r\n".join(head).encode())
    return sock


def leave(gateway: Gateway, stand_in: Vendor, rounds: int) -> float:
    """Median milliseconds from a visitor's leaving to the vendor's connection being closed."""
    took = []
    for _ in range(rounds):
        sock = ask_raw(gateway, 100_000, 20)
        while b"@" not in sock.recv(65536):
            continue
        time.sleep(0.1)
        known = len(stand_in.closed())
        left = time.monotonic_ns()
        sock.close()
        end = time.monotonic() + 10
        while len(stand_in.closed()) == known and time.monotonic() < end:
            time.sleep(0.002)
        rows = stand_in.closed()
        took.append((rows[-1][0] - left) / 1e6 if len(rows) > known else 10_000.0)
    return statistics.median(took)


def stalled_kib(gateway: Gateway) -> int:
    """Memory that one reader who stops reading makes the gateway hold, with a vendor as fast as it can."""
    before = gateway.rss_kib()
    sock = ask_raw(gateway, 400_000, 0, small_buffer=True)
    sock.recv(1024)
    worst = before
    for _ in range(20):
        time.sleep(0.1)
        worst = max(worst, gateway.rss_kib())
    sock.close()
    return worst - before


def open_streams(work: Path, gateway: Gateway, count: int, seconds: int) -> dict[str, float]:
    """Memory per stream while `count` are open at a token a second, and how many did not end well."""
    before = gateway.rss_kib()
    body = question(seconds, 1, stream=True, model=gateway.model)
    reader = subprocess.Popen(
        [
            str(work / "load"),
            "stream",
            str(gateway.port),
            gateway.path,
            str(count),
            str(count),
            body,
            *gateway.headers,
        ],
        stdout=subprocess.PIPE,
        preexec_fn=pinned(1),
    )
    worst = before
    while reader.poll() is None:
        worst = max(worst, gateway.rss_kib())
        time.sleep(1)
    result = json.loads(reader.communicate()[0])
    return {"kib_per_stream": (worst - before) / count, "streams_failed": result["failed"]}


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


COLUMNS = (
    ("json_cpu_us", "CPU/request µs"),
    ("token_cpu_us", "CPU/token µs"),
    ("first_p50_us", "first p50 µs"),
    ("first_p99_us", "first p99 µs"),
    ("token_late_p50_us", "late p50 µs"),
    ("leave_ms", "freed ms"),
    ("stalled_kib", "stalled KiB"),
    ("kib_per_stream", "KiB/stream"),
    ("streams_failed", "cut"),
)


def table(rows: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown, with each CPU figure also as a multiple of nginx's."""
    base = rows.get("nginx")
    lines = [
        "| gateway | " + " | ".join(title for _, title in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = []
        for key, _ in COLUMNS:
            if key not in row:
                cells.append("-")
                continue
            cell = f"{row[key]:.1f}"
            if base and key.endswith("cpu_us") and base.get(key):
                cell += f" ({row[key] / base[key]:.1f} ×)"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(GATEWAYS), help="contenders, comma separated")
    parser.add_argument("--tls", action="store_true", help="the vendor speaks HTTPS")
    parser.add_argument("--quick", action="store_true", help="shorter runs, no open-stream figure")
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the median counts")
    parser.add_argument("--streams", type=int, default=5000, help="streams open at once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    names = [n for n in args.only.split(",") if n]
    with tempfile.TemporaryDirectory(prefix="mogine-bench-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        for program in ("upstream", "load"):
            subprocess.run(["gcc", "-O2", "-o", str(work / program), str(HERE / f"{program}.c")], check=True)
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=IP:127.0.0.1,DNS:localhost",
                "-keyout",
                str(work / "key.pem"),
                "-out",
                str(work / "cert.pem"),
            ],
            check=True,
            capture_output=True,
        )
        stand_in = stack.enter_context(vendor(work, tls=args.tls))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("direct", *names)}
        for round_number in range(args.rounds):
            runs["direct"].append(direct(work, stand_in))
            for name in names:
                if name not in ("nginx", "mogine", "mogine-traced") and not (CONTENDERS / name).exists():
                    print(
                        f"{name} is not installed: run benchmarks/proxy/install-contenders", file=sys.stderr
                    )
                    continue
                with GATEWAYS[name](work, stand_in.url).running(work / f"{name}.log") as gateway:
                    row = measure(work, gateway, quick=args.quick)
                    if round_number == 0:
                        row["leave_ms"] = leave(gateway, stand_in, 5)
                        row["stalled_kib"] = stalled_kib(gateway)
                        if not args.quick and name != "litellm":
                            row |= open_streams(work, gateway, args.streams, 20)
                    runs[name].append(row)
        rows = {
            name: {
                key: statistics.median(r[key] for r in many if key in r)
                for key in {k for r in many for k in r}
            }
            for name, many in runs.items()
            if many
        }
    print(table(rows), file=sys.stderr if args.json == Path("/dev/stdout") else sys.stdout)
    if args.json:
        report = {"machine": machine(), "tls": args.tls, "rounds": args.rounds, "gateways": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if not shutil.which("nginx"):
        raise SystemExit("nginx is needed: apt-get install nginx")
    main()
