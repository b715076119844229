"""A generation described for other machines: its files as blocks with their SHA-256.

Whoever pulls fetches only blocks that no file of its own has, so a changed document costs a few of them.
A folder that is shared or copied holds:

current.json                     which publications there are, the one to pull last; replaced atomically
g000042-1f3a9c0b2d4e.json        a publication
blocks/1f/1f3a9c...              a block, named by its SHA-256
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogine.errors import StoreError
from mogine.kb.manifest import MANIFEST_NAME

FORMAT = 1
# Smaller ones: a changed document costs less to pull, and all of it more requests. At 10,000 passages it is
# 29 of 59 MiB with blocks of 1 MiB, 13 with these, 7 with blocks of 16 KiB.
BLOCK_BYTES = 128 * 1024
POINTER_NAME = "current.json"
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_SHA256 = re.compile("[0-9a-f]{64}")
NAME = re.compile("g[0-9]{6,12}")


@dataclass(frozen=True, slots=True)
class FileParts:
    """A file of a generation; each block but the last has BLOCK_BYTES."""

    name: str
    size_bytes: int
    blocks: tuple[str, ...]

    def size_of(self, number: int) -> int:
        """Bytes of a block."""
        return min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Publication:
    """What a generation consists of. `identity` is its manifest's, whatever it is called elsewhere."""

    generation: str
    files: tuple[FileParts, ...]

    @property
    def identity(self) -> str:
        return next(file.blocks[0] for file in self.files if file.name == MANIFEST_NAME)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def key(self) -> str:
        return f"{self.generation}-{self.identity[:12]}"

    def to_json(self) -> bytes:
        """As it goes over the wire and stands in a shared folder."""
        files = [{"name": f.name, "bytes": f.size_bytes, "blocks": list(f.blocks)} for f in self.files]
        return json.dumps({"format": FORMAT, "generation": self.generation, "files": files}).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Publication":
        """Raises StoreError when it is none, or one of another mogine."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields["format"] != FORMAT:
                raise StoreError(
                    f"what {where} offers has format {fields['format']}, and this mogine reads format "
                    f"{FORMAT}: update mogine here, or on the machine that writes"
                )
            files = [FileParts(str(f["name"]), int(f["bytes"]), tuple(f["blocks"])) for f in fields["files"]]
            publication = cls(str(fields["generation"]), tuple(files))
            if not publication._is_sound():
                raise ValueError("names, sizes and blocks do not fit")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{where} offers no generation that can be read ({error})") from error
        return publication

    def _is_sound(self) -> bool:
        names = [file.name for file in self.files]
        manifests = [file for file in self.files if file.name == MANIFEST_NAME]
        return (
            bool(NAME.fullmatch(self.generation))
            and len(set(names)) == len(names)
            and [len(file.blocks) for file in manifests] == [1]
            and all(
                _FILE.fullmatch(file.name)
                and len(file.blocks) == -(-file.size_bytes // BLOCK_BYTES)
                and all(isinstance(block, str) and _SHA256.fullmatch(block) for block in file.blocks)
                for file in self.files
            )
        )


def parts_of(name: str, path: Path) -> FileParts:
    """A file in blocks. Raises OSError."""
    with path.open("rb") as file:
        blocks = tuple(digest_of(block) for block in blocks_of(file.read))
    return FileParts(name, path.stat().st_size, blocks)


def blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What `read` gives, in blocks."""
    while block := read(BLOCK_BYTES):
        yield block


def digest_of(block: bytes) -> str:
    """The block's name."""
    return hashlib.sha256(block).hexdigest()


def block_path(folder: Path, digest: str) -> Path:
    """Where a shared folder has a block."""
    return folder / "blocks" / digest[:2] / digest


def keys_of(folder: Path) -> list[str]:
    """What a shared folder offers, the newest last. Raises StoreError."""
    path = folder / POINTER_NAME
    try:
        fields = json.loads(path.read_bytes())
        keys = [str(key) for key in fields["publications"]]
        if fields["format"] != FORMAT or not all(re.fullmatch(r"g[0-9]+-[0-9a-f]{12}", key) for key in keys):
            raise ValueError("another format")
        return keys
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); was it written by another mogine?") from error
