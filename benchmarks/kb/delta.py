"""How soon a changed document of a large base is found: `python benchmarks/kb/delta.py [--passages 100000]`.

Builds a base of generated passages once (`--home` keeps it), then changes a document of ten passages again
and again. Prints one JSON object: seconds of the whole change as a draft does it, of a server's way to the
new generation (open and warm), of `kb rollback` and `kb verify`; the copy alone, and the size on disk.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks.kb.generated import GeneratedEmbedder, build, document
from benchmarks.startup import machine
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.manifest import check_files
from mogine.kb.verify import verify


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def change(generations: Generations, embedder: GeneratedEmbedder, number: int, version: int) -> None:
    with generations.begin(embedder) as draft:
        draft.replace(*document(number, 10, version))
        draft.commit()


def serve(generations: Generations, embedder: GeneratedEmbedder, number: int, version: int) -> None:
    """What a server does to follow the pointer; and the changed document is found."""
    current = generations.current()
    if current is None:
        raise SystemExit("there is no generation")
    check_files(current)
    wanted, passages = document(number, 10, version)
    with closing(KnowledgeBase(current, embedder)) as knowledge:
        knowledge.warm()
        hits = knowledge.search(passages[0].searchable, 3, "vector")
    if hits[0].passage.id != passages[0].id:
        raise SystemExit(f"{wanted.source} is not found after its change")


def measure(home: Path, passages: int, rounds: int) -> dict[str, object]:
    generations, embedder = Generations(home / "kb"), GeneratedEmbedder()
    built = 0.0
    if generations.current() is None:
        built = seconds(lambda: build(generations, passages))
    changes, served = [], []
    for version in range(1, rounds + 1):
        mark = int(time.time()) + version
        changes.append(seconds(lambda version=mark: change(generations, embedder, 42, version)))  # type: ignore[misc]
        served.append(seconds(lambda version=mark: serve(generations, embedder, 42, version)))  # type: ignore[misc]
    current = generations.current()
    if current is None:
        raise SystemExit("there is no generation")
    findings = verify(current)
    if findings:
        raise SystemExit(f"damaged: {findings}")
    copied = home / "copy"
    return {
        "machine": machine(),
        "passages": current.manifest.passages,
        "mib_on_disk": round(sum(p.stat().st_size for p in current.path.rglob("*")) / 1024**2),
        "build_s": round(built, 1),
        "change_s": round(statistics.median(changes), 2),
        "first_change_s": round(changes[0], 2),
        "open_and_warm_s": round(statistics.median(served), 2),
        "copy_s": round(seconds(lambda: shutil.copytree(current.path, copied)), 2),
        "verify_s": round(seconds(lambda: verify(current)), 2),
        "rollback_s": round(seconds(generations.rollback), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--home", type=Path, help="where the base is, and stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        try:
            print(json.dumps(measure(home, options.passages, options.rounds), indent=1))
        finally:
            shutil.rmtree(home / "copy", ignore_errors=True)


if __name__ == "__main__":
    main()
