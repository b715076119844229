"""PDF: Chinese of any font, pages, paragraphs, and plain words where there is nothing to read."""

from pathlib import Path

import pytest

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.pdf import load_pdf
from tests.ingest.files import SENTENCE, pdf, pdf_with_embedded_font, scan

LINE = SENTENCE[:30]


def test_chinese_without_an_embedded_font_is_read() -> None:
    parsed = load_pdf(pdf([[("售后服务政策", 20), (SENTENCE, 11)]], title="untitled"))
    assert parsed.title == "售后服务政策"
    assert parsed.text == f"# 售后服务政策\n\n{SENTENCE}\n\f"


def test_chinese_of_an_embedded_font_is_read(tmp_path: Path) -> None:
    text = "退款政策：七天内可以无理由退货，运费由顾客承担。"
    assert text in load_pdf(pdf_with_embedded_font(text, tmp_path / "font.ttf")).text.replace("\n", "")


def test_lines_of_a_paragraph_are_joined_and_paragraphs_are_not() -> None:
    lines = [
        "自收到商品之日起七天内可以申请退款，运费由",
        "本公司承担，三个工作日内到账。",
        "第二段从这里开始，它也有两行那么长，直到这",
        "里结束。",
    ]
    text = load_pdf(pdf([[(line, 11) for line in lines]])).text
    assert text == f"{lines[0]}{lines[1]}\n\n{lines[2]}{lines[3]}\n\f"


def test_english_lines_are_joined_with_blanks_and_hyphens_taken_back() -> None:
    lines = [
        "You may return goods within seven days after the deliv-",
        "ery if they are unused and complete with their accessories",
        "and the receipt.",
    ]
    text = load_pdf(pdf([[(line, 11) for line in lines]])).text
    assert "after the delivery if they are unused" in text
    assert "accessories and the receipt." in text


def test_items_of_a_list_keep_their_lines() -> None:
    text = load_pdf(pdf([[("步骤如下", 11), ("1. 拨打电话", 11), ("2. 寄回商品", 11)]])).text
    assert "1. 拨打电话\n2. 寄回商品" in text


def test_running_heads_and_page_numbers_are_taken_off() -> None:
    pages = [
        [("某某公司员工手册", 11), (f"第{n}部分的内容，各页都不一样。{LINE}", 11), (f"第 {n} 页", 11)]
        for n in range(1, 6)
    ]
    text = load_pdf(pdf(pages)).text
    assert "员工手册" not in text and "页\n" not in text
    assert text.count("\f") == 5 and "第3部分的内容" in text


def test_a_scan_is_said_to_be_one() -> None:
    with pytest.raises(UnreadableDocument, match=r"a scan.*ocrmypdf"):
        load_pdf(scan())


@pytest.mark.parametrize("stamp", ["Scanned with CamScanner", "由 扫描全能王 扫描创建", "- {} -"])
@pytest.mark.parametrize("count", [2, 5])
def test_a_scan_with_stamps_or_numbers_on_its_pages_is_said_to_be_one(stamp: str, count: int) -> None:
    with pytest.raises(UnreadableDocument, match="scan"):
        load_pdf(pdf([[(stamp.format(n), 9)] for n in range(count)]))


def test_short_pages_are_no_scan() -> None:
    assert "400-000-0188" in load_pdf(pdf([[("联系我们", 20)], [("电话 400-000-0188", 20)]])).text


def test_pages_without_text_are_noted() -> None:
    parsed = load_pdf(pdf([[(SENTENCE, 11)], [], [(SENTENCE, 11)], [], []]))
    assert parsed.notes == ("pages without text (scanned?): 2, 4-5",)


def test_password_is_named() -> None:
    with pytest.raises(UnreadableDocument, match="protected by a password"):
        load_pdf(pdf([[(SENTENCE, 11)]], password="geheim"))


@pytest.mark.parametrize("cut", [20, 400, 2000])
def test_a_cut_pdf_is_refused_or_read_but_never_empty(cut: int) -> None:
    data = pdf([[(SENTENCE, 11)]] * 3)
    try:
        parsed = load_pdf(data[:cut])
    except UnreadableDocument as error:
        assert "damaged" in error.message or "scan" in error.message or "no pages" in error.message
    else:
        assert SENTENCE in parsed.text


def test_too_many_pages_are_refused() -> None:
    """P35"""
    with pytest.raises(UnreadableDocument, match="2,001 pages"):
        load_pdf(pdf([[("x", 8)]] * 2001))
