"""From rows to sums: what some rows come to, by quarter-hour, dimension and value.

What a thousand rows have in common is done to all of them by functions of the interpreter, column by column:
that costs a fraction of a step of Python for each row.
"""

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, compress, repeat
from operator import add, is_not, itemgetter, mul
from struct import Struct
from typing import Any

from mogine.analytics import histogram
from mogine.analytics.engine import Connection
from mogine.analytics.schema import BUCKET_BITS, SEQ_BITS
from mogine.analytics.tables import LISTED, Listing

QUARTER_MS = 900_000
ASKED_QUARTERS = 32  # questions are counted by 8 hours: days of China and of UTC are whole numbers of these

COLUMNS = (
    "questions", "visitors", "sessions", "ok", "errors", "aborted", "refused", "answered", "unanswered",
    "thumbs_up", "thumbs_down", "prompt_tokens", "completion_tokens", "reasoning_tokens", "estimated",
    "cost_cny", "first_tokens", "first_token_ms", "durations", "duration_ms", "citations", "score",
)  # fmt: skip

# What has few values is grouped by all of them at once, and from there by each.
FEW = {"provider": "provider", "model": "model", "status": "status", "error": "error_type"}
# A hash of a visitor lives for a day: what lies within two buckets of 18.6 hours is looked at.
REACH = 2
_REACH = "p.bucket IN (q.bucket - 2, q.bucket - 1, q.bucket)"
_AFTER = "p.bucket IN (q.bucket, q.bucket + 1, q.bucket + 2)"

# Nonsensical numbers are cut, so that they do not make every later sum useless.
MOST = 1 << 40  # tokens or milliseconds
MOST_CNY = 1e6

# The numbers of a row, and their sums, are one integer of many lanes: one addition adds them all. A lane has
# room for the largest number eight million times over, that of the costs for any sum.
_COST = "cost_cny"
_COST_UNIT = 10**10  # costs are kept with ten digits behind the point
_MEASURED = (
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "first_tokens", "first_token_ms", "durations",
    "duration_ms", _COST,
)  # fmt: skip
_COUNTED = tuple(name for name in COLUMNS[:-1] if name not in _MEASURED)  # scores are no whole numbers
_LANE_BITS = 64
_AT = {name: _LANE_BITS * place for place, name in enumerate((*_MEASURED, "", *_COUNTED))}
_PACK = Struct("<8Q").pack
_NUMBER: Callable[[bytes, Any], int] = int.from_bytes
_UNPACK = Struct(f"<{len(_AT)}Q")
_ORDER = itemgetter(*(_AT[name] // _LANE_BITS for name in COLUMNS[:-1]))
_COST_PLACE = COLUMNS.index(_COST)

Waits = dict[int, tuple[Counter[int], Counter[int]]]
Asked = dict[tuple[int, int], list[int]]


class Rows:
    """Some rows: those with keys after `low` up to `high`, or those of them that came `late`.

    Of the rows of a range all are left out that came late: they are counted by themselves.
    """

    def __init__(self, low: int, high: int, *, late: bool = False) -> None:
        self.low, self.high, self.late = low, high, late
        self.params = (low, high, low, high)

    def condition(self, key: str) -> str:
        """That a row with this `key` is one of them; for `params`."""
        is_one = f"{key} > ? AND {key} <= ? AND {key} {'IN' if self.late else 'NOT IN'}"
        return f"{is_one} (SELECT seq FROM uncounted WHERE seq > ? AND seq <= ?)"  # noqa: S608 - no values

    def within(self, low: int, high: int) -> "Rows":
        """Those of them after `low` and up to `high`."""
        return Rows(low, high, late=self.late)

    def first(self, column: str) -> str:
        """The condition that a row is the first of its visitor (or session)."""
        named = f"q.{column} <> '' AND q.bot = 0"
        earlier = (  # our own column names
            f"EXISTS (SELECT 1 FROM queries p WHERE {_REACH} AND p.{column} = q.{column} "  # noqa: S608
            "AND p.seq < q.seq AND p.bot = 0)"
        )
        if not self.late:
            return f"{named} AND NOT {earlier}"
        # One that came late is not the first when a later one was counted already.
        counted = (
            f"EXISTS (SELECT 1 FROM queries p WHERE {_AFTER} AND p.{column} = q.{column} "  # noqa: S608
            "AND p.seq > q.seq AND p.bot = 0 "
            "AND p.seq <= (SELECT value FROM state WHERE name = 'summed_upto') "
            "AND NOT EXISTS (SELECT 1 FROM uncounted u WHERE u.seq = p.seq))"
        )
        return f"{named} AND NOT {earlier} AND NOT {counted}"


@dataclass(slots=True)
class Sums:
    """What some rows come to: numbers by dimension, quarter-hour and value (an integer of lanes, and the sum
    of scores), waits and questions, and what each cited document is called."""

    numbers: dict[tuple[str, int, str], int]
    scores: dict[tuple[int, str], float]
    waits: Waits
    asked: Asked
    titles: dict[str, str]

    @property
    def questions(self) -> int:
        """How many rows there were, those of crawlers too."""
        return sum(
            _lanes(packed)[_AT["questions"] // _LANE_BITS]
            for (dimension, _, _), packed in self.numbers.items()
            if dimension in ("all", "bot")
        )

    def entries(self) -> list[list[Any]]:
        """As rows of the table `fresh`: dimension, slot, value, then COLUMNS."""
        found: list[list[Any]] = []
        for (dimension, slot, value), packed in self.numbers.items():
            lanes = _lanes(packed)
            row = [dimension, slot, value, *_ORDER(lanes)]
            place = len(_MEASURED)
            row[3 + _COST_PLACE] = (lanes[place - 1] + (lanes[place] << _LANE_BITS)) / _COST_UNIT
            row.append(self.scores.get((slot, value), 0.0) if dimension == "source" else 0.0)
            found.append(row)
        return found


def _lanes(packed: int) -> tuple[int, ...]:
    return _UNPACK.unpack(packed.to_bytes(_UNPACK.size, "little"))


_ROWS = (
    "SELECT q.seq, q.bot, q.status, q.answered, q.feedback, q.tokens_estimated, q.provider, q.model, "
    "q.error_type, q.page_url, q.visitor, q.session, t.question, coalesce(q.prompt_tokens, 0), "
    "coalesce(q.completion_tokens, 0), coalesce(q.reasoning_tokens, 0), coalesce(q.cost_cny, 0), "
    "q.first_token_ms, CASE WHEN q.status = 'ok' THEN q.duration_ms END "
    "FROM queries q LEFT JOIN texts t ON t.seq = q.seq"
)
# Of each row all that it cites as one text, since many cite the same, and the scores as another: as whole
# numbers, which are written and read quicker.
SCORE_UNIT = 10**6
_CITED = (
    "SELECT seq, CAST(json_group_array(source) AS TEXT), "  # noqa: S608 - our own number
    f"CAST(json_group_array(CAST(round(score * {SCORE_UNIT}) AS BIGINT)) AS TEXT) FROM citations"
)
_BOT = itemgetter(1)
_SEQ = itemgetter(0)


def fold(connection: Connection, rows: Rows, middle: int = 0, *, asked_from: int = 0) -> Sums:
    """Sums of `rows`, read in the order of their keys, with what they cite.

    With a `middle` all but what is told of everybody is summed by two slots instead of quarter-hours:
    `middle` for what comes from there on, the one before it for the rest. Questions are counted from the
    quarter-hour `asked_from` on.

    In Python, since grouping by each dimension in SQL means to sort the rows for each anew.
    """
    folding = _Folding(connection, rows, middle, asked_from)
    for part in connection.parts(f"{_ROWS} WHERE {rows.condition('q.seq')} ORDER BY q.seq", rows.params):
        folding.add(part)
    return folding.sums()


class _Outcomes(dict[tuple[str, str, str, int], int]):
    """The lanes of a question that ended so: status, answered, feedback, whether tokens are estimated."""

    def __missing__(self, ended: tuple[str, str, str, int]) -> int:
        status, answered, feedback, estimated = ended
        named = {
            "questions",
            {"ok": "ok", "error": "errors", "aborted": "aborted", "refused": "refused"}.get(status),
            {"yes": "answered", "no": "unanswered"}.get(answered),
            {"up": "thumbs_up", "down": "thumbs_down"}.get(feedback),
            "estimated" if estimated else None,
        }
        self[ended] = packed = sum(1 << _AT[name] for name in named if name)
        return packed


class _Slot:
    """What is summed of one slot, by value; `sources` by all that a row cites, and the scores of each row."""

    def __init__(self) -> None:
        self.few: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self.pages: defaultdict[str, int] = defaultdict(int)
        self.sources: defaultdict[str, int] = defaultdict(int)
        self.scores: defaultdict[str, list[str]] = defaultdict(list)
        # By milliseconds; what was not measured is counted under None.
        self.waits: tuple[Counter[int | None], Counter[int | None]] = (Counter(), Counter())


class _Questions:
    """What was asked in 8 hours, as it was worded: how often, how often without an answer, last when."""

    def __init__(self) -> None:
        self.asked: Counter[str | None] = Counter()
        self.unanswered: Counter[str | None] = Counter()
        self.last: dict[str | None, int] = {}


class _Folding:
    def __init__(self, connection: Connection, rows: Rows, middle: int, asked_from: int) -> None:
        self._connection, self._rows, self._middle, self._asked_from = connection, rows, middle, asked_from
        self._outcomes = _Outcomes()
        self._numbers: defaultdict[tuple[str, int, str], int] = defaultdict(int)
        self._slots: defaultdict[int, _Slot] = defaultdict(_Slot)
        self._questions: defaultdict[int, _Questions] = defaultdict(_Questions)
        self._seqs: list[int] = []
        self._visitors: list[str] = []
        self._sessions: list[str] = []
        self._cited_last: dict[str, int] = {}

    def add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """The next rows, in order."""
        if any(map(_BOT, rows)):
            bots = [row for row in rows if row[1]]
            for row, numbers in zip(bots, self._packed(bots), strict=True):
                self._numbers["bot", _quarter(row[0]), ""] += numbers
            rows = [row for row in rows if not row[1]]
        if not rows:
            return
        packed = self._packed(rows)
        seqs = list(map(_SEQ, rows))
        cited = self._cited(seqs)
        start = cited_start = 0
        while start < len(rows):
            slot = _quarter(seqs[start])
            after = (slot + 1) * QUARTER_MS << SEQ_BITS
            end = bisect_left(seqs, after, start)
            cited_end = bisect_left(cited, after, cited_start, key=_SEQ)
            self._add_people(slot, rows[start:end], packed[start:end])
            if cited_end > cited_start:
                known = dict(zip(seqs[start:end], packed[start:end], strict=True))
                self._cite(self._sums(slot), cited[cited_start:cited_end], known)
            start, cited_start = end, cited_end

    def _packed(self, rows: Sequence[tuple[Any, ...]]) -> list[int]:
        """The lanes of each row."""
        columns = list(zip(*rows, strict=True))
        prompt, completion, reasoning, cost, first, duration = columns[-6:]
        measured = map(
            _PACK,
            _cut(prompt),
            _cut(completion),
            _cut(reasoning),
            map(is_not, first, repeat(None)),
            _cut([value or 0 for value in first]),
            map(is_not, duration, repeat(None)),
            _cut([value or 0 for value in duration]),
            map(round, map(mul, _cut(cost, MOST_CNY), repeat(_COST_UNIT))),
        )
        outcomes = map(self._outcomes.__getitem__, zip(*columns[2:6], strict=True))
        return list(map(add, map(_NUMBER, measured, repeat("little")), outcomes))

    def _cited(self, seqs: list[int]) -> list[tuple[int, str, str]]:
        """What is cited under rows from the first to the last of these; see _CITED."""
        rows = self._rows.within(seqs[0] - 1, seqs[-1])
        parts = self._connection.parts(
            f"{_CITED} WHERE {rows.condition('seq')} GROUP BY seq ORDER BY seq", rows.params
        )
        return list(chain.from_iterable(parts))

    def _sums(self, slot: int) -> _Slot:
        if self._middle:
            slot = self._middle if slot >= self._middle else self._middle - 1
        return self._slots[slot]

    def _add_people(self, slot: int, rows: Sequence[tuple[Any, ...]], packed: list[int]) -> None:
        """Rows of one quarter-hour."""
        columns = list(zip(*rows, strict=True))
        seqs, _, status, answered, _, _, provider, model, error, page, visitor, session, question = columns[
            :13
        ]
        self._numbers["all", slot, ""] += sum(packed)
        self._seqs += seqs
        self._visitors += visitor
        self._sessions += session
        if slot >= self._asked_from:
            asked = self._questions[slot // ASKED_QUARTERS]
            asked.asked.update(question)
            asked.unanswered.update(compress(question, map("no".__eq__, answered)))
            asked.last.update(zip(question, seqs, strict=True))
        sums = self._sums(slot)
        for found, values in (
            (sums.few, zip(provider, model, status, error, strict=True)),
            (sums.pages, page),
        ):
            for value, numbers in zip(values, packed, strict=True):
                found[value] += numbers
        for counts, waited in zip(sums.waits, columns[-2:], strict=True):
            counts.update(waited)

    def _cite(self, sums: _Slot, cited: list[tuple[int, str, str]], packed: Mapping[int, int]) -> None:
        for seq, sources, scores in cited:
            if seq in packed:  # what crawlers see cited is told nowhere
                sums.sources[sources] += packed[seq]
                sums.scores[sources].append(scores)
                self._cited_last[sources] = seq

    def sums(self) -> Sums:
        """What all rows come to."""
        numbers = self._numbers
        for hashes, column, name in (
            (self._visitors, "visitor", "visitors"),
            (self._sessions, "session", "sessions"),
        ):
            first = _first_of(hashes, self._seqs)
            for slot, count in _firsts(self._connection, self._rows, column, first).items():
                numbers["all", slot, ""] += count << _AT[name]
        scores: defaultdict[tuple[int, str], float] = defaultdict(float)
        for slot, sums in self._slots.items():
            for values, packed in sums.few.items():
                for dimension, value in zip(FEW, values, strict=True):
                    numbers[dimension, slot, value] += packed
            for page, packed in sums.pages.items():
                numbers["page", slot, page] = packed
            for cited, packed in sums.sources.items():
                told = sums.scores[cited]
                every = list(map(int, ",".join(told).replace("[", "").replace("]", "").split(",")))
                # A row counts once for each document, whose citations may be several.
                sources = _listed(cited)
                for source, times in Counter(sources).items():
                    numbers["source", slot, source] += packed + (len(told) * times << _AT["citations"])
                for place, source in enumerate(sources):
                    scores[slot, source] += sum(every[place :: len(sources)]) / SCORE_UNIT
        waits = {
            slot: (_in_buckets(sums.waits[0]), _in_buckets(sums.waits[1]))
            for slot, sums in self._slots.items()
        }
        return Sums(numbers, scores, waits, _by_key(self._questions), self._titles())

    def _titles(self) -> dict[str, str]:
        """What each document was called last."""
        last: dict[str, int] = {}
        for cited, seq in sorted(self._cited_last.items(), key=itemgetter(1)):
            last.update(dict.fromkeys(_listed(cited), seq))
        if not last:
            return {}
        rows = self._connection.execute(
            f"SELECT source, title FROM citations WHERE seq {LISTED} ORDER BY seq",  # noqa: S608
            (Listing(list(set(last.values()))),),
        )
        return dict(map(tuple, rows))


@lru_cache(4096)
def _listed(sources: str) -> tuple[str, ...]:
    return tuple(json.loads(sources))


def _quarter(seq: int) -> int:
    return (seq >> SEQ_BITS) // QUARTER_MS


def _cut(values: Sequence[Any], most: float = MOST) -> Sequence[Any]:
    return values if max(values) <= most else [min(value, most) for value in values]


def _first_of(hashes: Sequence[str], seqs: Sequence[int]) -> list[int]:
    """Rows with which a visitor (or session) may have come first: those with none before them in reach."""
    found: list[int] = []
    last: dict[str, int] = {}
    start = 0
    while start < len(seqs):
        bucket = seqs[start] >> BUCKET_BITS
        end = bisect_left(seqs, (bucket + 1) << BUCKET_BITS, start)
        first = dict(zip(reversed(hashes[start:end]), reversed(seqs[start:end]), strict=True))
        first.pop("", None)
        found += [seq for hash, seq in first.items() if last.get(hash, -REACH - 1) < bucket - REACH]
        last.update(dict.fromkeys(first, bucket))
        start = end
    return found


def _firsts(connection: Connection, rows: Rows, column: str, first: list[int]) -> Counter[int]:
    """By quarter-hour, how many came first. Only rows whose bucket those before `rows` can reach need to
    be compared with these: all that lies after the beginning of `rows` is among them."""
    known = (rows.low >> BUCKET_BITS) + REACH
    sure = [] if rows.late else [seq for seq in first if seq >> BUCKET_BITS > known]
    doubted = [seq for seq in first if rows.late or seq >> BUCKET_BITS <= known]
    if doubted:
        found = connection.execute(
            f"SELECT q.seq FROM queries q WHERE q.seq {LISTED} AND {rows.first(column)}",  # noqa: S608
            (Listing(doubted),),
        )
        sure += [row[0] for row in found]
    return Counter(map(_quarter, sure))


def _in_buckets(waited: Mapping[int | None, int]) -> Counter[int]:
    """Milliseconds as the buckets they fall into."""
    found = Counter[int]()
    for value, count in waited.items():
        if value is not None:
            found[histogram.bucket(value)] += count
    return found


def question_key(question: str) -> int:
    """A number for the question, without regard to blanks at the ends and to case."""
    words = question.strip().lower().encode("utf-8", "replace")
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "big", signed=True)


def _by_key(questions: Mapping[int, _Questions]) -> Asked:
    """By 8 hours and question: the newest row, how often it was asked, how often without an answer."""
    found: Asked = {}
    for slot, told in questions.items():
        for question, count in told.asked.items():
            if question and question.strip():
                entry = found.setdefault((slot, question_key(question)), [0, 0, 0])
                entry[:] = (
                    max(entry[0], told.last[question]),
                    entry[1] + count,
                    entry[2] + told.unanswered[question],
                )
    return found
