"""Which questions ask for the same thing: by the knowledge base's model, or by words where there is none."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

import numpy as np

from mogine.kb.embedders import Embedder, NoEmbedder, Vectors
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.lexical import question_terms
from mogine.kb.manifest import Generation, check_files
from mogine.kb.passages import MAX_QUERY_CHARS

TERM_DIMENSIONS = 1024
TERMS_ALIKE = 0.4

# Pairs that ask for the same thing, all for different ones: how near a model puts the first kind, and how far
# the second, tells where it draws the line.
_SAME = (
    ("退款多久到账", "退款几天能到"),
    ("支持花呗分期吗", "能不能用花呗分期付款"),
    ("上海有门店吗", "上海哪里有实体店"),
    ("怎么开发票", "可以开发票吗"),
    ("可以寄到国外吗", "支持海外发货吗"),
    ("你们还招人吗", "公司在招聘吗"),
    ("how often must the filter be changed", "when do I replace the filter"),
    ("is there a student discount", "do students pay less"),
)
_LINE = 0.75


class Meaning(Protocol):
    """Tells which questions ask for the same: vectors of length one, and how near is near enough."""

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    def embed(self, questions: Sequence[str]) -> Vectors: ...


class ModelMeaning:
    """By the embedding model of the knowledge base. Raises UpstreamError when one elsewhere is away."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        firsts = self.embed([a for a, _ in _SAME])
        cosines = firsts @ self.embed([b for _, b in _SAME]).T
        same = float(np.diag(cosines).mean())
        apart = float(cosines[~np.eye(len(_SAME), dtype=bool)].mean())
        self.threshold = apart + _LINE * (same - apart)

    @property
    def name(self) -> str:
        return self._embedder.name

    def embed(self, questions: Sequence[str]) -> Vectors:
        return _unit(self._embedder.embed_questions([q[:MAX_QUERY_CHARS] for q in questions]))


class TermMeaning:
    """By the words that questions have in common, where there is no model."""

    name = "terms"
    threshold = TERMS_ALIKE

    def embed(self, questions: Sequence[str]) -> Vectors:
        rows = np.zeros((len(questions), TERM_DIMENSIONS), dtype=np.float32)
        for row, question in zip(rows, questions, strict=True):
            for term in question_terms(question):
                # A single Han character stands in many words.
                row[zlib.crc32(term.encode()) % TERM_DIMENSIONS] += 1.0 if len(term) > 1 else 0.4
        return _unit(rows)


def _unit(rows: Vectors) -> Vectors:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Vectors = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit


class Clusters:
    """Vectors of gaps; the nearest one is found by comparing with all."""

    def __init__(self, embedder: str, threshold: float) -> None:
        self.embedder = embedder
        self._threshold = threshold
        self._ids: list[int] = []
        self._totals: list[Vectors] = []
        self._units: Vectors | None = None
        self._used = 0

    def add(self, id: int, total: Vectors) -> None:
        """A gap whose questions' vectors add up to `total`."""
        if self._units is None or self._used == len(self._units):
            grown = np.zeros((max(64, 2 * self._used), len(total)), dtype=np.float32)
            if self._units is not None:
                grown[: self._used] = self._units
            self._units = grown
        self._ids.append(id)
        self._totals.append(total)
        self._units[self._used] = _unit(total[None, :])[0]
        self._used += 1

    def nearest(self, vector: Vectors) -> int | None:
        """The place of the gap that asks for the same."""
        if self._units is None:
            return None
        cosines = self._units[: self._used] @ vector
        best = int(cosines.argmax())
        return best if cosines[best] >= self._threshold else None

    def grow(self, place: int, vector: Vectors) -> tuple[int, Vectors]:
        """Adds questions to the gap at `place`; its id and its new total."""
        total = self._totals[place] = self._totals[place] + vector
        if self._units is not None:
            self._units[place] = _unit(total[None, :])[0]
        return self._ids[place], total


class Models:
    """The embedder and what stands on it, made when first needed: a look that finds nothing loads none."""

    def __init__(self, make: Callable[[], Embedder]) -> None:
        self._make = make
        self._embedder: Embedder | None = None
        self._meaning: Meaning | None = None

    @property
    def embedder(self) -> Embedder:
        if self._embedder is None:
            self._embedder = self._make()
        return self._embedder

    @property
    def meaning(self) -> Meaning:
        if self._meaning is None:
            has_model = self.embedder.name != NoEmbedder.name
            self._meaning = ModelMeaning(self.embedder) if has_model else TermMeaning()
        return self._meaning

    @contextmanager
    def knowledge(self, generation: Generation) -> Iterator[KnowledgeBase]:
        """A generation, open; its vectors are read only when there is a model for them."""
        check_files(generation)
        with closing(KnowledgeBase(generation, self.embedder, readers=1)) as knowledge:
            yield knowledge

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
