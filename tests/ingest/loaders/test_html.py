"""Web pages: their words with structure, without what stands around them."""

import pytest

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.html import load_html

PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>Returns - Example Ltd</title>
<link rel="canonical" href="https://example.com/returns">
<meta property="article:modified_time" content="2026-07-01T08:00:00Z">
<style>p { color: red }</style><script>alert("x")</script></head>
<body><header><nav><a href="/">Home</a> <a href="/shop">Shop</a></nav></header>
<main><h1>Returns</h1><p>Within <b>7 days</b>,<br>no questions.</p>
<h2>How to</h2><ul><li>Write to us<ul><li>by mail</li></ul></li><li>Send it back</li></ul>
<ol><li>one</li><li>two</li></ol>
<table><tr><th>Region</th><th>Days</th></tr>
<tr><td>China</td><td rowspan=2>3</td></tr><tr><td>Asia</td></tr></table>
<pre>line 1
  line 2</pre><p hidden>secret</p><p style="display: none">secret</p>
<img src="http://x.example/a.png" alt="a">
<details><summary>Who pays?</summary>You do.</details></main>
<footer>Copyright, all rights</footer></body></html>"""


def test_a_page_is_its_main_part_with_structure() -> None:
    assert load_html(PAGE.encode()).text == (
        "# Returns\n\nWithin 7 days,\nno questions.\n\n## How to\n\n- Write to us\n  - by mail\n"
        "- Send it back\n\n"
        "1. one\n2. two\n\n| Region | Days |\n| --- | --- |\n| China | 3 |\n| Asia | 3 |\n\n"
        "```\nline 1\n  line 2\n```\n\n###### Who pays?\n\nYou do."
    )


def test_the_head_gives_title_address_and_date() -> None:
    parsed = load_html(PAGE.encode())
    assert (parsed.title, parsed.url) == ("Returns", "https://example.com/returns")
    assert parsed.updated == "2026-07-01T08:00:00Z"


@pytest.mark.parametrize(
    ("title", "expected"), [("运费_某公司", "运费"), ("Fees | Example", "Fees"), ("A-B test", "A-B test")]
)
def test_the_site_is_taken_off_the_title(title: str, expected: str) -> None:
    assert load_html(f"<title>{title}</title><p>text".encode()).title == expected


def test_a_page_without_a_main_part_loses_only_what_stands_around() -> None:
    text = load_html(
        b"<body><nav>Menu</nav><div>Our shop opens at <i>nine</i>.</div>tail<aside>Advert</aside>"
        b"<footer>Imprint</footer></body>"
    ).text
    assert text == "Our shop opens at nine .\n\ntail".replace(" .", ".")


def test_a_page_that_is_all_navigation_is_kept() -> None:
    assert (
        "Products"
        in load_html(b"<body><nav><a>Products</a><a>About us and all our services</a></nav></body>").text
    )


def test_words_side_by_side_stay_apart_and_inline_words_stay_together() -> None:
    assert (
        load_html("<div>退</div><div>款</div><p>wa<b>rran</b>ty</p>".encode()).text == "退\n\n款\n\nwarranty"
    )


@pytest.mark.parametrize("declared", ["gb2312", "GBK", "gb18030"])
def test_encoding_that_a_page_declares(declared: str) -> None:
    page = f'<html><head><meta charset="{declared}"></head><body><p>退款政策：镕</p></body></html>'
    assert load_html(page.encode("gb18030")).text == "退款政策：镕"


def test_layout_tables_are_text_and_not_tables() -> None:
    text = load_html(b"<table><tr><td><h2>Left</h2></td><td><p>right</p></td></tr></table>").text
    assert text == "## Left\n\nright"


def test_merged_cells_cannot_fill_the_memory() -> None:
    rows = '<tr><td colspan="999999" rowspan="999999">x</td><td>y</td></tr>' * 20
    text = load_html(f"<table>{rows}</table>".encode()).text
    assert len(text) < 400_000


def test_words_that_look_like_markup_stay_words() -> None:
    assert load_html(b"<p># not a heading</p><p>---</p>").text == "\\# not a heading\n\n\\---"


def test_a_page_nested_beyond_reason_is_refused() -> None:
    with pytest.raises(UnreadableDocument, match="2,048 levels"):
        load_html(b"<div>" * 100_000 + "退款".encode())


def test_a_page_nested_deeper_than_python_recurses_is_read() -> None:
    assert (
        load_html(b"<div>" * 1_500 + "退款".encode() + b"</div>" * 1_500 + b"after").text == "退款\n\nafter"
    )


def test_entities_and_includes_fetch_and_expand_nothing() -> None:
    page = (
        '<!DOCTYPE html [<!ENTITY a "aaaa"><!ENTITY x SYSTEM "file:///etc/passwd">]>'
        '<p>&a;&x;</p><iframe src="http://127.0.0.1:9/"></iframe><object data="file:///etc/passwd"></object>'
    )
    read = load_html(page.encode())
    assert "root:" not in read.text
    assert "aaaa" not in read.text
    assert "]>" not in read.text + read.title
