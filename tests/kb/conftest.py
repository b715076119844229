"""Small documents, and an embedder that needs no model: the vectors of the fake embeddings address."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mogine.kb.embedders import Embedder, Vectors
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage
from tests.upstreams.embeddings import vector


class CharacterEmbedder:
    """Near vectors for texts that share characters; counts what it was asked."""

    def __init__(self, name: str = "characters", dimensions: int = 64) -> None:
        self.name = name
        self.dimensions = dimensions
        self.passages = 0

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        self.passages += len(texts)
        return self.embed_questions(texts)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        rows = [vector(text, self.dimensions) for text in texts]
        return np.array(rows, dtype=np.float32).reshape(len(texts), self.dimensions)

    def warm(self) -> None:
        """There is no model."""

    def close(self) -> None:
        """There is no connection."""


def make_document(source: str, *texts: str, title: str = "", url: str = "") -> tuple[Document, list[Passage]]:
    """A document with one passage a text."""
    whole = "\n\n".join(texts)
    digest = hashlib.sha256(whole.encode()).hexdigest()
    passages = [
        Passage(f"{digest}:{position}", source, title, "", position, text, url)
        for position, text in enumerate(texts)
    ]
    return Document(source, title, whole, digest, url), passages


def take_in(generations: Generations, embedder: Embedder, *documents: tuple[Document, list[Passage]]) -> str:
    """One ingest; the name of its generation."""
    with generations.begin(embedder) as draft:
        for document, passages in documents:
            draft.replace(document, passages)
        return draft.commit()


@pytest.fixture
def embedder() -> CharacterEmbedder:
    return CharacterEmbedder()


@pytest.fixture
def generations(tmp_path: Path) -> Generations:
    return Generations(tmp_path / "data" / "kb")
