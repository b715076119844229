"""Immutable folders and one pointer: how documents change without anybody ever reading half a change.

data/kb/current.json             which generation serves, and which are kept; replaced atomically
data/kb/lock                     held by the one process that writes
data/kb/vectors.db               vectors by content, so that nothing is embedded twice
data/kb/generations/g000042/     texts.db, chroma/, manifest.json: complete, synced, never written again
data/kb/generations/draft-...    being built; debris once its writer is dead
"""

import fcntl
import json
import os
import re
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mogine.errors import Locked, MogineError, NotFound, StoreError
from mogine.kb.catalogue import CatalogueWriter, read_documents, read_sources
from mogine.kb.embedders import Embedder, NoEmbedder
from mogine.kb.lexical import TERMS, LexicalWriter
from mogine.kb.passages import Document, Passage
from mogine.kb.texts import create_texts, open_for_reading, open_for_writing
from mogine.kb.vectors import VectorIndex

FORMAT = 1
KEPT = 3
# A server may be a moment behind: what has just been replaced stays until it must have moved on.
GRACE_S = 15.0
_EMBED_AT_ONCE = 32
_TAKE_OVER_AT_ONCE = 2000
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a generation says about itself.

    `versions` are those of what wrote it. `checksums` tell of every file that opening it does not change
    (Chroma notes each opening in its own database).
    """

    format: int
    embedder: str
    dimensions: int
    documents: int
    passages: int
    created_at: str
    versions: Mapping[str, str]
    checksums: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """One complete knowledge base."""

    name: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Kept:
    """A generation as it is listed: `generation` is None when `problem` says why it cannot be used."""

    name: str
    is_current: bool
    bytes: int
    generation: Generation | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Pointer:
    """`kept` goes from old to new and holds `current`; the others are for going back.

    `leaving` names what was replaced a moment ago, and when.
    """

    current: str
    kept: tuple[str, ...]
    leaving: tuple[tuple[str, float], ...] = ()


class Generations:
    """All generations of one home; cheap to make, holds nothing open."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._folders = path / "generations"
        self._pointer_path = path / "current.json"

    def current_name(self) -> str | None:
        """The name of the generation that serves; one small read, for watching."""
        pointer = self._read_pointer()
        return pointer.current if pointer else None

    def current(self) -> Generation | None:
        """None before the first ingest. Raises StoreError when its files are damaged."""
        name = self.current_name()
        return self._open(name) if name else None

    def sources(self) -> dict[str, str]:
        """Source to digest of every document that serves. Raises StoreError."""
        return _sources_of(self.current())

    def kept(self) -> list[Generation]:
        """Those that `rollback` can go to and the current one, newest first."""
        pointer = self._read_pointer()
        return [self._open(name) for name in reversed(pointer.kept)] if pointer else []

    def named(self, name: str) -> Generation:
        """One of those that are kept. Raises NotFound, StoreError."""
        pointer = self._read_pointer()
        kept = pointer.kept if pointer else ()
        if name not in kept:
            raise NotFound(f"there is no generation {name}; there are {', '.join(kept) or 'none'}")
        return self._open(name)

    def listed(self) -> list[Kept]:
        """As `kept`, damaged ones too."""
        pointer = self._read_pointer()
        return [self._listed(name, pointer.current) for name in reversed(pointer.kept)] if pointer else []

    def forget_others(self) -> list[str]:
        """Removes all generations but the current, so that what it does not hold is nowhere; their names.

        A server that still has one of them open keeps its files until it has moved on. Raises Locked.
        """
        with self._lock():
            pointer = self._read_pointer()
            if pointer is None:
                return []
            self._write_pointer(_Pointer(pointer.current, (pointer.current,)))
            self._sweep()
            return [name for name in pointer.kept if name != pointer.current]

    def rollback(self, name: str | None = None) -> Generation:
        """Lets `name` serve again, by default the one before the current. Raises NotFound, Locked."""
        with self._lock():
            pointer = self._read_pointer()
            if pointer is None:
                raise NotFound("there is no generation yet; `mogine kb ingest ./docs` makes the first")
            before = pointer.kept[: pointer.kept.index(pointer.current)]
            if name is None and not before:
                raise NotFound(f"there is no generation older than {pointer.current}")
            chosen = name or before[-1]
            if chosen not in pointer.kept:
                raise NotFound(f"there is no generation {chosen}; there are {', '.join(pointer.kept)}")
            generation = self._open(chosen)
            self._write_pointer(replace(pointer, current=chosen))
            return generation

    @contextmanager
    def begin(self, embedder: Embedder) -> Iterator["Draft"]:
        """A draft of the next generation, starting from the current one; left without `commit`, it is gone.

        Holds the writer's lock. Raises Locked when another run does.
        """
        with self._lock():
            self._sweep()
            draft = Draft(self, self.current(), self._next_name(), embedder)
            try:
                yield draft
            finally:
                draft.discard()

    # --- for Draft -------------------------------------------------------------------------------

    def draft_path(self, name: str) -> Path:
        return self._folders / f"draft-{name}"

    def publish(self, name: str) -> None:
        """A finished draft becomes the current generation: synced, renamed, pointed to. Then sweeps."""
        draft = self.draft_path(name)
        _sync_tree(draft)
        draft.rename(self._folders / name)
        _sync_folder(self._folders)
        self._write_pointer(self._pointer_after(name))
        self._sweep()

    # --- files -----------------------------------------------------------------------------------

    def _open(self, name: str) -> Generation:
        path = self._folders / name
        try:
            fields: dict[str, Any] = json.loads((path / "manifest.json").read_text("utf-8"))
            if fields.get("format") != FORMAT:
                raise StoreError(
                    f"{path} has format {fields.get('format')}, this mogine reads format {FORMAT}; "
                    "use the mogine that wrote it, or remove data/kb/current.json and run `mogine kb ingest`"
                )
            known = {f.name: fields[f.name] for f in dataclass_fields(Manifest) if f.name in fields}
            manifest = Manifest(**known)
            _check_versions(name, manifest)
            return Generation(name, path, manifest)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(
                f"{path} is damaged ({error}); `mogine kb rollback` goes back to the one before"
            ) from error

    def _listed(self, name: str, current: str) -> Kept:
        files = [path.stat().st_size for path in (self._folders / name).rglob("*") if path.is_file()]
        try:
            return Kept(name, name == current, sum(files), self._open(name))
        except StoreError as error:
            return Kept(name, name == current, sum(files), None, error.message)

    def _read_pointer(self) -> _Pointer | None:
        try:
            fields = json.loads(self._pointer_path.read_text("utf-8"))
            leaving = tuple((str(name), float(since)) for name, since in fields.get("leaving", ()))
            pointer = _Pointer(str(fields["current"]), tuple(map(str, fields["kept"])), leaving)
            if pointer.current not in pointer.kept:
                raise ValueError("current is not among kept")
            return pointer
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._pointer_path} cannot be read ({error}); "
                'write {"current": NAME, "kept": [NAME]} with a name from data/kb/generations into it'
            ) from error

    def _pointer_after(self, name: str) -> _Pointer:
        """The pointer with `name` as the newest and current; what served last is the way back."""
        old = self._read_pointer()
        if old is None:
            return _Pointer(name, (name,))
        now = self._clock()
        kept = (*(n for n in old.kept if n != old.current), old.current, name)
        leaving = [(n, now) for n in kept[:-KEPT]]
        leaving += [(n, since) for n, since in old.leaving if 0 <= now - since < GRACE_S]
        return _Pointer(name, kept[-KEPT:], tuple(leaving))

    def _write_pointer(self, pointer: _Pointer) -> None:
        draft = self._pointer_path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(pointer), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._pointer_path)
        _sync_folder(self._path)

    def _next_name(self) -> str:
        names = [path.name for path in self._folders.iterdir()]
        numbers = [int(name[1:]) for name in names if name[:1] == "g" and name[1:].isdigit()]
        return f"g{max(numbers, default=0) + 1:06d}"

    def _sweep(self) -> None:
        """Removes what no pointer names: drafts of dead writers and generations past keeping."""
        pointer = self._read_pointer()
        names = {*pointer.kept, *(name for name, _ in pointer.leaving)} if pointer else set()
        for path in self._folders.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            for folder in (self._path.parent, self._path, self._folders):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written ({error.strerror})") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 100, 0).decode("ascii", "replace").strip()
                raise Locked(
                    f"another run is changing the knowledge base (process {holder or 'unknown'}); "
                    "wait until it has finished, or stop it"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)  # gives the lock back, as the death of the process does


class Draft:
    """The next generation while it is built. Nothing is copied before the first change.

    When the current generation has vectors of another embedder, all its passages are embedded anew.
    """

    def __init__(self, home: Generations, current: Generation | None, name: str, embedder: Embedder) -> None:
        self._home = home
        self._current = current
        self._name = name
        self._embedder = embedder
        self._work: _Work | None = None
        self._finished: Generation | None = None
        self._sources: dict[str, str] | None = None

    @property
    def renews(self) -> bool:
        """Whether a commit writes everything anew, though no document has changed: the embedder is another
        one, or words are cut into other terms than those of the current keyword index.
        """
        return self.re_embeds or (
            self._current is not None and self._current.manifest.versions.get("terms", TERMS) != TERMS
        )

    @property
    def re_embeds(self) -> bool:
        """Whether a commit embeds every passage again, because the embedder has changed."""
        return self._current is not None and self._current.manifest.embedder != self._embedder.name

    def sources(self) -> dict[str, str]:
        """Source to digest of every document that the draft holds."""
        if self._work:
            return self._work.sources()
        if self._sources is None:
            self._sources = _sources_of(self._current)
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
                self._finished = Generation(self._name, self._home.draft_path(self._name), manifest)
            return self._finished

    def commit(self) -> str:
        """Lets the draft serve and gives its name; without any change, the name of the current generation.

        After it returned, the change survives a power cut. Raises StoreError, and the old one serves on.
        """
        if self.finish() is None and self._current is not None:
            return self._current.name
        with self._told():
            self._home.publish(self._name)
            return self._name

    def discard(self) -> None:
        """Gives everything back; after a commit there is nothing to give."""
        if self._work is not None:
            self._work.close()
            self._work = None
        shutil.rmtree(self._home.draft_path(self._name), ignore_errors=True)

    def _open(self, *, anew: bool = False) -> "_Work":
        if self._finished is not None:
            raise AssertionError("a finished draft takes no change")
        if self._work is None:
            path = self._home.draft_path(self._name)
            if self._current is None or self.renews or anew:
                path.mkdir(mode=0o700)
                create_texts(path)
                self._work = _Work(path, self._embedder)
                if self._current is not None:
                    self._work.take_over(self._current, with_vectors=not self.re_embeds)
            else:
                check_files(self._current)
                shutil.copytree(self._current.path, path)
                (path / "manifest.json").unlink()
                self._work = _Work(path, self._embedder, self._current.manifest.dimensions)
        return self._work

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except MogineError:
            raise
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{self._home.draft_path(self._name)} cannot be written ({error}); look at the disk's free "
                "space. The knowledge base is as it was before"
            ) from error


class _Work:
    """What is open while a draft is written. `dimensions` are those of the generation that was copied."""

    def __init__(self, path: Path, embedder: Embedder, dimensions: int | None = None) -> None:
        self._path = path
        self._embedder = embedder
        self._dimensions = dimensions
        self._db = open_for_writing(path)
        self._vectors: VectorIndex | None = None
        try:
            if embedder.name != NoEmbedder.name:
                self._vectors = VectorIndex(path, create=dimensions is None)
            self._catalogue = CatalogueWriter(self._db)
            self._lexical = LexicalWriter(self._db)
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

    def sources(self) -> dict[str, str]:
        return read_sources(self._db)

    def take_over(self, old: Generation, *, with_vectors: bool) -> None:
        """Every document of another generation; a vector that it lacks is embedded."""
        vectors = VectorIndex(old.path) if with_vectors and self._vectors else None
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

    def _move(self, moved: Sequence[tuple[int, int, str]], vectors: VectorIndex | None) -> None:
        known = vectors.vectors([old_number for _, old_number, _ in moved]) if vectors else {}
        ready = [(number, known[old_number]) for number, old_number, _ in moved if old_number in known]
        if self._vectors and ready:
            self._vectors.add([number for number, _ in ready], np.array([row for _, row in ready]))
        self._waiting += [(number, text) for number, old_number, text in moved if old_number not in known]
        self._embed()

    def finish(self) -> Manifest:
        """Writes what is left, the manifest too, and closes."""
        self._embed()
        self._lexical.finish()
        self._db.execute("COMMIT")
        documents, passages = self._catalogue.counts()
        manifest = Manifest(
            FORMAT,
            self._embedder.name,
            self._embedder.dimensions if self._dimensions is None else self._dimensions,
            documents,
            passages,
            datetime.now(UTC).isoformat(timespec="seconds"),
            {
                "mogine": version("mogine"),
                "chromadb": version("chromadb"),
                "sqlite": sqlite3.sqlite_version,
                "terms": TERMS,
            },
        )
        self.close()
        manifest = replace(manifest, checksums=checksums(self._path))
        (self._path / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        return manifest

    def close(self) -> None:
        self._db.close()
        if self._vectors:
            self._vectors.close()
            self._vectors = None

    def _embed(self) -> None:
        if self._vectors and self._waiting:
            vectors = self._embedder.embed_passages([text for _, text in self._waiting])
            self._vectors.add([number for number, _ in self._waiting], vectors)
        self._waiting = []


def _sources_of(generation: Generation | None) -> dict[str, str]:
    if generation is None:
        return {}
    try:
        with closing(open_for_reading(generation.path)) as db:
            return read_sources(db)
    except sqlite3.Error as error:
        raise StoreError(
            f"{generation.path} is damaged ({error}); `mogine kb rollback` goes back to the one before"
        ) from error


def check_files(generation: Generation) -> None:
    """Raises StoreError when a file is not as it was written.

    Chroma believes what its files say: one wrong byte there can end the whole process.
    """
    try:
        damaged = damaged_files(generation)
    except OSError as error:
        raise StoreError(f"{generation.path} cannot be read ({error})") from error
    if damaged:
        raise StoreError(
            f"{generation.path} is damaged ({damaged[0]}); `mogine kb rollback` goes back to the one before"
        )


def damaged_files(generation: Generation) -> list[str]:
    """What is wrong with the files of a generation, file by file; an older mogine noted nothing to compare."""
    written = generation.manifest.checksums
    found = checksums(generation.path) if written else {}
    missing = [f"{name} is missing" for name in sorted(written.keys() - found.keys())]
    changed = [name for name in sorted(written.keys() & found.keys()) if written[name] != found[name]]
    return [*missing, *(f"{name} is not as it was written" for name in changed)]


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file of a generation that is not changed by opening it.

    Below 1,000 vectors all of them are in Chroma's database; its index files are then begun at each opening.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _stays(path, folder)]
    return {path.relative_to(folder).as_posix(): _crc32(path) for path in files}


def _stays(path: Path, folder: Path) -> bool:
    if path.parent == folder:
        return path.name != "manifest.json"
    return (path.parent / "index_metadata.pickle").exists()


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def _check_versions(name: str, manifest: Manifest) -> None:
    """Raises StoreError when a newer Chroma wrote the vectors than is here to read them."""
    written, here = manifest.versions.get("chromadb", "0"), version("chromadb")
    if manifest.dimensions and _major_minor(written) > _major_minor(here):
        raise StoreError(
            f"generation {name} was written with chromadb {written}, and {here} is installed, which may not "
            f"read it rightly: install chromadb {written} or newer, go back with `mogine kb rollback`, "
            "or remove data/kb/current.json and run `mogine kb ingest`"
        )


def _major_minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _sync_tree(top: Path) -> None:
    for folder, _, names in os.walk(top):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(folder))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
