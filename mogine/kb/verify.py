"""Whether a generation is whole: manifest, files, catalogue, keyword index and vectors agree."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from mogine.errors import StoreError, Unavailable
from mogine.kb.manifest import Generation, damaged_files
from mogine.kb.texts import PADDING_ROWS, open_for_reading
from mogine.kb.vectors import VECTORS_NAME

SAMPLE = 300
PATIENCE_S = 30.0
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
    findings = _files(generation)
    is_readable = not findings
    numbers: set[int] = set()
    try:
        with closing(open_for_reading(generation.path)) as db:
            numbers = {number for (number,) in db.execute("SELECT number FROM passages")}
            findings += _catalogue(db, generation)
            findings += _keywords(db, numbers)
            if generation.manifest.dimensions:
                findings += _rounded(db, numbers)
    except sqlite3.Error as error:
        findings.append(Finding("catalogue", f"texts.db cannot be read ({error})"))
        return findings
    # Chroma believes what its files say: a wrong byte in them can end the whole process.
    if generation.manifest.dimensions and is_readable:
        try:
            findings += _vectors(generation, numbers, sample)
        except (StoreError, Unavailable) as error:
            findings.append(Finding("vectors", error.message))
    return findings


def _files(generation: Generation) -> list[Finding]:
    try:
        return [Finding("files", detail) for detail in damaged_files(generation)]
    except OSError as error:
        return [Finding("files", f"cannot be read ({error})")]


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


def _rounded(db: sqlite3.Connection, numbers: set[int]) -> Iterator[Finding]:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rounded_vectors'").fetchone():
        copies = {number for (number,) in db.execute("SELECT number FROM rounded_vectors")}
        yield from _compare("rounded vectors", numbers, copies)


def _vectors(generation: Generation, numbers: set[int], sample: int | None) -> Iterator[Finding]:
    broken = [] if generation.manifest.collection else list(_chroma_file(generation))
    yield from broken
    if broken:
        return  # Chroma would make a new, empty one in its place
    with closing(generation.open_vectors(timeout_s=PATIENCE_S)) as index:
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


def _chroma_file(generation: Generation) -> Iterator[Finding]:
    """Chroma's own database, looked at without Chroma."""
    path = generation.path / VECTORS_NAME / "chroma.sqlite3"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            for (message,) in db.execute("PRAGMA quick_check(5)").fetchall():
                if message != "ok":
                    yield Finding("vectors", f"chroma.sqlite3: {message}")
    except sqlite3.Error as error:
        yield Finding("vectors", f"chroma.sqlite3 cannot be read ({error})")


def _compare(part: str, wanted: set[int], found: set[int]) -> Iterator[Finding]:
    if missing := wanted - found:
        yield Finding(part, f"{len(missing)} passages are missing, such as number {min(missing)}")
    if extra := found - wanted:
        yield Finding(part, f"{len(extra)} passages are there that no document has, such as {min(extra)}")
