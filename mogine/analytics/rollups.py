"""Sums of the rows, by quarter-hour of UTC and by blocks of these: what statistics read.

Every time zone since 1972 lies a whole number of quarter-hours from UTC, so the days and hours of any of them
are made of whole slots, also at :30 and :45 and across clock changes. Four levels of slots (a quarter-hour,
an hour, a day, 16 days) let a year be summed from some hundred entries.

Recording does not wait for this. Rows are summed behind the writer, in the order of their keys up to
`summed_upto`; a reader gathers the rows after it (and those of `uncounted`, which came late) in the same
read transaction, by the same function. So the numbers are always those of all rows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from mogine.analytics import histogram
from mogine.analytics.engine import Connection
from mogine.analytics.fold import ASKED_QUARTERS, COLUMNS, FEW, QUARTER_MS, Rows, Sums, Waits, fold
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.tables import LISTED, Bulk, Listing, set_state, state

LEVELS = (1, 4, 96, 1536)  # quarter-hours in a slot of each level
DAY_LEVEL = 2
DIMENSIONS = ("all", "bot", "provider", "model", "status", "error", "page", "source")
MAX_PAGES = 1000  # different pages in a day of UTC; visitors name them, so there could be any number
OTHER_PAGES = "(other pages)"

ASKED_KEPT = 40
ASKED_ROOM = 4096
ASKED_LEFT = 1024
TAKEN_ROWS = 2_000

_REALS = ("cost_cny", "score")
_FRESH = ("dimension", "slot", "value", *COLUMNS)
_ASKED = ("slot", "key", "seq", "questions", "unanswered")
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
    ["bigint"] * 5,
)
_ADD_SOURCES = Bulk(
    "INSERT INTO sources (source, title) VALUES ",
    2,
    " ON CONFLICT (source) DO UPDATE SET title = excluded.title WHERE sources.title <> excluded.title",
    ["text"] * 2,
)
_SET_WAITS = Bulk(
    "INSERT INTO waits (level, slot, first_token, duration) VALUES ",
    4,
    " ON CONFLICT (level, slot) DO UPDATE SET first_token = excluded.first_token, "
    "duration = excluded.duration",
    ["bigint", "bigint", "bytea", "bytea"],
)


def gather_tail(connection: Connection, low: int, middle: int, high: int) -> Waits:
    """What is not summed yet of the rows from `low` to before `high`, into temporary tables; their waits.

    By quarter-hours only what is told of everybody: nobody asks for other parts than those before and after
    the quarter-hour of `middle`.
    """
    for table in FRESH:
        connection.execute(table)
    found: Waits = {}
    upto = state(connection)["summed_upto"]
    slot = (middle >> SEQ_BITS) // QUARTER_MS
    for rows in (Rows(max(low - 1, upto), high - 1), Rows(low - 1, high - 1, late=True)):
        sums = fold(connection, rows, slot, asked_from=slot)
        connection.load("fresh", _FRESH, sums.entries())
        for slot_of, pair in sums.waits.items():
            both = found.setdefault(slot_of, (Counter(), Counter()))
            both[0].update(pair[0])
            both[1].update(pair[1])
        connection.load("fresh_sources", ("source", "title"), sums.titles.items())
        connection.load("fresh_asked", _ASKED, ((*key, *entry) for key, entry in sums.asked.items()))
    return found


# --- summing up ----------------------------------------------------------------------------------


def sum_up(writer: Connection, limit: int, before: int) -> int:
    """Adds the next rows before the key `before`, at most `limit`, to the sums; how many."""
    late, last = writer.execute(
        "SELECT count(*), max(seq) FROM (SELECT seq FROM uncounted ORDER BY seq LIMIT ?) AS late", (limit,)
    ).fetchone()
    if late:
        _add(writer, Rows(-1, last, late=True))
        writer.execute("DELETE FROM uncounted WHERE seq <= ?", (last,))
    upto = state(writer)["summed_upto"]
    count, last = writer.execute(
        "SELECT count(*), max(seq) FROM "
        "(SELECT seq FROM queries WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?) AS following",
        (upto, before, limit - late),
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
    writer.load("fresh", _FRESH, sums.entries())
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
    entries: dict[tuple[int, int], tuple[Counter[int], Counter[int]]] = {}
    for level, size in enumerate(LEVELS):
        for slot, pair in found.items():
            first, whole = entries.setdefault((level, slot // size), (Counter(), Counter()))
            first.update(pair[0])
            whole.update(pair[1])
    known = writer.execute(
        "SELECT level, slot, first_token, duration FROM waits WHERE "  # noqa: S608
        + " OR ".join(f"(level = {level} AND slot {LISTED})" for level in range(len(LEVELS))),
        [Listing([slot for of, slot in entries if of == level]) for level in range(len(LEVELS))],
    )
    packed = {(row[0], row[1]): (row[2], row[3]) for row in known}
    rows = []
    for place, pair in entries.items():
        old = packed.get(place, (b"", b""))
        rows.append((*place, *(histogram.add(*each) for each in zip(old, pair, strict=True))))
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
    for dimension, column in FEW.items():
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
    _set_fresh(writer, sums)
    add_fresh(writer, [0])
    _SET_WAITS.run(
        writer,
        [(0, slot, *(histogram.add(b"", counts) for counts in pair)) for slot, pair in sums.waits.items()],
    )
    rebuild_slot(writer, 1, hour)
    return sums.questions


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
