"""What answers have cost, as the record knows it: for budgets that many processes share."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mogine.analytics.records import epoch_ms
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore, Reader

MAX_IDS = 500


@dataclass(frozen=True, slots=True)
class Spent:
    """CNY since each of the moments asked for, and which of the rows asked for are among them."""

    since: tuple[float, ...]
    recorded: frozenset[str]


class Spending:
    """Sums over the record, cheap enough to be asked every second.

    Rows older than `settled_after` (no answer lasts longer) are summed up once and then again only now
    and then, which also finds what was late because it lay in the spool.
    """

    def __init__(self, store: AnalyticsStore, settled_after: timedelta) -> None:
        self._store = store
        self._settled_after = settled_after
        self._anew_after = max(settled_after, timedelta(minutes=5))
        self._mark = datetime.min.replace(tzinfo=UTC)
        self._settled: dict[datetime, float] = {}

    def since(self, moments: Collection[datetime], ids: Collection[str], now: datetime) -> Spent:
        """What was spent since each of `moments`, and which of `ids` that covers, in one look.

        Raises MogineError when the record cannot be read.
        """
        with self._store.reader() as reader:
            mark = now - self._settled_after
            if set(moments) != set(self._settled) or not self._mark <= mark <= self._mark + self._anew_after:
                self._settled = {moment: _sum(reader, moment, mark) for moment in moments}
                self._mark = mark
            sums = tuple(
                self._settled[moment] + _sum(reader, max(moment, self._mark), None) for moment in moments
            )
            return Spent(sums, _recorded(reader, ids))


def _sum(reader: Reader, since: datetime, until: datetime | None) -> float:
    sql = "SELECT coalesce(sum(cost_cny), 0) FROM queries WHERE seq >= ?"
    bounds = [_seq(since)]
    if until is not None:
        sql += " AND seq < ?"
        bounds.append(_seq(until))
    return float(reader.one(sql, bounds)[0])


def _recorded(reader: Reader, ids: Collection[str]) -> frozenset[str]:
    found: set[str] = set()
    every = list(ids)
    for start in range(0, len(every), MAX_IDS):
        part = every[start : start + MAX_IDS]
        marks = ",".join("?" * len(part))
        rows = reader.all(f"SELECT id FROM queries WHERE id IN ({marks})", part)  # noqa: S608 - only marks
        found.update(row[0] for row in rows)
    return frozenset(found)


def _seq(at: datetime) -> int:
    return epoch_ms(at) << SEQ_BITS
