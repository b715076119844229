"""The vector index over the real Chroma."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mogine.errors import StoreError
from mogine.kb.embedders import Vectors, unit
from mogine.kb.vectors import VectorIndex


def some_vectors(count: int) -> Vectors:
    return unit(np.random.default_rng(7).normal(size=(count, 16)).astype(np.float32))


def test_nearest_come_first_with_their_cosine(tmp_path: Path) -> None:
    rows = some_vectors(300)
    index = VectorIndex(tmp_path, create=True)
    index.add(range(1, 301), rows)
    index.close()
    index = VectorIndex(tmp_path)
    found = index.search(rows[41], 5)
    assert next(iter(found)) == 42
    expected = rows @ rows[41]
    assert found == pytest.approx({number: expected[number - 1] for number in found}, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert index.cosines(rows[41], [1, 42, 999]) == pytest.approx({1: expected[0], 42: 1.0}, abs=1e-5)
    index.close()


def test_fewer_passages_than_asked_for_is_no_error(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, create=True)
    assert index.search(some_vectors(1)[0], 50) == {}
    assert index.cosines(some_vectors(1)[0], []) == {}
    assert index.cosines(some_vectors(1)[0], [5]) == {}
    index.add([3], some_vectors(1))
    assert list(index.search(some_vectors(1)[0], 50)) == [3]
    index.close()


def test_removed_vector_is_found_no_more(tmp_path: Path) -> None:
    rows = some_vectors(20)
    index = VectorIndex(tmp_path, create=True)
    index.add(range(20), rows)
    index.remove([4, 5])
    assert index.count() == 18
    assert not {4, 5} & set(index.search(rows[4], 20))
    index.close()


def test_copied_folder_grows_without_touching_the_first(tmp_path: Path) -> None:
    """What a new generation does, while the old one serves."""
    rows = some_vectors(30)
    first, second = tmp_path / "first", tmp_path / "second"
    index = VectorIndex(first, create=True)
    index.add(range(20), rows[:20])
    index.close()
    serving = VectorIndex(first)
    serving.search(rows[0], 1)
    shutil.copytree(first, second)
    writer = VectorIndex(second)
    writer.add(range(20, 30), rows[20:])
    writer.remove([0])
    writer.close()
    moved = VectorIndex(second)
    assert next(iter(moved.search(rows[25], 1))) == 25
    assert next(iter(moved.search(rows[0], 1))) != 0
    assert serving.count() == 20
    assert next(iter(serving.search(rows[0], 1))) == 0
    serving.close()
    moved.close()


def test_missing_folder_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="mogine kb ingest"):
        VectorIndex(tmp_path)


def test_settings_of_the_home_do_not_reach_chroma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B13: Chroma's settings read `.env` of the current directory, which is the home's."""
    (tmp_path / ".env").write_text("CHROMA_API_IMPL=chromadb.api.fastapi.FastAPI\nis_persistent=0\n")
    monkeypatch.chdir(tmp_path)
    index = VectorIndex(tmp_path, create=True)
    index.add([1], some_vectors(1))
    index.close()
    assert (tmp_path / "chroma" / "chroma.sqlite3").exists()
