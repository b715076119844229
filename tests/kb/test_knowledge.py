"""Search over one generation: by meaning, by words, and by both."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from mogine.errors import NotFound, RequestError, StoreError, Unavailable
from mogine.kb.embedders import NoEmbedder, Vectors, unit
from mogine.kb.generations import Generations
from mogine.kb.knowledge import MODES, KnowledgeBase
from mogine.kb.passages import Document, Passage, document_id
from tests.kb.conftest import CharacterEmbedder, make_document, take_in

Build = Callable[..., KnowledgeBase]


class Placed(CharacterEmbedder):
    """Vectors as a table says; a text that is not in it lies in a direction of its own."""

    def __init__(self, table: Mapping[str, Sequence[float]]) -> None:
        super().__init__("placed", 3)
        self._table = table

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return unit(np.array([self._table.get(text, (0.0, 0.0, 1.0)) for text in texts], dtype=np.float32))


@pytest.fixture
def build(generations: Generations, embedder: CharacterEmbedder) -> Iterator[Build]:
    opened = []

    def make(
        *documents: tuple[Document, list[Passage]], embedder: CharacterEmbedder = embedder
    ) -> KnowledgeBase:
        take_in(generations, embedder, *documents)
        current = generations.current()
        assert current is not None
        opened.append(KnowledgeBase(current, embedder))
        return opened[-1]

    yield make
    for knowledge in opened:
        knowledge.close()


def found(knowledge: KnowledgeBase, query: str, top_k: int = 10, mode: str = "hybrid") -> list[str]:
    return [hit.passage.source for hit in knowledge.search(query, top_k, mode)]  # type: ignore[arg-type]


def test_hit_has_all_that_a_citation_needs(build: Build) -> None:
    document = Document("docs/faq.pdf", "常见问题", "", "d1", "https://example.com/faq", "2026-01-01")
    passage = Passage(
        "d1:0", "docs/faq.pdf", "常见问题", "售后 > 退款", 0, "七天内退款。", "https://example.com/faq#r", 4
    )
    knowledge = build((document, [passage]))
    hits = knowledge.search("退款", 3)
    assert [hit.passage for hit in hits] == [passage]
    assert 0 < hits[0].score <= 1


def test_title_and_heading_are_found(build: Build) -> None:
    knowledge = build(
        make_document("a.md", "七天之内都可以。", title="退货政策"), make_document("b.md", "周一到周五。")
    )
    assert found(knowledge, "退货政策", 1, "keyword") == ["a.md"]


@pytest.mark.parametrize("mode", MODES)
def test_scores_fall_and_lie_between_0_and_1(build: Build, mode: str) -> None:
    texts = [f"document {n} about refunds and {'退款 ' * n}" for n in range(12)]
    knowledge = build(*(make_document(f"{n}.md", text) for n, text in enumerate(texts)))
    hits = knowledge.search("退款 refunds", 10, mode)  # type: ignore[arg-type]
    scores = [hit.score for hit in hits]
    assert len(hits) == 10
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert [h.passage.id for h in hits] == [h.passage.id for h in knowledge.search("退款 refunds", 10, mode)]  # type: ignore[arg-type]


def test_meaning_and_words_add_up(build: Build) -> None:
    """What is second in both lists beats what is first in one and nowhere in the other."""
    table = {
        "refund money": (1, 0, 0),
        "near": (1, 0, 0),
        "refund soon": (0.8, 0.6, 0),
        "refund money back": (0, 1, 0),
    }
    knowledge = build(
        make_document("near.md", "near"),
        make_document("both.md", "refund soon"),
        make_document("words.md", "refund money back"),
        embedder=Placed(table),
    )
    assert found(knowledge, "refund money", 1, "vector") == ["near.md"]
    assert found(knowledge, "refund money", 1, "keyword") == ["words.md"]
    scores = {h.passage.source: h.score for h in knowledge.search("refund money", 3)}
    keyword = {h.passage.source: h.score for h in knowledge.search("refund money", 3, "keyword")}
    assert scores["near.md"] == pytest.approx(1 / 1.6, abs=1e-3)
    assert scores["words.md"] == pytest.approx(0.6 * keyword["words.md"] ** 0.5 / 1.6, abs=1e-3)
    assert scores["both.md"] == pytest.approx((0.8 + 0.6 * keyword["both.md"] ** 0.5) / 1.6, abs=1e-3)


def test_passage_in_the_other_language_is_lent_what_the_best_has_up_to_a_limit(build: Build) -> None:
    """It has no word in common with the question, so words would always push it down."""
    table = {
        "怎么退款": (1, 0, 0),
        "You get your money back": (0.9, 0.4359, 0),
        "退款的历史": (0.3, 0.9539, 0),
    }
    knowledge = build(
        make_document("en.md", "You get your money back"),
        make_document("zh.md", "退款的历史"),
        embedder=Placed(table),
    )
    best = knowledge.search("怎么退款", 1, "keyword")[0].score
    assert best > 0.15
    scores = {h.passage.source: h.score for h in knowledge.search("怎么退款", 2)}
    assert scores["en.md"] == pytest.approx((0.9 + 0.6 * 0.15**0.5) / 1.6, abs=1e-3)
    assert scores["zh.md"] == pytest.approx((0.3 + 0.6 * best**0.5) / 1.6, abs=1e-3)


def test_passage_that_clearly_matches_in_the_own_language_comes_before_one_in_the_other(build: Build) -> None:
    table = {
        "怎么退款": (1, 0, 0),
        "You get your money back": (0.6, 0.8, 0),
        "退款：怎么申请退款": (0.5, 0.866, 0),
    }
    knowledge = build(
        make_document("en.md", "You get your money back"),
        make_document("zh.md", "退款：怎么申请退款"),
        embedder=Placed(table),
    )
    assert found(knowledge, "怎么退款", 2) == ["zh.md", "en.md"]


def test_passage_in_the_other_language_that_is_far_from_the_question_is_lent_nothing(build: Build) -> None:
    """Or a word in common somewhere would lift everything in the other language over the right answer."""
    table = {
        "how long is the guarantee for a pump": (1, 0, 0),
        "保修两年": (0.5, 0.866, 0),
        "保修一年": (0.35, 0.9367, 0),
        "The guarantee lasts for two years": (0.5, 0, 0.866),
    }
    knowledge = build(
        make_document("near.zh.md", "保修两年"),
        make_document("far.zh.md", "保修一年"),
        make_document("en.md", "The guarantee lasts for two years"),
        embedder=Placed(table),
    )
    scores = {h.passage.source: h.score for h in knowledge.search("how long is the guarantee for a pump", 3)}
    assert scores["near.zh.md"] > 0.5 / 1.6 + 1e-3
    assert scores["far.zh.md"] == pytest.approx(0.35 / 1.6, abs=1e-3)


def test_search_that_nobody_wants_any_more_ends_before_its_next_step(build: Build) -> None:
    embedder = CharacterEmbedder()
    knowledge = build(make_document("a.md", "退款"), embedder=embedder)
    asked = []

    def until_third() -> bool:
        asked.append(1)
        return len(asked) < 3

    with pytest.raises(CancelledError):
        knowledge.search("退款", is_wanted=until_third)
    assert len(asked) == 3


def test_passage_that_only_words_find_gets_its_cosine_too(build: Build) -> None:
    """It may be the 51st by meaning."""
    crowd = {f"near {n}": (1.0, 0.001 * n, 0.0) for n in range(60)}
    table = {"zebra": (1, 0, 0), "the zebra": (0.9, 0.4359, 0), **crowd}
    knowledge = build(
        make_document("zebra.md", "the zebra"),
        *(make_document(f"{n}.md", text) for n, text in enumerate(crowd)),
        embedder=Placed(table),
    )
    words = knowledge.search("zebra", 1, "keyword")[0].score
    best = knowledge.search("zebra", 1)[0]
    assert best.passage.source == "zebra.md"
    assert best.score == pytest.approx((0.9 + 0.6 * words**0.5) / 1.6, abs=1e-3)


def test_top_k_may_be_larger_than_the_base(build: Build) -> None:
    knowledge = build(make_document("a.md", "refund"))
    assert [len(found(knowledge, "refund", 50, mode)) for mode in MODES] == [1, 1, 1]


@pytest.mark.parametrize(
    "query", ["", "?!", "的", "\0", "\ud800", "🙂", "x" * 2000, "退" * 2000, "'; DROP TABLE", '"']
)
def test_any_question_is_answered(build: Build, query: str) -> None:
    knowledge = build(make_document("a.md", "refund 退款"))
    for mode in MODES:
        assert len(knowledge.search(query, 3, mode)) <= 1


def test_base_without_documents_finds_nothing(build: Build) -> None:
    knowledge = build()
    assert [found(knowledge, "refund", 3, mode) for mode in MODES] == [[], [], []]
    assert knowledge.documents() == []


def test_documents_are_listed_with_their_passages(build: Build) -> None:
    knowledge = build(make_document("b.md", "one", "three", title="B"), make_document("a.md", "refund"))
    first, second = knowledge.documents()
    assert (first.source, first.passages, first.characters) == ("a.md", 1, 6)
    assert (second.source, second.title, second.passages, second.characters) == ("b.md", "B", 2, 8)
    assert [p.text for p in knowledge.passages_of(document_id("b.md"))] == ["one", "three"]
    assert knowledge.document(document_id("b.md")) == second
    with pytest.raises(NotFound):
        knowledge.passages_of("0" * 16)


def test_equal_texts_of_two_sources_are_both_kept(build: Build) -> None:
    knowledge = build(make_document("a.md", "same"), make_document("b.md", "same"))
    assert sorted(found(knowledge, "same")) == ["a.md", "b.md"]


def test_vectors_of_another_embedder_are_refused_with_the_remedy(
    generations: Generations, build: Build
) -> None:
    build(make_document("a.md", "refund"))
    current = generations.current()
    assert current is not None
    with pytest.raises(Unavailable, match=r"characters.*mogine kb ingest") as caught:
        KnowledgeBase(current, CharacterEmbedder("other"))
    assert caught.value.reason == "kb_unavailable"


def test_without_an_embedder_words_are_searched(generations: Generations, build: Build) -> None:
    build(make_document("a.md", "退款"), make_document("b.md", "发票"))
    current = generations.current()
    assert current is not None
    knowledge = KnowledgeBase(current, NoEmbedder())
    hybrid, keyword = knowledge.search("退款", 5), knowledge.search("退款", 5, "keyword")
    assert hybrid == keyword
    assert [hit.passage.source for hit in hybrid] == ["a.md"]
    with pytest.raises(RequestError) as caught:
        knowledge.search("退款", 5, "vector")
    assert caught.value.param == "mode"
    knowledge.close()


def test_missing_files_are_a_store_error(generations: Generations, build: Build) -> None:
    build(make_document("a.md", "refund"))
    current = generations.current()
    assert current is not None
    (current.path / "texts.db").unlink()
    with pytest.raises(StoreError, match=r"texts\.db"):
        KnowledgeBase(current, CharacterEmbedder())


def test_open_base_outlives_its_folder(generations: Generations, build: Build, tmp_path: Path) -> None:
    """The writer may remove it while searches still run. Chroma opens its files anew whenever its connections
    are busy: then the search ends with an error of ours, and the server asks the next generation."""
    knowledge = build(*(make_document(f"{n}.md", f"refund {n}") for n in range(50)))
    knowledge.warm()
    current = generations.current()
    assert current is not None
    current.path.rename(tmp_path / "gone")
    assert len(found(knowledge, "refund", 50, "keyword")) == 50
    for mode in ("vector", "hybrid"):
        try:
            assert len(found(knowledge, "refund", 50, mode)) == 50
        except StoreError as error:
            assert "cannot be used" in error.message


def test_many_threads_search_at_once(build: Build) -> None:
    knowledge = build(*(make_document(f"{n}.md", f"退款 refund {n}") for n in range(100)))
    expected = found(knowledge, "退款 7", 5)
    results: list[list[str]] = []

    def work() -> None:
        results.extend(found(knowledge, "退款 7", 5) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(result == expected for result in results)


def test_among_near_passages_the_one_with_the_words_that_tell_them_apart_comes_first(build: Build) -> None:
    texts = ("The S600 filter costs 199.", "The S600 filter is replaced yearly.", "The S600 filter is blue.")
    question = "replaced S600 filter"
    # All as near by meaning, but for a hair in favour of the first.
    table = {question: (1.0, 0.0, 0.0), texts[0]: (1.0, 0.05, 0.0), texts[1]: (1.0, 0.15, 0.0)}
    documents = [make_document(f"{number}.md", text) for number, text in enumerate(texts)]
    knowledge = build(*documents, embedder=Placed(table))
    hits = knowledge.search(question, 3)
    assert hits[0].passage.text == texts[1]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize(("cosine", "first"), [(0.604, "zh.md"), (0.63, "en.md")])
def test_of_two_equals_the_one_in_the_language_of_the_question_comes_first(
    build: Build, cosine: float, first: str
) -> None:
    table = {
        "钱什么时候回来": (1, 0, 0),
        "Refunds take five days": (cosine, (1 - cosine**2) ** 0.5, 0),
        "五天以内到账": (0.6, 0.8, 0),
    }
    knowledge = build(
        make_document("en.md", "Refunds take five days"),
        make_document("zh.md", "五天以内到账"),
        embedder=Placed(table),
    )
    assert found(knowledge, "钱什么时候回来", 1, "vector") == ["en.md"]
    assert found(knowledge, "钱什么时候回来", 1) == [first]
