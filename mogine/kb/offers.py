"""Where generations are offered: to machines that ask the knowledge base server, and in a shared folder."""

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mogine.errors import NotFound, StoreError
from mogine.kb.generations import KEPT, OFFERS_NAME, Generations, identity_of
from mogine.kb.manifest import MANIFEST_NAME, Generation, check_files, lasting_files
from mogine.kb.publication import (
    BLOCK_BYTES,
    FORMAT,
    NAME,
    POINTER_NAME,
    FileParts,
    Publication,
    block_path,
    digest_of,
    keys_of,
    parts_of,
)
from mogine.kb.texts import copy_database

OFFER_NAME = "offer.json"


class Offers:
    """The current generation of a home as a publication; for any number of threads.

    Chroma notes each opening in its database, so of that file a copy is offered (data/kb/offers/NAME/),
    and stays as long as its generation.
    """

    def __init__(self, generations: Generations, path: Path) -> None:
        self._generations = generations
        self._path = path / OFFERS_NAME
        self._guard = threading.Lock()
        self._known: dict[str, tuple[Generation, Publication]] = {}

    def publication(self) -> Publication:
        """What there is to pull. Raises NotFound before the first ingest, StoreError."""
        generation = self._generations.current()
        if generation is None:
            raise NotFound("there is no generation yet; `mogine kb ingest ./docs` makes the first")
        with self._guard:
            return self._made(generation)

    def block(self, generation: str, file: str, number: int) -> bytes:
        """Raises NotFound for what is not offered, or not any more."""
        with self._guard:
            known = self._known.get(generation)
        if known is None:
            known = self._kept(generation)
        parts = next((f for f in known[1].files if f.name == file), None) if known else None
        if known is None or parts is None or not 0 <= number < len(parts.blocks):
            raise NotFound("this block is not offered any more; pull again")
        own = self._path / generation / file
        try:
            with (own if own.is_file() else known[0].path / file).open("rb") as opened:
                opened.seek(number * BLOCK_BYTES)
                return opened.read(BLOCK_BYTES)
        except OSError as error:
            raise NotFound("this generation is not offered any more; pull again") from error

    def _kept(self, name: str) -> tuple[Generation, Publication] | None:
        """One that another process has offered, or this one before it was started again."""
        if not NAME.fullmatch(name) or not (self._path / name / OFFER_NAME).is_file():
            return None
        generation = self._generations.named(name)
        with self._guard:
            return generation, self._made(generation)

    def _made(self, generation: Generation) -> Publication:
        known = self._known.get(generation.name)
        if known and known[0] == generation:
            return known[1]
        publication = self._read(generation) or self._make(generation)
        alive = {n: k for n, k in self._known.items() if k[0].path.is_dir() and n != generation.name}
        self._known = {**alive, generation.name: (generation, publication)}
        return publication

    def _read(self, generation: Generation) -> Publication | None:
        path = self._path / generation.name / OFFER_NAME
        if not path.is_file():
            return None
        try:
            publication = Publication.from_json(path.read_bytes(), str(path))
        except StoreError:
            return None  # of another mogine, or half written: it is made anew
        own = identity_of((generation.path / MANIFEST_NAME).read_bytes())
        return publication if publication.identity == own else None

    def _make(self, generation: Generation) -> Publication:
        check_files(generation)
        draft = self._path / "draft"
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            with _held(self._path / "lock"):
                if (made := self._read(generation)) is not None:
                    return made  # by another process meanwhile
                for old in (draft, self._path / generation.name):  # of one that was killed; once called so
                    shutil.rmtree(old, ignore_errors=True)
                draft.mkdir(mode=0o700)
                publication = Publication(generation.name, tuple(_offered(generation.path, draft)))
                _write(draft / OFFER_NAME, publication.to_json())
                draft.rename(self._path / generation.name)
                return publication
        except OSError as error:
            raise StoreError(
                f"generation {generation.name} cannot be offered ({error}); look at the disk's free space"
            ) from error


def _offered(folder: Path, copies: Path) -> Iterator[FileParts]:
    """The files of a generation; of a database that may change, a copy."""
    files = [*lasting_files(folder), folder / MANIFEST_NAME]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    for path in folder.rglob("*.sqlite3"):
        name = path.relative_to(folder).as_posix()
        (copies / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy_database(path, copies / name)
        named[name] = copies / name
    for name, path in sorted(named.items()):
        yield parts_of(name, path)


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish` has written; nothing when the folder had it already."""

    generation: str
    size_bytes: int
    written_bytes: int


def publish(offers: Offers, target: Path) -> Published:
    """The current generation into a folder that others can read; the last three stay there.

    Whoever reads the folder meanwhile sees the one before. Raises NotFound, StoreError.
    """
    publication = offers.publication()
    written = 0
    try:
        (target / "blocks").mkdir(parents=True, exist_ok=True)
        with _held(target / "lock"):
            for file in publication.files:
                for number, digest in enumerate(file.blocks):
                    path = block_path(target, digest)
                    if not path.is_file() or path.stat().st_size != file.size_of(number):
                        block = offers.block(publication.generation, file.name, number)
                        if digest_of(block) != digest:
                            raise StoreError(
                                f"{file.name} of {publication.generation} has changed; publish again"
                            )
                        _write(path, block)
                        written += len(block)
            others = [key for key in keys_of(target) if key != publication.key]
            keys = [*others[1 - KEPT :], publication.key]
            _write(target / f"{publication.key}.json", publication.to_json())
            _write(target / POINTER_NAME, json.dumps({"format": FORMAT, "publications": keys}).encode())
            _sweep_target(target, keys)
    except OSError as error:
        raise StoreError(f"{target} cannot be written ({error.strerror or error})") from error
    return Published(publication.generation, publication.size_bytes, written)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Two that publish into one folder wait for each other."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o640)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _sweep_target(target: Path, keys: Sequence[str]) -> None:
    used = set()
    for key in keys:
        path = target / f"{key}.json"
        files = Publication.from_json(path.read_bytes(), str(path)).files
        used |= {digest for file in files for digest in file.blocks}
    for path in target.glob("g*.json"):
        if path.stem not in keys:
            path.unlink(missing_ok=True)
    for path in target.glob("blocks/*/*"):
        if path.name not in used:
            path.unlink(missing_ok=True)
