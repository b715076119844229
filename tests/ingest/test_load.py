"""The kind of a document is what its bytes say; what cannot be read is refused in words that help."""

import pytest

from mogine.errors import TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest import load
from mogine.ingest.load import clean, digest_of, kind_of, parse, title_from_name
from tests.ingest.files import SENTENCE, docx, encrypted_office, pdf, pptx, xlsx, zipped

WORD = docx(("Normal", SENTENCE))


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.docx", WORD, "docx"),
        ("a.pdf", WORD, "docx"),
        ("a.doc", WORD, "docx"),
        ("a", xlsx({"a": [["x", "y"]]}), "xlsx"),
        ("a.zip", pptx(("a", "b", "")), "pptx"),
        ("a.txt", pdf([[("x", 9)]]), "pdf"),
        ("a.txt", b"<!DOCTYPE html><p>x", "html"),
        ("a.md", b"<html><p>x", "md"),
        ("a.csv", b"a,b", "csv"),
        ("README", b"text", "txt"),
        ("a.TXT", b"text", "txt"),
    ],
)
def test_kind_is_told_by_content_then_by_name(name: str, data: bytes, kind: str) -> None:
    assert kind_of(name, data) == kind


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("a.md", b"", UnreadableDocument, "is empty"),
        ("a.md", b" \n\t\x00", UnreadableDocument, "is empty"),
        ("a.md", b"***\n---\n", UnreadableDocument, "holds no text"),
        ("a.html", b"<html><script>x</script></html>", UnreadableDocument, "holds no text"),
        ("a.docx", docx(), UnreadableDocument, "holds no text"),
        ("a.docx", encrypted_office(), UnreadableDocument, "password"),
        ("a.doc", encrypted_office()[:500], UnsupportedMedia, "save it as DOCX"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), UnsupportedMedia, "save it as XLSX"),
        ("a.docx", WORD[:300], UnreadableDocument, "damaged"),
        ("a.docx", zipped({"word/document.xml": b"<w"}), UnreadableDocument, "damaged or no proper DOCX"),
        ("a.zip", zipped({"x.txt": b"x"}), UnsupportedMedia, "unpack"),
        ("a.pdf", b"%PDF-1.7 nothing follows", UnreadableDocument, "damaged"),
        ("a.pdf", bytes(range(256)), UnreadableDocument, "no PDF"),
        ("a.pdf", b"not found, said the server", UnreadableDocument, "no PDF"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), UnsupportedMedia, "md, txt"),
        ("a.rtf", b"{\\rtf1 x}", UnsupportedMedia, "save it as DOCX"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason_and_the_remedy(
    name: str, data: bytes, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse(name, data)


def test_files_beyond_the_limit_are_refused() -> None:
    with pytest.raises(TooLarge, match="64 MiB"):
        parse("a.txt", b"x" * (load.MAX_BYTES + 1))


def test_text_beyond_the_limit_is_refused() -> None:
    with pytest.raises(TooLarge, match="10,000,000 characters"):
        parse("a.txt", b"word " * 2_000_001)


def test_the_name_is_the_title_of_last_resort() -> None:
    assert parse("prices/price_list-2026.csv", b"a,b\n1,2").title == "price list 2026"
    assert title_from_name("_.md") == "untitled"


def test_text_is_cleaned_of_what_steers_terminals_and_ends_strings() -> None:
    assert clean("a\x00b\x1b[31mc\x9b\ud800\ufeff\r\nd\re\x85f\tg") == "ab[31mc\nd\ne\nf\tg"
    assert clean("e\u0301") == "é"


def test_digest_tells_contents_apart() -> None:
    assert digest_of(b"a") == digest_of(b"a") != digest_of(b"b")
