"""The SQLite file of a generation: catalogue and keyword index, written once, then read by many threads."""

import os
import queue
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mogine.errors import StoreError

TEXTS_NAME = "texts.db"
MAX_READERS = 4
# Rows in the keyword index that no question finds. Without them a term that stands in half of the
# passages has no weight at all, and in a base of three passages that is nearly every term.
PADDING_ROWS = 64
_PADDING = " ".join(["\ue000"] * 400)  # as long as a passage; a private character is in no term

_SCHEMA = """
CREATE TABLE documents (
    number INTEGER PRIMARY KEY,
    source TEXT NOT NULL UNIQUE,
    id TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    digest TEXT NOT NULL,
    url TEXT NOT NULL,
    updated TEXT NOT NULL
);
-- A number is never used again: it names the passage in both indexes, also after it was removed.
CREATE TABLE passages (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    document INTEGER NOT NULL REFERENCES documents (number),
    id TEXT NOT NULL,
    title TEXT NOT NULL,
    heading TEXT NOT NULL,
    position INTEGER NOT NULL,
    text TEXT NOT NULL,
    url TEXT NOT NULL,
    page INTEGER,
    language TEXT NOT NULL
);
CREATE INDEX passages_of_document ON passages (document, position);
-- Terms come ready made, so the tokenizer only has to split at blanks: `ascii` takes every character
-- beyond ASCII for part of a word. Contentless: the texts stand in `passages`.
CREATE VIRTUAL TABLE keywords USING fts5(terms, content='', tokenize='ascii');
CREATE TABLE term_counts (term TEXT PRIMARY KEY, passages INTEGER NOT NULL) WITHOUT ROWID;
-- A vector is its parts, whole numbers of a byte, times the step.
CREATE TABLE rounded_vectors (number INTEGER PRIMARY KEY, step REAL NOT NULL, parts BLOB NOT NULL);
"""


def create_texts(folder: Path) -> None:
    """An empty file with its tables."""
    db = open_for_writing(folder)
    try:
        db.executescript(_SCHEMA)
        db.executemany(
            "INSERT INTO keywords (rowid, terms) VALUES (?, ?)",
            [(-number, _PADDING) for number in range(1, PADDING_ROWS + 1)],
        )
    finally:
        db.close()


def open_for_writing(folder: Path) -> sqlite3.Connection:
    """For the one writer of a draft. Nothing is synced here: a draft that does not reach its commit is
    thrown away, and the commit syncs every file."""
    db = sqlite3.connect(folder / TEXTS_NAME, isolation_level=None)
    db.execute("PRAGMA journal_mode = MEMORY")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -65536")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def open_for_reading(folder: Path) -> sqlite3.Connection:
    """For any thread, one at a time. `immutable` means no locks and no looking for a journal."""
    uri = f"{(folder / TEXTS_NAME).resolve().as_uri()}?mode=ro&immutable=1"
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


def copy_database(source: Path, target: Path) -> None:
    """As it is between two commits, whoever writes to it meanwhile. Raises StoreError."""
    try:
        os.close(os.open(target, os.O_RDWR | os.O_CREAT, 0o600))
        with (
            closing(sqlite3.connect(f"file:{_uri(source)}?mode=ro", uri=True, timeout=30)) as reader,
            closing(sqlite3.connect(target)) as writer,
        ):
            reader.backup(writer)
            writer.execute("PRAGMA journal_mode = DELETE")  # one file, with nothing beside it
            if writer.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise StoreError(f"{source.name} is damaged; `mogine doctor` tells what to do")
    except sqlite3.Error as error:
        raise StoreError(f"{source.name} cannot be copied ({error})") from error


def _uri(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


class Readers:
    """A few connections to a file that nobody writes any more, handed to one thread at a time.

    All are opened at once, so that the folder may be removed while searches still run.
    """

    def __init__(self, folder: Path, count: int = MAX_READERS) -> None:
        self._path = folder / TEXTS_NAME
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        try:
            for _ in range(count):
                db = open_for_reading(folder)
                self._idle.put(db)
                db.execute("PRAGMA mmap_size = 0")
                db.execute("SELECT count(*) FROM documents").fetchone()
        except sqlite3.Error as error:
            self.close()
            raise StoreError(
                f"{self._path} cannot be read ({error}); `mogine kb ingest` builds it anew"
            ) from error

    @contextmanager
    def take(self) -> Iterator[sqlite3.Connection]:
        """A connection for the length of the block; waits while all are in use."""
        db = self._idle.get()
        try:
            yield db
        except sqlite3.Error as error:
            raise StoreError(
                f"{self._path} cannot be read ({error}); `mogine kb ingest` builds it anew"
            ) from error
        finally:
            self._idle.put(db)

    def close(self) -> None:
        """Only after the last search has ended."""
        while not self._idle.empty():
            self._idle.get().close()
