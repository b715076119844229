"""What several machines cost: vectors on a Chroma server, and generations that are pulled, against a folder.

    python -m benchmarks.kb.far [--passages 10000] [--home FOLDER] [--seconds 5]

Builds the base of `benchmarks.kb.run` twice, with its vectors in the folder and on a `chroma run` beside it,
and asks `mogine serve kb` the same kind of questions over each (--home keeps both). Then changes one document
of twenty passages in both, and pulls the folder's: whole, and after that change. The Chroma server is on this
machine, so a network's own time comes on top. JSON on stdout.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from benchmarks.kb.run import build, cpu_s, measure_search, megabytes
from benchmarks.kb.texts import Invented, InventedVectors
from mogine.kb.embedders import open_embedder
from mogine.kb.generations import Generations
from mogine.kb.offers import Offers
from mogine.kb.publication import FileParts, Publication
from mogine.kb.pull import Pulled, pull
from mogine.settings import load_settings

PORT_FILE = "chroma-port"
ROUNDS = 300


@contextmanager
def chroma(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a Chroma server, always on the same port for one folder."""
    path = folder / PORT_FILE
    if not path.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            path.write_text(str(free.getsockname()[1]))
    port = path.read_text()
    program = str(Path(sys.executable).with_name("chroma"))
    command = [program, "run", "--path", str(folder / "chroma"), "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/api/v2/heartbeat", trust_env=False)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the Chroma server does not start") from None
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(20)


def nearest_ms(home: Path) -> dict[str, float]:
    """Fifty candidates for one vector, without model, words and HTTP of our own."""
    generation = Generations.of(load_settings({}, home)).current()
    if generation is None:
        raise SystemExit("there is no generation")
    vectors = InventedVectors("", generation.manifest.dimensions)
    with closing(generation.open_vectors()) as index:
        index.warm(generation.manifest.dimensions)
        took = []
        for topic in range(ROUNDS):
            vectors.topic = topic % 400
            row = vectors.embed_questions([""])[0]
            started = time.perf_counter()
            index.search(row, 50)
            took.append((time.perf_counter() - started) * 1000)
    return {
        "p50_ms": round(statistics.median(took), 2),
        "p95_ms": round(float(np.quantile(took, 0.95)), 2),
    }


def change_s(home: Path) -> float:
    """One document of twenty passages taken in anew, as a draft does it."""
    settings = load_settings({}, home)
    real = open_embedder(settings)
    vectors = InventedVectors(real.name, real.dimensions)
    document, passages, vectors.topic = next(iter(Invented(seed=int(time.time())).documents(20)))
    started = time.perf_counter()
    with Generations.of(settings).begin(vectors) as draft:
        draft.replace(replace(document, digest=str(time.time_ns())), passages)
        draft.commit()
    return round(time.perf_counter() - started, 2)


class Near:
    """A source without a network: what a pull costs on its own machine."""

    name = "near"

    def __init__(self, offers: Offers) -> None:
        self._offers = offers

    def publication(self) -> Publication:
        return self._offers.publication()

    def block(self, publication: Publication, file: FileParts, number: int) -> bytes:
        return self._offers.block(publication.generation, file.name, number)

    def close(self) -> None:
        """Nothing is open."""


def pulled(home: Path, reader: Generations) -> tuple[Pulled, dict[str, float]]:
    settings = load_settings({}, home)
    embedder = open_embedder(settings).name
    source = Near(Offers(Generations.of(settings), settings.kb_path))
    started = time.perf_counter()
    source.publication()
    offered = time.perf_counter()
    done = pull(reader, source, embedder=embedder)
    return done, {
        "offer_s": round(offered - started, 2),
        "pull_s": round(time.perf_counter() - offered, 2),
        "mib": round(done.size_bytes / 1024**2, 1),
        "fetched_mib": round(done.fetched_bytes / 1024**2, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--home", type=Path, help="where both bases are kept; default: a temporary folder")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--build", action="store_true", help="only build the two bases")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top = arguments.home or Path(folder)
        near, far = top / "near", top / "far"
        for home in (near, far):
            home.mkdir(parents=True, exist_ok=True)
        with chroma(top) as (url, pid):
            (far / ".env").write_text(f"MOGINE_CHROMA_URL={url}\n")
            (far / ".env").chmod(0o600)
            started = time.perf_counter()
            build(near, arguments.passages)
            built_near = time.perf_counter()
            build(far, arguments.passages)
            built = [round(built_near - started, 1), round(time.perf_counter() - built_near, 1)]
            if arguments.build:
                print(json.dumps({"build_s": built}))
                return
            before = cpu_s(pid)
            found = measure_search(far, arguments.passages, arguments.seconds, 8)
            server = {"cpu_s": round(cpu_s(pid) - before, 1), "megabytes": megabytes(pid)}
            reader = Generations(Path(folder) / "reader" / "kb")
            result = {
                "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
                "build_s": dict(zip(("folder", "chroma"), built, strict=True)),
                "search": {
                    "folder": measure_search(near, arguments.passages, arguments.seconds, 8),
                    "chroma": {**found, "server": server},
                },
                "nearest_50": {"folder": nearest_ms(near), "chroma": nearest_ms(far)},
                "pull_whole": pulled(near, reader)[1],
                "change_s": {"folder": change_s(near), "chroma": change_s(far)},
                "pull_change": pulled(near, reader)[1],
            }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
