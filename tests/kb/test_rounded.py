"""The copies of vectors that lie beside the texts."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mogine.kb.embedders import unit
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.rounded import RoundedVectors, RoundedWriter
from mogine.kb.texts import TEXTS_NAME, Readers, create_texts, open_for_writing
from tests.kb.conftest import CharacterEmbedder, make_document, take_in


def test_cosines_of_copies_are_those_of_the_vectors(tmp_path: Path) -> None:
    rows = unit(np.random.default_rng(1).standard_normal((200, 384)).astype(np.float32))
    create_texts(tmp_path)
    with closing(open_for_writing(tmp_path)) as db:
        writer = RoundedWriter(db)
        writer.add(range(1, 201), rows)
        writer.remove([7, 8])
    readers = Readers(tmp_path, 1)
    copies = RoundedVectors(readers)
    near = copies.cosines(rows[0], [1, 2, 7, 200, 999])
    assert set(near) == {1, 2, 200}
    assert all(near[n] == pytest.approx(float(rows[0] @ rows[n - 1]), abs=0.002) for n in near)
    assert copies.cosines(rows[0], []) == {} == copies.cosines(rows[0], [999])
    readers.close()


def test_a_generation_without_copies_is_searched_all_the_same(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    """Those that older versions wrote serve until the next ingest."""
    crowd = [make_document(f"{n}.md", f"人群 {n}") for n in range(60)]
    take_in(generations, embedder, *crowd, make_document("wanted.md", "退款 refund"))
    current = generations.current()
    assert current is not None
    answers = []
    for _ in range(2):
        with closing(KnowledgeBase(current, embedder)) as knowledge:
            answers.append([(h.passage.source, round(h.score, 2)) for h in knowledge.search("refund", 5)])
        with closing(sqlite3.connect(current.path / TEXTS_NAME)) as db:
            db.execute("DROP TABLE IF EXISTS rounded_vectors")
    assert answers[0] == answers[1]
    assert answers[0][0][0] == "wanted.md"
