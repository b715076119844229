"""Rows to Markdown: a table with its header row, or one entry per row of questions and answers."""

import csv
import re
from collections.abc import Collection, Iterable, Sequence
from io import StringIO

from mogine.ingest.loaders.encoding import decode
from mogine.ingest.loaders.parsed import Parsed, heading, join, one_line, plain

QUESTION_NAMES = frozenset(
    str.split(
        "问题 问 提问 常见问题 用户问题 标准问题 标准问 问句 問題 常見問題 question questions q query faq"
    )
)
ANSWER_NAMES = frozenset(
    str.split("答案 答 回答 解答 回复 答复 标准答案 参考答案 回覆 answer answers a reply response")
)
# Headers that say more than the bare word; `问题分类` (kind) and `question id` are no questions.
_A_QUESTION = re.compile(r".{0,8}(?:问题|問題|提问|question)(?:内容|描述|标题|text)?")
_AN_ANSWER = re.compile(
    r".{0,8}(?:答案|回答|解答|答复|答覆|回复|回覆|answer|reply|response)(?:内容|正文|描述|text)?"
)
# Above this many characters an entry is cut in pieces later on; its question then goes into the heading.
LONG_ENTRY_CHARS = 400
_DELIMITERS = ",;\t|"

Rows = Sequence[Sequence[str]]


def load_csv(data: bytes) -> Parsed:
    """A CSV file with comma, semicolon, tab or bar between its cells."""
    text = decode(data).replace("\x00", "")
    # Of the process, so it only grows; a cell is never longer than its file.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    delimiter = _delimiter(text)
    rows = list(csv.reader(StringIO(text, newline=""), delimiter=delimiter))
    return Parsed(render_rows(rows))


def render_rows(rows: Iterable[Sequence[str]], level: int = 2) -> str:
    """Markdown of a sheet: its first row that is not empty is the header; `level` is for headings in it."""
    kept = _trimmed(rows)
    if not kept:
        return ""
    question, answer = _question_and_answer(kept[0])
    if question is not None and answer is not None and len(kept) > 1:
        return _entries(kept, question, answer, level)
    return render_table(kept)


def render_table(rows: Rows) -> str:
    """A Markdown table of rows of equal length, the first one its header."""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    if not lines:
        return ""
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _trimmed(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rows and columns that hold nothing taken out, all rows of one length."""
    filled = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    used = sorted({i for row in filled for i, cell in enumerate(row) if cell})
    return [[row[i] if i < len(row) else "" for i in used] for row in filled]


def _question_and_answer(header: Sequence[str]) -> tuple[int | None, int | None]:
    names = [one_line(cell).lower().strip("：:*") for cell in header]
    answer = _column(names, ANSWER_NAMES, _AN_ANSWER)
    question = _column(
        [name if i != answer else "" for i, name in enumerate(names)], QUESTION_NAMES, _A_QUESTION
    )
    return question, answer


def _column(names: Sequence[str], exact: Collection[str], like: re.Pattern[str]) -> int | None:
    """The first column of one of the names; when there is none, of one that is like them."""
    found = [i for i, name in enumerate(names) if name in exact]
    found += [i for i, name in enumerate(names) if like.fullmatch(name.replace("_", " ").replace(" ", ""))]
    return found[0] if found else None


def _entries(rows: Rows, question: int, answer: int, level: int) -> str:
    """One block per row, a rule between them so that no passage holds half of one and half of the next."""
    header = rows[0]
    blocks: list[str] = []
    has_heading = False
    for row in rows[1:]:
        asked = one_line(row[question])
        others = [i for i in range(len(header)) if i not in (question, answer) and row[i]]
        lines = [
            f"{header[question]}: {asked}",
            f"{header[answer]}: {row[answer]}",
            *(f"{header[i]}: {one_line(row[i])}" for i in others),
        ]
        entry = plain("\n".join(lines))
        is_long = len(entry) > LONG_ENTRY_CHARS
        top = heading(level, asked[:100] if is_long else "") if is_long or has_heading else ""
        blocks.append(join([top, entry]))
        has_heading = is_long
    return "\n\n---\n\n".join(blocks)


def _delimiter(text: str) -> str:
    """The character that cuts the first lines into the same number (above one) of cells most often."""
    sample = text[:16384]
    best, best_score = ",", 0.0
    for candidate in _DELIMITERS:
        counts = [len(row) for row in csv.reader(StringIO(sample, newline=""), delimiter=candidate) if row][
            :50
        ]
        if not counts or counts[0] < 2:
            continue
        score = sum(1 for n in counts if n == counts[0]) / len(counts)
        if score > best_score:
            best, best_score = candidate, score
    return best
