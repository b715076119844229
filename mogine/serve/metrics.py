"""What is counted, in plain numbers, and how Prometheus is told: cheap to count, composed when asked for."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from mogine.analytics.records import QueryRecord

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0)
DURATION_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)

METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"))

Labels = tuple[str, ...]

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mogine_http_requests": ("HTTP requests by route and status", ("server", "method", "route", "status")),
    "mogine_questions": (
        "Questions by way, provider and outcome; reason as in errors",
        ("kind", "provider", "status", "reason"),
    ),
    "mogine_tokens": ("Tokens, told by the vendor or estimated", ("provider", "direction", "source")),
    "mogine_cost_cny": ("What answers cost, by the table of prices", ("provider",)),
    "mogine_upstream_errors": ("Questions a vendor has failed", ("provider", "kind")),
    "mogine_upstream_retries": ("Second and third tries", ("provider",)),
    "mogine_key_changes": ("Questions taken to another key", ("provider",)),
    "mogine_rows_stored": ("Rows of the record written", ()),
    "mogine_rows_dropped": ("Rows of the record lost", ()),
    "mogine_worker_restarts": ("Workers started again after they had ended", ()),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mogine_streams_open": ("Answers being given now", ()),
    "mogine_visitors_tracked": ("Visitors whose rates are remembered", ()),
    "mogine_breaker_open": ("1 while a vendor is left alone, 0.5 while it is tried", ("provider",)),
    "mogine_keys": ("Keys of a vendor", ("provider",)),
    "mogine_keys_resting": ("Keys that rest after a refusal", ("provider",)),
    "mogine_rows_waiting": ("Rows in memory on their way to the record", ()),
    "mogine_rows_spooled": ("Rows in data/spool", ()),
    "mogine_budget_used_ratio": ("Used part of the budget that is used most", ()),
    "mogine_spent_today_cny": ("Spent today, as far as a budget is watched", ()),
    "mogine_spent_month_cny": ("Spent this month, as far as a budget is watched", ()),
    "mogine_workers": ("Processes that share the port", ()),
    "mogine_redis_away": ("1 while limits are not shared though they should be", ()),
}
# Of these every worker has its own view of one and the same thing; all others are added up.
SHARED = frozenset(
    {
        *("mogine_breaker_open", "mogine_keys", "mogine_keys_resting", "mogine_rows_spooled"),
        *("mogine_budget_used_ratio", "mogine_spent_today_cny", "mogine_spent_month_cny", "mogine_workers"),
        *("mogine_visitors_tracked", "mogine_worker_restarts", "mogine_redis_away"),
    }
)
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "mogine_first_token_seconds": ("From the question to the first word", FIRST_TOKEN_S),
    "mogine_answer_seconds": ("From the question to the answer's end", DURATION_S),
}


class Histogram:
    """Counts by bucket, for one provider."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Meters:
    """The counters of one server in one process."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._requests: Counter[Labels] = Counter()
        self._questions: Counter[Labels] = Counter()
        self._tokens: Counter[Labels] = Counter()
        self._cost: Counter[str] = Counter()
        self._first_token: dict[str, Histogram] = {}
        self._duration: dict[str, Histogram] = {}

    def request(self, method: str, route: str, status: int) -> None:
        """One HTTP request is over."""
        known = method if method in METHODS else "other"  # a visitor may invent any number of them
        self._requests[(known, route, str(status))] += 1

    def question(self, row: QueryRecord) -> None:
        """One question is over."""
        provider = row.provider
        self._questions[(row.kind, provider, row.status, row.error_type)] += 1
        if row.prompt_tokens is not None:
            source = "estimated" if row.tokens_estimated else "vendor"
            self._tokens[(provider, "in", source)] += row.prompt_tokens
            self._tokens[(provider, "out", source)] += row.completion_tokens or 0
        if row.cost_cny:
            self._cost[provider] += row.cost_cny  # type: ignore[assignment]
        if row.first_token_ms is not None:
            self._of(self._first_token, provider, FIRST_TOKEN_S).observe(row.first_token_ms / 1000)
        if row.status == "ok" and row.duration_ms is not None:
            self._of(self._duration, provider, DURATION_S).observe(row.duration_ms / 1000)

    @staticmethod
    def _of(table: dict[str, Histogram], provider: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = table.get(provider)
        if histogram is None:
            histogram = table[provider] = Histogram(bounds)
        return histogram

    def snapshot(self) -> "Snapshot":
        """All counters as they are now."""
        found = Snapshot()
        for (method, route, status), count in self._requests.items():
            found.add("mogine_http_requests", (self._server, method, route, status), count)
        for labels, count in self._questions.items():
            found.add("mogine_questions", labels, count)
        for labels, count in self._tokens.items():
            found.add("mogine_tokens", labels, count)
        for provider, cost in self._cost.items():
            found.add("mogine_cost_cny", (provider,), cost)
        for name, table in (
            ("mogine_first_token_seconds", self._first_token),
            ("mogine_answer_seconds", self._duration),
        ):
            for provider, histogram in table.items():
                found.histograms[(name, provider)] = [*map(float, histogram.counts), histogram.sum]
        return found


class Snapshot:
    """Numbers at one moment, of one process or of several put together."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], float] = {}
        self.histograms: dict[tuple[str, str], list[float]] = {}

    def add(self, name: str, labels: Labels, value: float) -> None:
        """One more number of a counter or gauge."""
        key = (name, labels)
        self.values[key] = self.values.get(key, 0.0) + value

    def merge(self, other: "Snapshot", *, counters_only: bool = False) -> None:
        """Take in what another process has counted; of one that is gone only its counters."""
        for (name, labels), value in other.values.items():
            key = (name, labels)
            if counters_only and name not in COUNTERS:
                continue
            if name in SHARED:
                self.values[key] = max(self.values.get(key, 0.0), value)
            else:
                self.values[key] = self.values.get(key, 0.0) + value
        for where, numbers in other.histograms.items():
            mine = self.histograms.get(where)
            self.histograms[where] = (
                list(numbers) if mine is None else [a + b for a, b in zip(mine, numbers, strict=True)]
            )

    def to_json(self) -> dict[str, Any]:
        """For the way between processes."""
        return {
            "values": [[name, list(labels), value] for (name, labels), value in self.values.items()],
            "histograms": [[name, label, numbers] for (name, label), numbers in self.histograms.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Snapshot":
        """The other end of that way."""
        found = cls()
        found.values = {(name, tuple(labels)): value for name, labels, value in data["values"]}
        found.histograms = {(name, label): numbers for name, label, numbers in data["histograms"]}
        return found


class _Told(Collector):
    """A snapshot as the Prometheus client library wants it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        yield from self._numbers()
        yield from self._histograms()

    def _numbers(self) -> Iterator[Metric]:
        for table, family in ((COUNTERS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name, (text, labels) in table.items():
                metric = family(name, text, labels=labels)
                for (found, values), value in self._snapshot.values.items():
                    if found == name:
                        metric.add_metric(values, value)
                if metric.samples:
                    yield metric

    def _histograms(self) -> Iterator[Metric]:
        for name, (text, bounds) in HISTOGRAMS.items():
            metric = HistogramMetricFamily(name, text, labels=("provider",))
            for (found, provider), numbers in self._snapshot.histograms.items():
                if found == name:
                    *counts, total = numbers
                    metric.add_metric((provider,), _cumulative(bounds, counts), total)
            if metric.samples:
                yield metric


def _cumulative(bounds: tuple[float, ...], counts: list[float]) -> list[tuple[str, float]]:
    running, buckets = 0.0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        running += count
        buckets.append((bound, running))
    return buckets


def render(snapshot: Snapshot) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Told(snapshot))
    return generate_latest(registry)
