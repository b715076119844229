"""Measures how well the knowledge base finds, on retrieval sets put into one index.

    python -m benchmarks.retrieval.run SETS [--index zh_wiki,zh_web,en_wiki] [--cache FILE] [--embedder e5]
                                            [--leave-out]

SETS holds one folder a set (corpus.jsonl, queries.jsonl, qrels.jsonl). The documents go the way of
`mogine kb ingest`: cut, embedded, indexed. Every question is asked in each mode, and once more with
reciprocal rank fusion of both lists, for comparison. `answer@1000` is the share of the questions with a known
answer that have it within the first 1,000 characters returned. The languages' means that mogine ships were
made from the development sets; with --leave-out each set is asked in an index whose means come from the other
sets alone. Words on stderr, JSON on stdout.
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

from benchmarks.retrieval.means import means_of, texts_of
from benchmarks.retrieval.sets import Question, RetrievalSet, hit, load_set, ndcg
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
from mogine.kb.manifest import Manifest
from mogine.kb.passages import Hit

DEPTH = 50
RETURNED_CHARS = 1000
RECIPROCAL_RANK = 60

Outcome = tuple[dict[str, dict[str, dict[str, float]]], Manifest]


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


def reciprocal_rank_fusion(*lists: Sequence[Hit]) -> list[Hit]:
    """Passages by the sum of 1 / (60 + rank)."""
    scores: dict[str, float] = {}
    passages: dict[str, Hit] = {}
    for hits in lists:
        for rank, found in enumerate(hits, start=1):
            key = f"{found.passage.source}\0{found.passage.id}"
            passages[key] = found
            scores[key] = scores.get(key, 0.0) + 1 / (RECIPROCAL_RANK + rank)
    return [passages[key] for key in sorted(scores, key=lambda key: -scores[key])]


def answered(hits: Sequence[Hit], question: Question) -> bool:
    """Whether the answer stands within the first characters that are returned."""
    returned = "\n".join(found.passage.text for found in hits[:5])[:RETURNED_CHARS]
    return any(answer in returned for answer in question.answers)


def searches(knowledge: KnowledgeBase, embedder: Embedder) -> dict[str, Callable[[str], list[Hit]]]:
    """Every way of searching that is compared."""
    keyword: dict[str, Callable[[str], list[Hit]]] = {
        "keyword": lambda q: knowledge.search(q, DEPTH, "keyword")
    }
    if not embedder.dimensions:
        return keyword
    return keyword | {
        "vector": lambda q: knowledge.search(q, DEPTH, "vector"),
        "rank fusion": lambda q: reciprocal_rank_fusion(
            knowledge.search(q, DEPTH, "keyword"), knowledge.search(q, DEPTH, "vector")
        ),
        "hybrid": lambda q: knowledge.search(q, DEPTH, "hybrid"),
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


def measure(
    knowledge: KnowledgeBase, sets: Sequence[RetrievalSet], embedder: Embedder
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures in percent for each way of searching and each set."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for way, find in searches(knowledge, embedder).items():
        result[way] = {}
        for found in sets:
            started = time.process_time()
            hits = [find(question.text) for question in found.questions]
            took = time.process_time() - started
            ranked = [
                ([hit.passage.source for hit in of_question], question.grades)
                for of_question, question in zip(hits, found.questions, strict=True)
            ]
            known = [pair for pair in zip(hits, found.questions, strict=True) if pair[1].answers]
            row = {
                "ndcg@10": 100 * sum(ndcg(*pair) for pair in ranked) / len(ranked),
                "hit@3": 100 * sum(hit(*pair, 3) for pair in ranked) / len(ranked),
                "cpu_ms": 1000 * took / len(ranked),
            }
            if known:
                row["answer@1000"] = 100 * sum(answered(*pair) for pair in known) / len(known)
            result[way][found.name] = {name: round(value, 1) for name, value in row.items()}
    return result


def add_means(result: dict[str, dict[str, dict[str, float]]]) -> None:
    """The mean over the sets beside them; tells everything on stderr."""
    for way, rows in result.items():
        rows["mean"] = {
            name: round(sum(row[name] for row in rows.values()) / len(rows), 1)
            for name in ("ndcg@10", "hit@3")
        }
        told = {name: (row["ndcg@10"], row["hit@3"], row.get("answer@1000")) for name, row in rows.items()}
        print(f"{way:12}", told, file=sys.stderr)


def left_out(folder: Path, cache: Path, sets: Sequence[RetrievalSet], all_sets: Path) -> Outcome:
    """Each set in its own run, with the means of all sets but this one."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    embedder = CachedEmbedder(E5Embedder(), cache)
    texts = {path.name: texts_of(load_set(path)) for path in sorted(all_sets.iterdir()) if path.is_dir()}
    for found in sets:
        others = [pair for name, pair in texts.items() if name != found.name]
        means = means_of(
            [p for pair in others for p in pair[0]], [q for pair in others for q in pair[1]], embedder
        )
        model = Remembering(CentredEmbedder(embedder, means))
        knowledge = build(folder / found.name, sets, model)
        for way, rows in measure(knowledge, [found], model).items():
            result.setdefault(way, {}).update(rows)
        manifest = knowledge.generation.manifest
        knowledge.close()
    return result, manifest


def open_model(name: str, cache_path: Path) -> Embedder:
    if name == "none":
        return NoEmbedder()
    return Remembering(CentredEmbedder(CachedEmbedder(E5Embedder(), cache_path), np.load(MEANS_PATH)))


def as_shipped(folder: Path, sets: Sequence[RetrievalSet], embedder: Embedder) -> Outcome:
    knowledge = build(folder, sets, embedder)
    result = measure(knowledge, sets, embedder)
    manifest = knowledge.generation.manifest
    knowledge.close()
    return result, manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("--index", default="", help="names of the sets to put into one index; default: all")
    parser.add_argument("--cache", type=Path, help="where vectors are kept between runs")
    parser.add_argument("--embedder", choices=("e5", "none"), default="e5")
    parser.add_argument("--leave-out", action="store_true", help="means of the other sets for each set")
    arguments = parser.parse_args()
    names = [n for n in arguments.index.split(",") if n]
    names = names or sorted(p.name for p in arguments.sets.iterdir() if p.is_dir())
    sets = [load_set(arguments.sets / name) for name in names]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = arguments.cache or folder / "vectors.db"
        if arguments.leave_out:
            result, manifest = left_out(folder, cache, sets, arguments.sets)
        else:
            result, manifest = as_shipped(folder, sets, open_model(arguments.embedder, cache))
    add_means(result)
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
