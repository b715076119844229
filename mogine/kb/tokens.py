"""Cuts a text into the model's tokens: the likeliest way to put it together from the pieces it knows."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mogine.kb.weights import Words

# Stands for the blank before a word; in a piece it is only ever the first character.
_BLANK = "\u2581"
_BLANK_BYTES = _BLANK.encode()
_BLANK_KEY = 256
Numbers = npt.NDArray[np.int64]

_REMEMBERED = 20_000
_REMEMBERED_CHARS = 24
_UNKNOWN_COSTS = 10.0
_NEVER = -1e30
_SPACES = re.compile(" +")
_WORD = re.compile(" [^ ]*")


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Some of the vocabulary: piece to number and score, and the length of the longest."""

    known: Mapping[str, tuple[int, float]]
    longest: int


class Tokenizer:
    """SentencePiece's unigram model.

    The vocabulary has 250,000 pieces of a hundred languages, and as Python strings it would take 45 MB:
    pieces are read from the file by their first byte, when a text needs them.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._unknown_score = float(words.scores.min()) - _UNKNOWN_COSTS
        self._rows = _by_first_byte(words)
        self._starting = functools.cache(self._pieces)
        self._by_start: dict[str, _Pieces] = {}
        self._remembered = functools.lru_cache(_REMEMBERED)(self._word)

    def __call__(self, text: str) -> list[int]:
        folded = _SPACES.sub(" ", text.translate(self._words.folded))
        if not folded.startswith(" "):
            folded = f" {folded}"
        tokens: list[int] = []
        for match in _WORD.finditer(folded):
            word = _BLANK + match[0][1:]
            tokens += self._remembered(word) if len(word) <= _REMEMBERED_CHARS else self._word(word)
        return tokens

    def _word(self, word: str) -> tuple[int, ...]:
        """Viterbi's way through one word: no piece reaches over a blank."""
        count = len(word)
        scores = [0.0] + [_NEVER] * count
        came_from = [0] * (count + 1)
        tokens = [self._words.unknown] * (count + 1)
        for begin in range(count):
            score = scores[begin]
            start = word[begin] if begin else word[:2]
            pieces = self._by_start.get(start) or self._start(start)
            known = pieces.known
            for end in range(begin + 1, min(count, begin + pieces.longest) + 1):
                piece = known.get(word[begin:end])
                if piece is not None and score + piece[1] > scores[end]:
                    scores[end], came_from[end], tokens[end] = score + piece[1], begin, piece[0]
            if score + self._unknown_score > scores[begin + 1]:
                scores[begin + 1] = score + self._unknown_score
                came_from[begin + 1], tokens[begin + 1] = begin, self._words.unknown
        found = []
        at = count
        while at:
            found.append(tokens[at])
            at = came_from[at]
        return tuple(reversed(found))

    def _start(self, start: str) -> _Pieces:
        first = start.encode()
        has_blank = first.startswith(_BLANK_BYTES)
        key = _BLANK_KEY + (first[3] if len(first) > 3 else 0) if has_blank else first[0]
        pieces = self._starting(key)
        if len(self._by_start) < _REMEMBERED:
            self._by_start[start] = pieces
        return pieces

    def _pieces(self, key: int) -> _Pieces:
        """All pieces of one first byte; those that are a blank and more, of the byte after the blank."""
        words = self._words
        rows = [*self._rows.get(key, ())]
        if key > _BLANK_KEY:
            # A blank alone is a way to begin every word.
            rows.extend(self._rows.get(_BLANK_KEY, ()))
        known = {}
        for row in rows:
            piece = words.letters[words.ends[row] : words.ends[row + 1]].decode()
            known[piece] = (int(row), float(words.scores[row]))
        return _Pieces(known, max(map(len, known), default=0))


def _by_first_byte(words: Words) -> dict[int, Numbers]:
    """First byte to the numbers of the pieces; past _BLANK_KEY, of the byte after a blank."""
    letters = np.frombuffer(words.letters, dtype=np.uint8)
    starts = words.ends[:-1].astype(np.int64)
    lengths = words.ends[1:].astype(np.int64) - starts

    def byte(index: int) -> Numbers:
        at = np.minimum(starts + index, len(letters) - 1)
        return np.where(lengths > index, letters[at], 0).astype(np.int64)

    first = byte(0)
    is_blank = (first == _BLANK_BYTES[0]) & (byte(1) == _BLANK_BYTES[1]) & (byte(2) == _BLANK_BYTES[2])
    keys = np.where(is_blank, _BLANK_KEY + byte(3), first)
    # Marks like <s> say something to the model; in a text they are only letters.
    keys[: words.unknown + 1] = -1
    keys[lengths == 0] = -1
    order = np.argsort(keys, kind="stable")
    found, begins = np.unique(keys[order], return_index=True)
    return {int(key): rows for key, rows in zip(found, np.split(order, begins[1:]), strict=True) if key >= 0}
