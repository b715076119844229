"""Whether a generation is whole: manifest, files, catalogue, keyword index and vectors agree."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from mogine.errors import StoreError
from mogine.kb.generations import Generation, checksums
from mogine.kb.texts import PADDING_ROWS, open_for_reading
from mogine.kb.vectors import VECTORS_NAME, VectorIndex

SAMPLE = 300
_NEAR_ENOUGH = 0.999
# An approximate index may miss a vector now and then; more than this is damage.
_MISSED_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be: in which part, and what."""

    part: str
    detail: str


def verify(generation: Generation, *, sample: int | None = SAMPLE) -> list[Finding]:
    """All findings; an empty list is a whole generation. `sample` vectors are searched for, all with None."""
    findings = [*_files(generation)]
    numbers: set[int] = set()
    try:
        with closing(open_for_reading(generation.path)) as db:
            numbers = {number for (number,) in db.execute("SELECT number FROM passages")}
            findings += _catalogue(db, generation)
            findings += _keywords(db, numbers)
    except sqlite3.Error as error:
        findings.append(Finding("catalogue", f"texts.db cannot be read ({error})"))
        return findings
    if generation.manifest.dimensions:
        try:
            findings += _vectors(generation, numbers, sample)
        except StoreError as error:
            findings.append(Finding("vectors", error.message))
    return findings


def _files(generation: Generation) -> Iterator[Finding]:
    written = generation.manifest.checksums
    if not written:  # an older mogine took none
        return
    try:
        found = checksums(generation.path)
    except OSError as error:
        yield Finding("files", f"cannot be read ({error})")
        return
    for name in sorted(written.keys() | found.keys()):
        if name not in found:
            yield Finding("files", f"{name} is missing")
        elif name in written and found[name] != written[name]:
            yield Finding("files", f"{name} is not as it was written")


def _catalogue(db: sqlite3.Connection, generation: Generation) -> Iterator[Finding]:
    for (message,) in db.execute("PRAGMA quick_check(5)").fetchall():
        if message != "ok":
            yield Finding("catalogue", f"texts.db: {message}")
    manifest = generation.manifest
    for what, told in (("documents", manifest.documents), ("passages", manifest.passages)):
        (count,) = db.execute(f"SELECT count(*) FROM {what}").fetchone()  # noqa: S608 - our own two names
        if count != told:
            yield Finding("catalogue", f"holds {count} {what}, the manifest says {told}")
    lost = "SELECT count(*) FROM passages WHERE document NOT IN (SELECT number FROM documents)"
    (orphans,) = db.execute(lost).fetchone()
    if orphans:
        yield Finding("catalogue", f"{orphans} passages belong to no document")


def _keywords(db: sqlite3.Connection, numbers: set[int]) -> Iterator[Finding]:
    rows = {row for (row,) in db.execute("SELECT id FROM keywords_docsize")}
    indexed = {row for row in rows if row > 0}
    if len(rows) - len(indexed) != PADDING_ROWS:
        yield Finding("keywords", f"has {len(rows) - len(indexed)} rows of padding, not {PADDING_ROWS}")
    yield from _compare("keywords", numbers, indexed)
    db.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab('main', 'keywords', 'row')")
    wrong = (
        "SELECT count(*) FROM (SELECT v.term FROM temp.terms v LEFT JOIN term_counts c ON c.term = v.term"
        " WHERE v.doc != coalesce(c.passages, 0) AND v.term != char(57344))"
    )
    (count,) = db.execute(wrong).fetchone()
    if count:
        yield Finding("keywords", f"{count} terms are counted wrongly")


def _vectors(generation: Generation, numbers: set[int], sample: int | None) -> Iterator[Finding]:
    with closing(_ChromaFile(generation)) as file:
        yield from file.findings()
    with closing(VectorIndex(generation.path)) as index:
        indexed = index.numbers()
        yield from _compare("vectors", numbers, indexed)
        both = sorted(numbers & indexed)
        chosen = both if sample is None else random.Random(0).sample(both, min(sample, len(both)))  # noqa: S311
        lost = 0
        for number, vector in index.vectors(chosen).items():
            nearest = index.search(vector, 10)
            lost += number not in nearest and max(nearest.values(), default=0.0) < _NEAR_ENOUGH
        if lost > _MISSED_SHARE * len(chosen):
            yield Finding("vectors", f"{lost} of {len(chosen)} vectors are not found by their own search")


class _ChromaFile:
    """Chroma's own database, looked at without Chroma."""

    def __init__(self, generation: Generation) -> None:
        path = generation.path / VECTORS_NAME / "chroma.sqlite3"
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)

    def findings(self) -> Iterator[Finding]:
        try:
            for (message,) in self._db.execute("PRAGMA quick_check(5)").fetchall():
                if message != "ok":
                    yield Finding("vectors", f"chroma.sqlite3: {message}")
        except sqlite3.Error as error:
            yield Finding("vectors", f"chroma.sqlite3 cannot be read ({error})")

    def close(self) -> None:
        self._db.close()


def _compare(part: str, wanted: set[int], found: set[int]) -> Iterator[Finding]:
    if missing := wanted - found:
        yield Finding(part, f"{len(missing)} passages are missing, such as number {min(missing)}")
    if extra := found - wanted:
        yield Finding(part, f"{len(extra)} passages are there that no document has, such as {min(extra)}")
