"""Keyword search: our own terms in SQLite's FTS5, ranked by BM25 as a share of a perfect match."""

import functools
import itertools
import math
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from snowballstemmer.english_stemmer import EnglishStemmer

from mogine.kb.passages import HAN
from mogine.kb.texts import PADDING_ROWS, Readers

# The rules of `terms`: raised when they change, so that the next ingest writes the keyword index anew.
TERMS = "1"
# BM25 with k1 = 1.2, as FTS5 has it: a term can at most earn its idf times k1 + 1.
_PERFECT = 2.2
# Terms in more than a fifth of the passages say nothing and cost most of the time, once there are many.
_EVERYWHERE = 0.2
_PRUNED_FROM = 1000
# Of a question's terms only the rarest are asked for: twelve find as well as all, and cost far less.
_MAX_TERMS = 12
_MAX_ABSENT = 64
_MAX_TERM_CHARS = 40

_KANA_AND_HANGUL = "\u3041-\u30ff\u31f0-\u31ff\u1100-\u11ff\uac00-\ud7af"
_WORDS = re.compile(rf"([{HAN}{_KANA_AND_HANGUL}]+)|([^\W_{HAN}{_KANA_AND_HANGUL}]+(?:'[a-z]+)?)")

# Words that ask or join; they are in the index, but no question is asked with them alone.
_STOP_WORDS = frozenset(
    """
    a about an and are as at be been but by can could did do does for from had has have how i if in into
    is it its me my of on or our please shall should so some such than that the their them then there these
    they this those to was we were what when where which who whom whose why will with would you your
    的 了 是 在 和 与 及 或 吗 呢 吧 啊 么 之 也 都 就 而 着 把 被 让 从 对 于 以 为 等 其 这 那 我 你 您 他
    她 它 们 个 些 哪 怎 什 何 谁 请 问 要 想 能 会 可 有 没 不 到 给 向 该 此 并 但 很 什么 怎么 怎样 如何
    为何 何时 哪里 哪儿 哪些 哪个 哪种 多少 是否 能否 可否 可以 能不 不能 请问 我们 你们 您们 他们 她们 它们
    这个 那个 这些 那些 一个 一些 一种 有没 没有 是不 不是 的是 了吗 是什 为什 么样 的吗 的呢 是哪 有哪 我的
    你的 我想
    """.split()  # noqa: SIM905 - a table of words reads best as words
)


def _read_simplified() -> dict[int, str]:
    lines = Path(__file__).with_name("simplified.txt").read_text("utf-8").splitlines()
    return {ord(pair[0]): pair[1] for line in lines if not line.startswith("#") for pair in line.split()}


_SIMPLIFIED = _read_simplified()


def terms(text: str) -> Iterator[str]:
    """All terms of a text in their order: Han, kana and Hangul as single characters and pairs, other
    words stemmed; half width, lower case, Simplified, without accents.
    """
    folded = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").translate(_SIMPLIFIED)
    for match in _WORDS.finditer(folded):
        run = match[1]
        if run:
            yield from run
            yield from map("".join, itertools.pairwise(run))
        else:
            yield _stem(match[2])


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    if word.isascii() and not any(c.isdigit() for c in word):
        word = EnglishStemmer().stemWord(word)
    return word.replace("'", "")[:_MAX_TERM_CHARS]


def question_terms(question: str) -> list[str]:
    """The different terms of a question without stop words; with them when it has no others."""
    every = [term for term in dict.fromkeys(terms(question)) if term]
    return [term for term in every if term not in _STEMMED_STOP_WORDS] or every


_STEMMED_STOP_WORDS = _STOP_WORDS | frozenset(_stem(word) for word in _STOP_WORDS if word.isascii())


class LexicalWriter:
    """Changes the keyword index of a draft; the caller holds the transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._changes: Counter[str] = Counter()

    def add(self, number: int, text: str) -> None:
        found = list(terms(text))
        self._db.execute("INSERT INTO keywords (rowid, terms) VALUES (?, ?)", (number, " ".join(found)))
        self._changes.update(set(found))

    def remove(self, number: int, text: str) -> None:
        """`text` must be what was added: a contentless index takes a row out by its terms."""
        found = list(terms(text))
        self._db.execute(
            "INSERT INTO keywords (keywords, rowid, terms) VALUES ('delete', ?, ?)", (number, " ".join(found))
        )
        self._changes.subtract(set(found))

    def finish(self) -> None:
        """Brings the counts up to date; once, before the commit."""
        self._db.executemany(
            "INSERT INTO term_counts VALUES (?, ?)"
            " ON CONFLICT (term) DO UPDATE SET passages = passages + excluded.passages",
            [(term, change) for term, change in self._changes.items() if change],
        )
        self._db.execute("DELETE FROM term_counts WHERE passages <= 0")
        self._changes.clear()


class LexicalIndex:
    """Searches the keyword index of a generation."""

    def __init__(self, readers: Readers, passages: int) -> None:
        self._readers = readers
        self._passages = passages

    def search(self, question: str, limit: int) -> Mapping[int, float]:
        """Passage numbers with their share of a perfect match (0-1), best first.

        BM25 divided by what a passage full of the question's terms would get: unlike a score scaled by
        the best hit it means the same for every question, so it can be added to a cosine.
        """
        with self._readers.take() as db:
            counts = self._counts(db, question_terms(question))
            asked = sorted((term for term in counts if counts[term]), key=counts.__getitem__)[:_MAX_TERMS]
            # A term that no passage has cannot be found, and still is a part of what was asked.
            absent = [term for term in counts if not counts[term]][:_MAX_ABSENT]
            perfect = _PERFECT * sum(self._idf(counts[term]) for term in (*asked, *absent))
            if not asked or perfect <= 0:
                return {}
            match = " OR ".join(f'"{term}"' for term in asked)
            rows = db.execute(
                "SELECT rowid, rank FROM keywords WHERE keywords MATCH ? ORDER BY rank LIMIT ?",
                (match, limit),
            ).fetchall()
        return {number: min(1.0, max(0.0, -rank / perfect)) for number, rank in rows}

    def _counts(self, db: sqlite3.Connection, asked: Sequence[str]) -> dict[str, int]:
        """In how many passages each term stands, without those that are everywhere."""
        counts = {term: self._count(db, term) for term in asked}
        if self._passages >= _PRUNED_FROM:
            most = _EVERYWHERE * self._passages
            counts = {term: n for term, n in counts.items() if n <= most} or counts
        return counts

    def _idf(self, count: int) -> float:
        return max(1e-6, math.log((self._passages + PADDING_ROWS - count + 0.5) / (count + 0.5)))

    def _count(self, db: sqlite3.Connection, term: str) -> int:
        row = db.execute("SELECT passages FROM term_counts WHERE term = ?", (term,)).fetchone()
        return int(row[0]) if row else 0
