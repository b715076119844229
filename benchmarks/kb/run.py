"""Measures search over HTTP and ingest on invented passages of real size.

    python -m benchmarks.kb.run [--passages 10000] [--home FOLDER] [--seconds 10] [--ingest 200]

Builds a base of so many passages; their vectors are invented, which saves the hours that embedding takes, and
with --home it is kept and found again. Starts `mogine serve kb` on it as an owner does, and asks questions
that the bundled model embeds as always, none twice, so no cache helps. Then takes in documents with the
model, and the same ones again unchanged. A table on stderr, JSON on stdout.
"""

import argparse
import http.client
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from benchmarks.kb.texts import Invented, InventedVectors, real_passages
from mogine.kb.embedders import E5Embedder, open_embedder
from mogine.kb.generations import Generations
from mogine.settings import load_settings

WARM_UP = 30
STARTS_WITHIN_S = 120


def build(home: Path, passages: int) -> None:
    """One generation of invented passages, once."""
    settings = load_settings({}, home)
    generations = Generations.of(settings)
    real = open_embedder(settings)
    current = generations.current()
    if current and (current.manifest.passages, current.manifest.embedder) == (passages, real.name):
        return
    if current:
        raise SystemExit(f"{home} holds another base; remove it, or choose another --home")
    vectors = InventedVectors(real.name, real.dimensions)
    with generations.begin(vectors) as draft:
        for document, made, topic in Invented().documents(passages):
            vectors.topic = topic
            draft.replace(document, made)
        draft.commit()


@contextmanager
def server(home: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of `mogine serve kb` once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "MOGINE_HOME": str(home), "MOGINE_KB_PORT": str(port)}
    command = [sys.executable, "-m", "mogine", "serve", "kb"]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((home / "server.log").read_text())
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(20)


def is_ready(port: int) -> bool:
    try:
        health = json.loads(get(http.client.HTTPConnection("127.0.0.1", port), "/api/kb/health"))
    except (OSError, http.client.HTTPException):
        return False
    return bool(health["status"] == "ok")


def get(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body[:300]!r}")
    return body


def ask(port: int, questions: Sequence[str]) -> list[float]:
    """Milliseconds of each question, one after the other on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    took = []
    for question in questions:
        started = time.perf_counter()
        get(connection, f"/api/search?q={quote(question)}&top_k=5")
        took.append((time.perf_counter() - started) * 1000)
    connection.close()
    return took


def megabytes(pid: int) -> dict[str, float]:
    """Of a process now: all, and without the files that it only maps."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        name: round(int(fields[key].split()[0]) / 1024, 1)
        for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"), ("peak", "VmHWM"))
    }


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_search(home: Path, passages: int, seconds: float, clients: int) -> dict[str, object]:
    questions = Invented(seed=int(time.time())).questions(20_000)
    with server(home) as (port, pid):
        ask(port, questions[:WARM_UP])
        rest = questions[WARM_UP:]
        before = cpu_s(pid)
        alone = sorted(ask(port, rest[:300]))
        cost = (cpu_s(pid) - before) * 1000 / len(alone)
        done = [0] * clients
        until = time.monotonic() + seconds

        def client(number: int) -> None:
            position = 300 + number
            while time.monotonic() < until and position + clients < len(rest):
                ask(port, rest[position : position + 1])
                position += clients
                done[number] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "passages": passages,
            "p50_ms": round(alone[len(alone) // 2], 1),
            "p95_ms": round(alone[int(len(alone) * 0.95)], 1),
            "cpu_ms_a_search": round(cost, 1),
            "searches_a_second": round(sum(done) / (time.monotonic() - started), 1),
            "clients": clients,
            "megabytes": megabytes(pid),
        }


def measure_ingest(folder: Path, count: int) -> dict[str, object]:
    """`mogine kb ingest` of files of one passage each, with the model and an empty cache; then again."""
    result: dict[str, object] = {}
    for language, size in (("zh", 380), ("en", 450)):
        docs = folder / language
        docs.mkdir()
        texts = real_passages(language, size, count)
        for number, text in enumerate(texts):
            (docs / f"{number:05}.md").write_text(text, "utf-8")
        home = folder / f"home-{language}"
        first, again = run_ingest(home, docs), run_ingest(home, docs)
        embedder = E5Embedder()
        embedder.warm()
        started = time.process_time()
        embedder.embed_passages(texts)
        result[language] = {
            "passages": count,
            "characters": size,
            "embedded_a_cpu_second": round(count / (time.process_time() - started), 1),
            "whole_command": first,
            "again_unchanged": again,
        }
    return result


def run_ingest(home: Path, docs: Path) -> dict[str, float]:
    environ = {**os.environ, "MOGINE_HOME": str(home)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "mogine", "kb", "ingest", str(docs)],
        env=environ,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_megabytes": round(after.ru_maxrss / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--home", type=Path, help="where the built base is kept; default: a temporary folder")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--ingest", type=int, default=200, help="files to take in; 0 leaves ingest out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = arguments.home or Path(folder) / "home"
        home.mkdir(parents=True, exist_ok=True)
        build(home, arguments.passages)
        result: dict[str, object] = {
            "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
            "search": measure_search(home, arguments.passages, arguments.seconds, arguments.clients),
        }
        if arguments.ingest:
            result["ingest"] = measure_ingest(Path(folder), arguments.ingest)
    print(json.dumps(result, indent=1))
    for part, values in result.items():
        print(f"{part:10} {json.dumps(values)}", file=sys.stderr)


if __name__ == "__main__":
    main()
