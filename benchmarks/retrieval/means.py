"""Makes mogine/kb/e5_means.npy: the mean vector of each language, of passages and of questions apart.

    python -m benchmarks.retrieval.means SETS [--cache FILE]

SETS holds the folders of retrieval sets (corpus.jsonl and queries.jsonl each). The passages are cut and
given their titles as `mogine kb ingest` does it, embedded with the bundled model as it comes, and averaged
per language; the same for the questions. The file is a float32 array of the shape (2, 2, 384): passages and
questions, each Chinese and other. It holds sums over hundreds of texts, none of the texts.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.retrieval.sets import load_set
from mogine.ingest.chunk import chunk
from mogine.kb.embedders import MEANS_PATH, CachedEmbedder, E5Embedder, Vectors
from mogine.kb.passages import language


def mean_of_languages(texts: list[str], rows: Vectors) -> Vectors:
    """Two rows: Chinese, other."""
    chinese = np.array([language(text) == "zh" for text in texts])
    return np.array([rows[chinese].mean(axis=0), rows[~chinese].mean(axis=0)], dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("--cache", type=Path, help="where vectors are kept between runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        embedder = CachedEmbedder(E5Embedder(), arguments.cache or Path(folder) / "vectors.db")
        passages: dict[str, None] = {}
        questions: dict[str, None] = {}
        for path in sorted(p for p in arguments.sets.iterdir() if p.is_dir()):
            found = load_set(path)
            passages.update(dict.fromkeys(p.searchable for d in found.documents for p in chunk(d)))
            questions.update(dict.fromkeys(q.text for q in found.questions))
        means = np.array(
            [
                mean_of_languages(list(passages), embed_in_steps(embedder, list(passages))),
                mean_of_languages(list(questions), embedder.embed_questions(list(questions))),
            ]
        )
    np.save(MEANS_PATH, means)
    print(f"{MEANS_PATH}: {len(passages)} passages, {len(questions)} questions")


def embed_in_steps(embedder: CachedEmbedder, texts: list[str], step: int = 32) -> Vectors:
    """So that an interrupted run loses little of what it has paid for."""
    return np.concatenate([embedder.embed_passages(texts[i : i + step]) for i in range(0, len(texts), step)])


if __name__ == "__main__":
    main()
