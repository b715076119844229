"""The next generation while it is written: a copy of the current one with its changes, or all anew."""

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mogine.errors import StoreError, Unavailable
from mogine.kb.catalogue import CatalogueWriter, read_documents, read_sources
from mogine.kb.chroma import ROWS_S, ChromaServer, Collection, Missing, NewCollection, Target
from mogine.kb.embedders import Embedder, NoEmbedder, Vectors
from mogine.kb.lexical import TERMS, LexicalWriter
from mogine.kb.manifest import (
    Generation,
    Manifest,
    checksums,
    copy_files,
    damaged_files,
    sources_of,
)
from mogine.kb.passages import Document, Passage
from mogine.kb.rounded import RoundedWriter
from mogine.kb.texts import create_texts, open_for_reading, open_for_writing
from mogine.kb.vectors import VECTORS_NAME, VectorIndex

log = logging.getLogger(__name__)

FORMAT = 1
_EMBED_AT_ONCE = 32
_TAKE_OVER_AT_ONCE = 2000
_UNCHANGED = "The knowledge base is as it was before"


class Draft:
    """The next generation while it is built. Nothing is copied before the first change.

    When the current generation has vectors of another embedder, all its passages are embedded anew.
    `target` names the Chroma server and the collection for its vectors; without, they are in its folder.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        current: Generation | None,
        embedder: Embedder,
        publish: Callable[[str], None],
        target: Target | None = None,
    ) -> None:
        self._path = path
        self._name = name
        self._current = current
        self._publish = publish
        self._embedder = embedder
        self._target = target if embedder.name != NoEmbedder.name else None
        self._made: Target | None = None
        self._work: _Work | None = None
        self._finished: Generation | None = None
        self._sources: dict[str, str] | None = None

    @property
    def renews(self) -> bool:
        """Whether a commit writes everything anew, though no document has changed: the embedder is another
        one, words are cut into other terms than those of the current keyword index, or the vectors move to
        a Chroma server or back, or are not there any more. Raises Unavailable when the server is away.
        """
        return self._current is not None and (
            self.re_embeds
            or self._current.manifest.versions.get("terms", TERMS) != TERMS
            or (self._current.manifest.dimensions > 0 and self._moves)
            or self._vectors_left < self._current.manifest.passages
        )

    @property
    def _moves(self) -> bool:
        return self._current is not None and bool(self._current.manifest.collection) != bool(self._target)

    @cached_property
    def _vectors_left(self) -> float:
        """How many the Chroma server has of the current generation; of those in a folder, enough."""
        current = self._current
        if current is None or not current.manifest.collection:
            return float("inf")
        if current.chroma is None:
            return 0
        with closing(Collection(current.chroma, current.manifest.collection, timeout_s=ROWS_S)) as vectors:
            try:
                return vectors.count()
            except Missing:
                return 0

    @property
    def re_embeds(self) -> bool:
        """Whether a commit embeds every passage again, because the embedder has changed."""
        return self._current is not None and self._current.manifest.embedder != self._embedder.name

    def sources(self) -> dict[str, str]:
        """Source to digest of every document that the draft holds."""
        if self._work:
            return self._work.sources()
        if self._sources is None:
            self._sources = sources_of(self._current)
        return dict(self._sources)

    def replace(self, document: Document, passages: Sequence[Passage]) -> None:
        """Puts `passages` in the place of whatever the document's source had."""
        with self._told():
            self._open().replace(document, passages)

    def remove(self, source: str) -> bool:
        """Whether there was such a source."""
        if source not in self.sources():
            return False
        with self._told():
            self._open().remove(source)
        return True

    def rebuild(self) -> None:
        """Writes every document into new files, without what removed ones have left in the old.

        Before any other change. Vectors are taken over where the embedder is still the same.
        """
        with self._told():
            self._open(anew=True)

    def finish(self) -> Generation | None:
        """The draft as it would serve, to be looked at before `commit`; None when there is no change.

        No change can follow. Whoever opens it closes it before the commit.
        """
        with self._told():
            if self._finished is None and (self._work is not None or self._current is None or self.renews):
                manifest = self._open().finish()
                self._work = None
                self._finished = Generation(self._name, self._path, manifest)
            return self._finished

    def commit(self) -> str:
        """Lets the draft serve and gives its name; without any change, the name of the current generation.

        After it returned, the change survives a power cut. Raises StoreError, and the old one serves on.
        """
        if self.finish() is None and self._current is not None:
            return self._current.name
        try:
            self._publish(self._name)
        except OSError as error:
            raise self._unwritable(error) from error
        self._made = None
        return self._name

    def discard(self) -> None:
        """Gives everything back; after a commit there is nothing to give."""
        if self._work is not None:
            self._work.close()
            self._work = None
        shutil.rmtree(self._path, ignore_errors=True)
        if self._made is not None:
            try:
                with closing(ChromaServer(self._made.chroma)) as server:
                    server.delete(self._made.name)
            except Unavailable as error:
                log.warning("its collection stays until the next ingest: %s", error.message)

    def _open(self, *, anew: bool = False) -> "_Work":
        if self._finished is not None:
            raise AssertionError("a finished draft takes no change")
        if self._work is None:
            path = self._path
            self._made = self._target
            if self._current is None or self.renews or anew:
                path.mkdir(mode=0o700)
                create_texts(path)
                self._work = _Work(path, self._embedder, self._target)
                if self._current is not None:
                    damaged = any(VECTORS_NAME in entry for entry in damaged_files(self._current))
                    usable = not self.re_embeds and not damaged and self._vectors_left > 0
                    self._work.take_over(self._current, with_vectors=usable)
            else:
                copy_files(self._current, path)
                self._work = _Work(path, self._embedder, self._target, self._current)
        return self._work

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            raise StoreError(f"{error.message}. {_UNCHANGED}") from error
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> StoreError:
        reason = error.strerror if isinstance(error, OSError) else error
        return StoreError(
            f"{self._path} cannot be written ({reason}); look at the disk's free space. {_UNCHANGED}"
        )


class _Work:
    """What is open while a draft is written. `copied` is the generation it began as, None for a new one."""

    def __init__(
        self,
        path: Path,
        embedder: Embedder,
        target: Target | None,
        copied: Generation | None = None,
    ) -> None:
        self._path = path
        self._embedder = embedder
        self._copied = copied
        self._db = open_for_writing(path)
        self._vectors: VectorIndex | NewCollection | None = None
        try:
            if target is not None:
                self._vectors = NewCollection(target)
            elif embedder.name != NoEmbedder.name:
                self._vectors = VectorIndex(path, create=copied is None)
            self._catalogue = CatalogueWriter(self._db)
            self._lexical = LexicalWriter(self._db)
            self._rounded = RoundedWriter(self._db)
            self._waiting: list[tuple[int, str]] = []
            self._db.execute("BEGIN")
        except BaseException:
            self.close()
            raise

    def replace(self, document: Document, passages: Sequence[Passage]) -> None:
        self.remove(document.source)
        numbers = self._catalogue.add(document, passages)
        for number, passage in zip(numbers, passages, strict=True):
            self._lexical.add(number, passage.searchable)
            self._waiting.append((number, passage.searchable))
        if len(self._waiting) >= _EMBED_AT_ONCE:
            self._embed()

    def remove(self, source: str) -> None:
        old = self._catalogue.passages_of(source)
        for number, passage in old:
            self._lexical.remove(number, passage.searchable)
        self._catalogue.remove(source)
        numbers = {number for number, _ in old}
        kept = [(number, text) for number, text in self._waiting if number not in numbers]
        embedded = numbers - {number for number, _ in self._waiting}
        self._waiting = kept
        if self._vectors and embedded:
            self._vectors.remove(sorted(embedded))
            self._rounded.remove(sorted(embedded))

    def sources(self) -> dict[str, str]:
        return read_sources(self._db)

    def take_over(self, old: Generation, *, with_vectors: bool) -> None:
        """Every document of another generation; a vector that it lacks is embedded."""
        vectors = old.open_vectors(timeout_s=ROWS_S) if with_vectors and self._vectors else None
        try:
            with closing(open_for_reading(old.path)) as db:
                moved: list[tuple[int, int, str]] = []
                for document, passages in read_documents(db):
                    numbers = self._catalogue.add(document, [passage for _, passage in passages])
                    for number, (old_number, passage) in zip(numbers, passages, strict=True):
                        self._lexical.add(number, passage.searchable)
                        moved.append((number, old_number, passage.searchable))
                    if len(moved) >= _TAKE_OVER_AT_ONCE:
                        self._move(moved, vectors)
                        moved = []
                self._move(moved, vectors)
        finally:
            if vectors:
                vectors.close()

    def _move(self, moved: Sequence[tuple[int, int, str]], vectors: VectorIndex | Collection | None) -> None:
        known = vectors.vectors([old_number for _, old_number, _ in moved]) if vectors else {}
        ready = [(number, known[old_number]) for number, old_number, _ in moved if old_number in known]
        if ready:
            self._add_vectors([number for number, _ in ready], np.array([row for _, row in ready]))
        self._waiting += [(number, text) for number, old_number, text in moved if old_number not in known]
        self._embed()

    def finish(self) -> Manifest:
        """Writes what is left, the manifest too, and closes."""
        self._embed()
        collection = ""
        if isinstance(self._vectors, NewCollection):
            collection = self._vectors.name
            if self._copied:
                self._carry_over(self._copied, self._vectors)
        self._lexical.finish()
        self._db.execute("COMMIT")
        documents, passages = self._catalogue.counts()
        manifest = Manifest(
            FORMAT,
            self._embedder.name,
            self._copied.manifest.dimensions if self._copied else self._embedder.dimensions,
            documents,
            passages,
            datetime.now(UTC).isoformat(timespec="seconds"),
            {
                "mogine": version("mogine"),
                "chromadb": version("chromadb"),
                "sqlite": sqlite3.sqlite_version,
                "terms": TERMS,
            },
            collection=collection,
        )
        self.close()
        manifest = replace(manifest, checksums=checksums(self._path, self._copied))
        (self._path / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        return manifest

    def _carry_over(self, old: Generation, vectors: NewCollection) -> None:
        """What has not changed goes from one collection to the next; the server itself cannot copy."""
        left = sorted(self._catalogue.numbers() - vectors.added)
        with closing(old.open_vectors(timeout_s=ROWS_S)) as before:
            for start in range(0, len(left), _TAKE_OVER_AT_ONCE):
                numbers = left[start : start + _TAKE_OVER_AT_ONCE]
                known = before.vectors(numbers)
                if len(known) < len(numbers):
                    raise StoreError(
                        f"the Chroma server has lost vectors of {old.name} meanwhile; ingest again"
                    )
                vectors.add(numbers, np.array([known[number] for number in numbers]))

    def close(self) -> None:
        self._db.close()
        if self._vectors:
            self._vectors.close()
            self._vectors = None

    def _embed(self) -> None:
        if self._vectors and self._waiting:
            vectors = self._embedder.embed_passages([text for _, text in self._waiting])
            self._add_vectors([number for number, _ in self._waiting], vectors)
        self._waiting = []

    def _add_vectors(self, numbers: Sequence[int], vectors: Vectors) -> None:
        if self._vectors:
            self._vectors.add(numbers, vectors)
            self._rounded.add(numbers, vectors)
