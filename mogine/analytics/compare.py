"""Whether a record that was moved has all of the one it came from: tables by rows, months by sums."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mogine.analytics import fold, rollups
from mogine.analytics.engine import Reader
from mogine.analytics.moved import LAST_SEQ, MARKED, MOVED_BITS, Bucket, by_bucket, digest_gaps
from mogine.analytics.records import from_epoch_ms
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.tables import LISTED, Listing, state

PART_ROWS = 500
LARGE_PART_ROWS = 200_000
DAY_MS = rollups.LEVELS[rollups.DAY_LEVEL] * fold.QUARTER_MS
# What is compared of each table beside the number of its rows.
_WEIGHTS = {
    "queries": "(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0) + coalesce(duration_ms, 0)) "
    "& 1073741823",
    "texts": "length(question) + length(answer)",
    "citations": "number + length(title) + length(source) + length(url)",
    "feedback": "length(reason) + length(comment)",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One number of both records: at the source, at the target, what the target has of its own, and what of
    the source it has deleted."""

    name: str
    numbers: tuple[float, float, float, float]
    differs: bool


def compare(source: Reader, target: Reader) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """Tables by their rows and by what is in them, months of UTC by their sums.

    Rows that the target recorded itself, or deleted itself, are told apart by the list.
    """
    own, gone, listed = _own_and_gone(target)
    known = state(target.connection)
    deleted = known["gone"] - known["moved_gone"]
    theirs, ours = _weigh(source), _weigh(target)
    besides, without = _weigh(target, own), _weigh(source, gone)
    tables: list[Line] = []
    for table in _WEIGHTS:
        for place, name in ((0, table), (1, f"{table}: contents")):
            numbers = theirs[table][place], ours[table][place], besides[table][place], without[table][place]
            expected = numbers[0] - numbers[3] + numbers[2]
            # Who was asked for a thumb may have given it there.
            differs = numbers[1] < expected if name == "feedback" else numbers[1] != expected
            if table == "feedback" and place:
                continue
            if name == "queries":
                differs = differs or numbers[0] != listed or len(gone) > deleted
            if differs or not place:
                tables.append(Line(name, (numbers[0], numbers[1], numbers[2], numbers[3]), differs))
    tables += _small_tables(source, target)
    return tuple(tables), _compare_months(source, target, own, is_exact=deleted <= len(gone))


def _own_and_gone(target: Reader) -> tuple[list[int], list[int], int]:
    """Rows at the target that are not in the list, rows of the list that are not there (by their keys at
    the source), and how long the list is."""
    own: list[int] = []
    gone: list[int] = []
    listed = 0
    there = by_bucket(target.connection.plain(f"{MARKED} ORDER BY q.seq"))
    rows = target.connection.plain("SELECT bucket, copied, seqs, marks FROM moved ORDER BY bucket")
    # Two of one millisecond at the edge of a bucket may have moved into the next.
    at_edge: set[int] = set()
    following = next(there, None)
    for number, *packed in rows:
        while following and following[0] < number:
            own += following[1].seqs
            following = next(there, None)
        here = set(following[1].seqs) if following and following[0] == number else set()
        if here:
            following = next(there, None)
        bucket = Bucket.unpack(packed[0], packed[1], packed[2])
        listed += len(bucket.seqs)
        places = {bucket.places.get(seq, seq): seq for seq in bucket.seqs}
        at_edge |= {at for at in places if at >> MOVED_BITS != number}
        gone += [seq for at, seq in places.items() if at not in here and at >> MOVED_BITS == number]
        own += sorted(here - places.keys())
    while following:
        own += following[1].seqs
        following = next(there, None)
    return [seq for seq in own if seq not in at_edge], gone, listed


def _weigh(reader: Reader, seqs: Sequence[int] | None = None) -> dict[str, tuple[int, int]]:
    """Of each table how many rows, and how much is in them: of all, or of those of `seqs`."""
    found = {table: (0, 0) for table in _WEIGHTS}
    for condition, params in _parts(reader, seqs):
        for table, weight in _WEIGHTS.items():
            count, heavy = reader.one(
                f"SELECT count(*), coalesce(sum({weight}), 0) FROM {table} WHERE {condition}",  # noqa: S608
                params,
            )
            found[table] = (found[table][0] + int(count), found[table][1] + int(heavy))
    return found


def _parts(reader: Reader, seqs: Sequence[int] | None) -> Iterator[tuple[str, list[Any]]]:
    """Conditions that together are everything, each of them quick to ask for."""
    if seqs is not None:
        for start in range(0, len(seqs), PART_ROWS):
            yield f"seq {LISTED}", [Listing(seqs[start : start + PART_ROWS])]
        return
    after: int | None = -1
    while after is not None:
        (upto,) = reader.one(
            "SELECT max(seq) FROM (SELECT seq FROM queries WHERE seq > ? ORDER BY seq LIMIT ?) AS following",
            (after, LARGE_PART_ROWS),
        )
        yield "seq > ? AND seq <= ?", [after, LAST_SEQ if upto is None else upto]
        after = upto


def _small_tables(source: Reader, target: Reader) -> Iterator[Line]:
    lost = [reader.one("SELECT coalesce(sum(rows), 0) FROM losses")[0] for reader in (source, target)]
    yield Line("losses", (lost[0], lost[1], 0, 0), lost[1] < lost[0])
    known = state(target.connection)
    gaps = [reader.one("SELECT count(*) FROM gaps")[0] for reader in (source, target)]
    # The target's own, once somebody has decided on them there.
    are_moved = digest_gaps(target.connection) == known["kept_gaps"]
    differs = are_moved and digest_gaps(source.connection) != known["moved_gaps"]
    yield Line("gaps", (gaps[0], gaps[1], 0, 0), differs)


def _compare_months(
    source: Reader, target: Reader, own: Sequence[int], *, is_exact: bool
) -> tuple[Line, ...]:
    """Questions, tokens and cost of each month; `is_exact` unless the target has deleted rows of its own,
    whose numbers are in its sums."""
    theirs, ours, besides = _months(source), _months(target), _months_of(target, own)
    lines = []
    for month in sorted(theirs.keys() | ours.keys()):
        for place, name in enumerate(("questions", "tokens", "CNY")):
            numbers = [found.get(month, [0, 0, 0.0])[place] for found in (theirs, ours, besides)]
            surplus = numbers[1] - numbers[0] - numbers[2]
            tolerance = 1e-9 * abs(numbers[1]) + 1e-6 if name == "CNY" else 0
            differs = surplus < -tolerance or (is_exact and surplus > tolerance)
            lines.append(Line(f"{month} {name}", (numbers[0], numbers[1], numbers[2], 0), differs))
    return tuple(lines)


def _months(reader: Reader) -> dict[str, list[float]]:
    """What the sums and the rows that are not summed yet come to."""
    rollups.gather_tail(reader.connection, 0, 0, LAST_SEQ)
    summed = (
        "sum(questions), sum(prompt_tokens + completion_tokens), sum(cost_cny) FROM {} "
        "WHERE dimension IN ('all', 'bot')"
    )
    quarters = rollups.LEVELS[rollups.DAY_LEVEL]
    days = reader.all(
        f"SELECT slot, {summed.format('rollups')} AND level = ? GROUP BY slot",
        (rollups.DAY_LEVEL,),
    )
    days += reader.all(f"SELECT slot / {quarters}, {summed.format('fresh')} GROUP BY 1")
    found: dict[str, list[float]] = {}
    for day, *numbers in days:
        _add_to(found, from_epoch_ms(day * DAY_MS), numbers)
    return found


def _months_of(reader: Reader, seqs: Sequence[int]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for condition, params in _parts(reader, seqs):
        rows = reader.all(
            "SELECT seq, coalesce(prompt_tokens, 0), coalesce(completion_tokens, 0), coalesce(cost_cny, 0) "  # noqa: S608
            f"FROM queries WHERE {condition}",
            params,
        )
        for seq, prompt, completion, cost in rows:
            tokens = min(prompt, fold.MOST) + min(completion, fold.MOST)
            _add_to(found, from_epoch_ms(seq >> SEQ_BITS), (1, tokens, min(cost, fold.MOST_CNY)))
    return found


def _add_to(found: dict[str, list[float]], at: datetime, numbers: Sequence[float]) -> None:
    sums = found.setdefault(f"{at:%Y-%m}", [0, 0, 0.0])
    for place, number in enumerate(numbers):
        sums[place] += number
