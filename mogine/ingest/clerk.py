"""One change of the documents in a process of its own: a server that embeds keeps its searches waiting.

The child gets a job as JSON and answers with what came of it; it shares nothing with the server but files.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mogine.errors
from mogine.children import import_path
from mogine.errors import MogineError, SettingsError, StoreError
from mogine.ingest.find import read
from mogine.ingest.pipeline import Gate, take_out, take_uploads
from mogine.ingest.readahead import Item
from mogine.kb.embedders import open_embedder
from mogine.kb.gate import TESTS_NAME, load_tests
from mogine.kb.generations import Generations
from mogine.settings import KnowledgeSettings, Settings

_START = "import sys; sys.path[:] = sys.argv[1:]; from mogine.ingest.clerk import main; main()"
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: sources by what happened to them, and the questions that fail now."""

    generation: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    passages: int
    worse: tuple[str, ...]


def program() -> list[str]:
    """The child's command line; nothing of a job or a setting stands in it."""
    return [sys.executable, "-I", "-B", "-X", "utf8", "-c", _START, *import_path()]


def job(
    settings: Settings, *, add: Sequence[tuple[str, str, Path]] = (), remove: Sequence[str] = ()
) -> bytes:
    """What the child reads: (source, name, file) of each document to take in, and sources to take out."""
    uploads = [(source, name, str(path)) for source, name, path in add]
    fields = {
        "home": str(settings.home),
        "kb": asdict(settings.kb),
        "add": uploads,
        "remove": list(remove),
    }
    return json.dumps(fields).encode()


def outcome(reply: bytes) -> Outcome:
    """What the child answered. Raises the MogineError that it met, and StoreError when it broke off."""
    try:
        fields: dict[str, Any] = json.loads(reply)
    except ValueError as error:
        raise StoreError("the process that changes the documents broke off; nothing was changed") from error
    if "error" in fields:
        kind = getattr(mogine.errors, fields["error"])
        raise kind(fields["message"], reason=fields["reason"], retry_after_s=fields["retry_after_s"])
    return Outcome(**_with_tuples(fields))


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# --- in the child --------------------------------------------------------------------------------


def main() -> None:
    """Does the one job on standard input."""
    os.nice(_NICENESS)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not speak into the answer
    fields = json.loads(sys.stdin.buffer.read())
    try:
        answer = asdict(_work(fields))
    except MogineError as error:
        answer = {
            "error": type(error).__name__,
            "message": error.message,
            "reason": error.reason,
            "retry_after_s": error.retry_after_s,
        }
    replies.write(json.dumps(answer).encode())
    replies.close()


def _work(fields: dict[str, Any]) -> Outcome:
    kb = KnowledgeSettings(**_with_tuples(fields["kb"]))
    settings = Settings(home=Path(fields["home"]), kb=kb)
    generations = Generations.of(settings)
    gate = _gate(settings.home / TESTS_NAME)
    with closing(open_embedder(settings)) as embedder:
        if fields["add"]:
            items = [Item(source, name, partial(read, Path(path))) for source, name, path in fields["add"]]
            summary = take_uploads(items, generations, embedder, gate=gate)
        else:
            summary = take_out(fields["remove"], generations, embedder, gate=gate)
    worse = summary.verdict.worse if summary.verdict else ()
    return Outcome(
        summary.generation,
        summary.added,
        summary.changed,
        summary.unchanged,
        summary.removed,
        tuple(f"{note.source} {note.reason}" for note in summary.notes),
        summary.passages,
        tuple(change.after.test.question for change in worse),
    )


def _gate(path: Path) -> Gate | None:
    """Tests only tell here; a mistake in their file is for `mogine kb test` to tell."""
    try:
        return Gate(tuple(load_tests(path)))
    except SettingsError:
        return None
