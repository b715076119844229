"""A whole generation has no findings; damage of any part of it has one that names the part."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mogine.errors import StoreError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.manifest import Generation
from mogine.kb.vectors import VectorIndex
from mogine.kb.verify import Finding, verify
from tests.kb.conftest import CharacterEmbedder, make_document, take_in


@pytest.fixture
def generation(generations: Generations, embedder: CharacterEmbedder) -> Generation:
    documents = [make_document(f"{n}.md", f"document {n}", f"退款 {n}") for n in range(20)]
    take_in(generations, embedder, *documents)
    take_in(generations, embedder, make_document("3.md", "another text"))
    current = generations.current()
    assert current is not None
    return current


@pytest.fixture
def large(generations: Generations, embedder: CharacterEmbedder) -> Generation:
    """From a thousand vectors on, Chroma keeps them in files of their own."""
    take_in(generations, embedder, make_document("a.md", *(f"{n} 退款" for n in range(1100))))
    current = generations.current()
    assert current is not None
    return current


def parts(findings: list[Finding]) -> set[str]:
    return {finding.part for finding in findings}


def change(generation: Generation, sql: str) -> None:
    with closing(sqlite3.connect(generation.path / "texts.db")) as db, db:
        db.execute(sql)


def chroma(generation: Generation) -> Path:
    (path,) = generation.path.glob("chroma/*/data_level0.bin")
    return path


def test_a_whole_generation_has_no_findings_also_after_it_was_read(
    generation: Generation, embedder: CharacterEmbedder
) -> None:
    assert verify(generation) == []
    with closing(VectorIndex(generation.path)) as index:
        index.warm(64)
    assert verify(generation, sample=None) == []


def test_a_generation_without_vectors_is_whole(generations: Generations) -> None:
    with generations.begin(NoEmbedder()) as draft:
        draft.replace(*make_document("a.md", "text"))
        draft.commit()
    current = generations.current()
    assert current is not None
    assert verify(current) == []


def test_a_flipped_byte_in_the_vectors_is_found(large: Generation) -> None:
    assert verify(large) == []
    data = bytearray(chroma(large).read_bytes())
    data[len(data) // 2] ^= 0xFF
    chroma(large).write_bytes(data)
    assert any("data_level0.bin is not as it was" in finding.detail for finding in verify(large))


@pytest.mark.parametrize("name", ["data_level0.bin", "index_metadata.pickle"])
def test_a_missing_file_is_found(large: Generation, name: str) -> None:
    chroma(large).with_name(name).unlink()
    assert any(f"{name} is missing" in finding.detail for finding in verify(large))


def test_a_vector_that_is_missing_is_found(generation: Generation) -> None:
    with closing(VectorIndex(generation.path)) as index:
        index.remove([min(index.numbers())])
    findings = verify(generation)
    assert any(f.part == "vectors" and "1 passages are missing" in f.detail for f in findings)


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("DELETE FROM passages WHERE number = 1", "keywords"),
        ("DELETE FROM documents WHERE source = '1.md'", "catalogue"),
        ("UPDATE term_counts SET passages = passages + 1 WHERE term = 'document'", "keywords"),
        ("INSERT INTO keywords (rowid, terms) VALUES (999, 'word')", "keywords"),
        ("DELETE FROM rounded_vectors WHERE number = 1", "rounded vectors"),
    ],
)
def test_parts_that_do_not_agree_are_found(generation: Generation, sql: str, part: str) -> None:
    change(generation, sql)
    assert part in parts(verify(generation))


@pytest.mark.parametrize("name", ["texts.db", "chroma/chroma.sqlite3"])
@pytest.mark.parametrize("damage", ["zeroed", "cut", "deleted"])
def test_a_damaged_database_is_a_finding_and_no_crash(generation: Generation, name: str, damage: str) -> None:
    """F20"""
    path = generation.path / name
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes(bytes(path.stat().st_size))
    assert verify(generation) != []


def test_a_base_with_damaged_vectors_is_told_and_written_anew(
    large: Generation, generations: Generations, embedder: CharacterEmbedder
) -> None:
    """F20"""
    data = bytearray(chroma(large).read_bytes())
    data[len(data) // 2] ^= 0xFF
    chroma(large).write_bytes(data)
    with generations.begin(embedder) as draft, pytest.raises(StoreError, match="mogine kb rollback"):
        draft.replace(*make_document("b.md", "text"))
    embedder.passages = 0
    with generations.begin(embedder) as draft:
        draft.rebuild()
        draft.commit()
    assert embedder.passages == 1100, "what Chroma would have to read is not let near it"
    current = generations.current()
    assert current is not None
    assert verify(current) == []
