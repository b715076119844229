"""Markdown and plain text: titles, front matter, and nothing else taken away."""

import pytest

from mogine.ingest.loaders.text import load_markdown, load_text


def test_front_matter_gives_title_address_and_date_and_is_no_text() -> None:
    parsed = load_markdown(
        b'---\ntitle: "Refunds: how"\nurl: https://example.com/refunds # where\nupdated: 2026-07-01\n'
        b"tags: [a]\n---\n# Heading\n\nText.\n"
    )
    assert (parsed.title, parsed.url, parsed.updated) == (
        "Refunds: how",
        "https://example.com/refunds",
        "2026-07-01",
    )
    assert parsed.text.strip() == "# Heading\n\nText."


def test_front_matter_in_toml_is_read_too() -> None:
    parsed = load_markdown(b'+++\ntitle = "Shipping"\ndate = 2026-01-02\n+++\nText.\n')
    assert (parsed.title, parsed.updated, parsed.text) == ("Shipping", "2026-01-02", "Text.\n")


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "//evil.example/x", "https://a b"]
)
def test_an_address_that_is_no_link_to_a_page_is_dropped(url: str) -> None:
    assert load_markdown(f"---\nurl: {url}\n---\nText\n".encode()).url == ""


def test_a_rule_at_the_top_is_no_front_matter() -> None:
    assert "still text" in load_markdown(b"---\n\nstill text").text


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# Returns #\n\nText", "Returns"),
        ("intro first\n\n# Later heading\n", "Later heading"),
        ("**公司简介**\n\n我们是一家公司。", "公司简介"),
        ("This is a whole sentence.\n\nText", ""),
    ],
)
def test_title_of_markdown(text: str, title: str) -> None:
    assert load_markdown(text.encode()).title == title


def test_comments_go_and_pictures_leave_their_words() -> None:
    parsed = load_markdown("a <!-- not\nthis --> b ![售后流程图](x.png) c".encode())
    assert parsed.text == "a  b 售后流程图 c"


def test_short_first_line_is_the_title_of_plain_text() -> None:
    assert load_text("售后服务政策\r\n\r\n内容。".encode("gb18030")).title == "售后服务政策"
    assert load_text("本公司成立于二〇一四年，总部在苏州。".encode()).title == ""


def test_chapters_of_plain_text_are_headings_and_sentences_are_not() -> None:
    text = load_text("第一章 总则\n第三条很重要。\n第二节 退款\n内容".encode()).text
    assert text.count("## 第") == 2
    assert "## 第一章 总则" in text and "## 第二节 退款" in text


def test_form_feeds_of_a_text_file_are_no_pages() -> None:
    assert "\f" not in load_text(b"one\ftwo").text
