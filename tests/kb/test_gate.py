"""Questions with known answers: read with care, asked, weighed; a change that makes them worse is seen."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mogine.errors import RequestError, SettingsError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.gate import KbTest, Outcome, add_test, junit, load_tests, run_tests, weigh, why_failed
from mogine.kb.gate import test_from as read_test
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.passages import document_id
from tests.kb.conftest import CharacterEmbedder, make_document, take_in

RETURNS = make_document("docs/returns.md", "Refunds take 14 days.", "Postage is on us.", title="Returns")
HOURS = make_document("docs/hours.md", "Open at nine.", url="https://example.com/hours")


@contextmanager
def opened(generations: Generations) -> Iterator[KnowledgeBase]:
    generation = generations.current()
    assert generation is not None
    with closing(KnowledgeBase(generation, NoEmbedder(), readers=1)) as knowledge:
        yield knowledge


# --- the file ------------------------------------------------------------------------------------


def test_tests_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "kb-tests.jsonl"
    assert load_tests(path) == []
    first = KbTest("怎么退款？", document="docs/returns.md")
    second = KbTest("hours", contains="nine", top_k=1, mode="keyword")
    assert add_test(path, first) and add_test(path, second)
    assert not add_test(path, first), "a test is there once"
    assert load_tests(path) == [first, second]
    assert "怎么退款" in path.read_text("utf-8"), "people read the file too"


def test_a_line_is_added_after_one_without_line_end(tmp_path: Path) -> None:
    path = tmp_path / "kb-tests.jsonl"
    path.write_text('\ufeff// ours\n\n{"question": "a", "contains": "b"}', "utf-8")
    add_test(path, KbTest("c", contains="d"))
    assert [test.question for test in load_tests(path)] == ["a", "c"]


def test_every_wrong_line_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "kb-tests.jsonl"
    path.write_text('{"question": "a", "contains": "b"}\n{\n[]\n{"question": "a"}\n{"qestion": "a"}\n')
    with pytest.raises(SettingsError) as caught:
        load_tests(path)
    for part in (
        "line 2 is no JSON",
        "line 3:",
        "line 4: document or contains",
        "line 5: unknown field 'qest",
    ):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"question": " ", "contains": "a"}, "question"),
        ({"question": "a" * 2001, "contains": "a"}, "question"),
        ({"question": 1, "contains": "a"}, "must be text"),
        ({"question": "a", "contains": " "}, "document or contains"),
        ({"question": "a", "contains": "a", "top_k": 0}, "top_k"),
        ({"question": "a", "contains": "a", "top_k": True}, "top_k"),
        ({"question": "a", "contains": "a", "top_k": "3"}, "top_k"),
        ({"question": "a", "contains": "a", "mode": "magic"}, "mode"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        read_test(fields)


# --- what is met ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs/returns.md", "returns.md", document_id("docs/returns.md")])
def test_a_document_goes_by_its_source_its_end_or_its_id(generations: Generations, name: str) -> None:
    take_in(generations, CharacterEmbedder(), RETURNS, HOURS)
    with opened(generations) as knowledge:
        (outcome,) = run_tests(knowledge, [KbTest("refunds", document=name)])
        (other,) = run_tests(knowledge, [KbTest("refunds", document="turns.md")])
    assert (outcome.passed, outcome.rank, outcome.first) == (True, 1, "docs/returns.md")
    assert not other.passed


def test_text_is_compared_without_width_case_and_blanks(generations: Generations) -> None:
    take_in(generations, CharacterEmbedder(), RETURNS)
    with opened(generations) as knowledge:
        (outcome,) = run_tests(knowledge, [KbTest("refunds", contains="ＴＡＫＥ  14\nDAYS")])
    assert outcome.passed


def test_document_and_text_must_be_met_by_one_passage(generations: Generations) -> None:
    take_in(generations, CharacterEmbedder(), RETURNS, HOURS)
    both = KbTest("refunds postage nine", document="docs/hours.md", contains="days")
    address = KbTest("open nine", document="https://example.com/hours", contains="nine")
    with opened(generations) as knowledge:
        outcomes = run_tests(knowledge, [both, address])
    assert [outcome.passed for outcome in outcomes] == [False, True]


def test_rank_beyond_top_k_fails_and_says_where_it_is(generations: Generations) -> None:
    documents = [make_document(f"{n}.md", "refund " * (9 - n) + "word " * n) for n in range(6)]
    take_in(generations, CharacterEmbedder(), *documents)
    with opened(generations) as knowledge:
        (outcome,) = run_tests(knowledge, [KbTest("refund", document="5.md", top_k=2)])
    assert not outcome.passed and outcome.rank == 6
    assert why_failed(outcome) == "5.md is at rank 6, expected within 2; first is 0.md"


# --- weighing ------------------------------------------------------------------------------------

TESTS = [KbTest("refunds", contains="14 days"), KbTest("open", contains="nine")]


@pytest.mark.parametrize(("mode", "may_serve"), [("strict", False), ("warn", True)])
def test_a_question_that_fails_now_is_worse_and_strict_holds_back(
    generations: Generations, embedder: CharacterEmbedder, mode: Any, may_serve: bool
) -> None:
    take_in(generations, embedder, RETURNS, HOURS)
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("docs/returns.md", "Refunds take as long as they take."))
        candidate = draft.finish()
        assert candidate is not None
        verdict = weigh(generations.current(), candidate, embedder, TESTS, mode)
    assert [change.after.test.question for change in verdict.worse] == ["refunds"]
    assert [change.after.test.question for change in verdict.moved] == ["refunds"]
    assert verdict.may_serve is may_serve


def test_what_failed_before_may_go_on_failing(generations: Generations, embedder: CharacterEmbedder) -> None:
    take_in(generations, embedder, HOURS)
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "Something else."))
        candidate = draft.finish()
        assert candidate is not None
        verdict = weigh(generations.current(), candidate, embedder, TESTS, "strict")
    assert verdict.may_serve and not verdict.worse and len(verdict.failed) == 1


def test_the_first_generation_has_nothing_to_be_worse_than(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    with generations.begin(embedder) as draft:
        draft.replace(*HOURS)
        candidate = draft.finish()
        assert candidate is not None
        assert weigh(None, candidate, embedder, TESTS, "strict").may_serve


def test_without_comparison_strict_wants_every_test_passed(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    """The current generation's vectors are another embedder's."""
    take_in(generations, embedder, RETURNS)
    other = CharacterEmbedder("other", 32)
    for documents, may_serve in (([], False), ([HOURS], True)):
        with generations.begin(other) as draft:
            for document in documents:
                draft.replace(*document)
            candidate = draft.finish()
            assert candidate is not None
            assert weigh(generations.current(), candidate, other, TESTS, "strict").may_serve is may_serve


def test_a_draft_that_was_looked_at_serves_after_its_commit(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, RETURNS)
    with generations.begin(embedder) as draft:
        draft.replace(*HOURS)
        candidate = draft.finish()
        assert candidate is not None
        weigh(generations.current(), candidate, embedder, TESTS, "warn")
        assert generations.current_name() == "g000001"
        assert draft.commit() == "g000002"
    with opened(generations) as knowledge:
        assert all(outcome.passed for outcome in run_tests(knowledge, TESTS))


# --- JUnit ---------------------------------------------------------------------------------------


def test_junit_is_proper_xml_whatever_the_questions_hold() -> None:
    outcomes = [
        Outcome(KbTest('a < b & "c" \x00\x1b\ud800 ]]>', contains="x"), 1, "a.md"),
        Outcome(KbTest("退款", document="<b>.md"), None, ""),
    ]
    suite = ET.fromstring(junit(outcomes, 1.5))  # noqa: S314 - our own words
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("2", "1", "1.500")
    good, bad = suite.findall("testcase")
    assert good.find("failure") is None
    failure = bad.find("failure")
    assert failure is not None
    assert "<b>.md is not among the first 50" in (failure.get("message") or "")


def test_a_line_holds_what_is_needed_and_no_more() -> None:
    assert KbTest("q", document="a.md").to_dict() == {"question": "q", "document": "a.md", "top_k": 3}
    assert json.dumps(KbTest("q", contains="c", mode="vector").to_dict()).count(":") == 4
