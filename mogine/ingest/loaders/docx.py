"""Word documents: paragraphs, headings, lists and tables in their order."""

import re
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from mogine.ingest.loaders.archive import refuse_bombs
from mogine.ingest.loaders.parsed import Parsed, heading, join, one_line, plain, title_of
from mogine.ingest.loaders.tables import render_rows

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_NOT_TEXT = frozenset({f"{_W}del", f"{_W}moveFrom", f"{_W}txbxContent", f"{_MC}Fallback", f"{_W}instrText"})
_HEADING_STYLE = re.compile(r"(?:heading|标题|標題)\s*([1-9])$", re.IGNORECASE)
_NO_LEVEL = "9"


def load_docx(data: bytes) -> Parsed:
    """A DOCX file. Headers, footers and comments are left out, deleted text too."""
    from docx import Document

    refuse_bombs(data)
    document = Document(BytesIO(data))
    levels = _Levels(document)
    blocks: list[str] = []
    title = ""
    in_list = False
    for element in _body(document.element.body):
        if element.tag == f"{_W}tbl":
            blocks.append(render_rows(_rows(element), level=6))
            in_list = False
            continue
        text = _text(element)
        is_item = levels.is_item(element)
        level = levels.of(element) if text.strip() else None
        if level == 0:
            title = title or one_line(text)
            blocks.append(heading(1, text))
        elif level is not None:
            blocks.append(heading(level, text))
        elif is_item and text.strip():
            line = plain("- " + one_line(text))
            blocks[-1:] = [f"{blocks[-1]}\n{line}"] if in_list else [*blocks[-1:], line]
        elif text.strip():
            blocks.append(plain(text.strip()))
        in_list = is_item and level is None and (in_list or bool(text.strip()))
        blocks.extend(_boxes(element))
    content = join(blocks)
    return Parsed(
        content, title=title or _named(document, content) or title_of(content), updated=_changed(document)
    )


class _Levels:
    """What a paragraph is, by its style or its own marks: a heading of a level (0: the title) or an item."""

    def __init__(self, document: Any) -> None:
        self._by_style: dict[str, int | None] = {}
        self._list_styles: set[str] = set()
        for style in document.styles.element.findall(f"{_W}style"):
            id = style.get(f"{_W}styleId", "")
            name = style.find(f"{_W}name")
            self._by_style[id] = _style_level(name.get(f"{_W}val", "") if name is not None else "", style)
            if style.find(f"{_W}pPr/{_W}numPr") is not None:
                self._list_styles.add(id)

    def of(self, paragraph: Any) -> int | None:
        properties = paragraph.find(f"{_W}pPr")
        if properties is None:
            return None
        own = _outline(properties)
        if own is not None:
            return own
        return self._by_style.get(_style_of(properties))

    def is_item(self, paragraph: Any) -> bool:
        """Whether a paragraph is numbered or bulleted, by itself or by its style."""
        properties = paragraph.find(f"{_W}pPr")
        if properties is None:
            return False
        return properties.find(f"{_W}numPr") is not None or _style_of(properties) in self._list_styles


def _style_of(properties: Any) -> str:
    style = properties.find(f"{_W}pStyle")
    return style.get(f"{_W}val", "") if style is not None else ""


def _style_level(name: str, style: Any) -> int | None:
    if name.lower() in ("title", "标题", "標題"):
        return 0
    if match := _HEADING_STYLE.match(name):
        return min(int(match[1]), 6)
    properties = style.find(f"{_W}pPr")
    return _outline(properties) if properties is not None else None


def _outline(properties: Any) -> int | None:
    outline = properties.find(f"{_W}outlineLvl")
    value = outline.get(f"{_W}val", _NO_LEVEL) if outline is not None else _NO_LEVEL
    return int(value) + 1 if value in "012345" and value else None


def _body(container: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, also those within content controls."""
    stack = [iter(container)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
        elif element.tag in (f"{_W}p", f"{_W}tbl"):
            yield element
        elif element.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}customXml", f"{_W}smartTag"):
            stack.append(iter(element))


def _text(paragraph: Any) -> str:
    """The words of one paragraph without those of its text boxes."""
    pieces: list[str] = []
    stack = [iter(paragraph)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
        elif element.tag in _NOT_TEXT:
            continue
        elif element.tag == f"{_W}t":
            pieces.append(element.text or "")
        elif element.tag == f"{_W}tab":
            pieces.append(" ")
        elif element.tag in (f"{_W}br", f"{_W}cr"):
            pieces.append("\n")
        elif element.tag == f"{_W}noBreakHyphen":
            pieces.append("-")
        elif element.tag != f"{_W}pPr":
            stack.append(iter(element))
    return "".join(pieces)


def _boxes(paragraph: Any) -> list[str]:
    """The text boxes hanging on a paragraph; Word writes each twice, the second for old programs."""
    boxes = (
        box
        for box in paragraph.iter(f"{_W}txbxContent")
        if next(box.iterancestors(f"{_MC}Fallback"), None) is None
    )
    return [
        plain(text) for box in boxes if (text := "\n".join(filter(str.strip, map(_text, box.iter(f"{_W}p")))))
    ]


def _rows(table: Any) -> list[list[str]]:
    """Cells of a table; one that spans columns or rows is repeated in each of them."""
    rows: list[list[str]] = []
    for row in table.findall(f"{_W}tr"):
        cells: list[str] = []
        for cell in row.iter(f"{_W}tc"):
            if next(cell.iterancestors(f"{_W}tr")) is not row:
                continue
            properties = cell.find(f"{_W}tcPr")
            text = "\n".join(filter(str.strip, map(_text, cell.iter(f"{_W}p"))))
            if _goes_on(properties) and rows and len(cells) < len(rows[-1]):
                text = rows[-1][len(cells)]
            cells.extend([text] * _width(properties))
        rows.append(cells)
    return rows


def _goes_on(properties: Any) -> bool:
    """Whether a cell only continues the one above it."""
    merge = properties.find(f"{_W}vMerge") if properties is not None else None
    return merge is not None and merge.get(f"{_W}val", "continue") == "continue"


def _width(properties: Any) -> int:
    span = properties.find(f"{_W}gridSpan") if properties is not None else None
    value = span.get(f"{_W}val", "1") if span is not None else "1"
    return min(max(int(value), 1), 50) if re.fullmatch(r"[0-9]{1,4}", value) else 1


def _named(document: Any, content: str) -> str:
    """The title in the file's properties, where the document itself says it too: templates leave theirs."""
    title = one_line(document.core_properties.title or "")
    return title if title and title in content[:2000] else ""


def _changed(document: Any) -> str:
    modified = document.core_properties.modified
    return modified.date().isoformat() if modified is not None else ""
