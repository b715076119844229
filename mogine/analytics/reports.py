"""The numbers: each report is one function with its SQL, and `DEFINITIONS` says what each number means."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from mogine.analytics import histogram
from mogine.analytics.engine import TOO_LONG, Reader, Row
from mogine.analytics.fold import ASKED_QUARTERS, COLUMNS, QUARTER_MS, Waits
from mogine.analytics.records import Window, epoch_ms, from_epoch_ms
from mogine.analytics.rollups import (
    DAY_LEVEL,
    LEVELS,
    gather_tail,
    pieces,
)
from mogine.analytics.store import AnalyticsStore, first_seq
from mogine.analytics.tables import LISTED, Listing
from mogine.errors import RequestError, Unavailable

TOP = 20
RETRY_S = 15
NOT_SUMMED = "many questions are not summed yet, which a running server does now: ask again in a moment"
MAX_GROUPS = 100
QUARTER_S = QUARTER_MS // 1000

_REALS = ("cost_cny", "score")


def _sum(name: str) -> str:
    # PostgreSQL's sums of whole numbers are of a kind that takes long to read.
    return f"sum({name})" if name in _REALS else f"CAST(sum({name}) AS BIGINT)"


_SUMS = ", ".join(f"{_sum(name)} AS {name}" for name in COLUMNS)
_PLAIN = tuple(name for name in COLUMNS[:16] if name not in ("visitors", "sessions"))
# Visitors and sessions are counted once, where they were first seen: they have no place in groups.
_COUNTED = ("questions", "visitors", "sessions", *_PLAIN[1:])

DEFINITIONS: Mapping[str, str] = {
    "window": "From since (included) to until (excluded): whole days of the time zone, today included, "
    "so the last day is still growing. previous is as many whole days before it. Everything is summed by "
    "quarter-hours of UTC, of which the days of every time zone are made, also those at 30 or 45 minutes; "
    "the sums stay when `cleanup` deletes the rows.",
    "questions": "Rows recorded: one per question of a person, whatever became of it. Crawlers are left out "
    "here and in all other numbers but their own.",
    "bots": "Questions of crawlers, known by the name they give themselves; bots_cost_cny: what those cost.",
    "visitors": "Different visitor hashes, each counted where it was first seen. The hash is salted anew "
    "each day of MOGINE_TIMEZONE: within such a day the number is exact; over several days it is the sum of "
    "the days, so somebody who comes back on another day counts again.",
    "sessions": "Different session ids, each counted where it was first seen; one that goes on after more "
    "than a day's pause counts again.",
    "ok": "Answers that came to their end.",
    "errors": "Questions that failed, at a vendor or here.",
    "aborted": "Answers that the visitor left or stopped.",
    "refused": "Questions turned away by a limit, a budget or a check.",
    "answered": "Questions known to be answered; unanswered: known not to be. The rest is unknown.",
    "answered_share": "answered / (answered + unanswered); null while neither is known.",
    "error_share": "errors / questions; null without questions.",
    "thumbs_up": "Questions whose visitor gave a thumb up; thumbs_down likewise. The last thumb counts, on "
    "the day of the question.",
    "prompt_tokens": "Tokens sent to vendors, as they counted them; completion_tokens: tokens received, "
    "thinking included; reasoning_tokens: the thinking among them.",
    "estimated": "Questions whose tokens were estimated because the vendor told none.",
    "cost_cny": "Sum of the cost of each question in CNY, by the prices of its day; questions without a "
    "known price count nothing.",
    "first_token_ms": "From the question's arrival to the first token sent, over all questions that had "
    "one; first_token_ms_mean is the mean of these. Percentiles (nearest rank) come from a histogram: at "
    "most 1 % away from the exact value.",
    "duration_ms": "From the question's arrival to the answer's end, over answers with status ok; "
    "duration_ms_mean is the mean of these. Percentiles (nearest rank) come from a histogram: at most 1 % "
    "away from the exact value.",
    "by": "Groups tell the 100 most frequent values. by_error: the envelope's reason, empty without one.",
    "by_source": "Questions under whose answer the document was cited; one answer can cite several.",
    "by_page": "Questions by the page they were asked from, at most 1,000 different ones in a day of UTC; "
    "the rest are told as (other pages).",
    "by_hour": "Questions by hour of the local day, 0 to 23; an hour that a clock change "
    "repeats counts as one.",
    "hour_weekday": "Questions by local weekday (first row Monday) and hour (0 to 23).",
    "top_questions": "Questions asked most often, compared without regard to blanks at the ends and to "
    "case, worded as last asked. Of each 8 hours (of UTC, those that begin within the window) the 40 most "
    "frequent are kept: exact while no more different ones are asked in 8 hours; beyond that a number may "
    "be too low, never too high. Empty when texts are not kept, and for deleted rows.",
    "top_sources": "Documents cited most often; score is the mean of their citations.",
}


@dataclass(frozen=True, slots=True)
class Table:
    """What a report returns: names of the columns, and rows as long."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """A list of objects, as JSON wants it."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Statistics:
    """All numbers of a window."""

    window: Window
    by: str
    totals: Mapping[str, Any]
    previous: Mapping[str, Any]
    series: Table
    groups: Mapping[str, Table]
    latency: Mapping[str, Mapping[str, int | None]]
    top_questions: Table
    top_sources: Table
    hour_weekday: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """As the API and `mogine stats --json` tell it."""
        before = self.window.before()
        return {
            "window": {
                "since": self.window.since.isoformat(),
                "until": self.window.until.isoformat(),
                "days": self.window.days,
                "timezone": str(self.window.timezone),
            },
            "totals": dict(self.totals),
            "previous": {
                "since": before.since.isoformat(),
                "until": before.until.isoformat(),
                **self.previous,
            },
            "by": self.by,
            "series": self.series.to_dicts(),
            **{f"by_{name}": table.to_dicts() for name, table in self.groups.items()},
            "latency": {name: dict(values) for name, values in self.latency.items()},
            "top_questions": self.top_questions.to_dicts(),
            "top_sources": self.top_sources.to_dicts(),
            "hour_weekday": [list(row) for row in self.hour_weekday],
            "definitions": dict(DEFINITIONS),
        }


# --- reports -------------------------------------------------------------------------------------


@contextmanager
def open_numbers(
    store: AnalyticsStore, window: Window, deadline_s: float | None = None
) -> Iterator["Numbers"]:
    """The numbers of `window`, and of the one before it, all from one and the same state of the record."""
    bounds = map(first_seq, (window.before().since, window.since, window.until))
    with store.reader(deadline_s) as reader:
        try:
            with store.translated():
                waits = gather_tail(reader.connection, *bounds)
        except Unavailable as error:
            if error.message != TOO_LONG:
                raise
            raise Unavailable(NOT_SUMMED, retry_after_s=RETRY_S) from error
        yield Numbers(reader, waits)


@dataclass(frozen=True, slots=True)
class Numbers:
    """A reader that has gathered what is not summed yet; `waits` is a part of that."""

    reader: Reader
    waits: Waits
    _known: dict[tuple[Any, ...], list[Row]] = field(default_factory=dict)

    def all(self, sql: str, params: Sequence[Any] = ()) -> list[Row]:
        """Every row of one statement; the same is asked once."""
        asked = (sql, *params)
        if asked not in self._known:
            self._known[asked] = self.reader.all(sql, params)
        return self._known[asked]


def totals(numbers: Numbers, window: Window) -> dict[str, Any]:
    """All sums of the window; `bots` tells of the crawlers, which count nowhere else."""
    (row,) = _sums(numbers, "all", window)
    (bots,) = _sums(numbers, "bot", window)
    found = _numbers(row, _COUNTED)
    return {**found, "bots": bots["questions"] or 0, "bots_cost_cny": round(bots["cost_cny"] or 0, 6)}


def by_day(numbers: Numbers, window: Window) -> Table:
    """One row for each local day, those without questions too."""
    found: dict[int, dict[str, Any]] = {}
    for number, row in _in_local_time(numbers, window, "/ 86400"):
        _merge(found, number, row)
    first = window.since.astimezone(window.timezone).date()
    labels = [first + timedelta(days=n) for n in range(window.days)]
    epoch = datetime(1970, 1, 1).date()
    return _table("day", [(str(day), found.get((day - epoch).days, {})) for day in labels], _COUNTED)


def by_hour(numbers: Numbers, window: Window) -> Table:
    """One row for each hour of the local day."""
    found: dict[int, dict[str, Any]] = {}
    for number, row in _in_local_time(numbers, window, "/ 3600 % 24"):
        _merge(found, number, row)
    return _table("hour", [(f"{hour:02d}", found.get(hour, {})) for hour in range(24)], _COUNTED)


def by_provider(numbers: Numbers, window: Window) -> Table:
    """One row for each provider that was asked."""
    return _by_value(numbers, "provider", window)


def by_model(numbers: Numbers, window: Window) -> Table:
    """One row for each model that answered."""
    return _by_value(numbers, "model", window)


def by_status(numbers: Numbers, window: Window) -> Table:
    """One row for each outcome."""
    return _by_value(numbers, "status", window)


def by_error(numbers: Numbers, window: Window) -> Table:
    """One row for each kind of error or refusal ("" where there was none)."""
    return _by_value(numbers, "error", window)


def by_page(numbers: Numbers, window: Window) -> Table:
    """One row for each page of the website, the busiest first."""
    return _by_value(numbers, "page", window)


def by_source(numbers: Numbers, window: Window) -> Table:
    """One row for each cited document, the most cited first."""
    return _by_value(numbers, "source", window)


def latency(numbers: Numbers, window: Window) -> dict[str, dict[str, int | None]]:
    """p50, p95 and p99, at most one percent away from the value at that rank."""
    selects, params = _in_pieces("SELECT first_token, duration FROM waits WHERE", window)
    rows = numbers.all(selects, params)
    found = {}
    low, high = _quarters(window)
    for name, place in (("first_token_ms", 0), ("duration_ms", 1)):
        counts = histogram.unpack(row[place] for row in rows)
        for slot, pair in numbers.waits.items():
            if low <= slot < high:
                counts.update(pair[place])
        found[name] = {f"p{percent}": histogram.percentile(counts, percent) for percent in (50, 95, 99)}
    return found


def top_questions(numbers: Numbers, window: Window) -> Table:
    """What is asked most often, as somebody worded it last."""
    low, high = _quarters(window)
    rows = numbers.all(
        """
        SELECT trim(t.question), a.questions, a.unanswered FROM (
          SELECT max(seq) AS seq, sum(questions) AS questions, sum(unanswered) AS unanswered
          FROM (SELECT slot, key, seq, questions, unanswered FROM asked UNION ALL
                SELECT slot, key, seq, questions, unanswered FROM fresh_asked) every
          WHERE slot >= ? AND slot < ? GROUP BY key ORDER BY questions DESC, seq DESC LIMIT ?
        ) a JOIN texts t ON t.seq = a.seq ORDER BY a.questions DESC, a.seq DESC
        """,
        (-(-low // ASKED_QUARTERS), -(-high // ASKED_QUARTERS), TOP),
    )
    return Table(("question", "questions", "unanswered"), tuple(tuple(row) for row in rows))


def top_sources(numbers: Numbers, window: Window) -> Table:
    """Which documents answers stand on."""
    rows = _sums(numbers, "source", window, limit=MAX_GROUPS)[:TOP]  # as by_source asks
    titles = dict(
        tuple(row)
        for row in numbers.all(
            "SELECT source, title FROM (SELECT source, title FROM sources "  # noqa: S608
            f"UNION ALL SELECT source, title FROM fresh_sources) every WHERE source {LISTED}",
            (Listing([row["value"] for row in rows]),),
        )
    )
    return Table(
        ("source", "title", "questions", "score"),
        tuple(
            (
                row["value"],
                titles.get(row["value"], ""),
                row["questions"],
                _mean(row["score"], row["citations"], 3),
            )
            for row in rows
        ),
    )


def hour_weekday(numbers: Numbers, window: Window) -> tuple[tuple[int, ...], ...]:
    """Seven rows (Monday first) of 24 counts, in local time."""
    grid = [[0] * 24 for _ in range(7)]
    for number, row in _in_local_time(numbers, window, "/ 3600 % 168", columns=("questions",)):
        # 1 January 1970 was a Thursday.
        grid[(number // 24 + 3) % 7][number % 24] += row["questions"]
    return tuple(tuple(row) for row in grid)


# --- how they are put together -------------------------------------------------------------------


def _quarters(window: Window) -> tuple[int, int]:
    """The quarter-hours of a window: from, and to before."""
    return epoch_ms(window.since) // QUARTER_MS, -(-epoch_ms(window.until) // QUARTER_MS)


def _pieces(window: Window) -> list[tuple[int, int, int]]:
    return pieces(*_quarters(window))


def _in_pieces(select: str, window: Window, *first: Any) -> tuple[str, list[Any]]:
    """`select` for each piece of a window, and the values bound: those of its own `first`, and the slots."""
    found = _pieces(window)
    selects = " UNION ALL ".join([f"{select} level = ? AND slot >= ? AND slot < ?"] * len(found))
    return selects, [value for piece in found for value in (*first, *piece)]


def _sums(numbers: Numbers, dimension: str, window: Window, *, limit: int = 0) -> list[dict[str, Any]]:
    """Sums by value, the most frequent first; of everything as one row when there is no `limit`."""
    grouped = "GROUP BY r.value ORDER BY questions DESC, r.value LIMIT ?" if limit else ""
    value = "r.value" if limit else "''"
    columns = f"value, {', '.join(COLUMNS)}"
    # Each piece is one range of the table's own order.
    each = f"SELECT {columns} FROM rollups WHERE dimension = ? AND"  # noqa: S608 - our own column names
    selects, params = _in_pieces(each, window, dimension)
    rows = numbers.all(
        f"SELECT {value} AS value, {_SUMS} FROM ({selects} UNION ALL "  # noqa: S608
        f"SELECT {columns} FROM fresh WHERE dimension = ? AND slot >= ? AND slot < ?) r {grouped}",
        [*params, dimension, *_quarters(window), *([limit] if limit else [])],
    )
    return [named for row in rows if (named := _named(row))["questions"] or not limit]


def _in_local_time(
    numbers: Numbers, window: Window, unit: str, columns: Sequence[str] = COLUMNS
) -> list[tuple[int, dict[str, Any]]]:
    """Sums by a unit of local time since 1970; a number can come twice, on both sides of a clock change."""
    sums = ", ".join(f"{_sum(name)} AS {name}" for name in columns)
    found = []
    for low, high, offset_s in offsets(window):
        # Whole hours from UTC: the sums of hours do, a quarter as many.
        level = 1 if offset_s % 3600 == low % 4 == high % 4 == 0 else 0
        seconds, size = QUARTER_S * LEVELS[level], LEVELS[level]
        rows = numbers.all(
            f"SELECT (slot * {seconds} + {offset_s}) {unit} AS number, {sums} FROM rollups "  # noqa: S608
            "WHERE dimension = 'all' AND level = ? AND slot >= ? AND slot < ? GROUP BY 1 UNION ALL "
            f"SELECT (slot * {QUARTER_S} + {offset_s}) {unit} AS number, {sums} FROM fresh "
            "WHERE dimension = 'all' AND slot >= ? AND slot < ? GROUP BY 1",
            (level, low // size, high // size, low, high),
        )
        found += [(row["number"], _named(row)) for row in rows]
    return found


def _named(row: Row) -> dict[str, Any]:
    return dict(zip(row.keys(), row, strict=True))


def offsets(window: Window) -> list[tuple[int, int, int]]:
    """The window cut where its zone's clock changes: quarter-hours from and to before, seconds from UTC."""
    low, high = _quarters(window)
    edges = [low]
    day = low
    while day < high:
        following = min(day + LEVELS[DAY_LEVEL], high)
        if _offset_s(day, window.timezone) != _offset_s(following, window.timezone):
            edges.append(_change(day, following, window.timezone))
        day = following
    edges.append(high)
    return [(a, b, _offset_s(a, window.timezone)) for a, b in pairwise(edges) if a < b]


def _change(low: int, high: int, zone: ZoneInfo) -> int:
    """The first quarter-hour after `low` with the offset of `high`."""
    before = _offset_s(low, zone)
    while high - low > 1:
        middle = (low + high) // 2
        if _offset_s(middle, zone) == before:
            low = middle
        else:
            high = middle
    return high


def _offset_s(quarter: int, zone: ZoneInfo) -> int:
    offset = from_epoch_ms(quarter * QUARTER_MS).astimezone(zone).utcoffset() or timedelta(0)
    return offset // timedelta(seconds=1)


def _merge(found: dict[int, dict[str, Any]], number: int, row: dict[str, Any]) -> None:
    known = found.setdefault(number, dict.fromkeys(COLUMNS, 0))
    for name in COLUMNS:
        known[name] += row[name]


def _numbers(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is told of one set of questions; means are None where nothing was measured."""
    found: dict[str, Any] = {name: row.get(name) or 0 for name in names}
    found["cost_cny"] = round(found["cost_cny"], 6)
    found["first_token_ms_mean"] = _mean(row.get("first_token_ms"), row.get("first_tokens"), 0)
    found["duration_ms_mean"] = _mean(row.get("duration_ms"), row.get("durations"), 0)
    return _with_shares(found)


def _mean(total: float | None, count: int | None, digits: int) -> float | None:
    return round((total or 0) / count, digits) if count else None


def _with_shares(row: dict[str, Any]) -> dict[str, Any]:
    judged = row["answered"] + row["unanswered"]
    row["answered_share"] = round(row["answered"] / judged, 4) if judged else None
    row["error_share"] = round(row["errors"] / row["questions"], 4) if row["questions"] else None
    return row


def _table(name: str, rows: Iterable[tuple[str, Mapping[str, Any]]], names: Sequence[str]) -> Table:
    full = [{name: label, **_numbers(row, names)} for label, row in rows]
    columns = tuple(full[0]) if full else (name, "questions")
    return Table(columns, tuple(tuple(row.values()) for row in full))


def _by_value(numbers: Numbers, dimension: str, window: Window) -> Table:
    rows = _sums(numbers, dimension, window, limit=MAX_GROUPS)
    return _table(dimension, [(row["value"], row) for row in rows], _PLAIN)


REPORTS: Mapping[str, Callable[[Numbers, Window], Table]] = {
    "day": by_day,
    "hour": by_hour,
    "provider": by_provider,
    "model": by_model,
    "status": by_status,
    "error": by_error,
    "source": by_source,
    "page": by_page,
}


def check_by(by: str) -> None:
    """Raises RequestError(reason="bad_filter") for a grouping that there is not."""
    if by not in REPORTS:
        raise RequestError(f"by must be one of {', '.join(REPORTS)}", reason="bad_filter", param="by")


def statistics(
    store: AnalyticsStore, window: Window, *, by: str = "day", deadline_s: float | None = None
) -> Statistics:
    """Every number of `window`, all from one and the same state of the record."""
    check_by(by)
    with open_numbers(store, window, deadline_s) as numbers:
        return Statistics(
            window=window,
            by=by,
            totals=totals(numbers, window),
            previous=totals(numbers, window.before()),
            series=REPORTS[by](numbers, window),
            groups={
                name: report(numbers, window)
                for name, report in REPORTS.items()
                if name not in ("day", "hour")
            },
            latency=latency(numbers, window),
            top_questions=top_questions(numbers, window),
            top_sources=top_sources(numbers, window),
            hour_weekday=hour_weekday(numbers, window),
        )
