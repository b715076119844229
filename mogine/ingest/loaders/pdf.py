"""PDF: lines joined to paragraphs, large type and bookmarks read as headings, running heads taken off."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.parsed import PAGE_END, Parsed, heading, join, one_line, plain, title_of

MAX_PAGES = 2_000
# A page with fewer characters than this, running heads apart, may be a picture; when the average page
# has hardly more than its number, the document is one of pictures.
FEW_CHARACTERS = 20
SCAN_CHARACTERS = 6
# What scanning programs write on every page.
_STAMP = re.compile("camscanner|扫描全能王|掃描全能王|adobe scan|夸克扫描王", re.IGNORECASE)
# A line of this share of the page's usual width ran on to the next one.
FULL_LINE_SHARE = 0.85
# One that also ends a sentence may just fill its line by chance: it must reach the very edge.
FULL_SENTENCE_SHARE = 0.97
HEADING_FACTOR = 1.15
HEADING_CHARS = 80
# Running heads are looked for in this many lines at either end of a page, and in a third of it at most.
EDGE_LINES = 2
_OCR = "make its text readable first, for example with `ocrmypdf IN.pdf OUT.pdf`"
_STARTS_ITEM = re.compile(
    r"\s*(?:[-•·●○■□▪◆*–]|[(（]?[0-9]{1,3}[.)、）．](?!\d)|[(（]?[一二三四五六七八九十]{1,3}[)、）．]|[①-⑳]|第[一二三四五六七八九十百0-9]+[章节条篇])"
)
_PASSWORD = re.compile("password", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    size: float

    @property
    def width(self) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in self.text)


def load_pdf(data: bytes) -> Parsed:
    """A PDF with text in it, Chinese without embedded fonts too. Passages know their page."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(BytesIO(data))
    except pypdfium2.PdfiumError as error:
        if _PASSWORD.search(str(error)):
            raise UnreadableDocument("is protected by a password; save a copy without it") from error
        raise UnreadableDocument("is damaged and cannot be opened as PDF; export it again") from error
    try:
        return _read(document)
    finally:
        document.close()


def _read(document: Any) -> Parsed:
    count = len(document)
    if count > MAX_PAGES:
        raise UnreadableDocument(f"has {count:,} pages, more than {MAX_PAGES:,}; split it")
    if count == 0:
        raise UnreadableDocument("has no pages")
    pages = _without_running_heads([_lines(document, number) for number in range(count)])
    empty = [number for number, lines in enumerate(pages, 1) if _characters(lines) < FEW_CHARACTERS]
    _refuse_scans(pages)
    marks = _bookmarks(document)
    body_size = _usual_size(pages)
    text = "".join(
        f"{_page(lines, body_size, marks.get(number, {}))}\n{PAGE_END}" for number, lines in enumerate(pages)
    )
    named = one_line(document.get_metadata_dict().get("Title", ""))
    start = _squeezed(text[:3000])
    return Parsed(
        text,
        title=named if named and _squeezed(named) in start else title_of(text),
        updated=_date(document.get_metadata_dict().get("ModDate", "")),
        notes=(f"pages without text (scanned?): {_ranges(empty)}",) if empty and len(empty) < count else (),
    )


def _lines(document: Any, number: int) -> list[_Line]:
    import pypdfium2

    try:
        page = document[number]
        text_page = page.get_textpage()
    except pypdfium2.PdfiumError as error:
        raise UnreadableDocument(f"is damaged at page {number + 1}; export it again") from error
    text = text_page.get_text_range()
    # Sizes are looked up by position, which only holds while the text has one character per glyph.
    is_aligned = len(text) == text_page.count_chars()
    lines: list[_Line] = []
    position = 0
    for raw in text.split("\n"):
        words = raw.strip()
        if words:
            at = position + len(raw) - len(raw.lstrip())
            size = pypdfium2.raw.FPDFText_GetFontSize(text_page, at) if is_aligned else 0.0
            lines.append(_Line(_clean(words), round(float(size), 1)))
        position += len(raw) + 1
    text_page.close()
    page.close()
    return [line for line in lines if line.text and not _STAMP.search(line.text)]


def _clean(words: str) -> str:
    # U+FFFE is how a hyphen that cut a word at the end of a line arrives, the line already joined.
    words = (
        re.sub("(?<=[^\\W\\d_])\ufffe(?=[^\\W\\d_])", "", words)
        .replace("\ufffe", "-")
        .replace("\u00ad", "")
        .replace("\u00a0", " ")
    )
    # Radicals (⽤) stand for the characters that they show.
    return re.sub("[\u2e80-\u2fdf]", lambda m: unicodedata.normalize("NFKC", m[0]), words).strip()


def _characters(lines: Sequence[_Line]) -> int:
    return sum(len("".join(line.text.split())) for line in lines)


def _refuse_scans(pages: Sequence[Sequence[_Line]]) -> None:
    total = sum(map(_characters, pages))
    if total == 0:
        raise UnreadableDocument(f"holds pictures of pages and no text (a scan); {_OCR}")
    if len(pages) > 1 and total < len(pages) * SCAN_CHARACTERS:
        raise UnreadableDocument(f"has hardly any text on its {len(pages)} pages (a scan?); {_OCR}")
    unreadable = sum(
        1
        for lines in pages
        for line in lines
        for c in line.text
        if unicodedata.category(c) in ("Co", "Cn", "Cc") or c == "\ufffd"
    )
    if unreadable > total * 0.3:
        raise UnreadableDocument(f"has fonts that do not tell which characters they show; {_OCR}")


def _bookmarks(document: Any) -> dict[int, dict[str, int]]:
    """Page (from 0) to the bookmarks on it: squeezed title to level."""
    marks: dict[int, dict[str, int]] = {}
    for entry in document.get_toc(max_depth=5):
        target = entry.get_dest()
        page = target.get_index() if target is not None else None
        if page is not None:
            marks.setdefault(page, {})[_squeezed(entry.get_title())] = entry.level + 1
    return marks


def _usual_size(pages: Sequence[Sequence[_Line]]) -> float:
    sizes: Counter[float] = Counter()
    for lines in pages:
        for line in lines:
            sizes[line.size] += len(line.text)
    return sizes.most_common(1)[0][0]


def _without_running_heads(pages: list[list[_Line]]) -> list[list[_Line]]:
    """Lines at the edges that stand on most pages, whatever the page number in them."""
    if len(pages) < 3:
        return pages
    seen: Counter[str] = Counter()
    for lines in pages:
        seen.update({_numberless(lines[index].text) for index in _edges(lines)})
    running = {text for text, count in seen.items() if count >= max(3, len(pages) * 0.6)}
    kept = []
    for lines in pages:
        dropped = {index for index in _edges(lines) if _numberless(lines[index].text) in running}
        kept.append([line for index, line in enumerate(lines) if index not in dropped])
    return kept


def _edges(lines: Sequence[_Line]) -> set[int]:
    count = min(EDGE_LINES, len(lines) // 3)
    return {*range(count), *range(len(lines) - count, len(lines))}


def _numberless(text: str) -> str:
    return re.sub(r"[0-9]+", "0", _squeezed(text))


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()


def _page(lines: Sequence[_Line], body_size: float, marks: dict[str, int]) -> str:
    blocks: list[str] = []
    paragraph = ""
    widths = sorted(line.width for line in lines)
    full = widths[int(len(widths) * 0.9)] * FULL_LINE_SHARE if widths else 0.0
    previous: _Line | None = None
    for line in lines:
        level = _level(line, body_size, marks)
        if level is not None:
            blocks += [plain(paragraph), heading(level, line.text)]
            paragraph, previous = "", None
        elif previous is not None and _runs_on(previous, line, full):
            paragraph = _joined(paragraph, line.text)
            previous = line
        else:
            is_same_list = previous is not None and _STARTS_ITEM.match(line.text)
            if is_same_list:
                paragraph = f"{paragraph}\n{line.text}"
            else:
                blocks.append(plain(paragraph))
                paragraph = line.text
            previous = line
    return join([*blocks, plain(paragraph)])


def _level(line: _Line, body_size: float, marks: dict[str, int]) -> int | None:
    if (level := marks.get(_squeezed(line.text))) is not None:
        return min(level, 6)
    is_large = body_size > 0 and line.size >= body_size * HEADING_FACTOR
    if not is_large or len(line.text) > HEADING_CHARS or line.text.endswith(tuple("。，,；;")):
        return None
    factor = line.size / body_size
    return 1 if factor >= 1.7 else 2 if factor >= 1.35 else 3


def _runs_on(previous: _Line, line: _Line, full: float) -> bool:
    """Whether `line` goes on with the sentence of the line above it."""
    if _STARTS_ITEM.match(line.text) or abs(previous.size - line.size) > 1:
        return False
    is_sentence = previous.text.endswith(tuple("。！？.!?;；：:"))
    return previous.width >= (full / FULL_LINE_SHARE * FULL_SENTENCE_SHARE if is_sentence else full)


def _joined(paragraph: str, text: str) -> str:
    if not paragraph:
        return text
    last, first = paragraph[-1], text[0]
    if last == "-" and len(paragraph) > 1 and paragraph[-2].isalpha() and first.islower():
        return paragraph[:-1] + text
    is_wide = unicodedata.east_asian_width(last) in "WF" or unicodedata.east_asian_width(first) in "WF"
    return paragraph + text if is_wide else f"{paragraph} {text}"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7", cut after some."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown[:20]) + (" ..." if len(shown) > 20 else "")


def _date(value: str) -> str:
    match = re.match(r"D:([0-9]{4})([0-9]{2})([0-9]{2})", value)
    return f"{match[1]}-{match[2]}-{match[3]}" if match else ""
