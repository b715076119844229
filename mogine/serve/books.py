"""What becomes of a question when it is over: its price, the budget, the counters, the record."""

import logging
from collections.abc import AsyncGenerator
from datetime import UTC, date, datetime, time, timedelta
from typing import Protocol
from zoneinfo import ZoneInfo

from mogine.analytics.records import QueryRecord
from mogine.chat import ChatRequest, Chunk, Provider, Usage
from mogine.serve.budget import Budget
from mogine.serve.metrics import Meters
from mogine.serve.prices import Prices

log = logging.getLogger(__name__)


class Record(Protocol):
    """Where rows go in the end."""

    def record(self, row: QueryRecord) -> None: ...


class Books:
    """Told of every question once, at its end."""

    def __init__(
        self, record: Record, prices: Prices, budget: Budget, meters: Meters, timezone: ZoneInfo
    ) -> None:
        self._record = record
        self._prices = prices
        self._timezone = timezone
        self._unpriced: set[str] = set()
        self._day = date.min
        self._day_begins = self._day_ends = datetime.max.replace(tzinfo=UTC)
        self.budget = budget
        self.meters = meters

    def cost_cny(self, provider: str, model: str, usage: Usage | None, at: datetime) -> float | None:
        """What `usage` cost; None when it is not known, or nothing is known of the model's price."""
        if usage is None:
            return None
        price = self._prices.find(provider, model, self._day_of(at))
        if price is None:
            self._miss(provider, model)
            return None
        return price.cost_cny(usage)

    def _day_of(self, at: datetime) -> date:
        if not self._day_begins <= at < self._day_ends:
            self._day = at.astimezone(self._timezone).date()
            following = self._day + timedelta(days=1)
            self._day_begins = datetime.combine(self._day, time(), self._timezone).astimezone(UTC)
            self._day_ends = datetime.combine(following, time(), self._timezone).astimezone(UTC)
        return self._day

    def close(self, row: QueryRecord) -> None:
        """The question is over."""
        if row.cost_cny:
            self.budget.add(row.id, row.started_at, row.cost_cny)
        self.meters.question(row)
        self._record.record(row)

    def _miss(self, provider: str, model: str) -> None:
        name = f"{provider}/{model}"
        if not self.budget.is_set or name in self._unpriced or len(self._unpriced) > 100:
            return
        self._unpriced.add(name)
        log.warning(
            'the price of %s is not known, so no budget sees it: add [prices."%s"] to site.toml',
            name,
            model,
        )


class Cheaper:
    """A provider with another model than its own."""

    def __init__(self, provider: Provider, model: str) -> None:
        self._provider = provider
        self._model = model

    @property
    def name(self) -> str:
        return self._provider.name

    @property
    def default_model(self) -> str:
        return self._model

    @property
    def dialect(self) -> str:
        return self._provider.dialect

    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The provider's own answer."""
        return self._provider.stream(request)
