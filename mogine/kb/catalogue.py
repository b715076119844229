"""Which documents a generation holds, and their passages."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mogine.errors import NotFound
from mogine.kb.passages import Document, Language, Passage, StoredDocument, language
from mogine.kb.texts import Readers

_PASSAGE = (
    "SELECT p.number, p.id, d.source, p.title, p.heading, p.position, p.text, p.url, p.page, p.language"
    " FROM passages p JOIN documents d ON d.number = p.document"
)
_DOCUMENT = (
    "SELECT d.source, d.title, d.digest, d.url, d.updated, count(p.number), coalesce(sum(length(p.text)), 0)"
    " FROM documents d LEFT JOIN passages p ON p.document = d.number"
)


def read_sources(db: sqlite3.Connection) -> dict[str, str]:
    """Source to digest."""
    return dict(db.execute("SELECT source, digest FROM documents"))


def read_documents(db: sqlite3.Connection) -> Iterator[tuple[Document, list[tuple[int, Passage]]]]:
    """All documents with their numbered passages, to be taken in again; the whole texts are not kept."""
    rows = db.execute("SELECT source, title, digest, url, updated FROM documents ORDER BY number")
    for source, title, digest, url, updated in rows.fetchall():
        yield Document(source, title, "", digest, url, updated), CatalogueWriter(db).passages_of(source)


class CatalogueWriter:
    """Changes the catalogue of a draft; the caller holds the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def add(self, document: Document, passages: Sequence[Passage]) -> list[int]:
        """The numbers of the passages, in their order."""
        cursor = self._db.execute(
            "INSERT INTO documents (source, id, title, digest, url, updated) VALUES (?, ?, ?, ?, ?, ?)",
            (
                document.source,
                document.id,
                document.title,
                document.digest,
                document.url,
                document.updated,
            ),
        )
        number = cursor.lastrowid
        return [self._add_passage(number, passage) for passage in passages]

    def _add_passage(self, document: int | None, p: Passage) -> int:
        cursor = self._db.execute(
            "INSERT INTO passages (document, id, title, heading, position, text, url, page, language)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (document, p.id, p.title, p.heading, p.position, p.text, p.url, p.page, language(p.text)),
        )
        number = cursor.lastrowid
        if number is None:
            raise AssertionError("an INSERT gives a row number")
        return number

    def passages_of(self, source: str) -> list[tuple[int, Passage]]:
        rows = self._db.execute(f"{_PASSAGE} WHERE d.source = ? ORDER BY p.position, p.number", (source,))
        return [(row[0], _passage(row)) for row in rows]

    def remove(self, source: str) -> None:
        self._db.execute(
            "DELETE FROM passages WHERE document = (SELECT number FROM documents WHERE source = ?)", (source,)
        )
        self._db.execute("DELETE FROM documents WHERE source = ?", (source,))

    def numbers(self) -> set[int]:
        """Of all passages."""
        return {number for (number,) in self._db.execute("SELECT number FROM passages")}

    def counts(self) -> tuple[int, int]:
        """Documents and passages."""
        row = self._db.execute("SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM passages)")
        documents, passages = row.fetchone()
        return int(documents), int(passages)


class Catalogue:
    """Reads the catalogue of a generation."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    def documents(self) -> list[StoredDocument]:
        """By source."""
        with self._readers.take() as db:
            rows = db.execute(f"{_DOCUMENT} GROUP BY d.number ORDER BY d.source").fetchall()
        return [StoredDocument(*row) for row in rows]

    def document(self, id: str) -> StoredDocument:
        """Raises NotFound."""
        with self._readers.take() as db:
            row = db.execute(f"{_DOCUMENT} WHERE d.id = ? GROUP BY d.number", (id,)).fetchone()
        if row is None:
            raise NotFound("there is no document with this id; GET /api/documents lists them")
        return StoredDocument(*row)

    def passages_of(self, id: str) -> list[Passage]:
        """In the document's order. Raises NotFound."""
        self.document(id)
        with self._readers.take() as db:
            rows = db.execute(f"{_PASSAGE} WHERE d.id = ? ORDER BY p.position, p.number", (id,)).fetchall()
        return [_passage(row) for row in rows]

    def passages(self, numbers: Sequence[int]) -> Mapping[int, Passage]:
        """Number to passage, for those that exist."""
        with self._readers.take() as db:
            rows = db.execute(f"{_PASSAGE} WHERE p.number IN ({_marks(numbers)})", list(numbers)).fetchall()
        return {row[0]: _passage(row) for row in rows}

    def languages(self, numbers: Sequence[int]) -> Mapping[int, Language]:
        """Number to the passage's language."""
        query = f"SELECT number, language FROM passages WHERE number IN ({_marks(numbers)})"  # noqa: S608
        with self._readers.take() as db:
            return dict(db.execute(query, list(numbers)).fetchall())


def _marks(values: Sequence[int]) -> str:
    return ", ".join("?" * len(values))


def _passage(row: Sequence[Any]) -> Passage:
    _, id, source, title, heading, position, text, url, page, _ = row
    return Passage(id, source, title, heading, position, text, url, page)
