"""Cuts a document into passages: at headings, between paragraphs, in a long one between sentences."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mogine.kb.passages import Document, Passage, language

# Whole paragraphs are packed up to this; only a longer one is cut.
MAX_CHARS = 512
# Into pieces of at most so much, when it is not Chinese: measured in docs/retrieval.md.
MAX_PIECE_CHARS = 340
# A piece of a cut paragraph begins with the last sentence of the piece before it, when that is short.
OVERLAP_CHARS = 100
MAX_HEADING_CHARS = 100
PAGE_END = "\f"

_ATX = re.compile(r"\s{0,3}(#{1,6})(?:[ \t]+(.*))?$")
_SETEXT = re.compile(r"\s{0,3}(=+|-{2,})[ \t]*$")
_RULE = re.compile(r"\s{0,3}(?:-[ \t]*){3,}$|\s{0,3}(?:\*[ \t]*){3,}$|\s{0,3}(?:_[ \t]*){3,}$")
_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
_TABLE_RULE = re.compile(r"\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?)?$")
_ESCAPED = re.compile(r"^([ \t]{0,3})\\(?=[#`~*=-])", re.M)
# Where a text may be cut, best first: sentences, clauses, words.
_ENDS = (
    re.compile(
        r"[。！？!?；;…]+[”’\"'」』）)】]*\s*|(?<=[^\W\d][^\W\d])\.[”’\"')]*\s+|(?<=[0-9)])\.\s+(?=[A-Z])|\n+"
    ),
    re.compile(r"[，,、：:]+\s*|\s[–—-]+\s"),
    re.compile(r"\s+"),
)


@dataclass(frozen=True, slots=True)
class _Block:
    """A paragraph, table or fenced text under its headings; a rule before it keeps it from being packed."""

    text: str
    headings: tuple[str, ...]
    page: int | None
    is_table: bool = False
    is_apart: bool = False


def chunk(document: Document) -> list[Passage]:
    """The passages of a document in their order; equal documents give equal passages."""
    return [
        Passage(
            id=f"{document.digest}:{position}",
            source=document.source,
            title=document.title,
            heading=" > ".join(block.headings),
            position=position,
            text=block.text,
            url=document.url,
            page=block.page,
        )
        for position, block in enumerate(_packed(_blocks(document.text, document.title)))
    ]


# --- packing -------------------------------------------------------------------------------------


def _packed(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Blocks of one section put together while they fit, larger ones cut."""
    open_block: _Block | None = None
    for block in blocks:
        for piece in _cut(block):
            if open_block is None:
                open_block = piece
            elif _fits(open_block, piece):
                open_block = _Block(
                    f"{open_block.text}\n\n{piece.text}", open_block.headings, open_block.page, is_apart=False
                )
            else:
                yield open_block
                open_block = piece
    if open_block is not None:
        yield open_block


def _fits(first: _Block, second: _Block) -> bool:
    if second.is_apart or first.headings != second.headings:
        return False
    return len(first.text) + len(second.text) + 2 <= MAX_CHARS


def _cut(block: _Block) -> Iterator[_Block]:
    if len(block.text) <= MAX_CHARS:
        yield block
        return
    limit = MAX_CHARS if language(block.text) == "zh" else MAX_PIECE_CHARS
    texts = _cut_table(block.text) if block.is_table else _cut_text(block.text, limit)
    for index, text in enumerate(texts):
        # Pieces of one block are never packed together again: they would hold the overlap twice.
        yield _Block(text, block.headings, block.page, block.is_table, is_apart=block.is_apart or index > 0)


def _cut_table(text: str) -> Iterator[str]:
    """Rows packed under a repeated header row."""
    lines = text.split("\n")
    header, rows = "\n".join(lines[:2]), lines[2:]
    room = MAX_CHARS - len(header) - 1
    if room < MAX_CHARS // 3:
        # A header that fills a passage by itself cannot stand above every row.
        yield from _cut_text(text, MAX_CHARS)
        return
    packed: list[str] = []
    used = 0
    for row in rows:
        for piece in [row] if len(row) <= room else _cut_text(row, room, overlap=0):
            if packed and used + len(piece) + 1 > room:
                yield "\n".join([header, *packed])
                packed, used = [], 0
            packed.append(piece)
            used += len(piece) + 1
    if packed:
        yield "\n".join([header, *packed])


def _cut_text(text: str, limit: int, overlap: int = OVERLAP_CHARS) -> Iterator[str]:
    """Pieces of about equal size, none above `limit`, cut after sentences where there are any."""
    atoms = _atoms(text, limit)
    total = sum(map(len, atoms))
    target = total / max(1, -(-total // limit))
    piece: list[str] = []
    used = 0
    for atom in atoms:
        if piece and (used + len(atom) > limit or used >= target):
            yield "".join(piece).strip()
            last = piece[-1]
            is_repeated = len(piece) > 1 and len(last) <= overlap and len(last) + len(atom) <= limit
            piece = [last] if is_repeated else []
            used = sum(map(len, piece))
        piece.append(atom)
        used += len(atom)
    if piece:
        yield "".join(piece).strip()


def _atoms(text: str, limit: int) -> list[str]:
    """Sentences; one above `limit` in clauses, words, or cut anywhere."""
    pending = [(text, 0)]
    atoms: list[str] = []
    while pending:
        words, depth = pending.pop()
        if depth > 0 and len(words) <= limit:
            if words.strip():
                atoms.append(words)
        elif depth < len(_ENDS):
            pending.extend((part, depth + 1) for part in reversed(_split_after(words, _ENDS[depth])))
        else:
            slices = (words[i : i + limit] for i in range(0, len(words), limit))
            atoms.extend(part for part in slices if part.strip())
    return atoms


def _split_after(text: str, pattern: re.Pattern[str]) -> list[str]:
    ends = [match.end() for match in pattern.finditer(text)]
    starts = [0, *ends]
    return [part for start, end in zip(starts, [*ends, len(text)], strict=True) if (part := text[start:end])]


# --- structure -----------------------------------------------------------------------------------


class _Outline:
    """The headings above the place that is being read."""

    def __init__(self, title: str) -> None:
        self._title = title.strip().casefold()
        self._path: list[tuple[int, str]] = []
        self._is_bare = False
        self._page: int | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """From the top; the document's own title, which stands beside every passage, is left out."""
        names = [name for _, name in self._path if name]
        return tuple(names[1:] if names and names[0].casefold() == self._title else names)

    def enter(self, level: int, name: str, page: int | None) -> _Block | None:
        """Open a section. A heading with nothing below it is given back as a block: its words count too."""
        bare = self.leave(level)
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        self._path.append((level, name))
        self._is_bare = bool(name)
        self._page = page
        return bare

    def leave(self, level: int = 0) -> _Block | None:
        """The last heading as a block when nothing but a heading of the same or a higher level follows it."""
        if not self._is_bare or not self._path or self._path[-1][0] < level:
            return None
        _, name = self._path.pop()
        self._is_bare = False
        return _Block(name, self.path, self._page)

    def fill(self) -> None:
        self._is_bare = False


def _blocks(text: str, title: str) -> Iterator[_Block]:
    """The text block by block, in one pass."""
    outline = _Outline(title)
    pages = text.split(PAGE_END)
    # Text that ends with a page's end has pages; a last piece without one belongs to the last page.
    has_pages = len(pages) > 1
    is_apart = False
    for number, page in enumerate(pages, 1):
        at = min(number, len(pages) - 1) if has_pages else None
        for kind, words in _pieces(page.split("\n")):
            if kind == "rule":
                is_apart = True
                continue
            found: _Block | None
            if kind.startswith("h"):
                found = outline.enter(int(kind[1]), words, at)
            else:
                outline.fill()
                found = _Block(words, outline.path, at, kind == "table", is_apart)
                is_apart = False
            if found is not None:
                yield found
    if (bare := outline.leave()) is not None:
        yield bare


def _pieces(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(`h1` to `h6`, heading), (`rule`, ""), (`table` or `text`, words)."""
    paragraph: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        is_first = not paragraph
        if is_first and (end := _fenced(lines, index)):
            yield "text", "\n".join(lines[index:end])
            index = end
            continue
        if match := _ATX.match(line):
            yield from _text(paragraph)
            yield _heading(len(match[1]), match[2] or "")
        elif (
            (match := _SETEXT.match(line)) and len(paragraph) == 1 and len(paragraph[0]) <= MAX_HEADING_CHARS
        ):
            yield _heading(1 if match[1].startswith("=") else 2, paragraph.pop())
        elif _RULE.match(line):
            yield from _text(paragraph)
            yield "rule", ""
        elif "|" in line and index + 1 < len(lines) and _TABLE_RULE.match(lines[index + 1].strip()):
            yield from _text(paragraph)
            end = index + 2
            while end < len(lines) and "|" in lines[end]:
                end += 1
            yield "table", "\n".join(row.strip() for row in lines[index:end])
            index = end
            continue
        elif line.strip():
            paragraph.append(line.rstrip())
        else:
            yield from _text(paragraph)
        index += 1
    yield from _text(paragraph)


def _text(paragraph: list[str]) -> Iterator[tuple[str, str]]:
    """The paragraph so far, which is emptied."""
    words = _ESCAPED.sub(r"\1", "\n".join(paragraph)).strip()
    paragraph.clear()
    if words:
        yield "text", words


def _heading(level: int, words: str) -> tuple[str, str]:
    """A heading; one as long as a paragraph is a paragraph."""
    name = " ".join(words.replace("**", "").replace("`", "").split()).rstrip("#").rstrip()
    return (f"h{level}", name) if len(name) <= MAX_HEADING_CHARS else ("text", name)


def _fenced(lines: Sequence[str], start: int) -> int:
    """The line after a fenced block that begins at `start`; 0 when none does or it is never closed."""
    opening = _FENCE.match(lines[start])
    if opening is None:
        return 0
    for index in range(start + 1, len(lines)):
        if lines[index].strip().startswith(opening[1]):
            return index + 1
    return 0
