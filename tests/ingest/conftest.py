"""A folder of documents beside an empty knowledge base, and an embedder that counts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mogine.ingest.pipeline import Progress, Summary, ingest
from mogine.ingest.worker import Parser
from mogine.kb.embedders import Embedder, NoEmbedder, Vectors
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase


class CountingEmbedder:
    """Vectors by letters; tells what it was given, and may be made to fail."""

    dimensions = 16

    def __init__(self, name: str = "counting") -> None:
        self.name = name
        self.texts: list[str] = []
        self.failure: BaseException | None = None

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        if self.failure is not None:
            raise self.failure
        self.texts += texts
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for character in text:
                row[ord(character) % self.dimensions] += 1
        lengths: Vectors = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return rows / lengths

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self.embed_passages(texts)

    def warm(self) -> None: ...

    def close(self) -> None: ...


class Base:
    """A knowledge base and the folder `docs` beside it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.docs = home / "docs"
        self.docs.mkdir(parents=True)
        self.generations = Generations(home / "data" / "kb")

    def write(self, files: Mapping[str, str | bytes]) -> None:
        for name, content in files.items():
            path = self.docs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def ingest(
        self,
        *paths: Path,
        embedder: Embedder | None = None,
        on_embedded: Callable[[int], None] | None = None,
        parser: Parser | None = None,
        **options: Any,
    ) -> Summary:
        *steps, summary = ingest(
            paths or ((self.docs,) if "urls" not in options else ()),
            self.generations,
            embedder or NoEmbedder(),
            base=self.home,
            own=[self.home / "data"],
            on_embedded=on_embedded,
            parser=parser,
            **options,
        )
        assert all(isinstance(step, Progress) for step in steps)
        assert isinstance(summary, Summary)
        return summary

    def sources(self) -> list[str]:
        return [d.source for d in self.open().documents()]

    def text_of(self, source: str) -> str:
        kb = self.open()
        (id,) = [d.id for d in kb.documents() if d.source == source]
        return "\n".join(p.text for p in kb.passages_of(id))

    def open(self) -> KnowledgeBase:
        generation = self.generations.current()
        assert generation is not None
        return KnowledgeBase(generation, NoEmbedder(), readers=1)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return Base(tmp_path / "home")


@pytest.fixture
def embedder() -> CountingEmbedder:
    return CountingEmbedder()
