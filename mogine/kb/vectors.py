"""The vector index of a generation: Chroma in a folder of its own; vectors are always passed in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mogine.errors import StoreError
from mogine.kb.embedders import Vectors

VECTORS_NAME = "chroma"
_COLLECTION = "passages"
_BATCH = 2000  # Chroma takes at most 5,461 rows a call


class VectorIndex:
    """Passage numbers by nearness. One process may write, before the generation serves; then all only read.

    Chroma opened in two places on a folder that is written gives stale results without any error.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        import chromadb
        from chromadb.config import Settings

        self._path = folder / VECTORS_NAME
        if not create and not self._path.is_dir():
            raise StoreError(f"{self._path} is missing; `mogine kb ingest` builds it anew")
        with self._told():
            # Chroma's settings would read a `.env` in the current directory: that file is ours.
            settings = Settings(_env_file=None, anonymized_telemetry=False, is_persistent=True)  # type: ignore[call-arg]
            self._client: Any = chromadb.PersistentClient(path=str(self._path), settings=settings)
            self._collection: Any
            if create:
                self._collection = self._client.create_collection(
                    _COLLECTION, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
                )
            else:
                self._collection = self._client.get_collection(_COLLECTION, embedding_function=None)

    def add(self, numbers: Sequence[int], vectors: Vectors) -> None:
        """New numbers only: updating in place is slow and has damaged indexes."""
        with self._told():
            for start in range(0, len(numbers), _BATCH):
                ids = [str(number) for number in numbers[start : start + _BATCH]]
                self._collection.add(ids=ids, embeddings=vectors[start : start + _BATCH])

    def remove(self, numbers: Sequence[int]) -> None:
        with self._told():
            for start in range(0, len(numbers), _BATCH):
                self._collection.delete(ids=[str(number) for number in numbers[start : start + _BATCH]])

    def search(self, vector: Vectors, limit: int) -> dict[int, float]:
        """The nearest numbers with their cosine, nearest first."""
        with self._told():
            found = self._collection.query(query_embeddings=[vector], n_results=limit, include=["distances"])
        distances = found["distances"]
        if distances is None:
            raise StoreError("Chroma sent no distances; mogine needs chromadb 1.5.9 or newer")
        return {int(id): 1.0 - float(d) for id, d in zip(found["ids"][0], distances[0], strict=True)}

    def numbers(self) -> set[int]:
        """Every number that the index knows."""
        with self._told():
            return {int(id) for id in self._collection.get(include=[])["ids"]}

    def vectors(self, numbers: Sequence[int]) -> dict[int, Vectors]:
        """Number to vector, for those that are in the index."""
        rows: dict[int, Vectors] = {}
        with self._told():
            for start in range(0, len(numbers), _BATCH):
                ids = [str(number) for number in numbers[start : start + _BATCH]]
                found = self._collection.get(ids=ids, include=["embeddings"])
                embeddings = np.asarray(found["embeddings"], dtype=np.float32)
                rows.update((int(id), row) for id, row in zip(found["ids"], embeddings, strict=True))
        return rows

    def cosines(self, vector: Vectors, numbers: Sequence[int]) -> Mapping[int, float]:
        """The cosine of each of `numbers`; one that is not in the index is left out."""
        if not numbers:
            return {}
        with self._told():
            found = self._collection.get(ids=[str(number) for number in numbers], include=["embeddings"])
        rows = np.asarray(found["embeddings"], dtype=np.float32)
        if not len(found["ids"]):
            return {}
        return {int(id): float(c) for id, c in zip(found["ids"], rows @ vector, strict=True)}

    def warm(self, dimensions: int) -> None:
        """Reads the index into memory; Chroma would do it at the first search."""
        self.search(np.ones(dimensions, dtype=np.float32), 1)

    def count(self) -> int:
        with self._told():
            return int(self._collection.count())

    def close(self) -> None:
        """Gives back files and memory; without it a folder that is gone stays open."""
        self._client.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # Chroma raises its own errors, SQLite's and plain Exceptions alike
            told = _first_line(error)
            remedy = (
                "make it writable: Chroma notes each opening in its files"
                if "readonly" in told
                else "look at the disk's free space, then `mogine kb ingest` builds it anew"
            )
            raise StoreError(f"{self._path} cannot be used ({told}); {remedy}") from error


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
