"""Which questions ask for the same: by the bundled model, by words, and by any other embedder."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import pytest

from mogine.gaps.meaning import Clusters, Meaning, ModelMeaning, TermMeaning
from mogine.kb.embedders import E5Embedder, Vectors
from tests.kb.conftest import CharacterEmbedder

ALIKE = (
    ("退款多久到账？", "退款几天能到账"),
    ("可以用花呗分期付款吗", "能不能花呗分期"),
    ("滤芯多久换一次", "滤芯更换周期是多久"),
    ("how long is the warranty of the S800", "what is the warranty period of the S800"),
)
DIFFERENT = (
    ("退款多久到账？", "你们还招人吗"),
    ("上海有门店吗", "怎么开发票"),
    ("净水器能过滤微塑料吗", "支持海外发货吗"),
    ("are you hiring?", "how loud is the S800"),
)


@pytest.fixture(scope="module")
def model() -> Iterator[ModelMeaning]:
    with closing(E5Embedder()) as embedder:
        yield ModelMeaning(embedder)


def cosine(meaning: Meaning, pair: tuple[str, str]) -> float:
    a, b = meaning.embed(pair)
    return float(a @ b)


@pytest.mark.parametrize("pair", ALIKE)
def test_the_model_knows_one_question_in_two_wordings(model: ModelMeaning, pair: tuple[str, str]) -> None:
    assert cosine(model, pair) >= model.threshold


@pytest.mark.parametrize("pair", DIFFERENT)
def test_the_model_keeps_questions_apart(model: ModelMeaning, pair: tuple[str, str]) -> None:
    assert cosine(model, pair) < model.threshold


def test_words_alone_find_what_shares_them() -> None:
    words = TermMeaning()
    assert cosine(words, ("退款多久到账？", "退款几天到账")) >= words.threshold
    assert cosine(words, ("How long is the warranty?", "how long does the warranty last")) >= words.threshold
    for pair in DIFFERENT:
        assert cosine(words, pair) < words.threshold
    assert not words.embed(["？！…"]).any()


class Distant(CharacterEmbedder):
    """An embedder that puts everything near together, as many do: all vectors share a large part."""

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        rows = super().embed_questions(texts)
        return np.concatenate([rows, np.full((len(rows), 1), 3.0, dtype=np.float32)], axis=1)


def test_where_the_line_lies_depends_on_the_embedder() -> None:
    plain, distant = ModelMeaning(CharacterEmbedder()), ModelMeaning(Distant())
    assert 0 < plain.threshold < distant.threshold < 1
    for meaning in (plain, distant):
        assert cosine(meaning, ALIKE[1]) >= meaning.threshold
        assert cosine(meaning, DIFFERENT[0]) < meaning.threshold


def test_clusters_grow_and_move_with_their_questions() -> None:
    clusters = Clusters("e", 0.8)
    assert clusters.nearest(np.array([1, 0], dtype=np.float32)) is None
    for number in range(200):  # more than fit into the first piece of memory
        angle = number / 200 * 2 * np.pi
        clusters.add(number, np.array([np.cos(angle), np.sin(angle)], dtype=np.float32))
    place = clusters.nearest(np.array([0, 1], dtype=np.float32))
    assert place == 50
    id, total = clusters.grow(place, np.array([3, 0], dtype=np.float32))
    assert id == 50 and total.tolist() == pytest.approx([3, 1], abs=1e-6)
