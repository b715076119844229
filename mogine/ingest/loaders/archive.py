"""Office files are ZIP archives of XML: they are inflated and counted here before a parser sees them."""

import re
import zipfile
import zlib
from io import BytesIO

from mogine.errors import UnreadableDocument

MAX_ENTRIES = 2_000
MAX_INFLATED_BYTES = 100 * 1024**2
MAX_RATIO = 100
# Small parts may be mostly blanks; a ratio says something only about what is large.
RATIO_FLOOR_BYTES = 4 * 1024**2
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError)
_BLOCK_BYTES = 256 * 1024
# A document type is what entities, and so XML bombs, need; Office never writes one. Both byte widths.
_DTD = re.compile(b"|".join(rb"\x00?".join(b"%c" % c for c in mark) for mark in (b"<!DOCTYPE", b"<!ENTITY")))
_DTD_REACH = 32


def office_kind(data: bytes) -> str | None:
    """`docx`, `xlsx` or `pptx` by the parts of the archive; None for any other one."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = archive.NameToInfo
            if len(names) > MAX_ENTRIES:
                raise UnreadableDocument(f"is an archive of more than {MAX_ENTRIES} entries")
    except _DAMAGE as error:
        raise UnreadableDocument("is a damaged Office file or archive; save it again") from error
    for part, kind in (("word/", "docx"), ("xl/", "xlsx"), ("ppt/", "pptx")):
        if any(name.startswith(part) for name in names):
            return kind
    return None


def refuse_bombs(data: bytes) -> None:
    """Inflate every part once, counting; what the archive says of its own sizes is not believed."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_ENTRIES:
                raise UnreadableDocument(f"is an archive of more than {MAX_ENTRIES} entries")
            total = 0
            for info in infos:
                if info.flag_bits & 0x1:
                    raise UnreadableDocument("is protected by a password; save a copy without it")
                total = _inflate(archive, info, total, len(data))
    except _DAMAGE as error:
        raise UnreadableDocument(
            "is a damaged Office file; open it in its program and save it again"
        ) from error


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, total: int, packed: int) -> int:
    is_xml = info.filename.lower().endswith((".xml", ".rels", ".vml"))
    tail = b""
    with archive.open(info) as part:
        while block := part.read(_BLOCK_BYTES):
            total += len(block)
            if total > MAX_INFLATED_BYTES:
                raise UnreadableDocument(f"inflates to more than {MAX_INFLATED_BYTES // 1024**2} MiB")
            if total > RATIO_FLOOR_BYTES and total > packed * MAX_RATIO:
                raise UnreadableDocument(f"inflates to more than {MAX_RATIO} times its size")
            if is_xml and _DTD.search(tail + block):
                raise UnreadableDocument("holds a document type definition, which Office files never do")
            tail = block[-_DTD_REACH:]
    return total
