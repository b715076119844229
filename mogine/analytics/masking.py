"""What is made unreadable before a question is written anywhere: phones, ID cards, bank cards, e-mail."""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mogine.analytics.records import QueryRecord

PHONE = "[phone]"
ID_CARD = "[id-card]"
BANK_CARD = "[bank-card]"
EMAIL = "[email]"

# Full-width forms are typed as often as plain ones; each stands for one character, so places agree.
# Only the signs of which numbers and addresses are made: every Chinese text is full of the others.
_NARROW = {chr(0xFEE0 + ord(sign)): sign for sign in string.ascii_letters + string.digits + "@.-+%_"}
_NARROW |= {"\u3000": " ", "\xa0": " "}
_NARROW |= dict.fromkeys([*map(chr, range(0x2010, 0x2016)), "\u2212"], "-")
_WIDE = re.compile(f"[{''.join(map(re.escape, _NARROW))}]")

# Groups of digits with one blank or dash between them; a decimal fraction is no number of a person.
_RUN = re.compile(r"[0-9]+(?:[ -][0-9]+)*(?:[ -]?[Xx](?![0-9A-Za-z]))?")
_DIGITS = re.compile(r"[0-9]+")
_ENOUGH = re.compile(r"(?:[0-9][ -]?){10}[0-9]")  # the shortest number of a person; most texts have none
_GROUP = re.compile(r"[0-9]+[Xx]?|[Xx]")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_LOCAL_PART = frozenset(string.ascii_letters + string.digits + "._%+-")
_MAX_LOCAL_PART = 64
_MOBILE = re.compile(r"(?:00)?(?:86)?1[3-9][0-9]{9}")
_ID_CARD = re.compile(
    r"[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9X]"
)
# Lengths and first digits that issuers really use: with Luhn alone one order number in ten would fall.
_BANK_CARD = re.compile(
    r"62[0-9]{14,17}|955[89][0-9]{12,15}|4(?:[0-9]{12}|[0-9]{15})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}"
    r"|7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}|35(?:2[89]|[3-8][0-9])[0-9]{12}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
    r"|60[0-9]{17}"
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_MAX_GROUPS = 19
_LENGTHS = range(11, 20)


def mask(text: str) -> str:
    """`text` with every mobile number, ID card, bank card and e-mail address replaced by its kind."""
    if not text:
        return text
    narrow = text if text.isascii() else _WIDE.sub(lambda sign: _NARROW[sign[0]], text)
    found = [(start, end, EMAIL) for start, end in _addresses(narrow)] if "@" in narrow else []
    if _ENOUGH.search(narrow):
        for run in _runs(narrow):
            if run.end() - run.start() >= _LENGTHS.start:
                found.extend(_numbers(narrow, run))
    if not found:
        return text
    parts: list[str] = []
    end = 0
    for start, stop, kind in sorted(found):
        if start >= end:
            parts += text[end:start], kind
            end = stop
    return "".join([*parts, text[end:]])


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    """Where e-mail addresses stand: what may stand before an `@`, and a domain after it."""
    end = 0
    at = text.find("@")
    while at >= 0:
        start = at
        while start > max(end, at - _MAX_LOCAL_PART) and text[start - 1] in _LOCAL_PART:
            start -= 1
        if start < at and (domain := _DOMAIN.match(text, at + 1)):
            end = domain.end()
            yield start, end
        at = text.find("@", max(at + 1, end))


def _runs(text: str) -> Iterator[re.Match[str]]:
    """Groups of digits; a fraction's are passed over, not what follows them."""
    place = 0
    while run := _RUN.search(text, place):
        start = run.start()
        if start >= 2 and text[start - 1] == "." and text[start - 2] in string.digits:
            fraction = _DIGITS.match(text, start)
            place = fraction.end() if fraction else run.end()
        else:
            place = run.end()
            yield run


def _numbers(text: str, run: re.Match[str]) -> Iterator[tuple[int, int, str]]:
    """The numbers of persons within a run of groups: the longest from each group on."""
    groups = [(m.start(), m.end(), m[0].upper()) for m in _GROUP.finditer(text, run.start(), run.end())]
    first = 0
    while first < len(groups):
        digits = ""
        best: tuple[int, str] | None = None
        for last in range(first, min(first + _MAX_GROUPS, len(groups))):
            digits += groups[last][2]
            if len(digits) > _LENGTHS.stop:
                break
            if len(digits) >= _LENGTHS.start and (kind := _kind(digits)):
                best = last, kind
        if best is None:
            first += 1
        else:
            yield groups[first][0], groups[best[0]][1], best[1]
            first = best[0] + 1


def _kind(digits: str) -> str | None:
    if _MOBILE.fullmatch(digits):
        return PHONE
    if _ID_CARD.fullmatch(digits) and _id_checks(digits):
        return ID_CARD
    if _BANK_CARD.fullmatch(digits) and _luhn(digits):
        return BANK_CARD
    return None


def _id_checks(number: str) -> bool:
    """GB 11643: a weighted sum modulo 11 gives the last sign."""
    total = sum(int(digit) * weight for digit, weight in zip(number, _ID_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == number[17]


def _luhn(number: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def bare_url(url: str) -> str:
    """A page's address without user, query and fragment: those carry tokens and names of persons."""
    if not url:
        return ""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return mask(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


@dataclass(frozen=True, slots=True)
class TextPolicy:
    """What may be kept of the words: `questions` is text, hash or none; `answers` yes or no.

    A hash is keyed with `salt`, so that nobody can try out questions against the file alone.
    """

    questions: str = "text"
    answers: bool = True
    salt: bytes = b""

    def apply(self, record: QueryRecord) -> QueryRecord:
        """`record` as it may be written."""
        question = self._question(record.question)
        answer = mask(record.answer) if self.answers else ""
        page_url, session = bare_url(record.page_url), mask(record.session)
        if (question, answer, page_url, session) == (
            record.question,
            record.answer,
            record.page_url,
            record.session,
        ):
            return record  # as nearly always; a copy costs more than the look
        return replace(record, question=question, answer=answer, page_url=page_url, session=session)

    def words(self, text: str) -> str:
        """What a visitor wrote beside a thumb, as it may be written: kept only where questions are."""
        return mask(text) if self.questions == "text" else ""

    def _question(self, text: str) -> str:
        match self.questions:
            case "text":
                return mask(text)
            case "hash" if text:
                words = " ".join(text.lower().split()).encode("utf-8", "replace")
                return "hmac:" + hmac.new(self.salt, words, hashlib.sha256).hexdigest()[:32]
            case _:
                return ""


def load_salt(path: Path) -> bytes:
    """The 32 random bytes in `path`, which is made when absent; of several processes one wins."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):  # another process was quicker; its bytes count
                os.link(draft, path)
        finally:
            draft.unlink()
    return path.read_bytes()
