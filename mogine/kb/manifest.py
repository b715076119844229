"""What a generation says about itself, and whether its files are still as they were written."""

import re
import shutil
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from mogine.errors import StoreError, Unavailable
from mogine.kb.catalogue import read_sources
from mogine.kb.chroma import Chroma, Collection
from mogine.kb.texts import open_for_reading
from mogine.kb.vectors import VectorIndex

MANIFEST_NAME = "manifest.json"
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a generation says about itself.

    `versions` are those of what wrote it. `checksums` tell of every file that opening it does not change
    (Chroma notes each opening in its own database). `collection` is where the vectors are on a Chroma
    server; "" when they are in the generation's own folder.
    """

    format: int
    embedder: str
    dimensions: int
    documents: int
    passages: int
    created_at: str
    versions: Mapping[str, str]
    checksums: Mapping[str, int] = field(default_factory=dict)
    collection: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One complete knowledge base. `chroma` is this machine's way to its vectors when a server has them."""

    name: str
    path: Path
    manifest: Manifest
    chroma: Chroma | None = None

    def open_vectors(self, *, timeout_s: float | None = None) -> VectorIndex | Collection:
        """Where the vectors are. Raises StoreError, and Unavailable when no setting says where."""
        name = self.manifest.collection
        if not name:
            return VectorIndex(self.path)
        if self.chroma is None:
            raise Unavailable(
                "the vectors of the knowledge base are in a Chroma server, and MOGINE_CHROMA_URL is not set: "
                "set it, or run `mogine kb ingest ./docs` to have them here",
                reason="kb_unavailable",
            )
        return Collection(self.chroma, name, timeout_s=timeout_s)


def check_files(generation: Generation) -> None:
    """Raises StoreError when a file is not as it was written.

    Chroma believes what its files say: one wrong byte there can end the whole process.
    """
    try:
        damaged = damaged_files(generation)
    except OSError as error:
        raise StoreError(f"{generation.path} cannot be read ({error})") from error
    if damaged:
        raise _damaged(generation, damaged[0])


def _damaged(generation: Generation, detail: object) -> StoreError:
    return StoreError(
        f"{generation.path} is damaged ({detail}); `mogine kb rollback` goes back to the one before"
    )


def damaged_files(generation: Generation) -> list[str]:
    """What is wrong with a generation, file by file; nothing where an older mogine noted no checksums."""
    written = generation.manifest.checksums
    found = checksums(generation.path) if written else {}
    missing = [f"{name} is missing" for name in sorted(written.keys() - found.keys())]
    changed = [name for name in sorted(written.keys() & found.keys()) if written[name] != found[name]]
    return [*missing, *(f"{name} is not as it was written" for name in changed)]


def copy_files(generation: Generation, folder: Path) -> None:
    """A copy to be changed, without the manifest. Raises StoreError when a file is not as it was written."""
    for source in sorted(generation.path.rglob("*")):
        name = source.relative_to(generation.path).as_posix()
        if source.is_dir():
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        elif name != MANIFEST_NAME:
            (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = generation.manifest.checksums.get(name)
            if known is not None and known != _crc32(source):
                raise _damaged(generation, f"{name} is not as it was written")
            shutil.copy2(source, folder / name)  # the kernel copies: six times as fast as reading and writing


def checksums(folder: Path, copied: Generation | None = None) -> dict[str, int]:
    """CRC-32 of every file of a generation that is not changed by opening it.

    Below 1,000 vectors all of them are in Chroma's database; its index files are then begun at each opening.
    A file that has not been touched since it was `copied` from another generation is not read again.
    """
    sums = {}
    for path in lasting_files(folder):
        name = path.relative_to(folder).as_posix()
        known = copied.manifest.checksums.get(name) if copied else None
        is_same = copied is not None and known is not None and _mark(path) == _mark(copied.path / name)
        sums[name] = known if is_same and known is not None else _crc32(path)
    return sums


def lasting_files(folder: Path) -> Iterator[Path]:
    """Those of a generation that opening it does not change, without the manifest."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and _stays(path, folder))


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _stays(path: Path, folder: Path) -> bool:
    if path.parent == folder:
        return path.name != MANIFEST_NAME
    return (path.parent / "index_metadata.pickle").exists()


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def check_versions(name: str, manifest: Manifest) -> None:
    """Raises StoreError when a newer Chroma wrote the vectors than is here to read them."""
    written, here = manifest.versions.get("chromadb", "0"), version("chromadb")
    if manifest.dimensions and not manifest.collection and _major_minor(written) > _major_minor(here):
        raise StoreError(
            f"generation {name} was written with chromadb {written}, and {here} is installed, which may not "
            f"read it rightly: install chromadb {written} or newer, go back with `mogine kb rollback`, "
            "or remove data/kb/current.json and run `mogine kb ingest`"
        )


def _major_minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def sources_of(generation: Generation | None) -> dict[str, str]:
    """Source to digest of every document. Raises StoreError."""
    if generation is None:
        return {}
    try:
        with closing(open_for_reading(generation.path)) as db:
            return read_sources(db)
    except sqlite3.Error as error:
        raise _damaged(generation, error) from error
