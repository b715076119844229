"""What a loader hands back, and the few ways in which text becomes Markdown-like text."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PAGE_END = "\f"
"""Closes every page of a text that has pages; nothing else in a text may hold this character."""

# Lines that would be taken for structure although they are words of a document.
_LOOKS_LIKE_STRUCTURE = re.compile(
    r"^(?=[ \t]{0,3}(?:#{1,6}(?:\s|$)|```|~~~|-{3,}\s*$|={3,}\s*$|\*{3,}\s*$))", re.M
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A document's text: headings as `# `, tables with pipes, pages closed by PAGE_END.

    `notes` are for the person who ingests: what is missing though the rest could be read.
    """

    text: str
    title: str = ""
    url: str = ""
    updated: str = ""
    notes: tuple[str, ...] = ()


def one_line(text: str) -> str:
    """`text` with every run of blanks and line breaks made one blank."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """Words that stay words: what looks like a heading, a fence or a rule is escaped."""
    return _LOOKS_LIKE_STRUCTURE.sub(lambda _: "\\", text)


def heading(level: int, text: str) -> str:
    """A heading line; an empty text ends the sections of this level and below."""
    return f"{'#' * min(max(level, 1), 6)} {one_line(text)}".rstrip()


def join(blocks: Iterable[str]) -> str:
    """Blocks with a blank line between them."""
    return "\n\n".join(block for block in blocks if block)


def title_of(text: str) -> str:
    """The first line of a text where it reads like a title: short, and no sentence; else ""."""
    first = next((line.strip() for line in text.splitlines() if line.strip(" \t\f#")), "")
    first = first.strip("\f# *").strip()
    if not first or len(first) > 60 or first.startswith(("|", "- ", "```", "<")):
        return ""
    return "" if first.endswith(tuple("。！？；，、：.!?;,:")) else first


def web_address(value: str) -> str:
    """`value` where it is an http(s) address or a path of the site; a link may be nothing else."""
    value = value.strip()
    is_address = re.match(r"https?://[^\s<>\"]+$|/(?!/)[^\s<>\"\\]*$", value, re.IGNORECASE)
    return value if is_address and len(value) <= 2000 else ""
