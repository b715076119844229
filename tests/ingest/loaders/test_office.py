"""Word, Excel and PowerPoint files."""

import datetime

import openpyxl
from docx import Document

from mogine.ingest.loaders.docx import load_docx
from mogine.ingest.loaders.pptx import load_pptx
from mogine.ingest.loaders.xlsx import load_xlsx
from tests.ingest.files import docx, pptx, saved, with_part, xlsx

WORD = "word/document.xml"


def test_word_file_keeps_order_headings_lists_and_tables() -> None:
    parsed = load_docx(
        docx(
            ("Title", "保修政策"),
            ("Normal", "适用于所有产品。"),
            ("Heading 1", "保修期"),
            ("List Bullet", "整机两年"),
            ("List Bullet", "水泵五年"),
            [["型号", "年"], ["S600", "2"]],
            ("Heading 2", "例外"),
            ("Normal", "# 人为损坏"),
        )
    )
    assert parsed.title == "保修政策"
    assert parsed.text == (
        "# 保修政策\n\n适用于所有产品。\n\n# 保修期\n\n- 整机两年\n- 水泵五年\n\n"
        "| 型号 | 年 |\n| --- | --- |\n| S600 | 2 |\n\n## 例外\n\n\\# 人为损坏"
    )


def test_localised_heading_style_and_outline_level_count() -> None:
    def relabel(xml: bytes) -> bytes:
        return xml.replace(b'w:val="heading 1"', 'w:val="标题 1"'.encode())

    assert load_docx(with_part(docx(("Heading 1", "总则")), "word/styles.xml", relabel)).text == "# 总则"

    def outline(xml: bytes) -> bytes:
        return xml.replace(b"<w:p><w:r>", b'<w:p><w:pPr><w:outlineLvl w:val="1"/></w:pPr><w:r>')

    assert load_docx(with_part(docx(("Normal", "附则")), WORD, outline)).text in ("## 附则", "附则")


def test_text_in_content_controls_and_links_counts_and_deleted_text_does_not() -> None:
    def change(xml: bytes) -> bytes:
        head, _, tail = xml.partition(b"<w:sectPr")
        added = (
            "<w:sdt><w:sdtContent><w:p><w:r><w:t>控件里的字</w:t></w:r></w:p></w:sdtContent></w:sdt>"
            "<w:p><w:hyperlink><w:r><w:t>链接</w:t></w:r></w:hyperlink>"
            "<w:del><w:r><w:delText>删掉</w:delText><w:t>删掉</w:t></w:r></w:del>"
            "<w:ins><w:r><w:t>加上</w:t><w:tab/><w:t>的</w:t></w:r></w:ins></w:p>"
        )
        return head + added.encode() + b"<w:sectPr" + tail

    text = load_docx(with_part(docx(("Normal", "开头")), WORD, change)).text
    assert text == "开头\n\n控件里的字\n\n链接加上 的"


def test_merged_cells_of_word_are_repeated() -> None:
    document = Document()
    table = document.add_table(rows=3, cols=2)
    for row, texts in zip(table.rows, [("a", "b"), ("x", "1"), ("", "2")], strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text
    table.cell(1, 0).merge(table.cell(2, 0))
    assert load_docx(saved(document.save)).text.endswith("| x | 1 |\n| x | 2 |")


def test_sheets_are_tables_under_their_names() -> None:
    text = load_xlsx(
        xlsx({"产品": [["型号", "价格"], ["S600", 1999]], "空": [], "Sheet3": [["a", "b"], [1, 2]]})
    ).text
    assert text == (
        "## 产品\n\n| 型号 | 价格 |\n| --- | --- |\n| S600 | 1999 |\n\n"
        "## Sheet3\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"
    )


def test_numbers_are_shown_as_a_person_sees_them() -> None:
    rows: list[list[object]] = [
        ["什么", "值"],
        ["折扣", 0.15],
        ["价", 1999.5],
        ["日", datetime.datetime(2026, 7, 1)],
        ["是", True],
        ["小", 0.1 + 0.2],
    ]
    text = load_xlsx(xlsx({"Sheet1": rows}, {"B2": "0%", "B3": "#,##0.00"})).text
    assert [line.split(" | ")[1].rstrip(" |") for line in text.splitlines()[2:]] == [
        "15%",
        "1999.50",
        "2026-07-01",
        "TRUE",
        "0.3",
    ]


def test_faq_sheet_is_entries() -> None:
    assert (
        load_xlsx(xlsx({"Sheet1": [["问题", "答案"], ["运费？", "包邮"]]})).text == "问题: 运费？\n答案: 包邮"
    )


def test_hidden_sheets_stay_hidden() -> None:
    book = openpyxl.Workbook()
    book.active.append(["seen", "1"])
    hidden = book.create_sheet("secret")
    hidden.append(["cost price", "1"])
    hidden.sheet_state = "hidden"
    assert "cost price" not in load_xlsx(saved(book.save)).text


def test_a_sheet_that_states_a_million_rows_is_read_by_what_it_has() -> None:
    def lie(xml: bytes) -> bytes:
        return xml.replace(b'ref="A1:B2"', b'ref="A1:XFD1048576"')

    data = with_part(xlsx({"Sheet1": [["a", "b"], [1, 2]]}), "xl/worksheets/sheet1.xml", lie)
    assert load_xlsx(data).text == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_slides_are_pages_with_headings_and_notes() -> None:
    parsed = load_pptx(
        pptx(("公司介绍", "成立于 2014 年\n总部在苏州", "口头说明"), ("", "没有标题的一页", ""))
    )
    assert parsed.text == (
        "## 公司介绍\n\n成立于 2014 年\n总部在苏州\n\n口头说明\n\f##\n\n没有标题的一页\n\f"
    )
    assert parsed.title == "公司介绍"


def test_slides_without_words_give_nothing() -> None:
    assert load_pptx(pptx(("", "", ""))).text == ""
