"""An ingest killed at random moments leaves the base whole: `python benchmarks/kb/kill.py [--kills 50]`.

Each round starts a real `mogine kb ingest` of changed documents, kills it with SIGKILL at a moment drawn by
lot from its usual duration, and checks the generation that serves: `verify` finds nothing, and all documents
are of one and the same round. Prints one JSON object; ends with 1 at the first damage.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks.kb.generated import GeneratedEmbedder
from mogine.ingest.pipeline import ingest
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.verify import verify

DOCUMENTS = 40

# A whole ingest with vectors; generated ones, so that the moments fall on writing and not on the model.
_INGEST = """
import sys
from pathlib import Path
from benchmarks.kb.generated import GeneratedEmbedder
from mogine.ingest.pipeline import SEEN_NAME, ingest
from mogine.kb.generations import Generations
home = Path(sys.argv[1])
kb = home / "data" / "kb"
seen_path = kb / SEEN_NAME
print("go", flush=True)
list(ingest([home / "docs"], Generations(kb), GeneratedEmbedder(), base=home, seen_path=seen_path, jobs=2))
"""


def write(docs: Path, mark: int) -> None:
    for number in range(DOCUMENTS):
        paragraphs = (f"mark{mark} 退款 paragraph {n} of document {number}. " * 12 for n in range(10))
        (docs / f"{number}.md").write_text("\n\n".join(paragraphs), "utf-8")


def start(home: Path) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen([sys.executable, "-c", _INGEST, str(home)], stdout=subprocess.PIPE)
    if child.stdout is None or child.stdout.readline() != b"go\n":
        raise SystemExit("the ingest did not start")
    return child


def check(home: Path) -> tuple[str, str]:
    """The generation and its mark; ends the program when it is not whole."""
    current = Generations(home / "data" / "kb").current()
    if current is None:
        raise SystemExit("there is no generation any more")
    if findings := verify(current, sample=None):
        raise SystemExit(f"{current.name} is damaged: {findings}")
    with closing(KnowledgeBase(current, NoEmbedder(), readers=1)) as knowledge:
        documents = knowledge.documents()
        marks = {knowledge.passages_of(document.id)[0].text.split()[0] for document in documents}
    if len(documents) != DOCUMENTS or len(marks) != 1:
        raise SystemExit(f"{current.name} mixes {sorted(marks)} in {len(documents)} documents")
    return current.name, marks.pop()


def run(home: Path, kills: int, chance: random.Random) -> dict[str, object]:
    (home / "docs").mkdir()
    write(home / "docs", 0)
    started = time.monotonic()
    with start(home) as child:
        if child.wait():
            raise SystemExit("the first ingest failed")
    usual_s = time.monotonic() - started
    last = check(home)
    committed = 0
    for mark in range(1, kills + 1):
        write(home / "docs", mark)
        with start(home) as child:
            time.sleep(chance.uniform(0, usual_s * 1.2))
            child.kill()
        now = check(home)
        committed += now != last
        last = now
    write(home / "docs", kills + 1)
    *_, summary = ingest([home / "docs"], Generations(home / "data" / "kb"), GeneratedEmbedder(), base=home)
    name, mark_now = check(home)
    if mark_now != f"mark{kills + 1}":
        raise SystemExit(f"the ingest after the last kill did not succeed: {summary}")
    names = sorted(path.name for path in (home / "data" / "kb" / "generations").iterdir())
    return {
        "kills": kills,
        "damaged": 0,
        "committed_before_the_kill": committed,
        "usual_s": round(usual_s, 2),
        "generations": names,
        "serves": name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), options.kills, random.Random(options.seed)), indent=1))


if __name__ == "__main__":
    main()
