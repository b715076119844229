"""Sums of the rows, by quarter-hour of UTC and by blocks of these: what statistics read.

Every time zone since 1972 lies a whole number of quarter-hours from UTC, so the days and hours of any of them
are made of whole slots, also at :30 and :45 and across clock changes. Four levels of slots (a quarter-hour,
an hour, a day, 16 days) let a year be summed from some hundred entries.

Recording does not wait for this. Rows are summed behind the writer, in the order of their keys up to
`summed_upto`; a reader gathers the rows after it (and those of `uncounted`, which came late) in the same
read transaction, by the same function. So the numbers are always those of all rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

from mogine.analytics import histogram
from mogine.analytics.engine import Connection
from mogine.analytics.schema import BUCKET_BITS, SEQ_BITS
from mogine.analytics.tables import LISTED, Bulk, Listing, set_state, state

QUARTER_MS = 900_000
LEVELS = (1, 4, 96, 1536)  # quarter-hours in a slot of each level
DAY_LEVEL = 2
DIMENSIONS = ("all", "bot", "provider", "model", "status", "error", "page", "source")
MAX_PAGES = 1000  # different pages in a day of UTC; visitors name them, so there could be any number
OTHER_PAGES = "(other pages)"

ASKED_QUARTERS = 32  # questions are counted by 8 hours: days of China and of UTC are whole numbers of these
ASKED_KEPT = 40
ASKED_ROOM = 4096
ASKED_LEFT = 1024
TAKEN_ROWS = 2_000

COLUMNS = (
    "questions", "visitors", "sessions", "ok", "errors", "aborted", "refused", "answered", "unanswered",
    "thumbs_up", "thumbs_down", "prompt_tokens", "completion_tokens", "reasoning_tokens", "estimated",
    "cost_cny", "first_tokens", "first_token_ms", "durations", "duration_ms", "citations", "score",
)  # fmt: skip

# What has few values is grouped by all of them at once, and from there by each.
_FEW = {"provider": "provider", "model": "model", "status": "status", "error": "error_type"}
# A hash of a visitor lives for a day: what lies within two buckets of 18.6 hours is looked at.
REACH = 2
_REACH = "p.bucket IN (q.bucket - 2, q.bucket - 1, q.bucket)"
_AFTER = "p.bucket IN (q.bucket, q.bucket + 1, q.bucket + 2)"

_REALS = ("cost_cny", "score")
# What is not summed yet, as readers gather it and as the writer adds it. Types that both engines understand.
FRESH = (
    "CREATE TEMP TABLE IF NOT EXISTS fresh (dimension TEXT NOT NULL, slot BIGINT NOT NULL, "
    "value TEXT NOT NULL, "
    + ", ".join(f"{name} {'DOUBLE PRECISION' if name in _REALS else 'BIGINT'} NOT NULL" for name in COLUMNS)
    + ")",
    "CREATE TEMP TABLE IF NOT EXISTS fresh_asked (slot BIGINT NOT NULL, key BIGINT NOT NULL, "
    "seq BIGINT NOT NULL, questions BIGINT NOT NULL, unanswered BIGINT NOT NULL)",
    "CREATE TEMP TABLE IF NOT EXISTS fresh_sources (source TEXT NOT NULL, title TEXT NOT NULL)",
)
_ADDED = ", ".join(f"{name} = rollups.{name} + excluded.{name}" for name in COLUMNS)
_SUMMED = ", ".join(f"sum({name})" for name in COLUMNS)
_ADD_ASKED = Bulk(
    "INSERT INTO asked (slot, key, seq, questions, unanswered) VALUES ",
    5,
    " ON CONFLICT (slot, key) DO UPDATE SET "
    "seq = CASE WHEN excluded.seq > asked.seq THEN excluded.seq ELSE asked.seq END, "
    "questions = asked.questions + excluded.questions, unanswered = asked.unanswered + excluded.unanswered",
)
_ADD_FRESH = Bulk("INSERT INTO fresh VALUES ", 3 + len(COLUMNS))
_ADD_FRESH_ASKED = Bulk("INSERT INTO fresh_asked (slot, key, seq, questions, unanswered) VALUES ", 5)
_ADD_FRESH_SOURCES = Bulk("INSERT INTO fresh_sources (source, title) VALUES ", 2)
_ADD_SOURCES = Bulk(
    "INSERT INTO sources (source, title) VALUES ",
    2,
    " ON CONFLICT (source) DO UPDATE SET title = excluded.title WHERE sources.title <> excluded.title",
)
_SET_WAITS = Bulk(
    "INSERT INTO waits (level, slot, first_token, duration) VALUES ",
    4,
    " ON CONFLICT (level, slot) DO UPDATE SET first_token = excluded.first_token, "
    "duration = excluded.duration",
)

Waits = dict[int, tuple[Counter[int], Counter[int]]]
Asked = dict[tuple[int, int], list[int]]

# The numbers of a row, and their sums, are one integer of many lanes: one addition adds them all. A lane has
# room for the largest number that the record takes (2^53) sixteen million times over.
_LANE_BITS = 80
_LANES = COLUMNS[:-1]  # scores are no whole numbers
_AT = {name: _LANE_BITS * place for place, name in enumerate(_LANES)}
_LANE = (1 << _LANE_BITS) - 1
_AT_PROMPT, _AT_COMPLETION, _AT_REASONING = (
    _AT[f"{name}_tokens"] for name in ("prompt", "completion", "reasoning")
)
_AT_COST, _AT_FIRST, _AT_DURATION = _AT["cost_cny"], _AT["first_token_ms"], _AT["duration_ms"]
_ONE_FIRST, _ONE_DURATION = 1 << _AT["first_tokens"], 1 << _AT["durations"]
_ONE_CITATION = 1 << _AT["citations"]
_COST_UNIT = 10**10  # costs are kept with ten digits behind the point
# Nonsensical numbers are cut, so that they do not make every later sum useless.
MOST_TOKENS = 1 << 40
MOST_CNY = 1e6


class Rows:
    """Some rows: those with keys after `low` up to `high`, or those that came late.

    Of the rows of a range all are left out that came late: they are counted by themselves.
    """

    def __init__(self, low: int = 0, high: int = 0, *, late: bool = False) -> None:
        self.late = late
        self.params: tuple[int, ...] = () if late else (low, high)
        self.condition = (
            "q.seq IN (SELECT seq FROM uncounted)"
            if late
            else "q.seq > ? AND q.seq <= ? AND q.seq NOT IN (SELECT seq FROM uncounted)"
        )

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
            "AND p.seq NOT IN (SELECT seq FROM uncounted))"
        )
        return f"{named} AND NOT {earlier} AND NOT {counted}"


# --- from rows to sums ---------------------------------------------------------------------------


@dataclass(slots=True)
class Sums:
    """What some rows come to: numbers by dimension, quarter-hour and value (an integer of lanes, and the sum
    of scores), waits and questions, and what each cited document is called."""

    numbers: dict[tuple[str, int, str], int]
    scores: dict[tuple[int, str], float]
    waits: Waits
    asked: Asked
    titles: dict[str, str]

    def entries(self) -> list[list[Any]]:
        """As rows of the table `fresh`."""
        found: list[list[Any]] = []
        for (dimension, slot, value), packed in self.numbers.items():
            row: list[Any] = [dimension, slot, value, *((packed >> at) & _LANE for at in _AT.values())]
            row[3 + COLUMNS.index("cost_cny")] /= _COST_UNIT
            row.append(self.scores.get((slot, value), 0.0) if dimension == "source" else 0.0)
            found.append(row)
        return found


_ROWS = (
    "SELECT q.seq, q.bot, q.provider, q.model, q.status, q.error_type, q.answered, q.feedback, "
    "q.tokens_estimated, q.prompt_tokens, q.completion_tokens, q.reasoning_tokens, q.cost_cny, "
    "q.first_token_ms, q.duration_ms, q.page_url, q.visitor, q.session, t.question "
    "FROM queries q LEFT JOIN texts t ON t.seq = q.seq"
)


@lru_cache(1024)
def _outcome(status: str, answered: str, feedback: str, estimated: int) -> int:
    """The lanes of one question that ended so."""
    named = {
        {"ok": "ok", "error": "errors", "aborted": "aborted", "refused": "refused"}.get(status),
        {"yes": "answered", "no": "unanswered"}.get(answered),
        {"up": "thumbs_up", "down": "thumbs_down"}.get(feedback),
    }
    return sum(1 << _AT[name] for name in ("questions", *named) if name) + (estimated << _AT["estimated"])


def _spent(prompt: int | None, completion: int | None, reasoning: int | None, cost: float | None) -> int:
    """The lanes of what one question has used."""
    packed = 0
    if prompt:
        packed = min(prompt, MOST_TOKENS) << _AT_PROMPT
    if completion:
        packed += min(completion, MOST_TOKENS) << _AT_COMPLETION
    if reasoning:
        packed += min(reasoning, MOST_TOKENS) << _AT_REASONING
    if cost:
        packed += round(max(0.0, min(cost, MOST_CNY)) * _COST_UNIT) << _AT_COST
    return packed


def fold(connection: Connection, rows: Rows, middle: int = 0) -> Sums:
    """Sums of `rows`, read once in the order of their keys, with what they cite beside them.

    With a `middle` all but what is told of everybody is summed by two slots instead of quarter-hours:
    `middle` for what comes from there on, the one before it for the rest.

    In Python, since grouping by each dimension in SQL means to sort the rows for each anew.
    """
    everybody: defaultdict[tuple[str, int, str], int] = defaultdict(int)
    few: defaultdict[tuple[int, str, str, str, str], int] = defaultdict(int)
    people = _People()
    cited = _Cited(connection, rows)
    for (
        seq, bot, provider, model, status, error, answered, feedback, estimated, prompt, completion,
        reasoning, cost, first, duration, page, visitor, session, question,
    ) in connection.plain(f"{_ROWS} WHERE {rows.condition} ORDER BY q.seq", rows.params):  # fmt: skip
        slot = (seq >> SEQ_BITS) // QUARTER_MS
        packed = _outcome(status, answered, feedback, estimated)
        packed += _spent(prompt, completion, reasoning, cost)
        if first is not None:
            packed += _ONE_FIRST + (first << _AT_FIRST)
        if status != "ok":
            duration = None
        elif duration is not None:
            packed += _ONE_DURATION + (duration << _AT_DURATION)
        sources = cited.under(seq)
        everybody["bot" if bot else "all", slot, ""] += packed
        if not bot:
            if middle:
                slot = middle if slot >= middle else middle - 1
            few[slot, provider, model, status, error] += packed
            people.pages[slot, page] += packed
            people.cite(slot, sources, packed)
            people.wait(slot, first, duration)
            people.ask(seq, question, answered == "no")
            people.visitors.see(visitor, seq)
            people.sessions.see(session, seq)
    numbers = everybody
    for seen, column, name in (
        (people.visitors, "visitor", "visitors"),
        (people.sessions, "session", "sessions"),
    ):
        for slot, count in _firsts(connection, rows, column, seen).items():
            numbers["all", slot, ""] += count << _AT[name]
    numbers.update(_by_dimension(few))
    numbers.update((("page", *key), packed) for key, packed in people.pages.items())
    numbers.update((("source", *key), packed) for key, packed in people.sources.items())
    return Sums(numbers, people.scores, _in_buckets(people.waits), _by_key(people.asked), cited.titles)


def _by_dimension(few: Mapping[tuple[int, str, str, str, str], int]) -> dict[tuple[str, int, str], int]:
    numbers: defaultdict[tuple[str, int, str], int] = defaultdict(int)
    for (slot, *values), packed in few.items():
        for dimension, value in zip(_FEW, values, strict=True):
            numbers[dimension, slot, value] += packed
    return numbers


class _Cited:
    """What is cited under rows that are read in their order beside this."""

    def __init__(self, connection: Connection, rows: Rows) -> None:
        self.titles: dict[str, str] = {}
        condition = rows.condition.replace("q.seq", "seq")
        self._reading = connection.plain(
            f"SELECT seq, source, title, score FROM citations WHERE {condition} ORDER BY seq, number",  # noqa: S608
            rows.params,
        )
        self._next = next(self._reading, None)

    def under(self, seq: int) -> list[tuple[str, float]]:
        """Documents cited under the row `seq`, with the scores of the citations."""
        found: list[tuple[str, float]] = []
        while self._next is not None and self._next[0] <= seq:
            at, source, title, score = self._next
            if at == seq:
                found.append((source, score))
                if title > self.titles.get(source, ""):
                    self.titles[source] = title
            self._next = next(self._reading, None)
        return found


class _People:
    """What is counted of people only, not of crawlers."""

    def __init__(self) -> None:
        self.pages: defaultdict[tuple[int, str], int] = defaultdict(int)
        self.sources: defaultdict[tuple[int, str], int] = defaultdict(int)
        self.scores: defaultdict[tuple[int, str], float] = defaultdict(float)
        self.waits: Waits = {}  # by milliseconds
        self.asked: dict[tuple[int, str], list[int]] = {}
        self.visitors, self.sessions = _Seen(), _Seen()

    def cite(self, slot: int, sources: Sequence[tuple[str, float]], packed: int) -> None:
        """A row counts once for each document, whose citations may be several."""
        known = set()
        for source, score in sources:
            self.sources[slot, source] += _ONE_CITATION if source in known else packed + _ONE_CITATION
            self.scores[slot, source] += score
            known.add(source)

    def wait(self, slot: int, first: int | None, duration: int | None) -> None:
        pair = self.waits.get(slot)
        if pair is None:
            pair = self.waits[slot] = (Counter(), Counter())
        if first is not None:
            pair[0][first] += 1
        if duration is not None:
            pair[1][duration] += 1

    def ask(self, seq: int, question: str | None, is_unanswered: bool) -> None:
        if not question:
            return
        key = ((seq >> SEQ_BITS) // (QUARTER_MS * ASKED_QUARTERS), question)
        entry = self.asked.get(key)
        if entry is None:
            self.asked[key] = [seq, 1, int(is_unanswered)]
        else:
            entry[0] = seq
            entry[1] += 1
            entry[2] += is_unanswered


class _Seen:
    """Visitors (or sessions) among some rows; `first` are the rows with which they may have come first."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self.first: list[int] = []

    def see(self, hash: str, seq: int) -> None:
        if not hash:
            return
        bucket = seq >> BUCKET_BITS
        if self._last.get(hash, -REACH - 1) < bucket - REACH:
            self.first.append(seq)
        self._last[hash] = bucket


def _firsts(connection: Connection, rows: Rows, column: str, seen: _Seen) -> Counter[int]:
    """By quarter-hour, how many came first. Only rows whose bucket those before `rows` can reach need to
    be compared with these: all that lies after the beginning of `rows` is among them."""
    known = -1 if rows.late else (rows.params[0] >> BUCKET_BITS) + REACH
    sure = [] if rows.late else [seq for seq in seen.first if seq >> BUCKET_BITS > known]
    doubted = [seq for seq in seen.first if rows.late or seq >> BUCKET_BITS <= known]
    if doubted:
        found = connection.execute(
            f"SELECT q.seq FROM queries q WHERE q.seq {LISTED} AND {rows.first(column)}",  # noqa: S608
            (Listing(doubted),),
        )
        sure += [row[0] for row in found]
    return Counter((seq >> SEQ_BITS) // QUARTER_MS for seq in sure)


def _in_buckets(waited: Waits) -> Waits:
    """Milliseconds as the buckets they fall into."""
    found: Waits = {}
    for slot, pair in waited.items():
        both = found[slot] = (Counter[int](), Counter[int]())
        for place, counts in enumerate(pair):
            for value, count in counts.items():
                both[place][histogram.bucket(value)] += count
    return found


def question_key(question: str) -> int:
    """A number for the question, without regard to blanks at the ends and to case."""
    words = question.strip().lower().encode("utf-8", "replace")
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "big", signed=True)


def _by_key(questions: Mapping[tuple[int, str], Sequence[int]]) -> Asked:
    """By 8 hours and question: the newest row, how often it was asked, how often without an answer."""
    found: Asked = {}
    for (slot, question), (seq, count, unanswered) in questions.items():
        if question.strip():
            entry = found.setdefault((slot, question_key(question)), [0, 0, 0])
            entry[:] = max(entry[0], seq), entry[1] + count, entry[2] + unanswered
    return found


def gather_tail(connection: Connection, low: int, middle: int, high: int) -> Waits:
    """What is not summed yet of the rows from `low` to before `high`, into temporary tables; their waits.

    By quarter-hours only what is told of everybody: nobody asks for other parts than those before and after
    the quarter-hour of `middle`.
    """
    for table in FRESH:
        connection.execute(table)
    found: Waits = {}
    upto = state(connection)["summed_upto"]
    for rows in (Rows(max(low - 1, upto), high - 1), Rows(late=True)):
        # What came late may lie before and after all that is asked for.
        sums = fold(connection, rows, 0 if rows.late else (middle >> SEQ_BITS) // QUARTER_MS)
        _ADD_FRESH.run(connection, sums.entries())
        for slot, pair in sums.waits.items():
            both = found.setdefault(slot, (Counter(), Counter()))
            both[0].update(pair[0])
            both[1].update(pair[1])
        _ADD_FRESH_SOURCES.run(connection, list(sums.titles.items()))
        _ADD_FRESH_ASKED.run(connection, [(*key, *entry) for key, entry in sums.asked.items()])
    return found


# --- summing up ----------------------------------------------------------------------------------


def sum_up(writer: Connection, limit: int, before: int) -> int:
    """Adds the next rows before the key `before`, at most `limit`, to the sums; how many."""
    late = writer.execute("SELECT count(*) FROM uncounted").fetchone()[0]
    if late:
        _add(writer, Rows(late=True))
        writer.execute("DELETE FROM uncounted")
    upto = state(writer)["summed_upto"]
    count, last = writer.execute(
        "SELECT count(*), max(seq) FROM "
        "(SELECT seq FROM queries WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?) AS following",
        (upto, before, limit),
    ).fetchone()
    if count:
        _add(writer, Rows(upto, last))
        set_state(writer, summed_upto=last)
    return int(late + count)


def _add(writer: Connection, rows: Rows) -> None:
    sums = fold(writer, rows)
    _set_fresh(writer, sums)
    add_fresh(writer)
    _add_waits(writer, sums.waits)
    _add_asked(writer, sums.asked)
    _ADD_SOURCES.run(writer, list(sums.titles.items()))


def _set_fresh(writer: Connection, sums: Sums) -> None:
    writer.execute(FRESH[0])
    writer.execute("DELETE FROM fresh")
    _ADD_FRESH.run(writer, sums.entries())
    _few_pages(writer)


def add_fresh(writer: Connection, levels: Sequence[int] = range(len(LEVELS))) -> None:
    """Adds what was gathered to the sums of each level."""
    for level in levels:
        writer.execute(
            f"INSERT INTO rollups SELECT dimension, {level}, slot / {LEVELS[level]}, value, "  # noqa: S608
            f"{_SUMMED} FROM fresh WHERE true GROUP BY dimension, slot / {LEVELS[level]}, value "
            f"ON CONFLICT (dimension, level, slot, value) DO UPDATE SET {_ADDED}"
        )
    writer.execute("DELETE FROM fresh")


def _few_pages(writer: Connection) -> None:
    """Puts the pages beyond MAX_PAGES of a day under one name."""
    size = LEVELS[DAY_LEVEL]
    days = writer.execute(
        f"SELECT slot / {size}, count(DISTINCT value) FROM fresh WHERE dimension = 'page' GROUP BY 1"  # noqa: S608
    ).fetchall()
    known = "SELECT value FROM rollups WHERE dimension = 'page' AND level = ? AND slot = ?"
    for day, new in days:
        there = {row[0] for row in writer.execute(known, (DAY_LEVEL, day))}
        if len(there) + new <= MAX_PAGES:
            continue
        named = writer.execute(
            f"SELECT value FROM fresh WHERE dimension = 'page' AND slot / {size} = ? GROUP BY value "  # noqa: S608
            "ORDER BY sum(questions) DESC, value",
            (day,),
        )
        unknown = [row[0] for row in named.fetchall() if row[0] not in there]
        for surplus in unknown[max(0, MAX_PAGES - len(there)) :]:
            writer.execute(
                f"UPDATE fresh SET value = ? WHERE dimension = 'page' AND slot / {size} = ? AND value = ?",  # noqa: S608
                (OTHER_PAGES, day, surplus),
            )


def _add_waits(writer: Connection, found: Waits) -> None:
    rows = []
    for level, size in enumerate(LEVELS):
        entries: dict[int, tuple[Counter[int], Counter[int]]] = {}
        for slot, pair in found.items():
            first, whole = entries.setdefault(slot // size, (Counter(), Counter()))
            first.update(pair[0])
            whole.update(pair[1])
        known = writer.execute(
            f"SELECT slot, first_token, duration FROM waits WHERE level = ? AND slot {LISTED}",  # noqa: S608
            (level, Listing(list(entries))),
        )
        packed = {row[0]: (row[1], row[2]) for row in known}
        for slot, pair in entries.items():
            old = packed.get(slot, (b"", b""))
            rows.append((level, slot, *(histogram.add(*each) for each in zip(old, pair, strict=True))))
    _SET_WAITS.run(writer, rows)


def _add_asked(writer: Connection, entries: Mapping[tuple[int, int], list[int]]) -> None:
    """Adds questions, and keeps few of each 8 hours: the most frequent, once these are over."""
    if not entries:
        return
    _ADD_ASKED.run(writer, [(*key, *entry) for key, entry in entries.items()])
    slots = {slot for slot, _ in entries}
    opened = state(writer)["asked_open"]
    over = writer.execute(
        "SELECT DISTINCT slot FROM asked WHERE slot >= ? AND slot < ?", (opened, max(slots))
    )
    for (slot,) in over.fetchall():
        prune_asked(writer, slot, ASKED_KEPT)
    for slot in slots:
        if writer.execute("SELECT count(*) FROM asked WHERE slot = ?", (slot,)).fetchone()[0] > ASKED_ROOM:
            prune_asked(writer, slot, ASKED_LEFT)
    set_state(writer, asked_open=max(opened, *slots))


def take_over(writer: Connection, reader: Connection) -> None:
    """Adds all sums of another record, to which `reader` belongs, to those of `writer`."""
    _take_rollups(writer, reader)
    for level, slot, *theirs in reader.plain("SELECT level, slot, first_token, duration FROM waits"):
        ours = writer.execute(
            "SELECT first_token, duration FROM waits WHERE level = ? AND slot = ?", (level, slot)
        ).fetchone() or (b"", b"")
        packed = [histogram.add(b"", histogram.unpack(pair)) for pair in zip(ours, theirs, strict=True)]
        _SET_WAITS.run(writer, [(level, slot, *packed)])
    for add, rows in (
        (_ADD_ASKED, reader.plain("SELECT slot, key, seq, questions, unanswered FROM asked")),
        (_ADD_SOURCES, reader.plain("SELECT source, title FROM sources")),
    ):
        while part := list(islice(rows, TAKEN_ROWS)):
            add.run(writer, part)


def _take_rollups(writer: Connection, reader: Connection) -> None:
    names = ("dimension", "level", "slot", "value", *COLUMNS)
    is_new = not writer.execute("SELECT 1 FROM rollups LIMIT 1").fetchone()
    writer.execute("CREATE TEMP TABLE IF NOT EXISTS taken AS SELECT * FROM rollups WHERE 1 = 0")
    rows = reader.plain(f"SELECT {', '.join(names)} FROM rollups")  # noqa: S608
    while part := list(islice(rows, TAKEN_ROWS)):
        if is_new:
            writer.load("rollups", names, part)
            continue
        writer.execute("DELETE FROM taken")
        writer.load("taken", names, part)
        writer.execute(
            f"INSERT INTO rollups ({', '.join(names)}) SELECT {', '.join(names)} FROM taken "  # noqa: S608
            f"WHERE true ON CONFLICT (dimension, level, slot, value) DO UPDATE SET {_ADDED}"
        )


def prune_asked(writer: Connection, slot: int, kept: int) -> None:
    """Leaves of these 8 hours the `kept` questions asked most often."""
    writer.execute(
        "DELETE FROM asked WHERE slot = ? AND key IN (SELECT key FROM asked WHERE slot = ? "
        "ORDER BY questions DESC, seq DESC LIMIT ? OFFSET ?)",
        (slot, slot, 2**62, kept),
    )


# --- changes of rows that are summed already -----------------------------------------------------


def change_feedback(writer: Connection, seq: int, rating: str) -> None:
    """The thumb of the row `seq` is about to become `rating`."""
    if seq > state(writer)["summed_upto"]:
        return
    if writer.execute("SELECT 1 FROM uncounted WHERE seq = ?", (seq,)).fetchone():
        return
    row = writer.execute("SELECT * FROM queries WHERE seq = ?", (seq,)).fetchone()
    change = {"thumbs_up": 0, "thumbs_down": 0}
    for value, sign in ((row["feedback"], -1), (rating, 1)):
        if value in ("up", "down"):
            change[f"thumbs_{value}"] += sign
    slot = (seq >> 20) // QUARTER_MS
    for dimension, value in _places(writer, row, slot):
        for level, size in enumerate(LEVELS):
            writer.execute(
                "UPDATE rollups SET thumbs_up = thumbs_up + ?, thumbs_down = thumbs_down + ? "
                "WHERE dimension = ? AND level = ? AND slot = ? AND value = ?",
                (*change.values(), dimension, level, slot // size, value),
            )


def _places(writer: Connection, row: Mapping[str, Any], slot: int) -> Iterator[tuple[str, str]]:
    """Under which dimensions and values a row was counted."""
    if row["bot"]:
        yield "bot", ""
        return
    yield "all", ""
    for dimension, column in _FEW.items():
        yield dimension, row[column]
    known = writer.execute(
        "SELECT 1 FROM rollups WHERE dimension = 'page' AND level = 0 AND slot = ? AND value = ?",
        (slot, row["page_url"]),
    ).fetchone()
    yield "page", row["page_url"] if known else OTHER_PAGES
    for (source,) in writer.execute(
        "SELECT DISTINCT source FROM citations WHERE seq = ?", (row["seq"],)
    ).fetchall():
        yield "source", source


def rename_value(writer: Connection, dimension: str, value: str, new: str) -> int:
    """Takes a value out of the sums, whose numbers go to `new`; how many entries there were."""
    writer.execute(
        f"INSERT INTO rollups SELECT dimension, level, slot, ?, {', '.join(COLUMNS)} FROM rollups "  # noqa: S608
        "WHERE dimension = ? AND value = ? "
        f"ON CONFLICT (dimension, level, slot, value) DO UPDATE SET {_ADDED}",
        (new, dimension, value),
    )
    return writer.execute(
        "DELETE FROM rollups WHERE dimension = ? AND value = ?", (dimension, value)
    ).rowcount


# --- building anew -------------------------------------------------------------------------------


def rebuild_hour(writer: Connection, hour: int) -> int:
    """The sums of an hour from its rows, all of them; how many are counted."""
    low, high = hour * LEVELS[1], (hour + 1) * LEVELS[1]
    for dimension in DIMENSIONS:
        writer.execute(
            "DELETE FROM rollups WHERE dimension = ? AND level = 0 AND slot >= ? AND slot < ?",
            (dimension, low, high),
        )
    writer.execute("DELETE FROM waits WHERE level = 0 AND slot >= ? AND slot < ?", (low, high))
    upto = state(writer)["summed_upto"]
    rows = Rows((low * QUARTER_MS << 20) - 1, min((high * QUARTER_MS << 20) - 1, upto))
    sums = fold(writer, rows)
    counted = sum(
        packed & _LANE for (dimension, _, _), packed in sums.numbers.items() if dimension in ("all", "bot")
    )
    _set_fresh(writer, sums)
    add_fresh(writer, [0])
    _SET_WAITS.run(
        writer,
        [(0, slot, *(histogram.add(b"", counts) for counts in pair)) for slot, pair in sums.waits.items()],
    )
    rebuild_slot(writer, 1, hour)
    return counted


def rebuild_slot(writer: Connection, level: int, slot: int) -> None:
    """A slot of an upper level from those below it."""
    ratio = LEVELS[level] // LEVELS[level - 1]
    low, high = slot * ratio, (slot + 1) * ratio
    for dimension in DIMENSIONS:
        writer.execute(
            "DELETE FROM rollups WHERE dimension = ? AND level = ? AND slot = ?", (dimension, level, slot)
        )
        writer.execute(
            f"INSERT INTO rollups SELECT dimension, ?, ?, value, {_SUMMED} FROM rollups "  # noqa: S608
            "WHERE dimension = ? AND level = ? AND slot >= ? AND slot < ? GROUP BY dimension, value",
            (level, slot, dimension, level - 1, low, high),
        )
    below = writer.execute(
        "SELECT first_token, duration FROM waits WHERE level = ? AND slot >= ? AND slot < ?",
        (level - 1, low, high),
    ).fetchall()
    writer.execute("DELETE FROM waits WHERE level = ? AND slot = ?", (level, slot))
    if below:
        packed = [histogram.add(b"", histogram.unpack(row[place] for row in below)) for place in (0, 1)]
        _SET_WAITS.run(writer, [(level, slot, *packed)])


def rebuild_asked(writer: Connection, slot: int) -> None:
    """The questions of 8 hours that are over."""
    low, high = slot * ASKED_QUARTERS * QUARTER_MS << 20, (slot + 1) * ASKED_QUARTERS * QUARTER_MS << 20
    writer.execute("DELETE FROM asked WHERE slot = ?", (slot,))
    entries = fold(writer, Rows(low - 1, min(high - 1, state(writer)["summed_upto"]))).asked
    most = sorted(entries.items(), key=lambda item: (-item[1][1], -item[1][0]))[:ASKED_KEPT]
    _ADD_ASKED.run(writer, [(*key, *entry) for key, entry in most])


# --- reading -------------------------------------------------------------------------------------


def pieces(low: int, high: int) -> list[tuple[int, int, int]]:
    """Slots that together are the quarter-hours from `low` to before `high`: (level, from, to before)."""
    found: list[tuple[int, int, int]] = []
    for level in range(len(LEVELS)):
        if low >= high:
            break
        size = LEVELS[level]
        above = LEVELS[level + 1] if level + 1 < len(LEVELS) else 0
        if not above:
            found.append((level, low // size, high // size))
            break
        inner_low, inner_high = -(-low // above) * above, high // above * above
        if inner_low >= inner_high:
            found.append((level, low // size, high // size))
            break
        if low < inner_low:
            found.append((level, low // size, inner_low // size))
        if inner_high < high:
            found.append((level, inner_high // size, high // size))
        low, high = inner_low, inner_high
    return found
