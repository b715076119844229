"""Passages: whole paragraphs where possible, never too large, nothing lost, headings and tables kept."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogine.ingest.chunk import MAX_CHARS, MAX_PIECE_CHARS, OVERLAP_CHARS, chunk
from mogine.kb.passages import Document, Passage

ZH = "自收到商品之日起七天内可以申请退款，运费由本公司承担，三个工作日内到账。"
EN = "You may return unused goods within seven days of delivery, and we pay the shipping. "


def cut(text: str, title: str = "T") -> list[Passage]:
    return chunk(Document("docs/a.md", title, text, "d1", "https://example.com/a"))


def test_passages_are_numbered_and_know_their_document() -> None:
    first, second = cut("# A\n\none\n\n# B\n\ntwo")
    assert (first.id, second.id, second.position) == ("d1:0", "d1:1", 1)
    assert (first.source, first.title, first.url, first.page) == (
        "docs/a.md",
        "T",
        "https://example.com/a",
        None,
    )


def test_whole_paragraphs_are_packed_up_to_the_limit() -> None:
    paragraphs = [f"第{n}段。{ZH * 3}" for n in range(12)]
    passages = cut("\n\n".join(paragraphs))
    assert "\n\n".join(p.text for p in passages) == "\n\n".join(paragraphs)
    assert all(300 <= len(p.text) <= MAX_CHARS for p in passages)


def test_english_paragraphs_are_packed_too() -> None:
    passages = cut("\n\n".join([EN * 2] * 20))
    assert all(300 <= len(p.text) <= MAX_CHARS for p in passages)


@pytest.mark.parametrize("sentence", [ZH, EN])
def test_a_long_paragraph_is_cut_after_sentences_with_one_of_overlap(sentence: str) -> None:
    numbered = [f"{n} {sentence}" for n in range(60)]
    passages = cut("".join(numbered))
    assert len(passages) > 2
    for before, after in itertools.pairwise(passages):
        assert before.text.endswith(sentence.strip())
        overlap = after.text[: after.text.index(sentence.strip()[-1]) + 1]
        assert before.text.endswith(overlap)
    for line in numbered:
        assert any(line.strip() in p.text for p in passages)


def test_a_whole_paragraph_stays_whole_and_a_longer_english_one_is_cut_finer() -> None:
    """Finer pieces of English are found better, also by questions in Chinese."""
    whole = EN * (MAX_CHARS // len(EN))
    assert [p.text for p in cut(whole)] == [whole.strip()]
    assert all(len(p.text) <= MAX_PIECE_CHARS for p in cut(EN * 40))
    assert any(len(p.text) > MAX_PIECE_CHARS for p in cut(ZH * 40))


def test_pieces_of_a_long_paragraph_are_of_about_one_len() -> None:
    sizes = [len(p.text) for p in cut(ZH * 17)]
    assert len(sizes) == 2 and min(sizes) > 250


def test_text_without_any_place_to_cut_is_cut_all_the_same() -> None:
    passages = cut("退" * 2000)
    assert "".join(p.text for p in passages) == "退" * 2000
    assert all(len(p.text) <= MAX_CHARS for p in passages)


def test_a_run_of_blanks_makes_no_empty_passage() -> None:
    assert [p.text for p in cut("a" + " " * 3000 + "b")] == ["a", "b"]


def test_numbers_and_abbreviations_do_not_end_sentences() -> None:
    text = "Version 3.14 costs 1.99 at example.com and e.g. J. Smith uses it "
    assert not any(p.text.startswith(("14 ", "99 ", "com ")) for p in cut(text * 40))


def test_heading_path_stands_beside_the_text_without_the_title() -> None:
    passages = cut("# T\n\nintro\n\n## Refunds\n\nr\n\n### When\n\nw\n\n## Fees ##\n\nf", title="t")
    assert [(p.heading, p.text) for p in passages] == [
        ("", "intro"), ("Refunds", "r"), ("Refunds > When", "w"), ("Fees", "f"),
    ]  # fmt: skip


def test_underlined_headings_count_and_rules_do_not() -> None:
    passages = cut("Refunds\n=======\n\none\n\nFees\n---\ntwo\n\n---\n\nthree")
    assert [(p.heading, p.text) for p in passages] == [
        ("Refunds", "one"),
        ("Refunds > Fees", "two"),
        ("Refunds > Fees", "three"),
    ]


def test_headings_without_text_are_text() -> None:
    passages = cut("# Rules\n\n## 支持七天无理由退货\n\n## 全国包邮\n\n# Contact\n\ncall us\n\n# The end")
    assert [(p.heading, p.text) for p in passages] == [
        ("Rules", "支持七天无理由退货\n\n全国包邮"), ("Contact", "call us"), ("", "The end"),
    ]  # fmt: skip


def test_an_empty_heading_ends_a_section() -> None:
    assert [p.heading for p in cut("## A\n\none\n\n##\n\ntwo")] == ["A", ""]


def test_hash_marks_in_code_are_no_headings() -> None:
    (passage,) = cut("before\n\n```sh\n# comment\n\nrun | it\n```\n\nafter")
    assert passage.text == "before\n\n```sh\n# comment\n\nrun | it\n```\n\nafter"


def test_a_fence_that_is_never_closed_hides_nothing() -> None:
    assert [p.heading for p in cut("```\ncode\n\n# Real\n\ntext")] == ["", "Real"]


def test_escaped_marks_are_words() -> None:
    assert [p.text for p in cut("\\# one\n\n\\---\n\ntwo")] == ["# one\n\n---\n\ntwo"]


def test_every_part_of_a_long_table_has_the_header_row() -> None:
    header = "| 型号 | 价格 |\n| --- | --- |"
    rows = [f"| S{n} | {n} 元，含安装，全国联保 |" for n in range(100)]
    passages = cut("intro\n\n" + "\n".join([header, *rows]))
    tables = [p for p in passages if "|" in p.text]
    assert len(tables) > 2
    assert all(p.text.startswith(header) or p.text.startswith("intro\n\n" + header) for p in tables)
    assert [row for p in tables for row in p.text.split("\n") if row in rows] == rows
    assert all(len(p.text) <= MAX_CHARS for p in passages)


def test_a_row_larger_than_a_passage_is_cut_under_its_header() -> None:
    passages = cut(f"| a | b |\n|---|---|\n| x | {ZH * 40} |")
    assert len(passages) > 2
    assert all(p.text.startswith("| a | b |\n|---|---|\n") and len(p.text) <= MAX_CHARS for p in passages)


def test_a_header_larger_than_a_passage_does_not_break_the_limit() -> None:
    passages = cut("| " + " | ".join([ZH] * 30) + " |\n|" + "---|" * 30 + "\n| x | y |")
    assert all(len(p.text) <= MAX_CHARS for p in passages)


def test_entries_with_rules_between_are_passages_of_their_own() -> None:
    assert [p.text for p in cut("问题: a\n答案: b\n\n---\n\n问题: c\n答案: d")] == [
        "问题: a\n答案: b",
        "问题: c\n答案: d",
    ]


def test_passages_of_a_paged_text_know_their_page() -> None:
    passages = cut("# One\n\na\n\f# Two\n\nb\n\fc\n\f# Four\n\f# Five\n\ne\n\f")
    assert [(p.page, p.heading, p.text) for p in passages] == [
        (1, "One", "a"), (2, "Two", "b\n\nc"), (4, "", "Four"), (5, "Five", "e"),
    ]  # fmt: skip


def test_a_heading_as_long_as_a_paragraph_is_one() -> None:
    assert [(p.heading, p.text) for p in cut("# " + "很长" * 100)] == [("", "很长" * 100)]


@pytest.mark.parametrize("text", ["", "\n\n", "\f\f", "---\n\n---", "#\n\n##"])
def test_nothing_gives_nothing(text: str) -> None:
    assert cut(text) == []


WORDS = st.integers(0, 10**6).map(lambda n: f"w{n}x")
SENTENCES = st.lists(WORDS, min_size=1, max_size=12).map(lambda words: " ".join(words) + ". ")
CHINESE = st.integers(0, 10**6).map(lambda n: f"甲{n}乙的退款政策是这样的，也请看下一条。")
PARAGRAPHS = st.lists(st.one_of(SENTENCES, CHINESE), min_size=1, max_size=40).map("".join)
HEADINGS = st.tuples(st.integers(1, 6), WORDS).map(lambda pair: "#" * pair[0] + " " + pair[1])
TABLES = st.lists(st.tuples(WORDS, CHINESE), min_size=1, max_size=30).map(
    lambda rows: "| a | b |\n| --- | --- |\n" + "\n".join(f"| {x} | {y} |" for x, y in rows)
)
LISTS = st.lists(SENTENCES, min_size=1, max_size=30).map(
    lambda items: "\n".join("- " + item for item in items)
)
DOCUMENTS = st.lists(
    st.one_of(PARAGRAPHS, HEADINGS, TABLES, LISTS, st.just("---"), st.just("\f")), max_size=25
).map("\n\n".join)


@settings(deadline=None)
@given(DOCUMENTS)
def test_no_word_is_lost_and_no_passage_is_too_large(text: str) -> None:
    passages = cut(text)
    kept = "\n".join(f"{p.heading}\n{p.text}" for p in passages)
    for token in re.findall(r"w\d+x|甲\d+乙", text):
        assert token in kept
    assert all(p.text.strip() and len(p.text) <= MAX_CHARS for p in passages)
    assert [p.id for p in passages] == [f"d1:{n}" for n in range(len(passages))]


@settings(deadline=None)
@given(st.text(max_size=5000))
def test_any_text_at_all_is_cut_the_same_way_twice(text: str) -> None:
    passages = cut(text)
    assert passages == cut(text)
    assert all(p.text.strip() and len(p.text) <= MAX_CHARS for p in passages)


@settings(deadline=None)
@given(PARAGRAPHS)
def test_overlap_is_short(text: str) -> None:
    assert sum(len(p.text) for p in cut(text)) <= len(text) + OVERLAP_CHARS * len(cut(text))


@pytest.mark.parametrize(
    "text",
    [
        "# " + " " * 200_000 + "x",
        "|" * 200_000,
        "-" * 200_000 + "x",
        "." * 200_000,
        "a|\n" * 60_000,
        "```\n~~~~\n" * 40_000,
        "\n# a" * 50_000,
    ],
    ids=["heading", "bars", "dashes", "dots", "cells", "fences", "headings"],
)
def test_hostile_text_takes_time_in_proportion_to_its_length(text: str) -> None:
    """Quadratic time would be minutes here, and the runner's limit would end it."""
    assert all(len(p.text) <= MAX_CHARS for p in cut(text))
