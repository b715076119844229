"""HTML to Markdown-like text: the words of the page without its navigation; nothing is ever fetched."""

import re
from collections.abc import Iterator
from typing import Any

from mogine.errors import UnreadableDocument
from mogine.ingest.loaders.encoding import decode
from mogine.ingest.loaders.parsed import (
    PAGE_END,
    Parsed,
    heading,
    join,
    one_line,
    plain,
    title_of,
    web_address,
)
from mogine.ingest.loaders.tables import render_table

_DROPPED = frozenset(
    str.split(
        "script style noscript template iframe object embed svg math canvas audio video map head "
        "select button input textarea datalist dialog"
    )
)
_AROUND = frozenset(["nav", "footer", "aside", "menu"])
_AROUND_ROLES = frozenset(
    ["navigation", "contentinfo", "banner", "search", "complementary", "menu", "menubar"]
)
_BLOCKS = frozenset(
    str.split(
        "address article blockquote body center dd details dialog div dl dt fieldset figcaption figure "
        "footer form header hgroup hr html legend li main nav ol p pre section summary table tbody td tfoot "
        "th thead tr ul"
    )
)
_HEADINGS = {f"h{n}": n for n in range(1, 7)}
# Deeper than any heading of the page, so that every entry of an accordion is a section of its own.
_SUMMARY_LEVEL = 6
_MAX_SPAN = 50
_MAX_TABLE_CELLS = 200_000
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_-]{2,40})", re.I)
# A document type with declarations of its own; no browser reads them, and lxml takes their end for words.
_DECLARATIONS = re.compile(r"(<!DOCTYPE[^>\[]{0,1000})\[[^\]]{0,100000}\]\s*>", re.I)
# Of a page's words, the share that must be left when everything around the content is taken off.
_CONTENT_SHARE = 0.2


def load_html(data: bytes) -> Parsed:
    """A web page saved as a file. Title, canonical address and date of change are taken from its head."""
    declared = _DECLARED.search(data[:4096])
    text = decode(data, declared[1].decode("ascii") if declared else "")
    root = _tree(_DECLARATIONS.sub(r"\1>", text, count=1))
    head = _Head(root)
    for element in list(root.iter(*_DROPPED)):
        _remove(element)
    body = root.find("body")
    content = _render(_content(body if body is not None else root))
    return Parsed(
        content,
        title=_title(root, head) or title_of(content),
        url=head.url,
        updated=head.updated,
    )


def _tree(text: str) -> Any:
    from lxml import etree

    # huge_tree moves libxml2's limit of depth from 256 to 2,048; what is deeper is refused below.
    parser = etree.HTMLParser(
        encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True, huge_tree=True
    )
    data = text.replace("\x00", "").replace(PAGE_END, "\n").encode("utf-8", "replace")
    root = etree.fromstring(data or b"<html/>", parser)
    if any("depth" in entry.message.lower() for entry in parser.error_log):
        raise UnreadableDocument(
            "nests its elements deeper than 2,048 levels; no browser would show it either"
        )
    if root is None:
        raise UnreadableDocument("holds no text")
    return root


class _Head:
    """What the head of a page says of it."""

    def __init__(self, root: Any) -> None:
        metas = {
            (meta.get("property") or meta.get("name") or "").lower(): (meta.get("content") or "").strip()
            for meta in root.iter("meta")
        }
        links = {(link.get("rel") or "").lower(): link.get("href") or "" for link in root.iter("link")}
        title = root.find(".//title")
        own = one_line("".join(title.itertext())) if title is not None else ""
        self.title: str = metas.get("og:title") or own
        self.url = web_address(links.get("canonical", "")) or web_address(metas.get("og:url", ""))
        self.updated = (metas.get("article:modified_time") or metas.get("last-modified") or "")[:40]


def _title(root: Any, head: _Head) -> str:
    tops = [text for node in root.iter("h1") if (text := one_line("".join(node.itertext())))]
    if len(tops) == 1 and len(tops[0]) <= 100:
        return tops[0]
    # "Returns - Example Ltd" and "Returns | Example Ltd": the site's name is the same on every page.
    return re.split(r"\s+[|–—-]\s+|[|_]", head.title)[0].strip() or head.title


def _remove(element: Any) -> None:
    """Take an element out, leaving the text behind it (lxml hangs that on the element itself)."""
    parent = element.getparent()
    if parent is None:
        return
    if element.tail:
        previous = element.getprevious()
        if previous is not None:
            previous.tail = (previous.tail or "") + " " + element.tail
        else:
            parent.text = (parent.text or "") + " " + element.tail
    parent.remove(element)


def _content(body: Any) -> Any:
    """The part of a page that is about something; the whole body where taking off would take too much."""
    whole = _words(body)
    mains = [node for node in body.iter("main", "article") if not _inside(node, ("main", "article"))]
    mains += [
        node for node in body.iter() if node.get("role") == "main" and node.tag not in ("main", "article")
    ]
    if len(mains) == 1 and _words(mains[0]) >= whole * _CONTENT_SHARE:
        return mains[0]
    around = {node for node in body.iter() if _is_around(node)}
    left = whole - sum(_words(node) for node in around if around.isdisjoint(node.iterancestors()))
    if left >= whole * _CONTENT_SHARE:
        for node in around:
            _remove(node)
    return body


def _is_around(node: Any) -> bool:
    if node.tag in _AROUND or (node.get("role") or "").lower() in _AROUND_ROLES:
        return True
    return node.tag == "header" and not _inside(node, ("article", "main")) and node.find(".//h1") is None


def _inside(node: Any, tags: tuple[str, ...]) -> bool:
    return next(node.iterancestors(*tags), None) is not None


def _words(node: Any) -> int:
    return sum(len(piece.strip()) for piece in node.itertext())


def _is_hidden(node: Any) -> bool:
    style = (node.get("style") or "").replace(" ", "").lower()
    return node.get("hidden") is not None or "display:none" in style


class _Writer:
    """Takes words and breaks, gives blocks. Lists are one block of lines."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._words: list[str] = []
        self._lines: list[str] = []
        self.marks: list[str] = []

    def text(self, words: str | None) -> None:
        if words:
            self._words.append(words)

    def line(self) -> None:
        """End a line; inside a list the lines stay together."""
        lines = [one_line(part) for part in "".join(self._words).split("\n\x00")]
        self._words.clear()
        for words in filter(None, lines):
            mark = self.marks[-1] if self.marks else ""
            self._lines.append(mark + words)
            if self.marks:
                self.marks[-1] = " " * (len(mark) - len(mark.lstrip()) + 2)

    def end(self) -> None:
        """End a block."""
        self.line()
        if self._lines:
            self.blocks.append(plain("\n".join(self._lines)))
            self._lines.clear()

    def break_line(self) -> None:
        self._words.append("\n\x00")

    def block(self, text: str) -> None:
        self.end()
        if text.strip():
            self.blocks.append(text)


def _render(root: Any) -> str:
    """One pass over the tree by events: depth costs no recursion."""
    from lxml import etree

    writer = _Writer()
    lists: list[list[int]] = []
    skipped: Any = None
    for event, node in etree.iterwalk(root, events=("start", "end")):
        if skipped is not None:
            if event == "end" and node is skipped:
                skipped = None
                if node is not root:
                    writer.text(node.tail)
            continue
        if not isinstance(node.tag, str):
            continue
        if event == "start":
            if _is_hidden(node) or _takes_whole(writer, node):
                skipped = node
                continue
            _start(writer, node, lists)
            writer.text(node.text)
        else:
            _end(writer, node, lists)
            if node is not root:
                writer.text(node.tail)
    writer.end()
    return join(writer.blocks)


def _takes_whole(writer: _Writer, node: Any) -> bool:
    """Headings, preformatted text and tables of data are written at once; True when this was one."""
    words = "".join(node.itertext()) if node.tag in (*_HEADINGS, "summary", "pre") else ""
    if node.tag in _HEADINGS or node.tag == "summary":
        writer.block(heading(_HEADINGS.get(node.tag, _SUMMARY_LEVEL), words) if words.strip() else "")
    elif node.tag == "pre":
        writer.block("```\n" + words.strip("\n").replace("```", "'''") + "\n```" if words.strip() else "")
    elif node.tag == "table" and (rows := _data_rows(node)):
        writer.block(render_table(rows))
    else:
        return False
    return True


def _start(writer: _Writer, node: Any, lists: list[list[int]]) -> None:
    if node.tag in ("ul", "ol"):
        if lists:
            writer.line()
        else:
            writer.end()
        lists.append([0] if node.tag == "ol" else [])
    elif node.tag == "li":
        writer.line()
        writer.marks.append("  " * max(0, len(lists) - 1) + _mark(lists))
    elif node.tag == "br":
        writer.break_line()
    elif node.tag in _BLOCKS:
        _break(writer, lists)


def _mark(lists: list[list[int]]) -> str:
    if not lists or not lists[-1]:
        return "- "
    lists[-1][0] += 1
    return f"{lists[-1][0]}. "


def _end(writer: _Writer, node: Any, lists: list[list[int]]) -> None:
    if node.tag in ("ul", "ol"):
        writer.line()
        if lists:
            lists.pop()
        if not lists:
            writer.end()
    elif node.tag == "li":
        writer.line()
        if writer.marks:
            writer.marks.pop()
    elif node.tag in _BLOCKS:
        _break(writer, lists)


def _break(writer: _Writer, lists: list[list[int]]) -> None:
    if lists:
        writer.line()
    else:
        writer.end()


def _data_rows(table: Any) -> list[list[str]]:
    """The cells of a table of data, merged cells repeated; [] for a table that only lays out a page."""
    if next(table.iterdescendants("table", *_HEADINGS), None) is not None:
        return []
    grid: list[list[str]] = []
    hanging: dict[int, tuple[str, int]] = {}
    count = 0
    for row in table.iter("tr"):
        cells: list[str] = []
        for cell in _cells(row):
            _fill_hanging(cells, hanging)
            text = one_line(" ".join(cell.itertext()))
            for _ in range(_span(cell, "colspan")):
                if (down := _span(cell, "rowspan")) > 1:
                    hanging[len(cells)] = (text, down - 1)
                cells.append(text)
        _fill_hanging(cells, hanging)
        count += len(cells)
        if count > _MAX_TABLE_CELLS:
            raise UnreadableDocument(f"holds a table of more than {_MAX_TABLE_CELLS:,} cells")
        if any(cells):
            grid.append(cells)
    width = max(map(len, grid), default=0)
    if len(grid) < 2 or width < 2:
        return []
    return [row + [""] * (width - len(row)) for row in grid]


def _cells(row: Any) -> Iterator[Any]:
    return (cell for cell in row if cell.tag in ("td", "th"))


def _fill_hanging(cells: list[str], hanging: dict[int, tuple[str, int]]) -> None:
    while (held := hanging.pop(len(cells), None)) is not None:
        if held[1] > 1:
            hanging[len(cells)] = (held[0], held[1] - 1)
        cells.append(held[0])


def _span(cell: Any, name: str) -> int:
    value = cell.get(name) or "1"
    return min(int(value), _MAX_SPAN) if re.fullmatch(r"[1-9][0-9]{0,5}", value) else 1
