"""Lets the n-th write or sync of an ingest fail, for every n: `python -m benchmarks.kb.inject [--most 40]`.

Needs strace. Each run changes four documents and takes them in while one call of the system fails with EIO or
ENOSPC. Whatever the call was, the command either does all or says in a line why it did nothing and ends with
1; a whole generation serves, of the old texts or of the new; and the next ingest takes the change in. Ends
with 1 when anything else happened.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.verify import verify

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = 4
# How often an ingest of these documents calls each in one thread, at most; files are copied by `sendfile`.
CALLS = {"pwrite64": 60, "write": 4, "sendfile": 12, "fsync": 40, "ftruncate": 2, "rename": 2}
ERRORS = ("EIO", "ENOSPC")
DRAFT = "generations/draft-g000004"
# What a commit syncs, and one after the other: among all the syncs of Chroma's threads these would be missed.
SYNCED = (f"{DRAFT}/texts.db", f"{DRAFT}/manifest.json", DRAFT, "generations", "current.new", ".")


def write(home: Path, mark: str) -> None:
    for number in range(DOCUMENTS):
        paragraphs = (f"{mark} 退款 paragraph {n} of document {number}. " * 8 for n in range(3))
        (home / "docs" / f"{number}.md").write_text("\n\n".join(paragraphs), "utf-8")


def ingest(home: Path, *strace: str) -> "subprocess.CompletedProcess[str]":
    """A real `mogine kb ingest`, under strace when it is given what to do."""
    # Without what measures coverage: its own file is not to be one of those that fail.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return subprocess.run(
        [*strace, sys.executable, "-m", "mogine", "kb", "ingest", "docs"],
        cwd=home,
        env={**environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def prepare(home: Path) -> None:
    """A home of which the old and the new texts were embedded before; its files hold the new ones."""
    (home / "docs").mkdir(parents=True)
    for mark in ("old", "new", "old"):
        write(home, mark)
        if (done := ingest(home)).returncode:
            raise SystemExit(done.stderr)
    write(home, "new")


def serving(home: Path) -> str:
    """Whose texts serve; or what is wrong with them."""
    generation = Generations(home / "data" / "kb").current()
    if generation is None:
        return "nothing serves"
    if findings := verify(generation, sample=None):
        return f"{generation.name} is damaged: {findings}"
    with closing(KnowledgeBase(generation, NoEmbedder(), readers=1)) as knowledge:
        passages = [p for document in knowledge.documents() for p in knowledge.passages_of(document.id)]
    marks = {passage.text.split()[0] for passage in passages}
    return marks.pop() if len(marks) == 1 else f"{generation.name} mixes {sorted(marks)}"


def run(prepared: Path, call: str, number: int, error: str, only: str = "") -> str:
    """What went wrong when the `number`-th `call` of each thread failed; "" when nothing did.

    On any file of the knowledge base, or on `only` that one.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "home"
        shutil.copytree(prepared, home)
        kb = home / "data" / "kb"
        paths = [kb / only] if only else _files(kb)
        done = ingest(
            home,
            *("strace", "-f", "-qq", "-o", "/dev/null"),
            *(word for path in paths for word in ("-P", str(path))),
            *("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"),
        )
        problem = _judged(done, serving(home))
        if not problem and (again := ingest(home)).returncode:
            problem = f"the next ingest failed: {again.stderr[-1500:]}"
        if not problem and serving(home) != "new":
            problem = f"after the next ingest: {serving(home)}"
    return f"{call} number {number} with {error} {only}: {problem}" if problem else ""


def _files(kb: Path) -> list[Path]:
    """All that an ingest will write: not the pipes between threads, nor the terminal."""
    served, draft = kb / "generations" / "g000003", kb / DRAFT
    copied = [draft / path.relative_to(served) for path in served.rglob("*")]
    journals = [draft / "chroma" / f"chroma.sqlite3-{kind}" for kind in ("wal", "journal", "shm")]
    return [
        kb,
        draft,
        *copied,
        *journals,
        *(kb / name for name in ("current.new", "files.db", "generations")),
    ]


def _judged(done: "subprocess.CompletedProcess[str]", serves: str) -> str:
    told = done.stderr.strip()
    if "Traceback" in told or done.returncode not in (0, 1):
        return f"exit code {done.returncode}: {told[-1500:]}"
    if done.returncode == 0:
        return "" if serves == "new" else f"said to be done: {serves}"
    if not told.splitlines()[-1].startswith("mogine: "):
        return f"no reason was given: {told[-1500:]}"
    if "as it was before" in told and serves != "old":
        return f"said to be as it was: {serves}"
    return "" if serves in ("old", "new") else serves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=200, help="up to which call")
    given = parser.parse_args()
    points = [(call, n, "") for call, often in CALLS.items() for n in range(1, min(often, given.most) + 1)]
    points += [("fsync", 1, only) for only in SYNCED]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        prepare(prepared)
        for call, number, only in points:
            for error in ERRORS:
                if problem := run(prepared, call, number, error, only):
                    wrong += 1
                    print(problem, file=sys.stderr, flush=True)
    print(f"{len(points) * len(ERRORS)} runs, {wrong} went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
