"""Archives are counted while they are inflated; what they say of themselves is not believed."""

import random
import struct
import zipfile

import pytest

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders import archive
from mogine.ingest.loaders.archive import office_kind, refuse_bombs
from tests.ingest.files import docx, pptx, with_part, xlsx, zipped

WORD = docx(("Normal", "text"))


@pytest.mark.parametrize("data", [WORD, xlsx({"a": [[1, 2]]}), pptx(("a", "b", ""))])
def test_ordinary_files_pass(data: bytes) -> None:
    refuse_bombs(data)


def test_kind_is_told_by_the_parts() -> None:
    assert office_kind(WORD) == "docx"
    assert office_kind(xlsx({"a": [[1]]})) == "xlsx"
    assert office_kind(zipped({"a.txt": b"x"})) is None


def test_a_bomb_is_refused_by_its_ratio() -> None:
    """P35"""
    with pytest.raises(UnreadableDocument, match="100 times"):
        refuse_bombs(with_part(WORD, "word/media/a.bin", lambda _: bytes(50 * 1024**2)))


def test_a_bomb_that_lies_about_its_size_is_refused() -> None:
    """P35"""
    bomb = bytearray(zipped({"word/document.xml": bytes(30 * 1024**2)}))
    at = bomb.find(b"PK\x01\x02")
    struct.pack_into("<I", bomb, at + 24, 10)
    with pytest.raises(UnreadableDocument):
        refuse_bombs(bytes(bomb))


def test_too_much_text_is_refused_however_it_is_packed() -> None:
    noise = random.Random(1).randbytes(archive.MAX_INFLATED_BYTES // 100)
    with pytest.raises(UnreadableDocument, match="100 MiB"):
        refuse_bombs(zipped({f"word/{n}.bin": noise for n in range(101)}, zipfile.ZIP_STORED))


def test_too_many_entries_are_refused() -> None:
    """P35"""
    with pytest.raises(UnreadableDocument, match="2000 entries"):
        office_kind(zipped({f"word/{n}": b"" for n in range(2001)}))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_xml_entities_are_refused(encoding: str) -> None:
    """P35"""
    bomb = '<!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]><w>&lol2;</w>'
    with pytest.raises(UnreadableDocument, match="document type"):
        refuse_bombs(with_part(WORD, "word/document.xml", lambda _: bomb.encode(encoding)))


def test_damage_is_named() -> None:
    with pytest.raises(UnreadableDocument, match="damaged"):
        refuse_bombs(WORD[:-100])
    flipped = bytearray(WORD)
    flipped[200] ^= 0xFF
    with pytest.raises(UnreadableDocument, match="damaged"):
        refuse_bombs(bytes(flipped))
