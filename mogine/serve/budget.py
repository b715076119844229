"""How much may still be spent: what the record says was, plus what this process has spent since it looked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from mogine.analytics.spending import Spending, Spent
from mogine.errors import MogineError, RateLimited

LOOK_S = 2.0
TIGHT = 0.8
MAX_PENDING = 20_000

log = logging.getLogger(__name__)

# What this home has spent in each period, in CNY; what all others have, None when nobody knows.
Exchange = Callable[[Mapping[str, float]], Awaitable[Sequence[float] | None]]


@dataclass(frozen=True, slots=True)
class Amounts:
    """CNY; None where there is no budget."""

    daily: float | None = None
    monthly: float | None = None

    def __bool__(self) -> bool:
        return self.daily is not None or self.monthly is not None


class Budget:
    """What was spent today and this month, of what may be.

    The record is read every LOOK_S, so that what other processes spend is seen and a restart forgets
    nothing. Rows of our own that are not in it yet are added by their ids: nothing counts twice, and a
    record that cannot be written does not make answers free.
    """

    def __init__(
        self,
        limits: Amounts,
        timezone: ZoneInfo,
        spending: Spending,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._limits = limits
        self._timezone = timezone
        self._spending = spending
        self._now = now
        self._pending: dict[str, tuple[datetime, float]] = {}
        self._recorded = (0.0, 0.0)
        self._unrecorded = (0.0, 0.0)  # the sums of what is pending
        self._others: tuple[tuple[datetime, ...], Sequence[float]] = ((), ())
        self._share = 0.0
        self._told = ""

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return bool(self._limits)

    @property
    def share(self) -> float:
        """The used part of the budget that is used most; 0 without one."""
        return self._share

    @property
    def today_cny(self) -> float:
        """What was spent today."""
        return self._own(0) + self._of_others(0)

    @property
    def month_cny(self) -> float:
        """What was spent this month."""
        return self._own(1) + self._of_others(1)

    def _own(self, which: int) -> float:
        return self._recorded[which] + self._unrecorded[which]

    def _of_others(self, which: int) -> float:
        starts, spent = self._others
        return spent[which] if starts and starts[which] == self._starts_now()[which] else 0.0

    @property
    def tight(self) -> bool:
        """Whether it is time to save."""
        return self._share >= TIGHT

    @property
    def spent(self) -> bool:
        """Whether nothing that costs may be done any more."""
        return self._share >= 1.0

    def refuse(self) -> RateLimited:
        """The error for whoever asks when it is spent."""
        now = self._now()
        of_month = self._limits.monthly is not None and self.month_cny >= self._limits.monthly
        local = now.astimezone(self._timezone)
        first = local.date().replace(day=1)
        begin = (first + timedelta(days=32)).replace(day=1) if of_month else local.date() + timedelta(days=1)
        until = datetime.combine(begin, time(), self._timezone)
        return RateLimited(
            f"the budget of this {'month' if of_month else 'day'} is used up; answers go on after it",
            reason="budget_exhausted",
            retry_after_s=(until - now).total_seconds(),
        )

    def add(self, row_id: str, started_at: datetime, cost_cny: float) -> None:
        """An answer has cost this."""
        if not self._limits or not cost_cny:
            return
        if len(self._pending) < MAX_PENDING:
            self._pending[row_id] = (started_at, cost_cny)
        # Beyond that the record is away for good, and what is not remembered counts until the next look.
        self._unrecorded = (self._unrecorded[0] + cost_cny, self._unrecorded[1] + cost_cny)
        self._settle()

    def look(self) -> None:
        """Read the record. Blocks; raises MogineError when that is not possible."""
        starts, pending = self._starts_now(), tuple(self._pending)
        self._take_up(starts, self._spending.since(starts, pending, self._now()))

    def _take_up(self, starts: tuple[datetime, datetime], found: Spent) -> None:
        for row_id in found.recorded:
            self._pending.pop(row_id, None)
        day, month = (sum(cost for at, cost in self._pending.values() if at >= start) for start in starts)
        self._recorded, self._unrecorded = (found.since[0], found.since[1]), (day, month)
        self._settle()

    @asynccontextmanager
    async def watching(self, exchange: Exchange | None = None) -> AsyncIterator[None]:
        """Look now, and again and again while the context lasts; `exchange` tells other homes what was spent
        here, and gives what was there."""
        if not self._limits:
            yield
            return
        await self._look_safely(exchange)

        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                await self._look_safely(exchange)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _look_safely(self, exchange: Exchange | None) -> None:
        starts, pending = self._starts_now(), tuple(self._pending)
        try:
            found = await asyncio.to_thread(self._spending.since, starts, pending, self._now())
            self._take_up(starts, found)
        except MogineError as error:
            self._tell(f"the budget goes by what was known before: {error.message}")
        if exchange is None:
            return
        local = starts[0].astimezone(self._timezone)
        of_others = await exchange({f"{local:%Y-%m-%d}": self._own(0), f"{local:%Y-%m}": self._own(1)})
        if of_others is not None:  # else what was known of them before still counts
            self._others = (starts, of_others)
            self._settle()

    def _starts_now(self) -> tuple[datetime, datetime]:
        day = self._now().astimezone(self._timezone).date()
        return (
            datetime.combine(day, time(), self._timezone).astimezone(UTC),
            datetime.combine(day.replace(day=1), time(), self._timezone).astimezone(UTC),
        )

    def _settle(self) -> None:
        shares = [
            spent / limit if limit else 1.0
            for spent, limit in ((self.today_cny, self._limits.daily), (self.month_cny, self._limits.monthly))
            if limit is not None
        ]
        self._share = max(shares, default=0.0)
        if self.spent:
            self._tell("the budget is used up: the assistant quotes passages, all else is refused")
        elif self.tight:
            self._tell(f"{self._share:.0%} of the budget are used")
        else:
            self._told = ""

    def _tell(self, news: str) -> None:
        if news[:14] != self._told[:14]:
            log.warning("%s", news)
        self._told = news
