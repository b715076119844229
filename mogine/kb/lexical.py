"""Keyword search: our own terms in SQLite's FTS5, ranked by BM25 as a share of a perfect match."""

import functools
import itertools
import math
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase, digits

from snowballstemmer.english_stemmer import EnglishStemmer

from mogine.kb.passages import HAN
from mogine.kb.texts import PADDING_ROWS, Readers

# The rules of `terms`: raised when they change, so that the next ingest writes the keyword index anew.
TERMS = "3"
# BM25 with k1 = 1.2, as FTS5 has it: a term can at most earn its idf times k1 + 1.
_PERFECT = 2.2
# Terms in more than a fifth of the passages say nothing and cost most of the time, once there are many.
_EVERYWHERE = 0.2
_PRUNED_FROM = 1000
# Of a question's terms only the rarest are asked for: twelve find as well as all, and cost far less.
_MAX_TERMS = 12
_MAX_ABSENT = 64
_MAX_TERM_CHARS = 40
# A word that stands nowhere is taken for a slip of the hand when it is as long as this (stemmed).
_MIN_SLIP_CHARS = 6
_MAX_SLIPS = 3
_PLAIN = re.compile("[a-z]+")
# Of a pair of characters in Simplified and Traditional form.
_MAX_SPELLINGS = 12
_IN_WORDS = frozenset(ascii_lowercase + digits)

_KANA_AND_HANGUL = "\u3041-\u30ff\u31f0-\u31ff\u1100-\u11ff\uac00-\ud7af"
# A run of Han and the like; words and numbers joined by one mark, as in XJ-200 and 7,200; a word.
_WORDS = re.compile(
    rf"([{HAN}{_KANA_AND_HANGUL}]+)"
    r"|((?:[a-z0-9]+[-_.,/])+[a-z0-9]+)"
    rf"|([^\W_{HAN}{_KANA_AND_HANGUL}]+(?:'[a-z]+)?)"
)
_PARTS = re.compile("[a-z0-9]+")
_MAX_CODE_CHARS = 24
# Where letters and digits meet in "iphone15"; a single letter is no word of its own ("a4").
_LETTERS_AND_DIGITS = re.compile("(?:[a-z]{2,}|[0-9]+)")

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


def _read_written() -> dict[str, str]:
    """A Simplified character to all that are written for it, itself first."""
    written: dict[str, str] = {}
    for number, simplified in _SIMPLIFIED.items():
        written[simplified] = written.get(simplified, simplified) + chr(number)
    return written


_WRITTEN = _read_written()


def terms(text: str) -> Iterator[str]:
    """All terms of a text in their order: Han, kana and Hangul as single characters and pairs, other
    words stemmed; half width, lower case, Simplified, without accents. A code of letters and digits is
    found however it is written: XJ-200 gives xj, 200 and xj200, and so does XJ200.
    """
    for match in _WORDS.finditer(_fold(text)):
        run = match[1]
        if run:
            yield from run
            yield from map("".join, itertools.pairwise(run))
        elif match[2]:
            yield from _code(match[2])
        else:
            yield from _word(match[3])


def _code(joined: str) -> Iterator[str]:
    """The parts, and all of them in one when that may be a code (7,200) or a word (e-mail)."""
    parts = _PARTS.findall(joined)
    for part in parts:
        yield from _word(part)
    is_word = len(parts) == 2 and "-" in joined
    whole = "".join(parts)
    if (is_word or any(c.isdigit() for c in joined)) and len(whole) <= _MAX_CODE_CHARS:
        yield _stem(whole)


@functools.lru_cache(maxsize=65536)
def _word(word: str) -> tuple[str, ...]:
    """The word stemmed; one of letters and digits also in its parts."""
    if not word.isascii() or word.isalpha() or word.isdigit() or len(word) > _MAX_CODE_CHARS:
        return (_stem(word),)
    parts = _LETTERS_AND_DIGITS.findall(word)
    return (*(map(_stem, parts) if len(parts) > 1 else ()), _stem(word))


def _slips(word: str) -> list[str]:
    """Every spelling that is one letter left out, put in, changed or swapped away, the first one kept."""
    cuts = [(word[:i], word[i:]) for i in range(1, len(word) + 1)]
    left_out = [a + b[1:] for a, b in cuts if b]
    swapped = [a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1]
    changed = [a + c + b[1:] for a, b in cuts if b for c in ascii_lowercase]
    put_in = [a + c + b for a, b in cuts for c in ascii_lowercase]
    return [*left_out, *swapped, *changed, *put_in]


def _in_parts(term: str) -> bool:
    """Whether the parts of a code say the same, so that it is not missed where only they stand."""
    return not term.isalpha() and not term.isdigit() and len(_LETTERS_AND_DIGITS.findall(term)) > 1


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


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").translate(_SIMPLIFIED)


def shares_of_words(question: str, texts: Sequence[str]) -> list[float]:
    """How much of what is asked stands in each of `texts` (0-1), by the words that tell these texts apart: a
    word that stands in all of them weighs nothing, however rare it is elsewhere.
    """
    lowered = [text.lower() for text in texts]
    found = [[stands_in(text) for text in lowered] for stands_in in map(_finder, question_terms(question))]
    weights = [math.log((len(texts) + 0.5) / (sum(row) + 0.5)) for row in found]
    whole = sum(weights) or 1.0
    return [
        sum(weight for weight, row in zip(weights, found, strict=True) if row[index]) / whole
        for index in range(len(texts))
    ]


def _finder(term: str) -> Callable[[str], bool]:
    """Whether a term stands in a text as it was written, in lower case; to fold the texts of every search
    would cost more than the search of all words does."""
    if term.isascii():
        # A stem in y has become one in i: compani is company.
        return functools.partial(_begins_in, term.removesuffix("i") or term)
    choices = itertools.product(*(_WRITTEN.get(character, character) for character in term))
    spellings = ["".join(choice) for choice in itertools.islice(choices, _MAX_SPELLINGS)]
    if len(spellings) == 1:
        return lambda text: term in text
    return lambda text: any(spelling in text for spelling in spellings)


def _begins_in(stem: str, text: str) -> bool:
    """Whether a word of `text` begins with `stem`: a tenth of the time of a pattern that says so."""
    at = text.find(stem)
    while at > 0 and text[at - 1] in _IN_WORDS:
        at = text.find(stem, at + 1)
    return at >= 0


def _read_sayings() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    """Phrases that stand for words, and the terms of those words."""
    lines = Path(__file__).with_name("sayings.txt").read_text("utf-8").splitlines()
    found = []
    for line in lines:
        if not line.startswith("#"):
            phrases, words = ([part.replace("_", " ") for part in side.split()] for side in line.split("="))
            patterns = (
                rf"\b{re.escape(p)}\b" if p.isascii() else re.escape(p)
                for p in sorted(phrases, key=len, reverse=True)
            )
            cut = [term for word in words for term in _telling(word)]
            found.append((re.compile("|".join(patterns)), tuple(dict.fromkeys(cut))))
    return tuple(found)


def _telling(words: str) -> list[str]:
    """Terms without stop words; of Chinese only the pairs, since a single character stands for too much."""
    return [t for t in terms(words) if t not in _STEMMED_STOP_WORDS and (t.isascii() or len(t) > 1)]


_SAYINGS = _read_sayings()


def reworded(question: str) -> tuple[str, list[tuple[str, ...]]]:
    """The question without the phrases that visitors have for things, and the terms that documents have for
    each of those things. What is left may be empty.
    """
    rest = _fold(question)
    meant = []
    for phrases, words in _SAYINGS:
        said = phrases.findall(rest)
        if said:
            rest = phrases.sub(" ", rest)
            # Documents may say it like the visitor.
            own = [term for phrase in said for term in _telling(phrase)]
            meant.append(tuple(dict.fromkeys((*words, *own))))
    return rest, meant


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
        rest, meant = reworded(question)
        with self._readers.take() as db:
            counts = self._counts(db, question_terms(rest))
            self._correct(db, counts)
            asked = sorted((term for term in counts if counts[term]), key=counts.__getitem__)[:_MAX_TERMS]
            # A term that no passage has cannot be found, and still is a part of what was asked.
            absent = [term for term in counts if not counts[term] and not _in_parts(term)][:_MAX_ABSENT]
            perfect = _PERFECT * sum(self._idf(counts[term]) for term in (*asked, *absent))
            for words in meant:
                also = self._counts(db, words)
                known = [word for word in also if also[word]]
                if known:  # all of them say one thing
                    perfect += _PERFECT * self._idf(min(also[word] for word in known))
                asked += known
            if not asked or perfect <= 0:
                return {}
            match = " OR ".join(f'"{term}"' for term in dict.fromkeys(asked))
            rows = db.execute(
                "SELECT rowid, rank FROM keywords WHERE keywords MATCH ? ORDER BY rank LIMIT ?",
                (match, limit),
            ).fetchall()
        return {number: min(1.0, max(0.0, -rank / perfect)) for number, rank in rows}

    def _counts(self, db: sqlite3.Connection, asked: Sequence[str]) -> dict[str, int]:
        """In how many passages each term stands, without those that are everywhere."""
        marks = ", ".join("?" * len(asked))
        known = dict(
            db.execute(f"SELECT term, passages FROM term_counts WHERE term IN ({marks})", list(asked))  # noqa: S608
        )
        counts = {term: int(known.get(term, 0)) for term in asked}
        if self._passages >= _PRUNED_FROM:
            most = _EVERYWHERE * self._passages
            counts = {term: n for term, n in counts.items() if n <= most} or counts
        return counts

    def _correct(self, db: sqlite3.Connection, counts: dict[str, int]) -> None:
        """Puts the commonest word one slip of the hand away in the place of a word that stands nowhere."""
        missing = [t for t in counts if not counts[t] and len(t) >= _MIN_SLIP_CHARS and _PLAIN.fullmatch(t)]
        for term in missing[:_MAX_SLIPS]:
            near = self._counts(db, _slips(term))
            best = max(near, key=near.__getitem__, default="")
            if best and near[best]:
                del counts[term]
                counts.setdefault(best, near[best])

    def _idf(self, count: int) -> float:
        return max(1e-6, math.log((self._passages + PADDING_ROWS - count + 0.5) / (count + 0.5)))
