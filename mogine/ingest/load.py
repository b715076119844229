"""One document's bytes to a Document: what kind it is, which loader reads it, what is said when none can."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from mogine.errors import MogineError, TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest.loaders.archive import office_kind
from mogine.ingest.loaders.docx import load_docx
from mogine.ingest.loaders.encoding import is_binary
from mogine.ingest.loaders.html import load_html
from mogine.ingest.loaders.parsed import Parsed, one_line
from mogine.ingest.loaders.pdf import load_pdf
from mogine.ingest.loaders.pptx import load_pptx
from mogine.ingest.loaders.tables import load_csv
from mogine.ingest.loaders.text import load_markdown, load_text
from mogine.ingest.loaders.xlsx import load_xlsx

LOADERS: Mapping[str, Callable[[bytes], Parsed]] = {
    "md": load_markdown,
    "txt": load_text,
    "html": load_html,
    "csv": load_csv,
    "pdf": load_pdf,
    "docx": load_docx,
    "xlsx": load_xlsx,
    "pptx": load_pptx,
}

SUFFIXES: Mapping[str, str] = {
    ".md": "md",
    ".markdown": "md",
    ".txt": "txt",
    ".text": "txt",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".csv": "csv",
    ".tsv": "csv",
    ".pdf": "pdf",
    ".docx": "docx",
    ".docm": "docx",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".pptx": "pptx",
    ".pptm": "pptx",
}

MAX_BYTES = 64 * 1024**2
MAX_TEXT_CHARS = 10_000_000
_TEXT_KINDS = frozenset({"md", "txt", "html", "csv"})
_OLD_OFFICE = {".doc": "DOCX", ".xls": "XLSX", ".ppt": "PPTX", ".dot": "DOCX", ".wps": "DOCX", ".et": "XLSX"}
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")
_LOOKS_LIKE_HTML = re.compile(
    rb"\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--.{0,500}?-->\s*)?<(?:!doctype html|html)[\s>]", re.I | re.S
)
# Characters that no text needs: C0 but TAB, LF and FF, DEL, C1, lone surrogates, marks of byte order.
_UNWANTED = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")


# Part of every digest: raised when loaders or chunking give other passages, so that all is taken in anew.
_VERSION = b"mogine 3\x00"


def digest_of(data: bytes) -> str:
    """What tells whether a document has to be taken in again."""
    return hashlib.sha256(_VERSION + data).hexdigest()


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case; "" when it has none."""
    return PurePosixPath(name).suffix.lower()


def parse(name: str, data: bytes) -> Parsed:
    """The text of a document. `name` is data: it helps to tell the kind and gives a title of last resort.

    Raises UnreadableDocument, UnsupportedMedia or TooLarge; messages are said of the document and do not
    repeat its name ("is empty").
    """
    if not data.strip(b"\x00 \t\r\n"):
        raise UnreadableDocument("is empty")
    if len(data) > MAX_BYTES:
        raise TooLarge(f"is larger than {MAX_BYTES // 1024**2} MiB; split it")
    kind = kind_of(name, data)
    try:
        parsed = LOADERS[kind](data)
    except (MogineError, MemoryError):
        raise
    except Exception as error:
        # Parsers raise whatever a broken file makes them stumble over; all of it means the same to a person.
        raise UnreadableDocument(
            f"is damaged or no proper {kind.upper()} ({type(error).__name__}); save it again"
        ) from error
    text = clean(parsed.text)
    if not re.search(r"\w", text):
        raise UnreadableDocument("holds no text")
    if len(text) > MAX_TEXT_CHARS:
        raise TooLarge(f"holds more than {MAX_TEXT_CHARS:,} characters of text; split it")
    title = one_line(clean(parsed.title))[:200] or title_from_name(name)
    return Parsed(text, title, clean(parsed.url), one_line(clean(parsed.updated)), parsed.notes)


def kind_of(name: str, data: bytes) -> str:
    """The kind by what the bytes are, and by the name only where the bytes are text of any kind."""
    suffix = suffix_of(name)
    if b"%PDF-" in data[:1024]:
        return "pdf"
    if data.startswith(_OLE):
        raise _refused_ole(suffix, data)
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind = office_kind(data)
        if kind is None:
            raise UnsupportedMedia("is an archive; unpack it and ingest the folder")
        return kind
    if data.startswith(b"{\\rtf"):
        raise UnsupportedMedia("is RTF, which is not read; save it as DOCX")
    named = SUFFIXES.get(suffix, "")
    if is_binary(data):
        raise _refused_bytes(suffix, named)
    if named and named not in _TEXT_KINDS:
        raise UnreadableDocument(f"is named {suffix} but its bytes are no {named.upper()}; save it again")
    if _LOOKS_LIKE_HTML.match(data[:2048]) and named != "md":
        return "html"
    return named or "txt"


def kinds() -> str:
    """The kinds in words."""
    return ", ".join(LOADERS)


def unread_suffix(suffix: str) -> str:
    """Why files of this suffix are not read, and what to do."""
    if newer := _OLD_OFFICE.get(suffix):
        return f"is an old Office file ({suffix}); save it as {newer}"
    return f"is of a kind that is not read ({suffix or 'no suffix'}); there are {kinds()}"


def clean(text: str) -> str:
    """One kind of line end, composed characters, and nothing that steers a terminal or ends a C string."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x85", "\n")
    return unicodedata.normalize("NFC", _UNWANTED.sub("", text))


def title_from_name(name: str) -> str:
    """`price_list-2026.xlsx` as "price list 2026"."""
    stem = PurePosixPath(name).stem
    return one_line(clean(re.sub(r"[_]+|(?<=\w)-(?=\w)", " ", stem)))[:200] or "untitled"


def _refused_bytes(suffix: str, named: str) -> MogineError:
    if not named:
        return UnsupportedMedia(f"is no document that is read here; there are {kinds()}")
    if named in _TEXT_KINDS:
        return UnsupportedMedia(
            f"is named {suffix} but holds bytes that no text has; save it as UTF-8 text or as PDF"
        )
    return UnreadableDocument(f"is damaged: its bytes are no {named.upper()}; save it again")


def _refused_ole(suffix: str, data: bytes) -> MogineError:
    if _ENCRYPTED_PACKAGE in data:
        return UnreadableDocument("is protected by a password; save a copy without it")
    return UnsupportedMedia(unread_suffix(suffix if suffix in _OLD_OFFICE else ".doc"))
