"""Invented passages with the statistics of real ones: words by Zipf's law, topics, Chinese and English."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

import mogine
from mogine.kb.embedders import Vectors, unit
from mogine.kb.passages import Document, Passage

SAMPLES = Path(mogine.__file__).with_name("samples")
WORDS = 40_000
TOPICS = 400
PASSAGES_A_DOCUMENT = 20
_SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "ro",
    "su",
    "tion",
    "ment",
    "ing",
)
_JOINING = {
    "zh": "的是在和了有不为以对",
    "en": ("the", "of", "and", "to", "in", "a", "is", "for", "on", "with"),
}


class Invented:
    """The same seed gives the same texts."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        han = [chr(code) for code in range(0x4E00, 0x4E00 + 5000)]
        letters = list(accumulate(1 / (rank + 20) for rank in range(len(han))))
        self._random.shuffle(han)
        self._words = {
            "zh": ["".join(self._random.choices(han, cum_weights=letters, k=2)) for _ in range(WORDS)],
            "en": [
                "".join(self._random.choices(_SYLLABLES, k=self._random.randint(2, 4))) for _ in range(WORDS)
            ],
        }
        self._zipf = list(accumulate(1 / (rank + 5) for rank in range(WORDS)))

    def text(self, language: str, topic: int, size: int) -> str:
        """About `size` characters on a topic: a part of the words belongs to it."""
        own = random.Random(topic).choices(self._words[language], k=60)
        gap = "" if language == "zh" else " "
        pieces: list[str] = []
        length = 0
        while length < size:
            count = self._random.randint(6, 14)
            common = self._random.choices(self._words[language], cum_weights=self._zipf, k=count)
            sentence = [
                self._random.choice(own)
                if (chance := self._random.random()) < 0.2
                else self._random.choice(_JOINING[language])
                if chance < 0.45
                else word
                for word in common
            ]
            pieces.append(gap.join(sentence) + ("。" if language == "zh" else ". "))
            length += len(pieces[-1])
        return "".join(pieces).strip()

    def documents(self, passages: int) -> Iterator[tuple[Document, list[Passage], int]]:
        """Documents with their passages and their topic, half of them Chinese."""
        for number in range(max(1, passages // PASSAGES_A_DOCUMENT)):
            language = ("zh", "en")[number % 2]
            topic = self._random.randrange(TOPICS)
            source, title = f"docs/{number:05}.md", self.text(language, topic, 8)[:20]
            size = 380 if language == "zh" else 900
            made = [
                Passage(f"{number:05}:{i}", source, title, "", i, self.text(language, topic, size))
                for i in range(PASSAGES_A_DOCUMENT)
            ]
            yield Document(source, title, "", f"{number:064}"), made, topic

    def questions(self, count: int) -> list[str]:
        """Short questions, each on a topic."""
        return [
            self.text("zh", self._random.randrange(TOPICS), 14)[:24] + "？"
            if number % 2 == 0
            else " ".join(self.text("en", self._random.randrange(TOPICS), 60).split()[:9]) + "?"
            for number in range(count)
        ]


def real_passages(language: str, size: int, count: int) -> list[str]:
    """Texts of about `size` characters out of the sentences of the sample documents, no two alike.

    Invented words have twice the tokens of real ones, and a model's time goes by tokens.
    """
    random_ = random.Random(language)
    samples = (SAMPLES / "docs").glob(f"*.{language}.md")
    paragraphs = [line for path in samples for line in path.read_text("utf-8").splitlines() if len(line) > 20]
    sentences = [part for line in paragraphs for part in re.split(r"(?<=[。！？.!?])\s*", line) if part]
    gap = "" if language == "zh" else " "
    texts = []
    for number in range(count):
        pieces = [str(number)]
        while sum(map(len, pieces)) < size:
            pieces.append(random_.choice(sentences))
        texts.append(gap.join(pieces)[: size + 40])
    return texts


class InventedVectors:
    """Stands for the bundled model while a large base is built: vectors round the centre of their topic."""

    def __init__(self, name: str, dimensions: int) -> None:
        self.name = name
        self.dimensions = dimensions
        self.topic = 0
        self._random = np.random.default_rng(1)
        self._centres = self._random.standard_normal((TOPICS, dimensions))

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        noise = self._random.standard_normal((len(texts), self.dimensions))
        rows = self._centres[self.topic] + noise
        return unit(rows.astype(np.float32))

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self.embed_passages(texts)

    def warm(self) -> None:
        """There is no model."""

    def close(self) -> None:
        """There is nothing to give back."""
