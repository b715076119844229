"""Makes mogine/kb/e5_means.npy: the mean vector of each language, of passages and of questions apart.

    python -m benchmarks.retrieval.means SETS [--cache FILE]

SETS holds the folders of retrieval sets (corpus.jsonl and queries.jsonl each). The passages are cut and
given their titles as `mogine kb ingest` does it, embedded with the bundled model as it comes, and averaged
per language; the same for the questions. The file is a float32 array of the shape (2, 2, 384): passages and
questions, each Chinese and other. It holds sums over hundreds of texts, none of the texts.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.retrieval.sets import RetrievalSet, load_set
from mogine.ingest.chunk import chunk
from mogine.kb.embedders import MEANS_PATH, CachedEmbedder, E5Embedder, Vectors
from mogine.kb.passages import language


def mean_of_languages(texts: list[str], rows: Vectors) -> Vectors:
    """Two rows: Chinese, other."""
    chinese = np.array([language(text) == "zh" for text in texts])
    return np.array([rows[chinese].mean(axis=0), rows[~chinese].mean(axis=0)], dtype=np.float32)


def texts_of(found: RetrievalSet) -> tuple[list[str], list[str]]:
    """Passages as ingest cuts them, and questions."""
    return (
        [passage.searchable for document in found.documents for passage in chunk(document)],
        [question.text for question in found.questions],
    )


def means_of(passages: Sequence[str], questions: Sequence[str], embedder: CachedEmbedder) -> Vectors:
    """What CentredEmbedder takes away; each text counts once."""
    each, asked = list(dict.fromkeys(passages)), list(dict.fromkeys(questions))
    return np.array(
        [
            mean_of_languages(each, embed_in_steps(embedder, each)),
            mean_of_languages(asked, embedder.embed_questions(asked)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("--cache", type=Path, help="where vectors are kept between runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        embedder = CachedEmbedder(E5Embedder(), arguments.cache or Path(folder) / "vectors.db")
        passages: list[str] = []
        questions: list[str] = []
        for path in sorted(p for p in arguments.sets.iterdir() if p.is_dir()):
            of_set = texts_of(load_set(path))
            passages += of_set[0]
            questions += of_set[1]
        means = means_of(passages, questions, embedder)
    np.save(MEANS_PATH, means)
    print(f"{MEANS_PATH}: {len(passages)} passages, {len(questions)} questions")


def embed_in_steps(embedder: CachedEmbedder, texts: list[str], step: int = 32) -> Vectors:
    """So that an interrupted run loses little of what it has paid for."""
    return np.concatenate([embedder.embed_passages(texts[i : i + step]) for i in range(0, len(texts), step)])


if __name__ == "__main__":
    main()
