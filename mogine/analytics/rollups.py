"""Sums of the rows, by quarter-hour of UTC and by blocks of these: what statistics read.

Every time zone since 1972 lies a whole number of quarter-hours from UTC, so the days and hours of any of them
are made of whole slots, also at :30 and :45 and across clock changes. Four levels of slots (a quarter-hour,
an hour, a day, 16 days) let a year be summed from some hundred entries.

Recording does not wait for this. Rows are summed behind the writer, in the order of their keys up to
`summed_upto`; a reader gathers the rows after it (and those of `uncounted`, which came late) in the same
read transaction, by the same statements. So the numbers are always those of all rows.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from mogine.analytics import histogram
from mogine.analytics.tables import Bulk, set_state, state

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

COLUMNS = (
    "questions", "visitors", "sessions", "ok", "errors", "aborted", "refused", "answered", "unanswered",
    "thumbs_up", "thumbs_down", "prompt_tokens", "completion_tokens", "reasoning_tokens", "estimated",
    "cost_cny", "first_tokens", "first_token_ms", "durations", "duration_ms", "citations", "score",
)  # fmt: skip

_SLOT = f"((q.seq >> 20) / {QUARTER_MS})"
_NUMBERS = """
  count(*), 0, 0,
  sum(q.status = 'ok'), sum(q.status = 'error'), sum(q.status = 'aborted'), sum(q.status = 'refused'),
  sum(q.answered = 'yes'), sum(q.answered = 'no'), sum(q.feedback = 'up'), sum(q.feedback = 'down'),
  sum(min(coalesce(q.prompt_tokens, 0), 1 << 40)), sum(min(coalesce(q.completion_tokens, 0), 1 << 40)),
  sum(min(coalesce(q.reasoning_tokens, 0), 1 << 40)), sum(q.tokens_estimated),
  coalesce(sum(q.cost_cny), 0.0), count(q.first_token_ms), coalesce(sum(q.first_token_ms), 0),
  count(CASE WHEN q.status = 'ok' THEN q.duration_ms END),
  coalesce(sum(CASE WHEN q.status = 'ok' THEN q.duration_ms END), 0)
"""  # tokens are cut, so that a nonsensical number does not make every later sum overflow
# What has few values is grouped by all of them at once, and from there by each.
_FEW = {"provider": "provider", "model": "model", "status": "status", "error": "error_type"}
# A hash of a visitor lives for a day: what lies within two buckets of 18.6 hours is looked at.
_REACH = "p.bucket IN (q.bucket - 2, q.bucket - 1, q.bucket)"
_AFTER = "p.bucket IN (q.bucket, q.bucket + 1, q.bucket + 2)"

FRESH = f"""
CREATE TEMP TABLE IF NOT EXISTS fresh (
  dimension TEXT NOT NULL, slot INTEGER NOT NULL, value TEXT NOT NULL, {", ".join(COLUMNS)}
)
"""
FRESH_GROUPS = f"""
CREATE TEMP TABLE IF NOT EXISTS fresh_groups (
  {", ".join(_FEW.values())}, bot INTEGER NOT NULL, slot INTEGER NOT NULL, {", ".join(COLUMNS)}
)
"""
FRESH_ASKED = """
CREATE TEMP TABLE IF NOT EXISTS fresh_asked (
  slot INTEGER NOT NULL, key INTEGER NOT NULL, seq INTEGER NOT NULL,
  questions INTEGER NOT NULL, unanswered INTEGER NOT NULL
)
"""
FRESH_SOURCES = "CREATE TEMP TABLE IF NOT EXISTS fresh_sources (source TEXT NOT NULL, title TEXT NOT NULL)"
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)
_SUMMED = ", ".join(f"sum({name})" for name in COLUMNS)
_ADD_ASKED = Bulk(
    "INSERT INTO asked (slot, key, seq, questions, unanswered) VALUES ",
    5,
    " ON CONFLICT (slot, key) DO UPDATE SET seq = max(seq, excluded.seq), "
    "questions = questions + excluded.questions, unanswered = unanswered + excluded.unanswered",
)
_ADD_FRESH_ASKED = Bulk("INSERT INTO fresh_asked (slot, key, seq, questions, unanswered) VALUES ", 5)
_SET_WAITS = Bulk("INSERT OR REPLACE INTO waits (level, slot, first_token, duration) VALUES ", 4)

Waits = dict[int, tuple[Counter[int], Counter[int]]]
Asked = dict[tuple[int, int], list[int]]


class Rows:
    """Some rows: those with keys after `low` up to `high`, or those that came late.

    Of the rows of a range all are left out that came late: they are counted by themselves.
    """

    def __init__(self, low: int = 0, high: int = 0, *, late: bool = False) -> None:
        self.late = late
        self.params = () if late else (low, high)
        self.condition = (
            "q.seq IN (SELECT seq FROM uncounted)"
            if late
            else "q.seq > ? AND q.seq <= ? AND q.seq NOT IN (SELECT seq FROM uncounted)"
        )

    def first(self, column: str) -> str:
        """The condition that a row is the first of its visitor (or session)."""
        named = f"q.{column} <> '' AND NOT q.bot"
        earlier = (  # our own column names
            f"EXISTS (SELECT 1 FROM queries p WHERE {_REACH} AND p.{column} = q.{column} "  # noqa: S608
            "AND p.seq < q.seq AND NOT p.bot)"
        )
        if not self.late:
            return f"{named} AND NOT {earlier}"
        # One that came late is not the first when a later one was counted already.
        counted = (
            f"EXISTS (SELECT 1 FROM queries p WHERE {_AFTER} AND p.{column} = q.{column} "  # noqa: S608
            "AND p.seq > q.seq AND NOT p.bot "
            "AND p.seq <= (SELECT value FROM state WHERE name = 'summed_upto') "
            "AND p.seq NOT IN (SELECT seq FROM uncounted))"
        )
        return f"{named} AND NOT {earlier} AND NOT {counted}"


# --- from rows to sums ---------------------------------------------------------------------------


def gather(connection: sqlite3.Connection, rows: Rows) -> None:
    """Sums of `rows` by quarter-hour into the temporary table `fresh`, beside what is there."""
    connection.execute(FRESH)
    connection.execute(FRESH_GROUPS)
    where = f"WHERE {rows.condition}"
    few = ", ".join(f"q.{name}" for name in _FEW.values())
    connection.execute(
        f"INSERT INTO fresh_groups SELECT {few}, q.bot, {_SLOT}, "  # noqa: S608
        f"{_NUMBERS}, 0, 0.0 FROM queries q {where} GROUP BY 1, 2, 3, 4, 5, 6",
        rows.params,
    )
    for dimension, value in {"all": "''", **_FEW, "bot": "''"}.items():
        connection.execute(
            f"INSERT INTO fresh SELECT '{dimension}', slot, {value}, {_SUMMED} FROM fresh_groups "  # noqa: S608
            f"WHERE bot = {int(dimension == 'bot')} GROUP BY 2, 3"
        )
    connection.execute("DELETE FROM fresh_groups")
    connection.execute(
        f"INSERT INTO fresh SELECT 'page', {_SLOT}, q.page_url, {_NUMBERS}, 0, 0.0 "  # noqa: S608
        f"FROM queries q {where} AND NOT q.bot GROUP BY 2, 3",
        rows.params,
    )
    cited = rows.condition.replace("q.seq", "seq")
    connection.execute(
        f"INSERT INTO fresh SELECT 'source', {_SLOT}, c.source, {_NUMBERS}, sum(c.citations), sum(c.score) "  # noqa: S608
        "FROM (SELECT seq, source, count(*) AS citations, sum(score) AS score FROM citations "
        f"WHERE {cited} GROUP BY seq, source) c CROSS JOIN queries q ON q.seq = c.seq "
        "WHERE NOT q.bot GROUP BY 2, 3",
        rows.params,
    )
    for column, name in (("visitor", "visitors"), ("session", "sessions")):
        zeros = ", ".join("count(*)" if each == name else "0" for each in COLUMNS)
        connection.execute(
            f"INSERT INTO fresh SELECT 'all', {_SLOT}, '', {zeros} FROM queries q {where} "  # noqa: S608
            f"AND {rows.first(column)} GROUP BY 2",
            rows.params,
        )


def waits(connection: sqlite3.Connection, rows: Rows) -> Waits:
    """By quarter-hour, how often each bucket of first tokens and of whole answers was met."""
    found: Waits = {}
    for place, (column, condition) in enumerate(
        (("first_token_ms", "1"), ("duration_ms", "q.status = 'ok'"))
    ):
        for slot, value, count in connection.execute(
            f"SELECT {_SLOT}, q.{column}, count(*) FROM queries q WHERE {rows.condition} "  # noqa: S608
            f"AND NOT q.bot AND q.{column} IS NOT NULL AND {condition} GROUP BY 1, 2",
            rows.params,
        ):
            pair = found.setdefault(slot, (Counter(), Counter()))
            pair[place][histogram.bucket(value)] += count
    return found


def question_key(question: str) -> int:
    """A number for the question, without regard to blanks at the ends and to case."""
    words = question.strip().lower().encode("utf-8", "replace")
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "big", signed=True)


def asked(connection: sqlite3.Connection, rows: Rows) -> Asked:
    """By 8 hours and question: the newest row, how often it was asked, how often without an answer."""
    found: Asked = {}
    for slot, question, seq, count, unanswered in connection.execute(
        f"SELECT {_SLOT} / {ASKED_QUARTERS}, t.question, max(q.seq), count(*), sum(q.answered = 'no') "  # noqa: S608
        f"FROM queries q JOIN texts t ON t.seq = q.seq WHERE {rows.condition} "
        "AND NOT q.bot AND t.question <> '' GROUP BY 1, 2",
        rows.params,
    ):
        if question.strip():
            entry = found.setdefault((slot, question_key(question)), [0, 0, 0])
            entry[:] = max(entry[0], seq), entry[1] + count, entry[2] + unanswered
    return found


def gather_tail(connection: sqlite3.Connection, low: int, high: int) -> Waits:
    """What is not summed yet of the rows from `low` to before `high`, into temporary tables; their waits."""
    connection.execute(FRESH)
    connection.execute(FRESH_ASKED)
    connection.execute(FRESH_SOURCES)
    found: Waits = {}
    upto = state(connection)["summed_upto"]
    for rows in (Rows(max(low - 1, upto), high - 1), Rows(late=True)):
        gather(connection, rows)
        for slot, pair in waits(connection, rows).items():
            both = found.setdefault(slot, (Counter(), Counter()))
            both[0].update(pair[0])
            both[1].update(pair[1])
        connection.execute(f"INSERT INTO fresh_sources {_titles(rows)}", rows.params)
        _ADD_FRESH_ASKED.run(connection, [(*key, *entry) for key, entry in asked(connection, rows).items()])
    return found


# --- summing up ----------------------------------------------------------------------------------


def sum_up(writer: sqlite3.Connection, limit: int, before: int) -> int:
    """Adds the next rows before the key `before`, at most `limit`, to the sums; how many."""
    late = writer.execute("SELECT count(*) FROM uncounted").fetchone()[0]
    if late:
        _add(writer, Rows(late=True))
        writer.execute("DELETE FROM uncounted")
    upto = state(writer)["summed_upto"]
    count, last = writer.execute(
        "SELECT count(*), max(seq) FROM "
        "(SELECT seq FROM queries WHERE seq > ? AND seq < ? ORDER BY seq LIMIT ?)",
        (upto, before, limit),
    ).fetchone()
    if count:
        _add(writer, Rows(upto, last))
        set_state(writer, summed_upto=last)
    return int(late + count)


def _add(writer: sqlite3.Connection, rows: Rows) -> None:
    writer.execute(FRESH)
    writer.execute("DELETE FROM fresh")
    gather(writer, rows)
    _few_pages(writer)
    add_fresh(writer)
    _add_waits(writer, waits(writer, rows))
    _add_asked(writer, asked(writer, rows))
    writer.execute(
        f"INSERT INTO sources (source, title) SELECT * FROM ({_titles(rows)}) WHERE true "  # noqa: S608
        "ON CONFLICT (source) DO UPDATE SET title = excluded.title WHERE title <> excluded.title",
        rows.params,
    )


def _titles(rows: Rows) -> str:
    """What each document is called that was cited under `rows`."""
    cited = rows.condition.replace("q.seq", "seq")
    return f"SELECT source, max(title) FROM citations WHERE {cited} GROUP BY source"  # noqa: S608


def add_fresh(writer: sqlite3.Connection, levels: Sequence[int] = range(len(LEVELS))) -> None:
    """Adds what was gathered to the sums of each level."""
    for level in levels:
        writer.execute(
            f"INSERT INTO rollups SELECT dimension, {level}, slot / {LEVELS[level]} AS slot, value, "  # noqa: S608
            f"{_SUMMED} FROM fresh WHERE true GROUP BY dimension, slot / {LEVELS[level]}, value "
            f"ON CONFLICT (dimension, level, slot, value) DO UPDATE SET {_ADDED}"
        )
    writer.execute("DELETE FROM fresh")


def _few_pages(writer: sqlite3.Connection) -> None:
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


def _add_waits(writer: sqlite3.Connection, found: Waits) -> None:
    entries: dict[tuple[int, int], tuple[Counter[int], Counter[int]]] = {}
    for level, size in enumerate(LEVELS):
        for slot, pair in found.items():
            first, whole = entries.setdefault((level, slot // size), (Counter(), Counter()))
            first.update(pair[0])
            whole.update(pair[1])
    rows = []
    for key, pair in entries.items():
        known = writer.execute(
            "SELECT first_token, duration FROM waits WHERE level = ? AND slot = ?", key
        ).fetchone() or (b"", b"")
        rows.append((*key, *(histogram.add(old, new) for old, new in zip(known, pair, strict=True))))
    _SET_WAITS.run(writer, rows)


def _add_asked(writer: sqlite3.Connection, entries: Mapping[tuple[int, int], list[int]]) -> None:
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


def prune_asked(writer: sqlite3.Connection, slot: int, kept: int) -> None:
    """Leaves of these 8 hours the `kept` questions asked most often."""
    writer.execute(
        "DELETE FROM asked WHERE slot = ?1 AND key IN (SELECT key FROM asked WHERE slot = ?1 "
        "ORDER BY questions DESC, seq DESC LIMIT -1 OFFSET ?2)",
        (slot, kept),
    )


# --- changes of rows that are summed already -----------------------------------------------------


def change_feedback(writer: sqlite3.Connection, seq: int, rating: str) -> None:
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


def _places(writer: sqlite3.Connection, row: Mapping[str, Any], slot: int) -> Iterator[tuple[str, str]]:
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


def rename_value(writer: sqlite3.Connection, dimension: str, value: str, new: str) -> int:
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


def rebuild_hour(writer: sqlite3.Connection, hour: int) -> int:
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
    writer.execute(FRESH)
    writer.execute("DELETE FROM fresh")
    gather(writer, rows)
    count = writer.execute("SELECT coalesce(sum(questions), 0) FROM fresh WHERE dimension IN ('all', 'bot')")
    counted = int(count.fetchone()[0])
    _few_pages(writer)
    add_fresh(writer, [0])
    _SET_WAITS.run(
        writer,
        [
            (0, slot, *(histogram.add(b"", counts) for counts in pair))
            for slot, pair in waits(writer, rows).items()
        ],
    )
    rebuild_slot(writer, 1, hour)
    return counted


def rebuild_slot(writer: sqlite3.Connection, level: int, slot: int) -> None:
    """A slot of an upper level from those below it."""
    ratio = LEVELS[level] // LEVELS[level - 1]
    low, high = slot * ratio, (slot + 1) * ratio
    for dimension in DIMENSIONS:
        writer.execute(
            "DELETE FROM rollups WHERE dimension = ? AND level = ? AND slot = ?", (dimension, level, slot)
        )
        writer.execute(
            f"INSERT INTO rollups SELECT dimension, ?, ?, value, {_SUMMED} FROM rollups "  # noqa: S608
            "WHERE dimension = ? AND level = ? AND slot >= ? AND slot < ? GROUP BY value",
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


def rebuild_asked(writer: sqlite3.Connection, slot: int) -> None:
    """The questions of 8 hours that are over."""
    low, high = slot * ASKED_QUARTERS * QUARTER_MS << 20, (slot + 1) * ASKED_QUARTERS * QUARTER_MS << 20
    writer.execute("DELETE FROM asked WHERE slot = ?", (slot,))
    entries = asked(writer, Rows(low - 1, min(high - 1, state(writer)["summed_upto"])))
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
