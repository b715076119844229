"""Many ingests while visitors search: `python -m benchmarks.kb.swap [--ingests 50] [--documents 40]`.

Each ingest is a real `mogine kb ingest` that changes one document, over `mogine serve kb`, with the bundled
model, while four visitors search for that document all the time, never twice in the same words. Prints one
JSON object: how many seconds after the commit the change is found, how many searches there were, and how many
of them failed or told what is not in the generation that they name. Ends with 1 when there was any.
"""

import argparse
import http.client
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.kb.run import get, run_ingest, server
from benchmarks.kb.texts import Invented
from mogine.kb.generations import Generations

VISITORS = 4
PATH = "/api/search?top_k=3&q=password+of+the+reading+room+please+"


class Visitor(threading.Thread):
    """Asks until told to stop; `told` are generation and number of each answer, "" where there is none."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        super().__init__()
        self._port, self._stop_asking = port, stop
        self.told: list[tuple[str, str]] = []
        self.failed = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        while not self._stop_asking.is_set():
            try:
                self.told.append(answer(connection, f"{self.ident}-{len(self.told)}"))
            except (SystemExit, OSError, http.client.HTTPException):
                self.failed += 1
                connection.close()
        connection.close()


def answer(connection: http.client.HTTPConnection, more: str = "") -> tuple[str, str]:
    """The generation that answers, and the numbers in what it found; `more` makes a question a new one."""
    body = json.loads(get(connection, PATH + more))
    texts = " ".join(found["text"] for found in body["results"])
    return body["generation"], "".join(re.findall(r"number-(\d+)", texts))


def measure(folder: Path, ingests: int, documents: int) -> dict[str, object]:
    home, docs = folder / "home", folder / "docs"
    home.mkdir()
    docs.mkdir()
    invented = Invented()
    for number in range(documents):
        (docs / f"{number}.md").write_text(invented.text("en", number % 7, 800), "utf-8")

    def publish(number: int) -> str:
        text = f"# Reading room\n\nThe password of the reading room is number-{number}.\n"
        (docs / "room.md").write_text(text, "utf-8")
        run_ingest(home, docs)
        return generations.current_name() or ""

    generations = Generations(home / "data" / "kb")
    numbers = {publish(0): "0"}
    stop = threading.Event()
    waits: list[float] = []
    with server(home) as (port, _):
        visitors = [Visitor(port, stop) for _ in range(VISITORS)]
        for visitor in visitors:
            visitor.start()
        watching = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(1, ingests + 1):
            seen: list[float] = []

            def watch(wanted: str = str(number), seen: list[float] = seen) -> None:
                while answer(watching)[1] != wanted:
                    time.sleep(0.02)
                seen.append(time.time())

            watcher = threading.Thread(target=watch)
            watcher.start()
            numbers[publish(number)] = str(number)
            committed = (home / "data" / "kb" / "current.json").stat().st_mtime
            watcher.join()
            waits.append(max(0.0, seen[0] - committed))
        stop.set()
        for visitor in visitors:
            visitor.join()
        watching.close()
    told = [pair for visitor in visitors for pair in visitor.told]
    waits.sort()
    return {
        "ingests": ingests,
        "found_after_s": {"p50": round(waits[len(waits) // 2], 2), "longest": round(waits[-1], 2)},
        "searches": len(told),
        "failed": sum(visitor.failed for visitor in visitors),
        "wrong": sum(numbers.get(generation) != number for generation, number in told),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ingests", type=int, default=50)
    parser.add_argument("--documents", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.ingests, options.documents)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["failed"] or found["wrong"] else 0)


if __name__ == "__main__":
    main()
