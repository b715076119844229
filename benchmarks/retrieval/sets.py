"""Retrieval sets on disk: corpus.jsonl, queries.jsonl and qrels.jsonl a folder, and how a run is scored."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogine.kb.passages import Document


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the documents that answer it (2) or belong to the topic (1)."""

    text: str
    grades: Mapping[str, int]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """One set; a document's source is its id."""

    name: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]


def load_set(folder: Path) -> RetrievalSet:
    """Reads one set."""
    grades: dict[str, dict[str, int]] = {}
    for row in _rows(folder / "qrels.jsonl"):
        of_question = grades.setdefault(row["query_id"], {})
        of_question[row["doc_id"]] = max(row["score"], of_question.get(row["doc_id"], 0))
    return RetrievalSet(
        folder.name,
        tuple(
            Document(row["id"], row["title"], row["text"], hashlib.sha256(row["text"].encode()).hexdigest())
            for row in _rows(folder / "corpus.jsonl")
        ),
        tuple(
            Question(row["text"], grades[row["id"]], tuple(row["answers"]))
            for row in _rows(folder / "queries.jsonl")
        ),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def ndcg(sources: Sequence[str], grades: Mapping[str, int], depth: int = 10) -> float:
    """Graded: gain 3 for an answer, 1 for the topic; each document counts at its best passage's place."""
    ranked = list(dict.fromkeys(sources))[:depth]
    gain: float = sum((2 ** grades.get(s, 0) - 1) / math.log2(i + 2) for i, s in enumerate(ranked))
    best = sorted(grades.values(), reverse=True)[:depth]
    ideal: float = sum((2**grade - 1) / math.log2(i + 2) for i, grade in enumerate(best))
    return gain / ideal


def hit(sources: Sequence[str], grades: Mapping[str, int], depth: int) -> bool:
    """Whether a document that answers is among the first."""
    return any(grades.get(source, 0) >= 2 for source in list(dict.fromkeys(sources))[:depth])
