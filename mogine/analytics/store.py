"""The record of questions: rows in, rows out, rows deleted, whichever database keeps it."""

import contextlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from hmac import compare_digest
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from mogine.analytics import rollups, search
from mogine.analytics.engine import (
    BUSY_MS,
    PATIENT_BUSY_MS,
    Bound,
    Connection,
    Damaged,
    Engine,
    Reader,
    Row,
)
from mogine.analytics.fold import ASKED_QUARTERS, QUARTER_MS
from mogine.analytics.records import (
    QueryRecord,
    Selection,
    epoch_ms,
    from_epoch_ms,
    signal_bits,
    signals_of,
)
from mogine.analytics.schema import ROW_COLUMNS, SEQ_BITS, STEPS
from mogine.analytics.sqlite import SqliteEngine
from mogine.analytics.tables import LISTED, Listing, set_state, state
from mogine.chat import Citation
from mogine.errors import RequestError, SettingsError
from mogine.settings import Settings

MAX_SEARCH_CHARS = 100
MAX_TEXT_CHARS = 128 * 1024
MAX_WORD_CHARS = 512
MAX_INTEGER = 2**53
COST_DIGITS = 10  # behind the point, of CNY: what floating point adds further right is noise
MAX_FEEDBACK_AGE_MS = 24 * 3_600_000
SEARCH_CHUNK = 256
BATCHES_AT_ONCE = 20

_VALUES = ROW_COLUMNS[2:]
_SELECT_CITATIONS = (
    f"SELECT seq, number, title, source, heading, url, score FROM citations "  # noqa: S608
    f"WHERE seq {LISTED} ORDER BY seq, number"
)
_SELECT_ROWS = (
    f"SELECT q.seq, q.id, {', '.join('q.' + name for name in _VALUES)}, "  # noqa: S608
    "t.question, t.answer FROM queries q LEFT JOIN texts t ON t.seq = q.seq"
)
# Keys that end batches, found by steps along the index: rows between them are not looked at.
_ENDS = (
    "WITH RECURSIVE ends (place, seq) AS (SELECT 0, CAST(? AS BIGINT) UNION ALL SELECT place + 1, "
    "(SELECT q.seq FROM queries q WHERE q.seq > ends.seq AND q.seq < ? ORDER BY q.seq LIMIT 1 OFFSET ?) "
    "FROM ends WHERE place < ? AND seq IS NOT NULL) "
    "SELECT seq FROM ends WHERE place > 0 AND seq IS NOT NULL ORDER BY place"
)

_KEYED_BY_ROW = ("texts", "citations", "feedback", "unindexed", "uncounted", "gap_questions", "queries")


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, newest first; `next` is the cursor for those before them, "" at the end."""

    records: tuple[QueryRecord, ...]
    next: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What health tells: how many rows, when the newest answer ended, rows known to be lost."""

    rows: int
    last_write_at: datetime | None
    lost: int


@dataclass(frozen=True, slots=True)
class GivenFeedback:
    """A thumb ("" when only a person was asked for) with its words, and what it is about."""

    id: str
    started_at: datetime
    given_at: datetime
    rating: str
    reason: str
    comment: str
    question: str
    handoff: bool = False


@dataclass(frozen=True, slots=True)
class Asker:
    """Who gives feedback: the hash of the visitor, and the session that they can name."""

    visitor: str
    session: str = ""

    def owns(self, visitor: str, session: str) -> bool:
        """Whether a row of this visitor and session is theirs. A session id is random and secret; the hash
        of a visitor changes at midnight."""
        same_session = bool(session) and compare_digest(self.session.encode(), session.encode())
        return same_session or (bool(visitor) and compare_digest(self.visitor.encode(), visitor.encode()))


class LastingReader:
    """A read-only connection for many short looks, each at one state of the record; in between it holds
    nothing open. For one thread at a time."""

    def __init__(self, store: "AnalyticsStore", deadline_s: float | None, begin: str = "BEGIN") -> None:
        self._store = store
        self._deadline_s = deadline_s
        self._begin = begin
        self._connection: Connection | None = None

    @contextlib.contextmanager
    def look(self) -> Iterator[Reader]:
        """What `AnalyticsStore.reader` gives."""
        with self._store.translated():
            if self._connection is None:
                self._connection = self._store.open_reader()
            self._connection.execute(self._begin)
            try:
                yield Reader(self._connection, self._deadline_s)
            finally:
                # Nothing was written; ROLLBACK would have the driver forget what it has prepared.
                self._connection.execute("COMMIT")

    def close(self) -> None:
        """Closes the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()


class AnalyticsStore:
    """The record: in the SQLite file at `path`, or with `url` in PostgreSQL, and then `path` only tells where
    the data folder is. Reading never creates a file: an absent one reads as an empty record.

    Several threads, processes and, with PostgreSQL, machines may write.
    """

    def __init__(
        self,
        path: Path,
        url: str = "",
        *,
        steps: Sequence[tuple[str, str]] = STEPS,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self._engine: Engine = _postgres(url, steps) if url else SqliteEngine(path, steps, clock)
        self._clock = clock
        self.is_file = not url

    # --- the engine ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._engine.name

    @property
    def visits(self) -> int:
        """Grows when somebody else writes, or we do durably."""
        return self._engine.visits

    @property
    def held_s(self) -> float:
        """How long our last transaction has kept others from writing."""
        return self._engine.held_s

    @property
    def silent_s(self) -> float:
        """For how long the server has said nothing to who brings it rows just now."""
        return self._engine.silent_s

    def prepare(self, *, busy_ms: int = PATIENT_BUSY_MS) -> None:
        """Makes the tables, or upgrades them (a file after a backup); does nothing when they are up to date.

        Raises StoreError when that cannot be written, is of a newer mogine or no record of ours (it stays
        untouched), Damaged when it is no sound database, Locked when somebody holds it.
        """
        self._engine.prepare(busy_ms=busy_ms)

    def exists(self) -> bool:
        """Whether there is a record with anything in it."""
        return self._engine.exists()

    def check(self, limit_s: float) -> None:
        """Looks for damage for at most `limit_s`. Raises Damaged, StoreError."""
        self._engine.check(limit_s)

    def soundness(self) -> str:
        """ "ok", or what is wrong with the database."""
        return self._engine.soundness()

    def close(self) -> None:
        """Closes what is open; the next use opens it again."""
        self._engine.close()

    def translated(self) -> AbstractContextManager[None]:
        """The driver's errors, and the system's, as ours."""
        return self._engine.translated()

    def transaction(
        self, busy_ms: int = PATIENT_BUSY_MS, *, durable: bool = True, shared: bool = False
    ) -> AbstractContextManager[Connection]:
        """See Engine.transaction."""
        return self._engine.transaction(busy_ms, durable=durable, shared=shared)

    def lock(self, name: str, *, wait: bool = False) -> AbstractContextManager[None]:
        """Holds a lock that all processes with this record share; Locked when another has it."""
        return self._engine.lock(name, wait=wait)

    def size_bytes(self) -> int:
        """What the record takes on the disk."""
        with self.translated():
            return self._engine.size_bytes()

    def checkpoint(self) -> bool:
        """Moves the journal into the file and empties it; False when a reader was in the way."""
        return self._engine.checkpoint()

    def sweep(self) -> None:
        """After much was deleted: whatever the engine needs to use the room again."""
        with self.translated():
            self._engine.sweep()

    def give_back(self, pages: int = 500, *, spare: int = 0) -> bool:
        """Hands up to `pages` free pages back to the disk; False when there are no more than `spare`."""
        return self._engine.give_back(pages, spare)

    def move_aside(self, damage: Damaged) -> Path | None:
        """Renames the damaged file (and its journal), so that a new one can begin.

        None when the file that `damage` speaks of is not there any more: another process was quicker.
        """
        return self._engine.move_aside(damage)

    # --- writing ---------------------------------------------------------------------------------

    def insert(self, records: Iterable[QueryRecord], *, busy_ms: int = BUSY_MS) -> int:
        """Commits `records` together; those whose id is known already stay as they are.

        Returns how many were new, when they are on the disk. Raises Locked after `busy_ms`.
        """
        return self.insert_bound([as_row(record) for record in records], busy_ms=busy_ms)

    def insert_bound(self, rows: list[Bound], *, busy_ms: int = BUSY_MS) -> int:
        """`insert` of what `as_row` has made of records."""
        while True:
            with self.transaction(busy_ms, shared=True) as writer:
                new = self.add(writer, rows)
            # A file that was moved aside while we wrote took these rows with it.
            if self._engine.is_current():
                return len(new)

    def add(self, writer: Connection, rows: list[Bound]) -> list[Bound]:
        """Those of `rows` that are new, as they are there now."""
        new = self._engine.insert(writer, rows)
        _note_late(writer, new)
        return new

    def renumber(self, writer: Connection, table: str) -> None:
        """Lets numbers that the database gives to rows of `table` begin behind those that are there."""
        self._engine.renumber(writer, table)

    def give_feedback(
        self,
        id: str,
        rating: str,
        *,
        reason: str = "",
        comment: str = "",
        handoff: bool = False,
        at: datetime | None = None,
        asker: Asker | None = None,
    ) -> bool:
        """Ties a thumb to the row of `id`, or that a person was asked for (`rating` may then be "").

        Of several thumbs the last one counts.

        False when there is no such row, or `asker` is given and it is not theirs: nobody learns which.
        """
        now = at or self._clock()
        with self.transaction(PATIENT_BUSY_MS) as writer:
            found = writer.execute(
                "SELECT seq, visitor, session FROM queries WHERE id = ?", (_word(id),)
            ).fetchone()
            if found is None or (asker is not None and not asker.owns(found["visitor"], found["session"])):
                return False
            seq = found["seq"]
            if asker is not None and epoch_ms(now) - (seq >> SEQ_BITS) > MAX_FEEDBACK_AGE_MS:
                return False
            if rating:
                rollups.change_feedback(writer, seq, _word(rating))
                thumbs = signal_bits(["thumbs_down"])
                writer.execute(
                    "UPDATE queries SET feedback = ?, signals = (signals & ?) | ? WHERE seq = ?",
                    (_word(rating), ~thumbs, thumbs if rating == "down" else 0, seq),
                )
            if handoff:
                writer.execute(
                    "UPDATE queries SET signals = signals | ? WHERE seq = ?", (signal_bits(["handoff"]), seq)
                )
            # Each is told by itself: a thumb takes no wish for a person back, nor the other way round.
            writer.execute(
                "INSERT INTO feedback (seq, reason, comment, given_ms, handoff) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (seq) DO UPDATE SET given_ms = excluded.given_ms, "
                "handoff = CASE WHEN excluded.handoff > feedback.handoff THEN 1 ELSE feedback.handoff END, "
                "reason = CASE WHEN ? THEN excluded.reason ELSE feedback.reason END, "
                "comment = CASE WHEN ? THEN excluded.comment ELSE feedback.comment END",
                (
                    seq,
                    _word(reason),
                    _text(comment),
                    epoch_ms(now),
                    int(handoff),
                    bool(rating or reason),
                    bool(rating or comment),
                ),
            )
            return True

    def note_loss(self, rows: int, reason: str) -> None:
        """Writes down that `rows` questions could not be kept."""
        with self.transaction(BUSY_MS) as writer:
            writer.execute(
                "INSERT INTO losses (at_ms, rows, reason) VALUES (?, ?, ?)",
                (epoch_ms(self._clock()), rows, _word(reason)),
            )

    def delete_before(self, before: datetime, *, limit: int = 500) -> int:
        """Deletes the oldest rows that began before `before`, at most `limit`, in one transaction."""
        with self.transaction(PATIENT_BUSY_MS, durable=False) as writer:
            oldest = writer.execute(
                "SELECT seq FROM queries WHERE seq < ? ORDER BY seq LIMIT ?", (first_seq(before), limit)
            ).fetchall()
            if oldest:
                self._erase(writer, oldest[0][0], oldest[-1][0], len(oldest), kept_from=first_seq(before))
                known = state(writer)["deleted_before"]
                set_state(writer, deleted_before=max(known, epoch_ms(before)))
            return len(oldest)

    def delete_rows(self, seqs: Sequence[int]) -> int:
        """Deletes these rows, in one transaction; their numbers stay in the sums."""
        with self.transaction(PATIENT_BUSY_MS) as writer:
            return self.erase(writer, seqs)

    def erase(self, writer: Connection, seqs: Sequence[int]) -> int:
        """`delete_rows` within a transaction."""
        if not seqs:
            return 0
        low, high = min(seqs), max(seqs)
        within = writer.execute("SELECT seq FROM queries WHERE seq >= ? AND seq <= ?", (low, high)).fetchall()
        wanted = set(seqs)
        there = [row[0] for row in within if row[0] in wanted]
        if there and len(there) == len(within):
            self._erase(writer, there[0], there[-1], len(there))
        else:
            for seq in there:
                self._erase(writer, seq, seq, 1)
        return len(there)

    def _erase(self, writer: Connection, low: int, high: int, rows: int, *, kept_from: int = 0) -> None:
        """All rows from `low` to `high`, which are `rows`, and every trace of their words.

        Searches need not find those before `kept_from` any more, which are to be deleted next.
        """
        search.unseal(writer, low, high, kept_from)
        known = state(writer)
        unsummed = writer.execute(
            "SELECT count(*) FROM queries WHERE seq >= ? AND seq <= ? AND (seq > ? OR seq IN "
            "(SELECT seq FROM uncounted WHERE seq >= ? AND seq <= ?))",
            (low, high, known["summed_upto"], low, high),
        ).fetchone()[0]
        for table in _KEYED_BY_ROW:
            writer.execute(f"DELETE FROM {table} WHERE seq >= ? AND seq <= ?", (low, high))  # noqa: S608
        quarter = ASKED_QUARTERS * QUARTER_MS
        slots = ((low >> SEQ_BITS) // quarter, (high >> SEQ_BITS) // quarter)
        writer.execute(
            "DELETE FROM asked WHERE slot >= ? AND slot <= ? AND seq >= ? AND seq <= ?", (*slots, low, high)
        )
        set_state(writer, gone=known["gone"] + rows - unsummed)

    def recount(self) -> None:
        """Finds out how many of the summed rows are no longer there; nobody may delete meanwhile."""
        with self.reader() as reader:
            known = _rows(reader)
            (rows,) = reader.one("SELECT count(*) FROM queries")
        with self.transaction() as writer:
            set_state(writer, gone=state(writer)["gone"] + known - rows)

    def purge_index(self, limit: int) -> bool:
        """Deletes up to `limit` terms of segments out of use; False when there are none left."""
        with self.transaction(PATIENT_BUSY_MS, durable=False) as writer:
            return search.purge(writer, limit)

    # --- reading ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reader(self, deadline_s: float | None = None) -> Iterator[Reader]:
        """One consistent state of the record, to be read."""
        with self.translated():
            connection = self.open_reader()
        with contextlib.closing(connection), self.translated():
            connection.execute("BEGIN")
            yield Reader(connection, deadline_s)

    def open_reader(self) -> Connection:
        """A connection to read with, which the caller closes; to an empty record where there is none."""
        return self._engine.open_reader()

    def summary(self, *, deadline_s: float | None = None) -> Summary:
        """How much there is."""
        with self.reader(deadline_s) as reader:
            rows = _rows(reader)
            (lost,) = reader.one("SELECT coalesce(sum(rows), 0) FROM losses")
            newest = reader.all(
                "SELECT started_ms + coalesce(duration_ms, 0) FROM queries ORDER BY seq DESC LIMIT 1"
            )
        return Summary(rows, from_epoch_ms(newest[0][0]) if newest else None, lost)

    def is_crowded(self, rows: int) -> bool:
        """Whether more than so many rows are not summed yet."""
        with self.reader() as reader:
            upto = state(reader.connection)["summed_upto"]
            return bool(
                reader.all("SELECT 1 FROM queries WHERE seq > ? ORDER BY seq LIMIT 1 OFFSET ?", (upto, rows))
            )

    def newest_at(self) -> datetime | None:
        """When the newest question was asked."""
        with self.reader() as reader:
            found = reader.all("SELECT started_ms FROM queries ORDER BY seq DESC LIMIT 1")
        return from_epoch_ms(found[0][0]) if found else None

    def count_before(self, before: datetime) -> int:
        """How many rows began before `before`."""
        with self.reader() as reader:
            found: int = reader.one("SELECT count(*) FROM queries WHERE seq < ?", (first_seq(before),))[0]
        return found

    def count(self, selection: Selection) -> int:
        """How many rows are picked by `selection`."""
        where, params = _where(selection)
        with self.reader() as reader:
            if selection.search:
                return len(_found(reader, selection))
            found: int = reader.one(f"SELECT count(*) FROM queries q WHERE {where}", params)[0]  # noqa: S608
        return found

    def page(
        self,
        selection: Selection = Selection(),  # noqa: B008 - a frozen value
        *,
        limit: int = 100,
        before: str = "",
        deadline_s: float | None = None,
    ) -> Page:
        """The newest rows of `selection`, or those before the cursor `before`.

        Raises RequestError(reason="bad_filter") for a cursor that was never handed out.
        """
        high = decode_cursor(before) if before else None
        where, params = _where(selection, before=high)
        with self.reader(deadline_s) as reader:
            if selection.search:
                seqs = _found(reader, selection, before=high, limit=limit + 1)
                where, params = _LISTED, [Listing(seqs.tolist())]
            rows = reader.all(
                f"{_SELECT_ROWS} WHERE {where} ORDER BY q.seq DESC LIMIT ?", [*params, limit + 1]
            )
            more = len(rows) > limit
            records = _records(reader, rows[:limit])
        return Page(records, encode_cursor(rows[limit - 1]["seq"]) if more else "")

    def iterate(
        self,
        selection: Selection = Selection(),  # noqa: B008
        *,
        batch: int = 1000,
        deadline_s: float | None = None,
    ) -> Iterator[QueryRecord]:
        """Every row of `selection`, oldest first, in constant memory.

        Read in batches with nothing held open between them: a slow taker never keeps the journal
        from being emptied.
        """
        if selection.search:
            yield from self._iterate_found(selection, batch, deadline_s)
            return
        after = -1
        while True:
            where, params = _where(selection, after=after)
            with self.reader(deadline_s) as reader:
                rows = reader.all(f"{_SELECT_ROWS} WHERE {where} ORDER BY q.seq LIMIT ?", [*params, batch])
                records = _records(reader, rows)
            yield from records
            if len(rows) < batch:
                return
            after = rows[-1]["seq"]

    def batches(
        self, selection: Selection, size: int, deadline_s: float | None = None
    ) -> Iterator[tuple[str, list[Any]]]:
        """`selection` cut into conditions on `queries q` (with their values), oldest first, that at most
        `size` rows meet each."""
        if selection.search:
            with self.reader(deadline_s) as reader:
                seqs = _found(reader, selection)
            for start in range(len(seqs) - 1, -1, -size):
                yield _LISTED, [Listing(seqs[max(0, start - size + 1) : start + 1].tolist())]
            return
        low, high = _span(selection)
        after = low - 1
        with contextlib.closing(LastingReader(self, deadline_s)) as lasting:
            # Of many batches at once, as long as they are full: few questions, quickly.
            while selection.is_span:
                with lasting.look() as reader:
                    ends = reader.all(_ENDS, (after, high, size - 1, BATCHES_AT_ONCE))
                for (end,) in ends:
                    yield _where(selection, after=after, upto=end)
                    after = end
                if len(ends) < BATCHES_AT_ONCE:
                    break
            while True:
                where, params = _where(selection, after=after)
                with lasting.look() as reader:
                    last, rows = reader.one(
                        "SELECT max(seq), count(*) FROM (SELECT q.seq FROM queries q "  # noqa: S608
                        f"WHERE {where} ORDER BY q.seq LIMIT ?) AS batch",
                        [*params, size],
                    )
                if rows:
                    yield _where(selection, after=after, upto=last)
                if rows < size:
                    return
                after = last

    def chosen(self, reader: Reader, condition: str, params: Sequence[Any]) -> tuple[QueryRecord, ...]:
        """The rows that meet a condition of `batches`, oldest first."""
        return _records(reader, reader.all(f"{_SELECT_ROWS} WHERE {condition} ORDER BY q.seq", params))

    def _iterate_found(
        self, selection: Selection, batch: int, deadline_s: float | None
    ) -> Iterator[QueryRecord]:
        with self.reader(deadline_s) as reader:
            seqs = _found(reader, selection)
        for start in range(len(seqs) - 1, -1, -batch):
            part = seqs[max(0, start - batch + 1) : start + 1].tolist()
            with self.reader(deadline_s) as reader:
                records = self.chosen(reader, _LISTED, [Listing(part)])
            yield from records

    def iterate_feedback(
        self, since: datetime | None = None, *, batch: int = 1000
    ) -> Iterator[GivenFeedback]:
        """Every thumb on questions asked since then, oldest question first."""
        after = first_seq(since) - 1 if since else -1
        while True:
            with self.reader() as reader:
                rows = reader.all(
                    "SELECT q.seq, q.id, f.given_ms, q.feedback, f.reason, f.comment, t.question, f.handoff "
                    "FROM feedback f JOIN queries q ON q.seq = f.seq LEFT JOIN texts t ON t.seq = f.seq "
                    "WHERE f.seq > ? ORDER BY f.seq LIMIT ?",
                    (after, batch),
                )
            for seq, id, given_ms, rating, reason, comment, question, handoff in rows:
                at = from_epoch_ms(seq >> SEQ_BITS)
                given_at = from_epoch_ms(given_ms)
                words = (rating, reason, comment, question or "")
                yield GivenFeedback(id, at, given_at, *words, handoff=bool(handoff))
            if len(rows) < batch:
                return
            after = rows[-1]["seq"]


def open_store(settings: Settings) -> AnalyticsStore:
    """The record of a home."""
    return AnalyticsStore(settings.analytics_path, settings.analytics.database_url)


def _postgres(url: str, steps: Sequence[tuple[str, str]]) -> Engine:
    try:
        from mogine.analytics.postgres import PostgresEngine  # noqa: PLC0415 - for those who set the address
    except ImportError as error:
        if not (error.name or "").startswith("psycopg"):
            raise
        raise SettingsError(
            "MOGINE_DATABASE_URL needs the package psycopg: pip install 'mogine[postgres]', or leave it empty"
        ) from error
    return PostgresEngine(url, steps)


def encode_cursor(seq: int) -> str:
    """The place of a row, with a checksum: what somebody made up is told from what we handed out."""
    return f"{seq:016x}{crc32(f'cursor:{seq}'.encode()):08x}"


def decode_cursor(text: str) -> int:
    """Raises RequestError(reason="bad_filter") for anything that `encode_cursor` did not make."""
    try:
        seq = int(text[:16], 16)
        if len(text) == 24 and encode_cursor(seq) == text:
            return seq
    except ValueError:
        pass  # told below, as every other made-up cursor
    raise RequestError(
        "before is no cursor of this list; take it from `next` of the answer before",
        reason="bad_filter",
        param="before",
    )


def first_seq(at: datetime) -> int:
    """The smallest key that a row of this moment can have."""
    return min(epoch_ms(at) << SEQ_BITS, 2**63 - 1)  # a filter may name the year 9999


def as_row(record: QueryRecord) -> Bound:
    """What is bound for one record: every value fit for a database, whatever a visitor sent."""
    seq = first_seq(record.started_at) | (crc32(record.id.encode("utf-8", "replace")) & ((1 << SEQ_BITS) - 1))
    row = [
        seq,
        _word(record.id),
        _word(record.kind),
        _word(record.session),
        _word(record.visitor),
        _text(record.page_url, 2048),
        _word(record.provider),
        _word(record.model),
        _word(record.status),
        _word(record.error_type),
        _word(record.answered),
        _real(record.top_score),
        _integer(record.prompt_tokens),
        _integer(record.completion_tokens),
        _integer(record.reasoning_tokens),
        int(record.tokens_estimated),
        _real(record.cost_cny, COST_DIGITS),
        _integer(record.first_token_ms),
        _integer(record.duration_ms),
        _word(record.feedback),
        int(record.bot),
        signal_bits(record.signals),
        _integer(record.search_ms),
    ]
    citations = [
        (
            _integer(c.number),
            _word(c.title),
            _word(c.source),
            _word(c.heading),
            _text(c.url, 2048),
            _real(c.score) or 0.0,
        )
        for c in record.citations
    ]
    if len({entry[0] for entry in citations}) < len(citations):  # of several with one number the last counts
        citations = list({entry[0]: entry for entry in citations}.values())
    return row, (_text(record.question), _text(record.answer)), citations


def _records(reader: Reader, rows: Sequence[Row]) -> tuple[QueryRecord, ...]:
    cited: dict[int, list[Citation]] = {}
    for row in reader.all(_SELECT_CITATIONS, (Listing([row["seq"] for row in rows]),)):
        seq, number, title, source, heading, url, score = row
        cited.setdefault(seq, []).append(Citation(number, title, source, heading, url, "", score))
    return tuple(_record(row, tuple(cited.get(row["seq"], ()))) for row in rows)


def _record(row: Row, citations: tuple[Citation, ...]) -> QueryRecord:
    values = {name: row[name] for name in _VALUES}
    values["tokens_estimated"] = bool(values["tokens_estimated"])
    values["bot"] = bool(values["bot"])
    values["signals"] = signals_of(values["signals"])
    return QueryRecord(
        id=row["id"],
        started_at=from_epoch_ms(row["seq"] >> SEQ_BITS),
        question=row["question"] or "",
        answer=row["answer"] or "",
        citations=citations,
        **values,
    )


# Every bucket there is: the indexes of visitors and sessions are ordered by bucket first.
_BUCKETS = (
    "q.bucket IN (WITH RECURSIVE b (n) AS (SELECT (SELECT min(seq) FROM queries) >> 46 UNION ALL "
    "SELECT n + 1 FROM b WHERE n < (SELECT max(seq) FROM queries) >> 46) SELECT n FROM b)"
)
_TERMS = {
    "visitor": f"{_BUCKETS} AND q.visitor = ?",
    "session": f"{_BUCKETS} AND q.session = ?",
    "feedback": "q.feedback <> '' AND q.feedback = ?",  # as the index has it
}


def _where(
    selection: Selection, *, after: int | None = None, before: int | None = None, upto: int | None = None
) -> tuple[str, list[Any]]:
    """The condition on `queries q` (and `texts t` for a search), values bound, columns our own.

    There is one bound on each side: of two SQLite takes any, and looks at all that lies between them.
    """
    terms, params = ["1 = 1"], list[Any]()
    lows = [after + 1] if after is not None else []
    lows += [first_seq(selection.since)] if selection.since is not None else []
    highs = [bound for bound in (before, upto + 1 if upto is not None else None) if bound is not None]
    highs += [first_seq(selection.until)] if selection.until is not None else []
    if lows:
        terms.append("q.seq >= ?")
        params.append(max(lows))
    if highs:
        terms.append("q.seq < ?")
        params.append(min(highs))
    for name in ("provider", "model", "kind", "status", "answered", "visitor", "session", "feedback"):
        if value := getattr(selection, name):
            if (name, value) == ("feedback", "any"):
                terms.append("q.feedback <> ''")
            else:
                terms.append(_TERMS.get(name, f"q.{name} = ?"))
                params.append(_word(value))
    if selection.unanswered:
        terms.append("q.bot = 0 AND q.signals <> 0")  # as the index has it
    if selection.bot:
        terms.append("q.bot = 1" if selection.bot == "yes" else "q.bot = 0")
    return " AND ".join(terms), params


def _span(selection: Selection) -> tuple[int, int]:
    """The first key of the time of `selection`, and the first after it."""
    return (
        first_seq(selection.since) if selection.since else 0,
        first_seq(selection.until) if selection.until else 2**63 - 1,
    )


_LISTED = f"q.seq {LISTED}"


def _found(
    reader: Reader, selection: Selection, *, before: int | None = None, limit: int | None = None
) -> "array[int]":
    """Keys of the rows that `selection` searches for, newest first."""
    connection = reader.connection
    wanted = search.Wanted.of(_text(selection.search, MAX_SEARCH_CHARS))
    low, high = _span(selection)
    high = min(high, before or high)
    found: list[int] = []

    def look(condition: str, *values: Any, after: int | None = None) -> Iterator[int]:
        """Rows within `condition` that fit, newest first."""
        where, params = _where(selection, after=after, before=before)
        rows = connection.execute(
            "SELECT q.seq, t.question, t.answer FROM queries q JOIN texts t ON t.seq = q.seq "  # noqa: S608
            f"WHERE {where} AND {condition} ORDER BY q.seq DESC",
            [*params, *values],
        )
        return (seq for seq, question, answer in rows if wanted.fits(question, answer))

    # What is in no segment yet is read; it need not be the newest, rows of the spool come late.
    upto = state(connection)["sealed_upto"]
    found += islice(look("1 = 1", after=upto), limit)
    found += islice(look("q.seq IN (SELECT seq FROM unindexed)"), limit)
    segments = search.newest_first(connection, low, high)
    for segment, last, places in search.in_segments(connection, segments, wanted):
        found.sort(reverse=True)
        if limit is not None and len(found) >= limit and found[limit - 1] > last:
            break
        if not places:
            continue
        seqs = search.rows_of(connection, segment)
        candidates = [seq for place in reversed(places) if low <= (seq := seqs[place]) < high]
        hits = 0
        for start in range(0, len(candidates), SEARCH_CHUNK):
            part = list(look(_LISTED, Listing(candidates[start : start + SEARCH_CHUNK])))
            found += part
            hits += len(part)
            if limit is not None and hits >= limit:
                break
    found.sort(reverse=True)
    return array("q", found[:limit])


def _rows(reader: Reader) -> int:
    """How many rows there are: those in the sums but for the deleted, and those after them."""
    known = state(reader.connection)
    (summed,) = reader.one(
        "SELECT coalesce(sum(questions), 0) FROM rollups WHERE dimension IN ('all', 'bot') AND level = ?",
        (len(rollups.LEVELS) - 1,),
    )
    (after,) = reader.one(
        "SELECT (SELECT count(*) FROM queries WHERE seq > ?) + (SELECT count(*) FROM uncounted)",
        (known["summed_upto"],),
    )
    return max(0, int(summed) - known["gone"] + int(after))


def mark_summed(writer: Connection, upto: int) -> None:
    """From here on rows up to the key `upto` are taken for summed, but for those that are there already."""
    known = state(writer)["summed_upto"]
    if upto > known:
        writer.execute(
            "INSERT INTO uncounted (seq) SELECT seq FROM queries WHERE seq > ? AND seq <= ? "
            "ON CONFLICT DO NOTHING",
            (known, upto),
        )
        set_state(writer, summed_upto=upto)


def _note_late(writer: Connection, inserted: list[Bound]) -> None:
    """Rows that belong among those that are summed, or in the index, are done by themselves."""
    known = state(writer)
    for name, table in (("summed_upto", "uncounted"), ("sealed_upto", "unindexed")):
        late = [(row[0],) for row, _, _ in inserted if row[0] <= known[name]]
        if late:
            writer.executemany(f"INSERT INTO {table} (seq) VALUES (?) ON CONFLICT DO NOTHING", late)  # noqa: S608


def _text(value: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Text that any program can read back: no lone surrogates, no NUL, not without end."""
    if len(value) <= limit and value.isascii() and "\0" not in value:
        return value
    return value[:limit].encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _word(value: str) -> str:
    if value.isascii() and len(value) <= MAX_WORD_CHARS and "\0" not in value:
        return value
    return _text(value, MAX_WORD_CHARS)


def _integer(value: int | None) -> int | None:
    return None if value is None else max(0, min(int(value), MAX_INTEGER))


def _real(value: float | None, digits: int | None = None) -> float | None:
    # NaN is kept as NULL; infinity would spoil every sum.
    if value is None or value - value != 0:
        return None
    return float(value) if digits is None else round(float(value), digits)
