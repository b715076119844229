"""The numbers: each report is one function with its SQL, and `DEFINITIONS` says what each number means."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any

from mogine.analytics.records import Window, epoch_ms
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore, Reader
from mogine.errors import RequestError

TOP = 20
MAX_GROUPS = 100

# One row of numbers, for any set of rows q. None where nothing was measured: that is not zero.
_SUMS = """
  count(*) AS questions,
  count(DISTINCT nullif(q.visitor, '')) AS visitors,
  count(DISTINCT nullif(q.session, '')) AS sessions,
  coalesce(sum(q.status = 'ok'), 0) AS ok,
  coalesce(sum(q.status = 'error'), 0) AS errors,
  coalesce(sum(q.status = 'aborted'), 0) AS aborted,
  coalesce(sum(q.status = 'refused'), 0) AS refused,
  coalesce(sum(q.answered = 'yes'), 0) AS answered,
  coalesce(sum(q.answered = 'no'), 0) AS unanswered,
  coalesce(sum(q.feedback = 'up'), 0) AS thumbs_up,
  coalesce(sum(q.feedback = 'down'), 0) AS thumbs_down,
  coalesce(sum(q.prompt_tokens), 0) AS prompt_tokens,
  coalesce(sum(q.completion_tokens), 0) AS completion_tokens,
  coalesce(sum(q.reasoning_tokens), 0) AS reasoning_tokens,
  coalesce(sum(q.tokens_estimated), 0) AS estimated,
  round(coalesce(sum(q.cost_cny), 0), 6) AS cost_cny,
  round(avg(q.first_token_ms)) AS first_token_ms_mean,
  round(avg(CASE WHEN q.status = 'ok' THEN q.duration_ms END)) AS duration_ms_mean
"""

DEFINITIONS: Mapping[str, str] = {
    "window": "From since (included) to until (excluded): whole days of the time zone, today included, "
    "so the last day is still growing. previous is as many whole days before it.",
    "questions": "Rows recorded: one per question, whatever became of it.",
    "visitors": "Different visitor hashes. The hash is salted anew each day, so somebody who comes back "
    "on another day counts again.",
    "sessions": "Different session ids.",
    "ok": "Answers that came to their end.",
    "errors": "Questions that failed, at a vendor or here.",
    "aborted": "Answers that the visitor left or stopped.",
    "refused": "Questions turned away by a limit, a budget or a check.",
    "answered": "Questions known to be answered; unanswered: known not to be. The rest is unknown.",
    "answered_share": "answered / (answered + unanswered); null while neither is known.",
    "error_share": "errors / questions; null without questions.",
    "thumbs_up": "Questions whose visitor gave a thumb up; thumbs_down likewise. The last thumb counts.",
    "prompt_tokens": "Tokens sent to vendors, as they counted them; completion_tokens: tokens received, "
    "thinking included; reasoning_tokens: the thinking among them.",
    "estimated": "Questions whose tokens were estimated because the vendor told none.",
    "cost_cny": "Sum of the cost of each question in CNY, by the prices of its day; questions without a "
    "known price count nothing.",
    "first_token_ms": "From the question's arrival to the first token sent, over all questions that had "
    "one. Percentiles are exact (nearest rank): no error.",
    "duration_ms": "From the question's arrival to the answer's end, over answers with status ok. "
    "Percentiles are exact (nearest rank): no error.",
    "by_source": "Questions under whose answer the document was cited; one answer can cite several.",
    "by_hour": "Questions by hour of the local day, 0 to 23; an hour that a clock change "
    "repeats counts as one.",
    "hour_weekday": "Questions by local weekday (first row Monday) and hour (0 to 23).",
    "top_questions": "Questions asked most often, compared without regard to blanks at the ends and to "
    "the case of Latin letters; empty when texts are not kept.",
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


def totals(reader: Reader, window: Window) -> dict[str, Any]:
    """All sums of the window."""
    row = reader.one(f"SELECT {_SUMS} FROM queries q WHERE q.seq >= ? AND q.seq < ?", _range(window))  # noqa: S608
    return _with_shares(dict(row))


def by_day(reader: Reader, window: Window) -> Table:
    """One row for each local day, those without questions too."""
    return _by_spans(reader, "day", _days(window), [name for name, _, _ in _days(window)])


def by_hour(reader: Reader, window: Window) -> Table:
    """One row for each hour of the local day."""
    spans = [(f"{at.hour:02d}", low, high) for at, low, high in _hours(window)]
    return _by_spans(reader, "hour", spans, [f"{hour:02d}" for hour in range(24)])


def by_provider(reader: Reader, window: Window) -> Table:
    """One row for each provider that was asked."""
    return _by_column(reader, "provider", window)


def by_model(reader: Reader, window: Window) -> Table:
    """One row for each model that answered."""
    return _by_column(reader, "model", window)


def by_status(reader: Reader, window: Window) -> Table:
    """One row for each outcome."""
    return _by_column(reader, "status", window)


def by_error(reader: Reader, window: Window) -> Table:
    """One row for each kind of error or refusal ("" where there was none)."""
    return _by_column(reader, "error", window, column="error_type")


def by_page(reader: Reader, window: Window) -> Table:
    """One row for each page of the website, the busiest first."""
    return _by_column(reader, "page", window, column="page_url")


def by_source(reader: Reader, window: Window) -> Table:
    """One row for each cited document, the most cited first."""
    rows = reader.all(
        f"""
        SELECT cited.source, {_SUMS}
        FROM (SELECT DISTINCT seq, source FROM citations WHERE seq >= ? AND seq < ?) cited
        JOIN queries q ON q.seq = cited.seq
        GROUP BY cited.source ORDER BY questions DESC, cited.source LIMIT {MAX_GROUPS}
        """,  # noqa: S608 - our own constants
        _range(window),
    )
    return _table("source", [dict(row) for row in rows])


def latency(reader: Reader, window: Window) -> dict[str, dict[str, int | None]]:
    """p50, p95 and p99, exact: the value at that rank of the ordered list."""
    return {
        "first_token_ms": _percentiles(reader, window, "first_token_ms", "1"),
        "duration_ms": _percentiles(reader, window, "duration_ms", "q.status = 'ok'"),
    }


def top_questions(reader: Reader, window: Window) -> Table:
    """What is asked most often, as somebody worded it."""
    rows = reader.all(
        """
        SELECT min(trim(t.question)), count(*) AS questions, sum(q.answered = 'no')
        FROM queries q JOIN texts t ON t.seq = q.seq
        WHERE q.seq >= ? AND q.seq < ? AND t.question <> ''
        GROUP BY lower(trim(t.question)) ORDER BY questions DESC, max(q.seq) DESC LIMIT ?
        """,
        [*_range(window), TOP],
    )
    return Table(("question", "questions", "unanswered"), tuple(tuple(row) for row in rows))


def top_sources(reader: Reader, window: Window) -> Table:
    """Which documents answers stand on."""
    rows = reader.all(
        """
        SELECT source, max(title), count(DISTINCT seq) AS questions, round(avg(score), 3)
        FROM citations WHERE seq >= ? AND seq < ?
        GROUP BY source ORDER BY questions DESC, source LIMIT ?
        """,
        [*_range(window), TOP],
    )
    return Table(("source", "title", "questions", "score"), tuple(tuple(row) for row in rows))


def hour_weekday(reader: Reader, window: Window) -> tuple[tuple[int, ...], ...]:
    """Seven rows (Monday first) of 24 counts, in local time."""
    hours = _hours(window)
    counts = reader.all(
        "SELECT (SELECT count(*) FROM queries q "
        "WHERE q.seq >= json_extract(b.value, '$[0]') AND q.seq < json_extract(b.value, '$[1]')) "
        "FROM json_each(?) b ORDER BY b.key",
        (json.dumps([[low, high] for _, low, high in hours]),),
    )
    grid = [[0] * 24 for _ in range(7)]
    for (at, _, _), row in zip(hours, counts, strict=True):
        grid[at.weekday()][at.hour] += row[0]
    return tuple(tuple(row) for row in grid)


# --- how they are put together -------------------------------------------------------------------


def _range(window: Window) -> tuple[int, int]:
    return epoch_ms(window.since) << SEQ_BITS, epoch_ms(window.until) << SEQ_BITS


def _with_shares(row: dict[str, Any]) -> dict[str, Any]:
    judged = row["answered"] + row["unanswered"]
    row["answered_share"] = round(row["answered"] / judged, 4) if judged else None
    row["error_share"] = round(row["errors"] / row["questions"], 4) if row["questions"] else None
    return row


def _table(name: str, rows: Iterable[dict[str, Any]]) -> Table:
    full = [_with_shares(row) for row in rows]
    columns = tuple(full[0]) if full else (name, "questions")
    return Table(columns, tuple(tuple(row.values()) for row in full))


def _by_column(reader: Reader, name: str, window: Window, *, column: str = "") -> Table:
    column = column or name
    rows = reader.all(
        f"SELECT q.{column} AS {name}, {_SUMS} FROM queries q WHERE q.seq >= ? AND q.seq < ? "  # noqa: S608
        f"GROUP BY q.{column} ORDER BY questions DESC, q.{column} LIMIT {MAX_GROUPS}",
        _range(window),
    )
    return _table(name, [dict(row) for row in rows])


def _by_spans(reader: Reader, name: str, spans: list[tuple[str, int, int]], labels: list[str]) -> Table:
    """Sums by label of the span of keys a row lies in; each label of `labels` in its order."""
    rows = reader.all(
        # CROSS JOIN keeps the spans outside: each is one range of the table's own order.
        f"SELECT json_extract(b.value, '$[0]') AS {name}, {_SUMS} FROM json_each(?) b "  # noqa: S608
        "CROSS JOIN queries q ON q.seq >= json_extract(b.value, '$[1]') "
        "AND q.seq < json_extract(b.value, '$[2]') GROUP BY 1",
        (json.dumps(spans),),
    )
    found = {row[name]: dict(row) for row in rows}
    nothing = dict(reader.one(f"SELECT '' AS {name}, {_SUMS} FROM queries q WHERE 0"))  # noqa: S608
    return _table(name, [found.get(label) or {**nothing, name: label} for label in labels])


def _percentiles(reader: Reader, window: Window, column: str, condition: str) -> dict[str, int | None]:
    counts = reader.all(
        f"SELECT q.{column}, count(*) FROM queries q WHERE q.seq >= ? AND q.seq < ? "  # noqa: S608
        f"AND q.{column} IS NOT NULL AND {condition} GROUP BY 1 ORDER BY 1",
        _range(window),
    )
    total = sum(row[1] for row in counts)
    result: dict[str, int | None] = {"p50": None, "p95": None, "p99": None}
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        rank = -(-total * percent // 100)
        seen = 0
        for value, count in counts:
            seen += count
            if seen >= rank:
                result[name] = value
                break
    return result


def _days(window: Window) -> list[tuple[str, int, int]]:
    """The local days of the window: date, and the range of keys. A day can have 23 or 25 hours."""
    first = window.since.astimezone(window.timezone).date()
    edges = [_midnight(first + timedelta(days=n), window) for n in range(window.days + 1)]
    return [
        (str(first + timedelta(days=n)), _key(max(low, window.since)), _key(min(high, window.until)))
        for n, (low, high) in enumerate(pairwise(edges))
    ]


def _midnight(day: date, window: Window) -> datetime:
    return datetime.combine(day, time(), window.timezone).astimezone(UTC)


def _hours(window: Window) -> list[tuple[datetime, int, int]]:
    """The local hours of the window: their beginning in local time, and the range of keys."""
    hours = []
    low = window.since
    while low < window.until:
        local = low.astimezone(window.timezone)
        # Stepped in UTC, so that no hour is skipped or met twice; a zone may shift by half an hour.
        high = low + timedelta(hours=1) - timedelta(minutes=local.minute, seconds=local.second)
        shifted = high.astimezone(window.timezone)
        if shifted.minute:
            high -= timedelta(minutes=shifted.minute)
        high = min(max(high, low + timedelta(minutes=1)), window.until)
        hours.append((local, _key(low), _key(high)))
        low = high
    return hours


def _key(at: datetime) -> int:
    return epoch_ms(at) << SEQ_BITS


REPORTS: Mapping[str, Callable[[Reader, Window], Table]] = {
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
    with store.reader(deadline_s) as reader:
        return Statistics(
            window=window,
            by=by,
            totals=totals(reader, window),
            previous=totals(reader, window.before()),
            series=REPORTS[by](reader, window),
            groups={
                name: report(reader, window)
                for name, report in REPORTS.items()
                if name not in ("day", "hour")
            },
            latency=latency(reader, window),
            top_questions=top_questions(reader, window),
            top_sources=top_sources(reader, window),
            hour_weekday=hour_weekday(reader, window),
        )
