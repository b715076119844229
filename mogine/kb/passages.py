"""The nouns of the knowledge base: documents, the passages they are cut into, and what a search finds."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

# What a search takes; its cost grows with the question, and nobody asks for longer ones.
MAX_QUERY_CHARS = 2000

Language = Literal["zh", "other"]

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN = re.compile(f"[{HAN}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{HAN}]+")


def language(text: str) -> Language:
    """Chinese when it has at least as many Han characters as words of other scripts.

    So "iPhone 15 Pro 怎么退款" is Chinese, and an English paragraph that quotes one name in Han is not.
    """
    han = sum(1 for _ in _HAN.finditer(text))
    return "zh" if han and han >= sum(1 for _ in _OTHER_WORD.finditer(text)) else "other"


def document_id(source: str) -> str:
    """The public id of the document that came from `source`: stable, and safe in an address."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Document:
    """A text that was taken in. `source` names where it came from and is unique in a knowledge base.

    `digest` belongs to the source's bytes: equal digests mean that nothing has to be done again.
    `updated` is what the document says about its own age (front matter), "" when it says nothing.
    """

    source: str
    title: str
    text: str
    digest: str
    url: str = ""
    updated: str = ""

    @property
    def id(self) -> str:
        return document_id(self.source)


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, small enough to be found and quoted.

    `text` is the bare piece; title and heading path stand beside it, not in it. `heading` is the path
    below the title ("Returns > Refunds"), `position` counts from 0 within the document, `page` from 1.
    """

    id: str
    source: str
    title: str
    heading: str
    position: int
    text: str
    url: str = ""
    page: int | None = None

    @property
    def searchable(self) -> str:
        """What is embedded and indexed: title and heading path in front, each only once."""
        front = [self.title] if self.title and not self.text.startswith(self.title) else []
        if self.heading and self.heading != self.title and not self.text.startswith(self.heading):
            front = (
                [self.heading]
                if self.title and self.heading.startswith(self.title)
                else [*front, self.heading]
            )
        return "\n".join([*front, self.text])


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a search found; `score` lies in 0-1 and grows with relevance."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as a generation lists it; its text lives on in its passages."""

    source: str
    title: str
    digest: str
    url: str
    updated: str
    passages: int
    characters: int

    @property
    def id(self) -> str:
        return document_id(self.source)
