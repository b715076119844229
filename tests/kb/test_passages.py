"""Documents and passages: ids, languages, and what of a passage is searched."""

import pytest

from mogine.kb.passages import Passage, document_id, language


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("怎么退款", "zh"),
        ("iPhone 15 Pro 怎么退款", "zh"),
        ("華氏溫標仍然在美國日常生活中使用", "zh"),
        ("The Forbidden City (故宫) is in the middle of Beijing and was built in 1420", "other"),
        ("How do I get a refund?", "other"),
        ("Как вернуть деньги?", "other"),
        ("12345 !?", "other"),
        ("", "other"),
        ("𠀀𠀁", "zh"),
    ],
)
def test_language_is_chinese_when_han_outweighs_words(text: str, expected: str) -> None:
    assert language(text) == expected


def test_document_id_is_stable_and_safe_in_an_address() -> None:
    assert document_id("docs/退款.md") == document_id("docs/退款.md")
    assert document_id("docs/退款.md") != document_id("docs/退换.md")
    assert document_id("docs/退款.md").isalnum()
    assert document_id("\udcff.md").isalnum()


@pytest.mark.parametrize(
    ("title", "heading", "text", "expected"),
    [
        ("Returns", "", "Within 30 days.", "Returns\nWithin 30 days."),
        ("Returns", "Refunds > Cards", "Two weeks.", "Returns\nRefunds > Cards\nTwo weeks."),
        ("Returns", "Returns > Cards", "Two weeks.", "Returns > Cards\nTwo weeks."),
        ("Returns", "Returns", "Two weeks.", "Returns\nTwo weeks."),
        ("Returns", "", "Returns are free.", "Returns are free."),
        ("", "", "Only text.", "Only text."),
        ("", "Cards", "Two weeks.", "Cards\nTwo weeks."),
    ],
)
def test_title_and_heading_are_searched_once_with_the_text(
    title: str, heading: str, text: str, expected: str
) -> None:
    assert Passage("x:0", "a.md", title, heading, 0, text).searchable == expected
