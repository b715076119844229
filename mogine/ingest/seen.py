"""Which files have been hashed already: while size and time of change agree, one `stat` stands for a hash."""

import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mogine.ingest.find import read
from mogine.ingest.load import digest_of

log = logging.getLogger(__name__)

# A file may change twice within one tick of its file system's clock; what is this young is hashed again.
_TOO_YOUNG_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class _Known:
    size: int
    mtime_ns: int
    digest: str


class Seen:
    """Digests of files by source. Lost or damaged it costs time, never a change: it is only a memory."""

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._known = self._load()
        self._fresh: dict[str, _Known] = {}
        self.hashed = 0

    def digest(self, source: str, path: Path) -> str:
        """The digest of the file's bytes. Raises UnreadableDocument, TooLarge."""
        before = self._look(path)
        known = self._known.get(source)
        if known and before and (known.size, known.mtime_ns) == (before.st_size, before.st_mtime_ns):
            return known.digest
        digest = digest_of(read(path))
        self.hashed += 1
        # The look came first: a file that changed since then looks different next time.
        if before and self._clock_ns() - before.st_mtime_ns > _TOO_YOUNG_NS:
            self._fresh[source] = _Known(before.st_size, before.st_mtime_ns, digest)
        return digest

    def save(self, gone: Iterable[str] = ()) -> None:
        """Remembers what was hashed and forgets what is gone."""
        forgotten = [(source,) for source in gone if source in self._known]
        if not self._fresh and not forgotten:
            return
        try:
            with closing(self._open()) as db, db:
                db.executemany("DELETE FROM files WHERE source = ?", forgotten)
                db.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
                    [(s, k.size, k.mtime_ns, k.digest, _rules()) for s, k in self._fresh.items()],
                )
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "%s cannot be written (%s); the next ingest hashes all files again", self._path, error
            )

    def _load(self) -> dict[str, _Known]:
        if not self._path.is_file():
            return {}
        try:
            with closing(self._open()) as db:
                rows = db.execute(
                    "SELECT source, size, mtime_ns, digest FROM files WHERE rules = ?", (_rules(),)
                ).fetchall()
        except (OSError, sqlite3.Error) as error:
            log.warning("%s cannot be read (%s); all files are hashed again", self._path, error)
            self._path.unlink(missing_ok=True)
            return {}
        return {source: _Known(size, mtime_ns, digest) for source, size, mtime_ns, digest in rows}

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=5)
        db.execute(
            "CREATE TABLE IF NOT EXISTS files (source TEXT PRIMARY KEY, size INTEGER NOT NULL,"
            " mtime_ns INTEGER NOT NULL, digest TEXT NOT NULL, rules TEXT NOT NULL) WITHOUT ROWID"
        )
        return db

    def _look(self, path: Path) -> os.stat_result | None:
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            return None  # read() says why
        return status if stat.S_ISREG(status.st_mode) else None


def _rules() -> str:
    """Changes whenever all digests do."""
    return digest_of(b"")
