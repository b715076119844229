"""Text is read in whatever encoding it was saved, also when there is little of it."""

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.encoding import decode

CHINESE = "退款政策：自签收之日起七天内可以无理由退货，运费由顾客承担。"
TRADITIONAL = "退款政策：自簽收之日起七天內可以無理由退貨，運費由顧客承擔。請聯絡我們的客服人員。"
MIXED = "Refund policy 退款政策\nS600 台下式净水器，售价 1,999 元。\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"]
)
@pytest.mark.parametrize("text", [MIXED, "a line\nof ASCII\n"])
def test_text_is_read_in_any_usual_encoding(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_utf16_with_a_mark_needs_no_ascii_in_it(mark: str) -> None:
    bom = codecs.BOM_UTF16_LE if mark == "utf-16-le" else codecs.BOM_UTF16_BE
    assert decode(bom + "退款".encode(mark)) == "退款"


@pytest.mark.parametrize("text", ["退款", "运费", "你好。", "价格：99元", "退款政策 refund", CHINESE])
def test_short_gb18030_is_told_from_western_text(text: str) -> None:
    assert decode(text.encode("gb18030")) == text


@pytest.mark.parametrize("text", ["café", "Grüße aus Köln, naïve Übung", "Señor Muñoz pagó 5 £"])
def test_western_text_is_not_taken_for_chinese(text: str) -> None:
    assert decode(text.encode("latin-1")) == text


def test_big5_is_told_from_gb18030() -> None:
    assert decode(TRADITIONAL.encode("big5")) == TRADITIONAL


def test_utf8_cut_within_a_character_is_still_utf8() -> None:
    data = (CHINESE * 20).encode()[:-1]
    assert decode(data).startswith(CHINESE)
    assert "\ufffd" in decode(data)[-2:]


def test_what_a_document_says_of_itself_is_tried() -> None:
    text = "Оплата картой и возврат товара"
    assert decode(text.encode("koi8-r"), "koi8-r") == text


@pytest.mark.parametrize(
    "data", [bytes(range(256)) * 4, b"\x7fELF\x02\x01\x01" + bytes(100), b"\x89PNG\r\n\x1a\n\x00\x01"]
)
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableDocument, match="no text"):
        decode(data)


@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1))
def test_utf8_chinese_is_never_taken_for_anything_else(text: str) -> None:
    assert decode(text.encode()) == text


@given(st.binary())
def test_any_bytes_give_text_or_are_refused(data: bytes) -> None:
    try:
        assert isinstance(decode(data), str)
    except UnreadableDocument as error:
        assert "UTF-8" in error.message
