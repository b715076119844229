"""How much may still be spent: what the record says was, plus what this process has spent since it looked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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

    Other homes are heard of by `hear`, and hear of this one by `tell`: of what an answer has cost, and when
    it began.
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
        self._heard: dict[str, tuple[float, float]] = {}
        self._today = self._looked = _Day(timezone, now())
        self.tell: Callable[[datetime, float], None] | None = None
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
        return self._spent(0)

    @property
    def month_cny(self) -> float:
        """What was spent this month."""
        return self._spent(1)

    def _spent(self, which: int) -> float:
        # What all have been told of this home may be ahead of what was read, and the other way round.
        told, others = self._heard.get(self.periods()[which], (0.0, 0.0))
        return max(self._own(which), told) + others

    def _own(self, which: int) -> float:
        return self._recorded[which] + self._unrecorded[which]

    def own_cny(self) -> dict[str, float]:
        """What this home has spent in each period, as this process knew at its last look."""
        return {period: self._own(which) for which, period in enumerate(self._looked.names)}

    def periods(self, at: datetime | None = None) -> tuple[str, str]:
        """The day and the month of `at`, or of now."""
        if at is None:
            return self._day().names
        return (self._today if self._today.holds(at) else _Day(self._timezone, at)).names

    def _day(self) -> "_Day":
        now = self._now()
        if not self._today.holds(now):
            self._today = _Day(self._timezone, now)
        return self._today

    def hear(self, spent: Mapping[str, tuple[float, float]]) -> None:
        """What by now all know to be spent in each period, in CNY: by this home, and by all others."""
        self._heard = {**spent} if spent.keys() == self._heard.keys() else {**self._heard, **spent}
        for period in self._heard.keys() - {*spent, *self.periods()}:
            del self._heard[period]
        self._settle()

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
        if self.tell is not None:
            self.tell(started_at, cost_cny)
        if len(self._pending) < MAX_PENDING:
            self._pending[row_id] = (started_at, cost_cny)
        # Beyond that the record is away for good, and what is not remembered counts until the next look.
        day, month = (
            before + cost_cny * (period == looked)
            for before, period, looked in zip(
                self._unrecorded, self.periods(started_at), self._looked.names, strict=True
            )
        )
        self._unrecorded = (day, month)
        self._settle()

    def look(self) -> None:
        """Read the record. Blocks; raises MogineError when that is not possible."""
        day, pending = self._day(), tuple(self._pending)
        self._take_up(day, self._spending.since(day.starts, pending, self._now()))

    def _take_up(self, looked: "_Day", found: Spent) -> None:
        for row_id in found.recorded:
            self._pending.pop(row_id, None)
        day, month = (
            sum(cost for at, cost in self._pending.values() if at >= start) for start in looked.starts
        )
        self._looked = looked
        self._recorded, self._unrecorded = (found.since[0], found.since[1]), (day, month)
        self._settle()

    @asynccontextmanager
    async def watching(self, exchange: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[None]:
        """Look now, and again and again while the context lasts, and call `exchange` after each look."""
        if not self._limits:
            yield
            return

        async def look() -> None:
            await self.look_safely()
            if exchange is not None:
                await exchange()

        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                await look()

        await look()
        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def look_safely(self) -> None:
        """Read the record, if there is a budget; when that is not possible what was known before counts."""
        if not self._limits:
            return
        day, pending = self._day(), tuple(self._pending)
        try:
            found = await asyncio.to_thread(self._spending.since, day.starts, pending, self._now())
            self._take_up(day, found)
        except MogineError as error:
            self._tell(f"the budget goes by what was known before: {error.message}")

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


class _Day:
    """One day of a time zone, and its month."""

    __slots__ = ("_until", "names", "starts")

    def __init__(self, timezone: ZoneInfo, at: datetime) -> None:
        date = at.astimezone(timezone).date()
        days = (date, date.replace(day=1), date + timedelta(days=1))
        day, month, self._until = (datetime.combine(d, time(), timezone).astimezone(UTC) for d in days)
        self.starts = (day, month)
        self.names = (f"{date:%Y-%m-%d}", f"{date:%Y-%m}")

    def holds(self, at: datetime) -> bool:
        """Whether `at` is on it."""
        return self.starts[0] <= at < self._until
