"""What answers have cost, as the record knows it: for budgets that many processes share.

Read from the sums by quarter-hour, as statistics are, and from the rows that are not summed yet: so it stays
when `cleanup` deletes rows.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mogine.analytics.engine import Reader
from mogine.analytics.fold import QUARTER_MS
from mogine.analytics.records import epoch_ms
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.tables import LISTED, Listing, state

LOOK_S = 5.0
END_OF_TIME = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Spent:
    """CNY since each of the moments asked for, and which of the rows asked for are among them."""

    since: tuple[float, ...]
    recorded: frozenset[str]


class Spending:
    """Sums over the record, cheap enough to be asked every second.

    What is older than `settled_after` (no answer lasts longer) is summed up once and then again only now
    and then, which also finds what was late because it lay in the spool.
    """

    def __init__(self, store: AnalyticsStore, settled_after: timedelta) -> None:
        self._store = store
        self._settled_after = settled_after
        self._anew_after = max(settled_after, timedelta(minutes=5))
        self._mark = self._settled_at = datetime.min.replace(tzinfo=UTC)
        self._settled: dict[datetime, float] = {}

    def since(self, moments: Collection[datetime], ids: Collection[str], now: datetime) -> Spent:
        """What was spent since each of `moments`, and which of `ids` that covers, in one look.

        The moments are whole quarter-hours, as midnight is anywhere. Raises MogineError when the record
        cannot be read.
        """
        with self._store.reader(LOOK_S) as reader:
            if set(moments) != set(self._settled) or not (
                self._settled_at <= now <= self._settled_at + self._anew_after
            ):
                self._mark = _quarter(now - self._settled_after)
                self._settled = {moment: _sum(reader, moment, self._mark) for moment in moments}
                self._settled_at = now
            sums = tuple(
                self._settled[moment] + _sum(reader, max(moment, self._mark), None) for moment in moments
            )
            return Spent(sums, _recorded(reader, ids))


def _sum(reader: Reader, since: datetime, until: datetime | None) -> float:
    """What the rows between two whole quarter-hours have cost, also those that are deleted."""
    low, high = _seq(since), END_OF_TIME if until is None else _seq(until)
    if low >= high:
        return 0.0
    slot = QUARTER_MS << SEQ_BITS
    (summed,) = reader.one(
        "SELECT coalesce(sum(cost_cny), 0) FROM rollups "
        "WHERE dimension IN ('all', 'bot') AND level = 0 AND slot >= ? AND slot < ?",
        (low // slot, high // slot),
    )
    # One bound below: of two SQLite takes any, and would read every row of a month.
    (later,) = reader.one(
        "SELECT coalesce(sum(cost_cny), 0) FROM queries WHERE seq >= ? AND seq < ? "
        "AND seq NOT IN (SELECT seq FROM uncounted)",
        (max(low, state(reader.connection)["summed_upto"] + 1), high),
    )
    (late,) = reader.one(
        "SELECT coalesce(sum(cost_cny), 0) FROM queries "
        "WHERE seq IN (SELECT seq FROM uncounted) AND seq >= ? AND seq < ?",
        (low, high),
    )
    return float(summed) + float(later) + float(late)


def _recorded(reader: Reader, ids: Collection[str]) -> frozenset[str]:
    rows = reader.all(f"SELECT id FROM queries WHERE id {LISTED}", (Listing(list(ids)),))  # noqa: S608
    return frozenset(row[0] for row in rows)


def _quarter(at: datetime) -> datetime:
    """The beginning of the quarter-hour."""
    return datetime.fromtimestamp(epoch_ms(at) // QUARTER_MS * QUARTER_MS / 1000, UTC)


def _seq(at: datetime) -> int:
    return epoch_ms(at) << SEQ_BITS
