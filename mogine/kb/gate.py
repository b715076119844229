"""Questions with known answers, kept beside the documents: no change of them makes answers worse unseen."""

import json
import re
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from mogine.errors import RequestError, SettingsError, StoreError, Unavailable
from mogine.kb.embedders import Embedder
from mogine.kb.knowledge import MODES, KnowledgeBase, Mode
from mogine.kb.manifest import Generation
from mogine.kb.passages import MAX_QUERY_CHARS, Hit, document_id

TESTS_NAME = "kb-tests.jsonl"
DEFAULT_TOP_K = 3
MAX_TOP_K = 50
_FIELDS = ("question", "document", "contains", "top_k", "mode")
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

GateMode = Literal["strict", "warn", "off"]


@dataclass(frozen=True, slots=True)
class KbTest:
    """A question, and what one of its first `top_k` passages must be: of `document`, and hold `contains`.

    `document` is a source, its end ("returns.md"), an id or an address. At least one of both is given.
    """

    question: str
    document: str = ""
    contains: str = ""
    top_k: int = DEFAULT_TOP_K
    mode: Mode = "hybrid"

    def is_met_by(self, hit: Hit) -> bool:
        """Whether this passage is what was expected."""
        passage = hit.passage
        is_document = not self.document or self.names(passage.source, passage.url)
        return is_document and _plain(self.contains) in _plain(passage.text)

    def names(self, source: str, url: str) -> bool:
        """Whether `document` is the one with this source and address."""
        return self.document in (source, url, document_id(source)) or source.endswith("/" + self.document)

    def to_dict(self) -> dict[str, Any]:
        """The object of its line; what is left at its default is left out."""
        fields: dict[str, Any] = {"question": self.question}
        if self.document:
            fields["document"] = self.document
        if self.contains:
            fields["contains"] = self.contains
        fields["top_k"] = self.top_k
        return fields if self.mode == "hybrid" else {**fields, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class Outcome:
    """`rank` is that of the first passage that was expected, from 1; None when none is among the first 50."""

    test: KbTest
    rank: int | None
    first: str

    @property
    def passed(self) -> bool:
        return self.rank is not None and self.rank <= self.test.top_k


@dataclass(frozen=True, slots=True)
class Change:
    """One test before and after; `before` is None where there was nothing to compare with."""

    after: Outcome
    before: Outcome | None

    @property
    def is_worse(self) -> bool:
        """It passed, and fails now."""
        return self.before is not None and self.before.passed and not self.after.passed

    @property
    def moved(self) -> bool:
        return self.before is not None and self.before.rank != self.after.rank


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests say about a generation that does not serve yet. `may_serve` is the gate's decision."""

    changes: tuple[Change, ...]
    may_serve: bool

    @property
    def worse(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.is_worse)

    @property
    def moved(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.moved)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(change.after for change in self.changes if not change.after.passed)


# --- the file ------------------------------------------------------------------------------------


def load_tests(path: Path) -> list[KbTest]:
    """The tests of a home; none when there is no file. Raises SettingsError that names every wrong line."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); it must be UTF-8 text") from error
    tests, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("//"):
            continue
        try:
            tests.append(test_from(json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"line {number} is no JSON object ({error.msg})")
        except RequestError as error:
            problems.append(f"line {number}: {error.message}")
    if problems:
        raise SettingsError("\n".join([f"{path}:", *(f"  - {problem}" for problem in problems[:20])]))
    return tests


def test_from(fields: Any) -> KbTest:
    """A test from the object of its line. Raises RequestError."""
    if not isinstance(fields, dict):
        raise RequestError('write one object a line: {"question": "...", "document": "...", "top_k": 3}')
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise RequestError(f"unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")
    question, document, contains = (fields.get(name, "") for name in _FIELDS[:3])
    if not all(isinstance(value, str) for value in (question, document, contains)):
        raise RequestError("question, document and contains must be text")
    if not question.strip() or len(question) > MAX_QUERY_CHARS:
        raise RequestError(f"question must have 1 to {MAX_QUERY_CHARS} characters")
    if not document.strip() and not _plain(contains):
        raise RequestError("document or contains must say what is expected")
    top_k = fields.get("top_k", DEFAULT_TOP_K)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= MAX_TOP_K:
        raise RequestError(f"top_k must be a whole number from 1 to {MAX_TOP_K}")
    mode = next((mode for mode in MODES if mode == fields.get("mode", "hybrid")), None)
    if mode is None:
        raise RequestError(f"mode must be one of {', '.join(MODES)}")
    return KbTest(question.strip(), document.strip(), contains.strip(), top_k, mode)


def add_test(path: Path, test: KbTest) -> bool:
    """Appends a test; False when the file has it already. Raises SettingsError, StoreError."""
    known = load_tests(path)
    if test in known:
        return False
    try:
        line = json.dumps(test.to_dict(), ensure_ascii=False) + "\n"
        is_open_ended = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + line if is_open_ended else line)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror})") from error
    return True


# --- running -------------------------------------------------------------------------------------


def run_tests(knowledge: KnowledgeBase, tests: Sequence[KbTest]) -> list[Outcome]:
    """Asks every question. Raises what `search` raises."""
    return [_run(knowledge, test) for test in tests]


def weigh(
    current: Generation | None,
    candidate: Generation,
    embedder: Embedder,
    tests: Sequence[KbTest],
    mode: GateMode,
) -> Verdict:
    """The tests on a generation that does not serve yet, beside those on the one that does.

    `strict` holds it back when a test that passed fails. Where the current one cannot be asked, because it
    was made with another embedder, there is nothing to compare with, and `strict` wants all tests passed.
    """
    after = _outcomes(candidate, embedder, tests)
    before = _outcomes_before(current, embedder, tests) if current else None
    known: Sequence[Outcome | None] = before or [None] * len(after)
    changes = tuple(Change(new, old) for new, old in zip(after, known, strict=True))
    is_comparable = current is None or before is not None
    is_worse = any(c.is_worse for c in changes) or (
        not is_comparable and not all(c.after.passed for c in changes)
    )
    return Verdict(changes, may_serve=mode != "strict" or not is_worse)


def _outcomes_before(
    current: Generation, embedder: Embedder, tests: Sequence[KbTest]
) -> list[Outcome] | None:
    try:
        return _outcomes(current, embedder, tests)
    except (Unavailable, StoreError):
        return None  # another embedder's, or damaged: no ground for refusing what would heal it


def _outcomes(generation: Generation, embedder: Embedder, tests: Sequence[KbTest]) -> list[Outcome]:
    with closing(KnowledgeBase(generation, embedder, readers=1)) as knowledge:
        return run_tests(knowledge, tests)


def _run(knowledge: KnowledgeBase, test: KbTest) -> Outcome:
    mode: Mode = test.mode if knowledge.generation.manifest.dimensions else "keyword"
    hits = knowledge.search(test.question, MAX_TOP_K, mode)
    rank = next((rank for rank, hit in enumerate(hits, start=1) if test.is_met_by(hit)), None)
    return Outcome(test, rank, hits[0].passage.source if hits else "")


def junit(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The outcomes as JUnit's XML, which every CI system reads."""
    failed = sum(not outcome.passed for outcome in outcomes)
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<testsuite name="mogine kb test" tests="{len(outcomes)}" failures="{failed}" errors="0" '
        f'skipped="0" time="{seconds:.3f}">',
    ]
    for outcome in outcomes:
        name = _attribute(outcome.test.question)
        case = f'  <testcase classname="kb-tests" name={name} time="0"'
        if outcome.passed:
            lines.append(f"{case}/>")
        else:
            lines += [
                f"{case}>",
                f"    <failure message={_attribute(why_failed(outcome))}/>",
                "  </testcase>",
            ]
    return "\n".join([*lines, "</testsuite>", ""])


def why_failed(outcome: Outcome) -> str:
    """In words, for people."""
    test = outcome.test
    wanted = " with ".join(
        part for part in (test.document, f'"{test.contains}"' if test.contains else "") if part
    )
    place = f"is at rank {outcome.rank}" if outcome.rank else f"is not among the first {MAX_TOP_K}"
    first = f"; first is {outcome.first}" if outcome.first and outcome.rank != 1 else ""
    return f"{wanted} {place}, expected within {test.top_k}{first}"


def _attribute(text: str) -> str:
    return quoteattr(_NOT_IN_XML.sub("\ufffd", text))


def _plain(text: str) -> str:
    """For comparison: one width, one case, no difference in blanks and line breaks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
