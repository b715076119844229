"""Immutable folders and one pointer: how documents change without anybody ever reading half a change.

data/kb/current.json             which generation serves, and which are kept; replaced atomically
data/kb/lock                     held by the one process that writes
data/kb/vectors.db               vectors by content, so that nothing is embedded twice
data/kb/owner                    names this folder's collections on a Chroma server
data/kb/offers/g000042/          what of a generation is copied for machines that pull it, see offers.py
data/kb/incoming/                what is being pulled from another machine; the rest of one that broke off
data/kb/generations/g000042/     texts.db, chroma/, manifest.json: complete, synced, never written again
data/kb/generations/draft-...    being built; debris once its writer is dead
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from mogine.errors import Locked, NotFound, StoreError
from mogine.kb.chroma import Chroma, Collections
from mogine.kb.draft import FORMAT, Draft
from mogine.kb.embedders import Embedder
from mogine.kb.manifest import MANIFEST_NAME, Generation, Manifest, check_versions, sources_of
from mogine.settings import Settings

KEPT = 3
OFFERS_NAME = "offers"
# A server may be a moment behind: what has just been replaced stays until it must have moved on.
GRACE_S = 15.0


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

    `leaving` names what was replaced a moment ago, and when; `pulled` those that came from elsewhere.
    """

    current: str
    kept: tuple[str, ...]
    leaving: tuple[tuple[str, float], ...] = ()
    pulled: tuple[str, ...] = ()


class Generations:
    """All generations of one home; cheap to make, holds nothing open. With `chroma`, new ones have their
    vectors on that server.
    """

    def __init__(
        self, path: Path, chroma: Chroma | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.chroma = chroma
        self._path = path
        self._clock = clock
        self._folders = path / "generations"
        self._pointer_path = path / "current.json"
        self._collections = Collections(chroma, path / "owner") if chroma else None

    @classmethod
    def of(cls, settings: Settings) -> "Generations":
        """Those of a home."""
        return cls(settings.kb_path, Chroma.of(settings.kb))

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
        return sources_of(self.current())

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
            return self._point_to(pointer, chosen)

    @contextmanager
    def begin(self, embedder: Embedder) -> Iterator[Draft]:
        """A draft of the next generation, starting from the current one; left without `commit`, it is gone.

        Holds the writer's lock. Raises Locked when another run does.
        """
        with self._lock():
            self._sweep()
            name = self._next_name()
            target = self._collections.target_for(name) if self._collections else None
            draft = Draft(self._draft_path(name), name, self.current(), embedder, self._publish, target)
            try:
                yield draft
            finally:
                draft.discard()

    @contextmanager
    def receive(self) -> Iterator["Arrival"]:
        """A place for a generation of another machine. Holds the writer's lock. Raises Locked, StoreError."""
        with self._lock():
            self._sweep()
            folder, rest = self._path / "incoming", self._path / "incoming.rest"
            if folder.exists():
                shutil.rmtree(rest, ignore_errors=True)
                folder.rename(rest)
            folder.mkdir(mode=0o700)
            yield Arrival(self, folder, rest)

    # --- for what arrives ------------------------------------------------------------------------

    def folder_of(self, name: str) -> Path:
        """Where the generation's files are."""
        return self._folders / name

    def is_own(self) -> bool:
        """Whether documents serve that were taken in here, and not pulled from another machine."""
        pointer = self._read_pointer()
        return pointer is not None and pointer.current not in pointer.pulled

    def kept_as(self, identity: str) -> str | None:
        """The name here of the generation with that manifest; None when it is not kept."""
        pointer = self._read_pointer()
        for name in reversed(pointer.kept if pointer else ()):
            path = self._folders / name / MANIFEST_NAME
            if path.is_file() and identity_of(path.read_bytes()) == identity:
                return name
        return None

    def _serve(self, name: str) -> None:
        pointer = self._read_pointer()
        if pointer is not None:
            pulled = tuple(dict.fromkeys((*pointer.pulled, name)))
            self._point_to(replace(pointer, pulled=pulled), name)

    def _adopt(self, folder: Path, name: str) -> str:
        """As `_publish`, for a generation of another machine; under a name of our own where its is taken."""
        chosen = self._next_name() if (self._folders / name).exists() else name
        _sync_tree(folder)
        folder.rename(self._folders / chosen)
        _sync_folder(self._folders)
        pointer = self._pointer_after(chosen)
        self._write_pointer(replace(pointer, pulled=(*pointer.pulled, chosen)))
        self._sweep()
        return chosen

    # --- for a draft -----------------------------------------------------------------------------

    def _draft_path(self, name: str) -> Path:
        return self._folders / f"draft-{name}"

    def _publish(self, name: str) -> None:
        """A finished draft becomes the current generation: synced, renamed, pointed to. Then sweeps."""
        draft = self._draft_path(name)
        _sync_tree(draft)
        draft.rename(self._folders / name)
        _sync_folder(self._folders)
        self._write_pointer(self._pointer_after(name))
        self._sweep()

    # --- files -----------------------------------------------------------------------------------

    def _open(self, name: str) -> Generation:
        path = self._folders / name
        try:
            manifest = read_manifest(name, (path / MANIFEST_NAME).read_bytes())
            return Generation(name, path, manifest, self.chroma)
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
            pulled = tuple(map(str, fields.get("pulled", ())))
            pointer = _Pointer(str(fields["current"]), tuple(map(str, fields["kept"])), leaving, pulled)
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
        return _Pointer(name, kept[-KEPT:], tuple(leaving), tuple(n for n in old.pulled if n in kept[-KEPT:]))

    def _point_to(self, pointer: _Pointer, name: str) -> Generation:
        generation = self._open(name)
        self._write_pointer(replace(pointer, current=name))
        return generation

    def _write_pointer(self, pointer: _Pointer) -> None:
        """Raises StoreError; its message says which generation serves then."""
        draft = self._pointer_path.with_suffix(".new")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(asdict(pointer), file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._pointer_path)
        except OSError as error:
            raise StoreError(
                f"{self._pointer_path} cannot be written ({error.strerror}); look at the disk's free space. "
                "The knowledge base is as it was before"
            ) from error
        try:
            _sync_folder(self._path)
        except OSError as error:
            raise StoreError(
                f"generation {pointer.current} serves now, but a power cut may undo it: {self._path} cannot "
                f"be synced ({error.strerror}); look at the disk"
            ) from error

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
        for path in (self._path / OFFERS_NAME).glob("g*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        if self._collections:
            self._collections.sweep(names)

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


class Arrival:
    """A generation of another machine on its way in; without `adopt`, what has come stays for the next try.

    `folder` is empty and to be filled, `rest` holds what the last try has left.
    """

    def __init__(self, generations: Generations, folder: Path, rest: Path) -> None:
        self._generations = generations
        self.folder = folder
        self.rest = rest

    def adopt(self, name: str) -> str:
        """What is in `folder` serves from now on; its name here."""
        chosen = self._generations._adopt(self.folder, name)
        shutil.rmtree(self.rest, ignore_errors=True)
        return chosen

    def serve(self, name: str) -> None:
        """One that is kept here already serves again."""
        self._generations._serve(name)
        shutil.rmtree(self.folder, ignore_errors=True)


def identity_of(manifest: bytes) -> str:
    """What tells generations apart whatever they are called: SHA-256 of the manifest, which names its files'
    checksums."""
    return hashlib.sha256(manifest).hexdigest()


def read_manifest(name: str, data: bytes) -> Manifest:
    """Of a generation that this mogine can read. Raises StoreError, and what bad JSON deserves."""
    fields: dict[str, Any] = json.loads(data)
    if fields.get("format") != FORMAT:
        raise StoreError(
            f"generation {name} has format {fields.get('format')}, this mogine reads format {FORMAT}; "
            "use the mogine that wrote it, or remove data/kb/current.json and run `mogine kb ingest`"
        )
    known = {f.name: fields[f.name] for f in dataclass_fields(Manifest) if f.name in fields}
    manifest = Manifest(**known)
    check_versions(name, manifest)
    return manifest


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
