"""What is seen of one question while it is answered; becomes exactly one row, however it ends."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from mogine.analytics.records import Answered, Kind, QueryRecord, Signal, Status
from mogine.answer import AnswerEvent, Answering, Declined, PassedOver, estimate_tokens
from mogine.chat import ChatRequest, Citation, Citations, Delta, Finish, Reasoning, ToolCalls, Usage
from mogine.errors import ContentFiltered, MogineError
from mogine.serve.books import Books
from mogine.serve.limits import TooOften
from mogine.serve.visitors import utc_now

if TYPE_CHECKING:
    from mogine.serve.telemetry import QuestionTrace

# Questions that the documents do not answer stay below this; see MIN_SCORE of mogine/answer.py.
SURE_SCORE = 0.35
MAX_PIECES = 256  # a piece of two letters takes as much memory as fifty of them
SURE_SCORE_BY_WORDS = 0.2
REGRET_CHARS = 400
IMAGE_TOKENS = 1_000  # about what vision models read of one picture
_MARK = re.compile(r"\[(\d{1,2})\]")
# How models say that they do not know, when they forget the mark that they were asked for.
_REGRET = re.compile(
    r"不知道|不清楚|不确定|(?:资料|文档|文件)(?:中|里)并?(?:没有|未)"
    r"|(?:没有|未能?|无法|暂无)[^。！？\n]{0,12}(?:找到|提到|提及|说明|相关(?:信息|内容|资料)|回答|确认|确定|查到)"
    r"|\bdo(?:es)?(?: not|n't|n’t) (?:know|mention|contain|say|have|cover|specify)"
    r"|\b(?:not|n't|n’t) (?:mentioned|found|covered|specified|in the documents)|\bno information\b"
    r"|\b(?:unable|not able) to (?:answer|find)",
    re.IGNORECASE,
)


@dataclass(slots=True)
class Observation:
    """One question. `request` is set when it goes to a provider; until then nothing was spent on it."""

    id: str
    kind: Kind
    visitor: str
    provider: str
    question: str
    page_url: str = ""
    session: str = ""
    model: str = ""
    bot: bool = False
    sure_score: float = SURE_SCORE
    request: ChatRequest | None = None
    citations: tuple[Citation, ...] = ()
    searched: bool = True
    search_ms: int | None = None
    declined: bool = False
    usage: Usage | None = None
    finish: Finish | None = None
    error: Exception | None = None
    first_token_ms: int | None = None
    trace: "QuestionTrace | None" = None
    clock: Callable[[], float] = time.perf_counter
    started_at: datetime = field(default_factory=utc_now)
    _began: float = 0.0
    _texts: list[str] = field(default_factory=list)
    _reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts)

    def ask(self, provider: str, request: ChatRequest) -> None:
        """From here on `provider` is asked, and what it reads and says may cost money."""
        self.request, self.provider, self.model = request, provider, request.model

    def pass_over(self, reason: str) -> None:
        """Whoever was asked last has failed before its first word, and the next one is asked."""
        if self.trace is not None:
            self.trace.failed(reason)

    def say(self, text: str) -> None:
        """A piece of the answer passes."""
        texts = self._texts
        texts.append(text)
        if len(texts) >= MAX_PIECES:
            self._texts = ["".join(texts)]
        if self.first_token_ms is None:
            self.first_token_ms = self._elapsed_ms()

    def see(self, event: AnswerEvent) -> None:
        """Look at one event as it passes."""
        kind = type(event)
        if kind is Delta:
            self.say(event.text)  # type: ignore[union-attr]
        elif kind is Reasoning:
            self._reasoning_tokens += estimate_tokens(event.text)  # type: ignore[union-attr]
            if self.first_token_ms is None:
                self.first_token_ms = self._elapsed_ms()
        else:
            self._see_rare(event)

    def _see_rare(self, event: AnswerEvent) -> None:
        match event:
            case Usage():
                self.usage = event
            case Finish():
                self.finish = event
                self.model = event.model or self.model
            case Answering(provider, model):
                self.provider, self.model = provider, model
            case Citations(items, searched, search_ms):
                self.citations, self.searched = items, searched
                # An application's own sources come later, and tell nothing of our search.
                self.search_ms = self.search_ms if search_ms is None else search_ms
            case Declined():
                self.declined = True
            case PassedOver(_, reason):
                self.pass_over(reason)
            case ToolCalls():
                if self.first_token_ms is None:
                    self.first_token_ms = self._elapsed_ms()

    @property
    def answered(self) -> Answered:
        """Whether the documents held an answer, as far as can be seen from outside the model."""
        if self.kind != "chat" or self.finish is None or self.error is not None:
            return "unknown"
        if self.provider == "extract" and self.citations and self.citations[0].score < self.sure_score:
            return "unknown"  # it quotes whatever is nearest, so its marks prove nothing
        text = self.text
        known = {citation.number for citation in self.citations}
        is_cited = any(int(number) in known for number in _MARK.findall(text))
        if is_cited and not self.declined:
            return "yes"
        if not self.searched:
            return "unknown"
        return "no" if self.declined or not self.citations or self._regrets(text) else "unknown"

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What tells at once that the question went unanswered; the visitor's next steps may tell more."""
        if self.kind != "chat" or self.finish is None or self.error is not None or not self.searched:
            return ()
        if self.answered == "yes":
            return ()
        found: list[Signal] = []
        # Sources of an application come without a score, which is 0 then.
        if not self.citations or 0 < self.citations[0].score < self.sure_score:
            found.append("no_passage")
        if self.declined or self._regrets(self.text):
            found.append("declined")
        return tuple(found)

    def _regrets(self, text: str) -> bool:
        return self.provider != "extract" and _REGRET.search(text[:REGRET_CHARS]) is not None

    def row(self, status: Status, reason: str, books: Books) -> QueryRecord:
        """The row, told at the end."""
        # Whoever leaves before the first word has had the vendor read the question.
        usage = self.usage or self._estimate(sent=status == "aborted")
        return QueryRecord(
            id=self.id,
            started_at=self.started_at,
            kind=self.kind,
            provider=self.provider,
            status=status,
            session=self.session,
            visitor=self.visitor,
            page_url=self.page_url,
            model=self.model,
            question=self.question,
            answer=self.text,
            error_type=reason,
            answered=self.answered,
            citations=self.citations,
            top_score=self.citations[0].score if self.citations else None,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            reasoning_tokens=usage.reasoning_tokens if usage else None,
            tokens_estimated=usage.estimated if usage else False,
            cost_cny=books.cost_cny(self.provider, self.model, usage, self.started_at),
            first_token_ms=self.first_token_ms,
            duration_ms=self._elapsed_ms(),
            bot=self.bot,
            signals=self.signals,
            search_ms=self.search_ms,
        )

    def usage_so_far(self) -> Usage | None:
        """What the vendor told, else an estimate that says so; None when no provider was asked."""
        return self.usage or self._estimate()

    def _estimate(self, *, sent: bool = False) -> Usage | None:
        if self.request is None or (self.first_token_ms is None and not sent):
            return None
        prompt = sum(
            estimate_tokens(message.text) + IMAGE_TOKENS * len(message.images)
            for message in self.request.messages
        )
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=estimate_tokens(self.text) + self._reasoning_tokens,
            reasoning_tokens=self._reasoning_tokens,
            estimated=True,
        )

    def _elapsed_ms(self) -> int:
        return round((self.clock() - self._began) * 1000)


class recorded:
    """Record `seen` on every way out of the block; errors pass on."""

    __slots__ = ("_books", "_seen")

    def __init__(self, books: Books, seen: Observation) -> None:
        self._books = books
        self._seen = seen

    def __enter__(self) -> Observation:
        return self._seen

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        seen = self._seen
        status: Status = "ok"
        reason = ""
        if isinstance(error, asyncio.CancelledError | ConnectionError | GeneratorExit):
            status, reason = "aborted", "client_left"
        elif isinstance(error, Exception):
            status, reason = _outcome(seen, error)
            if isinstance(error, TooOften) and error.repeated:
                reason = ""
        elif seen.error is not None:
            status, reason = _outcome(seen, seen.error)
        if status != "refused" or reason:
            row = seen.row(status, reason, self._books)
            self._books.close(row)
            if seen.trace is not None:
                seen.trace.end(row, seen.finish, seen.usage)


def _outcome(seen: Observation, error: Exception) -> tuple[Status, str]:
    reason = error.reason if isinstance(error, MogineError) else "internal_error"
    refused = seen.request is None or isinstance(error, ContentFiltered)
    return ("refused" if refused else "error"), reason
