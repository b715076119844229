"""Bytes to text: byte order marks, UTF-8, UTF-16 without a mark, GB18030, Big5, then a guess."""

import codecs
import re

from mogine.errors import UnreadableDocument

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 64 * 1024
# C0 (save for TAB, LF, FF, CR and ESC), the mark of a pictures' or program's bytes.
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# A stray control character (0x1a ends old DOS files) is forgiven; one in a hundred bytes is not.
_BINARY_SHARE = 0.01
_BROKEN_SHARE = 0.01


def decode(data: bytes, declared: str = "") -> str:
    """The text of `data`; `declared` is what the document says of itself and is tried after UTF-8.

    Raises UnreadableDocument when the bytes are no text.
    """
    for mark, marked in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(marked, "replace")
    if (name := _utf16_without_mark(data)) is not None:
        return data.decode(name, "replace")
    if is_binary(data):
        raise UnreadableDocument("holds no text; save it as UTF-8 text or as PDF")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _not_utf8(data, declared)


def is_binary(data: bytes) -> bool:
    """Whether the bytes are no text in any encoding that is known here."""
    if data.startswith(tuple(mark for mark, _ in _MARKS)) or _utf16_without_mark(data):
        return False
    sample = data[:_SAMPLE_BYTES]
    return len(_BINARY.findall(sample)) > max(1, len(sample) * _BINARY_SHARE)


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 shows itself by zero bytes (of ASCII, blanks, line ends) on one side only."""
    sample = data[: _SAMPLE_BYTES & ~1]
    if len(data) % 2 or len(sample) < 4 or b"\x00" not in sample:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if min(even, odd) > max(even, odd) // 20:
        return None
    name = "utf-16-le" if odd > even else "utf-16-be"
    try:
        text = sample.decode(name)
    except UnicodeDecodeError:
        return None
    return name if _share(text, _COMMON) > 0.9 else None


_COMMON = re.compile(
    r"[\t\n\r\x20-\x7e\u00a0-\u024f\u0370-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]"
)


def _share(text: str, pattern: re.Pattern[str]) -> float:
    return len(pattern.findall(text)) / max(1, len(text))


def _not_utf8(data: bytes, declared: str) -> str:
    lenient = data.decode("utf-8", "replace")
    beyond_ascii = sum(1 for character in lenient if character > "\x7f")
    if lenient.count("\ufffd") <= beyond_ascii * _BROKEN_SHARE:
        return lenient
    chinese = max(
        (_plausible_gb18030(data), "gb18030"),
        (_plausible_big5(data), "big5hkscs"),
        key=lambda scored: scored[0],
    )
    if chinese[0] >= 0.7:
        return data.decode(chinese[1], "replace")
    if declared and (text := _as_declared(data, declared)) is not None:
        return text
    return data.decode("cp1252", "replace") if _looks_western(data) else _guessed(data)


def _looks_western(data: bytes) -> bool:
    """Accents stand alone among ASCII letters; other scripts come in runs. A guesser errs on short texts."""
    runs = re.findall(rb"[\x80-\xff]+", data[:_SAMPLE_BYTES])
    return sum(map(len, runs)) <= len(runs) * 1.5


def _as_declared(data: bytes, declared: str) -> str | None:
    # Pages that say gb2312 or gbk hold characters of gb18030 all the same.
    name = "gb18030" if declared.lower() in ("gb2312", "gbk", "gb_2312-80", "x-gbk") else declared
    try:
        return data.decode(name)
    except (LookupError, UnicodeDecodeError):
        return None


def _plausible_gb18030(data: bytes) -> float:
    """How many of the two-byte characters are everyday ones; 0 where it cannot be GB18030."""
    return _plausible(data, "gb18030", lead=(0xB0, 0xD7), rare=(0xD8, 0xF7), marks=(0xA1, 0xA3), trail=0xA1)


def _plausible_big5(data: bytes) -> float:
    return _plausible(data, "big5hkscs", lead=(0xA4, 0xC6), rare=(0xC9, 0xF9), marks=(0xA1, 0xA3), trail=0x40)


def _plausible(
    data: bytes,
    name: str,
    *,
    lead: tuple[int, int],
    rare: tuple[int, int],
    marks: tuple[int, int],
    trail: int,
) -> float:
    sample = data[:_SAMPLE_BYTES]
    try:
        # A sample may end within a character, a file may not.
        codecs.getincrementaldecoder(name)().decode(sample, final=len(data) <= _SAMPLE_BYTES)
    except UnicodeDecodeError:
        return 0.0
    characters = 0
    credit = 0.0
    position = 0
    while position + 1 < len(sample):
        first, second = sample[position], sample[position + 1]
        if first < 0x80:
            position += 1
            continue
        position += 2
        characters += 1
        if second < trail:
            continue
        if lead[0] <= first <= lead[1] or marks[0] <= first <= marks[1]:
            credit += 1.0
        elif rare[0] <= first <= rare[1]:
            credit += 0.3
    return credit / characters if characters else 0.0


def _guessed(data: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(data[:_SAMPLE_BYTES]).best()
    return data.decode(best.encoding if best is not None else "cp1252", "replace")
