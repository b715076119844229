"""The nouns of analytics: one recorded question, a window of time, and what is picked out of the record."""

import secrets
from collections.abc import Iterable
from dataclasses import field
from datetime import UTC, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from mogine.chat import Citation
from mogine.errors import RequestError
from mogine.values import value

Kind = Literal["chat", "llm", "v1"]
Status = Literal["ok", "error", "aborted", "refused"]
Answered = Literal["yes", "no", "unknown"]
Feedback = Literal["", "up", "down"]
Signal = Literal["no_passage", "declined", "thumbs_down", "rephrased", "handoff"]

KINDS: tuple[Kind, ...] = ("chat", "llm", "v1")
STATUSES: tuple[Status, ...] = ("ok", "error", "aborted", "refused")
ANSWERED: tuple[Answered, ...] = ("yes", "no", "unknown")
RATINGS: tuple[Feedback, ...] = ("up", "down")
# What tells that a question went unanswered. In the file each is a bit, by its place: new ones go to the end.
SIGNALS: tuple[Signal, ...] = ("no_passage", "declined", "thumbs_down", "rephrased", "handoff")
MAX_DAYS = 3660


def new_id(at: datetime | None = None) -> str:
    """44 hex digits: milliseconds since 1970 (sorts by time), then 128 random bits, as request ids are."""
    return f"{epoch_ms(at or datetime.now(UTC)):012x}{secrets.token_hex(16)}"


def epoch_ms(at: datetime) -> int:
    """Whole milliseconds since 1970; exact, which `timestamp()` is not."""
    return max(0, (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1))


def from_epoch_ms(value: int) -> datetime:
    """The moment `value` milliseconds after 1970, in UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=value)


@value(frozen=True, slots=True, kw_only=True)
class QueryRecord:
    """One question and what became of it; also of one that was refused, failed or abandoned.

    `id` is the request's id, by which feedback finds the row. `kind` tells the route (`/api/chat`,
    `/api/llm/*`, `/v1/*`), `visitor` is a salted daily hash, never an address. `error_type` is the
    envelope's `reason` ("" when all went well). None means not known, which is not zero.
    `bot` tells a crawler, by the name it gave itself; that name is not kept.
    Texts come as they are: the recorder masks them before anything is written. Of a citation the
    excerpt is not kept. `signals` tell why the question counts as unanswered: no passage was near enough, the
    answer said that it is not in the documents, a thumb down, the same words tried again, a person asked for.
    `search_ms` is how long passages were looked for, None when nobody looked.
    """

    started_at: datetime
    kind: Kind
    provider: str
    status: Status
    id: str = ""
    session: str = ""
    visitor: str = ""
    page_url: str = ""
    model: str = ""
    question: str = ""
    answer: str = ""
    error_type: str = ""
    answered: Answered = "unknown"
    citations: tuple[Citation, ...] = ()
    top_score: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    tokens_estimated: bool = False
    cost_cny: float | None = None
    first_token_ms: int | None = None
    duration_ms: int | None = None
    feedback: Feedback = ""
    bot: bool = False
    signals: tuple[Signal, ...] = ()
    search_ms: int | None = None

    def __post_init__(self) -> None:
        if self.started_at.tzinfo is None:
            raise ValueError("started_at must be an aware time, in UTC")
        if not self.id:
            object.__setattr__(self, "id", new_id(self.started_at))


def time_text(at: datetime) -> str:
    """A moment (in UTC) as JSON tells it."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def signal_bits(signals: Iterable[str]) -> int:
    """Signals as the number that stands for them in the file."""
    return sum(1 << SIGNALS.index(signal) for signal in SIGNALS if signal in set(signals))


def signals_of(bits: int) -> tuple[Signal, ...]:
    """The other way round; bits that nobody knows are left out."""
    return tuple(signal for place, signal in enumerate(SIGNALS) if bits >> place & 1)


@value(frozen=True, slots=True)
class Window:
    """From `since` (included) to `until` (excluded), both aware; `timezone` says what a day is."""

    since: datetime
    until: datetime
    timezone: ZoneInfo = field(default_factory=lambda: ZoneInfo("UTC"))

    @classmethod
    def last_days(cls, days: int, now: datetime, timezone: ZoneInfo) -> "Window":
        """The last `days` whole local days, today included, so the window ends at the next midnight.

        Raises RequestError(reason="bad_filter") unless 1 <= days <= MAX_DAYS.
        """
        if not 1 <= days <= MAX_DAYS:
            raise RequestError(
                f"days must be a whole number from 1 to {MAX_DAYS}", reason="bad_filter", param="days"
            )
        tomorrow = now.astimezone(timezone).date() + timedelta(days=1)
        since = datetime.combine(tomorrow - timedelta(days=days), time(), timezone)
        return cls(
            since.astimezone(UTC), datetime.combine(tomorrow, time(), timezone).astimezone(UTC), timezone
        )

    @property
    def days(self) -> int:
        """How many local days it touches."""
        first = self.since.astimezone(self.timezone).date()
        last = (self.until - timedelta(microseconds=1)).astimezone(self.timezone).date()
        return (last - first).days + 1

    def before(self) -> "Window":
        """As many local days, ending where this one begins."""
        start = self.since.astimezone(self.timezone)
        since = datetime.combine(start.date() - timedelta(days=self.days), start.time(), self.timezone)
        return Window(since.astimezone(UTC), self.since, self.timezone)


@value(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows are wanted; "" and None pick everything. `search` is found in question or answer.

    `unanswered` picks those with any of SIGNALS; `bot` is "yes" for crawlers alone, "no" for all others.
    """

    since: datetime | None = None
    until: datetime | None = None
    provider: str = ""
    model: str = ""
    kind: str = ""
    status: str = ""
    answered: str = ""
    visitor: str = ""
    session: str = ""
    feedback: str = ""
    unanswered: bool = False
    bot: str = ""
    search: str = ""

    @property
    def is_span(self) -> bool:
        """Whether all rows of its time are wanted."""
        return self == Selection(since=self.since, until=self.until)
