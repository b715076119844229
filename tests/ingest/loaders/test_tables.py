"""Tables keep their header row; questions keep their answers."""

import pytest

from mogine.ingest.chunk import chunk
from mogine.ingest.loaders.tables import load_csv, render_rows
from mogine.kb.passages import Document


def test_csv_becomes_a_table_with_its_header() -> None:
    assert load_csv("型号,价格\nS600,1999\n\nS800,2999\n".encode()).text == (
        "| 型号 | 价格 |\n| --- | --- |\n| S600 | 1999 |\n| S800 | 2999 |"
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_is_found(delimiter: str) -> None:
    text = "\n".join(delimiter.join(row) for row in [("a", "b", "c"), ("1, 2", "x; y", "z")])
    if delimiter in ",;":
        text = f'a{delimiter}b{delimiter}c\n"1, 2"{delimiter}"x; y"{delimiter}z'
    assert load_csv(text.encode()).text.endswith("| 1, 2 | x; y | z |")


def test_csv_in_gb18030_with_quoted_line_breaks() -> None:
    text = load_csv('名称,说明\n滤芯,"一年\n一换"\n'.encode("gb18030")).text
    assert text.endswith("| 滤芯 | 一年 一换 |")


def test_bars_within_cells_do_not_make_cells() -> None:
    assert render_rows([["a", "b"], ["x|y", "z"]]).endswith("| x\\|y | z |")


def test_empty_rows_and_columns_are_left_out_and_short_rows_filled() -> None:
    assert (
        render_rows([["", "", ""], ["a", "", "b"], ["1"], ["", "", ""]])
        == "| a | b |\n| --- | --- |\n| 1 |  |"
    )


@pytest.mark.parametrize(
    "header",
    [
        ("问题", "答案"),
        ("Question", "Answer"),
        ("Q:", "A:"),
        ("常见问题", "回答"),
        ("客户的问题", "回复内容"),
        ("Customer question", "Our reply"),
        ("问题描述", "问题回复"),
    ],
)
def test_question_and_answer_stand_together_with_their_column_names(header: tuple[str, str]) -> None:
    text = render_rows(
        [(*header, "类别"), ("怎么退款？", "联系客服。\n三天到账。", "售后"), ("运费？", "包邮", "")]
    )
    first, second = text.split("\n\n---\n\n")
    assert first == f"{header[0]}: 怎么退款？\n{header[1]}: 联系客服。\n三天到账。\n类别: 售后"
    assert second == f"{header[0]}: 运费？\n{header[1]}: 包邮"


@pytest.mark.parametrize(
    "header", [("问题分类", "回复时间"), ("question id", "answered by"), ("问题", "型号")]
)
def test_columns_about_questions_make_no_entries(header: tuple[str, str]) -> None:
    assert render_rows([header, ("1", "2")]).startswith("| ")


def test_a_long_answer_has_its_question_as_heading_and_the_next_entry_has_not() -> None:
    text = render_rows([("问题", "答案"), ("怎么退款？", "很长。" * 200), ("运费？", "包邮")])
    assert text.startswith("## 怎么退款？\n\n问题: 怎么退款？")
    assert "---\n\n##\n\n问题: 运费？" in text


def test_a_table_of_one_row_is_a_table() -> None:
    assert render_rows([("问题", "答案")]) == "| 问题 | 答案 |\n| --- | --- |"


def test_nothing_gives_nothing() -> None:
    assert render_rows([]) == "" == render_rows([["", " "]])


def test_large_file_after_a_small_one_is_read_as_well() -> None:
    """The csv module's limit for a cell belongs to the process, and one worker reads many files."""
    assert "a" in load_csv(b"a,b\n1,2").text
    long = "x" * 200_000
    assert long in load_csv(f"a,b\n{long},2".encode()).text


def test_an_entry_of_several_paragraphs_is_one_passage_where_it_fits() -> None:
    answer = "Open your orders.\n\nPress Refund.\n\n- say why\n- add a picture\n\n# Then\n\nWait three days."
    text = render_rows([("question", "answer"), ("How?", answer), ("What if not?", "Call us.")])
    first, second = chunk(Document("faq.csv", "faq", text, "digest"))
    assert first.text == f"question: How?\nanswer: {answer}"
    assert second.text == "question: What if not?\nanswer: Call us."
