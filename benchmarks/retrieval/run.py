"""Measures how well the knowledge base finds, on retrieval sets put into one index.

    python -m benchmarks.retrieval.run SETS [--index zh_wiki,zh_web,en_wiki] [--cache FILE] [--embedder e5]

SETS holds one folder a set (corpus.jsonl, queries.jsonl, qrels.jsonl). The documents go the way of
`mogine kb ingest`: cut, embedded, indexed. Every question is asked in each mode, and once more with
reciprocal rank fusion of both lists, for comparison. Words on stderr, JSON on stdout.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.retrieval.sets import RetrievalSet, hit, load_set, ndcg
from mogine.ingest.chunk import chunk
from mogine.kb.embedders import (
    MEANS_PATH,
    CachedEmbedder,
    CentredEmbedder,
    E5Embedder,
    Embedder,
    NoEmbedder,
    Vectors,
)
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.passages import Hit

DEPTH = 50
RECIPROCAL_RANK = 60


class Remembering:
    """An embedder that embeds each question once, though it is asked in several modes."""

    def __init__(self, inner: Embedder) -> None:
        self._inner = inner
        self._known: dict[str, Vectors] = {}
        self.name = inner.name
        self.dimensions = inner.dimensions

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._inner.embed_passages(texts)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        for text in texts:
            if text not in self._known:
                self._known[text] = self._inner.embed_questions([text])[0]
        return np.array([self._known[text] for text in texts])

    def warm(self) -> None:
        self._inner.warm()

    def close(self) -> None:
        self._inner.close()


def reciprocal_rank_fusion(*lists: Sequence[Hit]) -> list[str]:
    """Sources by the sum of 1 / (60 + rank of their best passage)."""
    scores: dict[str, float] = {}
    for hits in lists:
        for rank, source in enumerate(dict.fromkeys(h.passage.source for h in hits), start=1):
            scores[source] = scores.get(source, 0.0) + 1 / (RECIPROCAL_RANK + rank)
    return sorted(scores, key=lambda source: -scores[source])


def sources(hits: Sequence[Hit]) -> list[str]:
    return [found.passage.source for found in hits]


def searches(knowledge: KnowledgeBase, embedder: Embedder) -> dict[str, Callable[[str], list[str]]]:
    """Every way of searching that is compared."""
    keyword: dict[str, Callable[[str], list[str]]] = {
        "keyword": lambda q: sources(knowledge.search(q, DEPTH, "keyword"))
    }
    if not embedder.dimensions:
        return keyword
    return keyword | {
        "vector": lambda q: sources(knowledge.search(q, DEPTH, "vector")),
        "rank fusion": lambda q: reciprocal_rank_fusion(
            knowledge.search(q, DEPTH, "keyword"), knowledge.search(q, DEPTH, "vector")
        ),
        "hybrid": lambda q: sources(knowledge.search(q, DEPTH, "hybrid")),
    }


def build(folder: Path, sets: Sequence[RetrievalSet], embedder: Embedder) -> KnowledgeBase:
    """All documents of all sets in one new generation."""
    generations = Generations(folder / "kb")
    with generations.begin(embedder) as draft:
        for found in sets:
            for document in found.documents:
                draft.replace(document, chunk(document))
        draft.commit()
    generation = generations.current()
    if generation is None:
        raise SystemExit("no generation was made")
    return KnowledgeBase(generation, embedder)


def measure(knowledge: KnowledgeBase, sets: Sequence[RetrievalSet], embedder: Embedder) -> dict[str, object]:
    """nDCG@10 and hit@3 in percent for each way and set, and their means over the sets."""
    result: dict[str, object] = {}
    for way, find in searches(knowledge, embedder).items():
        rows: dict[str, dict[str, float]] = {}
        for found in sets:
            started = time.process_time()
            ranked = [(find(question.text), question.grades) for question in found.questions]
            rows[found.name] = {
                "ndcg@10": round(100 * sum(ndcg(*pair) for pair in ranked) / len(ranked), 1),
                "hit@3": round(100 * sum(hit(*pair, 3) for pair in ranked) / len(ranked), 1),
                "cpu_ms": round(1000 * (time.process_time() - started) / len(ranked), 1),
            }
        rows["mean"] = {
            name: round(sum(row[name] for row in rows.values()) / len(sets), 1)
            for name in ("ndcg@10", "hit@3")
        }
        result[way] = rows
        print(
            f"{way:12}", {name: (row["ndcg@10"], row["hit@3"]) for name, row in rows.items()}, file=sys.stderr
        )
    return result


def open_model(name: str, cache_path: Path) -> Embedder:
    if name == "none":
        return NoEmbedder()
    return Remembering(CentredEmbedder(CachedEmbedder(E5Embedder(), cache_path), np.load(MEANS_PATH)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("--index", default="", help="names of the sets to put into one index; default: all")
    parser.add_argument("--cache", type=Path, help="where vectors are kept between runs")
    parser.add_argument("--embedder", choices=("e5", "none"), default="e5")
    arguments = parser.parse_args()
    names = [n for n in arguments.index.split(",") if n]
    names = names or sorted(p.name for p in arguments.sets.iterdir() if p.is_dir())
    sets = [load_set(arguments.sets / name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        embedder = open_model(arguments.embedder, arguments.cache or Path(folder) / "vectors.db")
        knowledge = build(Path(folder), sets, embedder)
        manifest = knowledge.generation.manifest
        result = measure(knowledge, sets, embedder)
        knowledge.close()
    print(
        json.dumps(
            {
                "machine": {"processor": platform.machine(), "python": platform.python_version()},
                "embedder": manifest.embedder,
                "documents": manifest.documents,
                "passages": manifest.passages,
                "results": result,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
