"""From answers to the record: rows are taken at once, and committed in groups by one thread."""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType

from mogine.analytics.engine import Bound, Damaged
from mogine.analytics.masking import TextPolicy, load_salt
from mogine.analytics.records import QueryRecord
from mogine.analytics.spool import Batch, Spool
from mogine.analytics.store import AnalyticsStore, Asker, as_row, open_store
from mogine.analytics.upkeep import Upkeep
from mogine.errors import Locked, MogineError, StoreError, Unavailable
from mogine.settings import Settings

log = logging.getLogger(__name__)

Fit = tuple[QueryRecord, Bound]  # a row as it may be written, and what the database takes of it

CAPACITY = 10_000
GROUP_ROWS = 500
LINGER_S = 0.03
CROWD_ROWS = 10  # from here on rows wait a little longer for each other: a commit costs as much as ten rows
CROWD_LINGER_S = 0.1
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 5.0
LOOK_AGAIN_S = 30.0
CLOSING_S = 5.0
BUSY_CLOSING_S = 1.0  # at the end, for a database that others just keep busy
# A server can take a connection and say nothing. Rows wait so long for a word of it, then go to the spool
# while it may yet answer. With the time for which a few rows wait for each other that makes less than 200 ms.
PATIENCE_S = 0.08
PATIENCE_ROW_S = 0.0004  # many rows take their time
SLOWEST_S = 1.0  # even a server that answers again and again
TOLD_S = 0.5  # from here on health tells of it
LISTEN_EVERY_S = 0.02
LOOK_EVERY_S = 0.1
CHECK_S = 1.0  # what a start may spend on looking for damage: enough for some hundred thousand questions


@dataclass(frozen=True, slots=True)
class RecorderStats:
    """How the recorder is doing. `waiting` rows are in memory, `spooled` ones in files; `stored` and
    `dropped` count since the start; `problem` says why it is degraded, "" when it is not."""

    stored: int
    waiting: int
    spooled: int
    dropped: int
    problem: str
    last_write_at: datetime | None

    @property
    def degraded(self) -> bool:
        """Whether the database does not take rows at the moment."""
        return bool(self.problem)


class _Errand:
    """A call of the database, in a thread of its own: whoever sent for it goes on when it takes long.

    `done` is for the writer thread, with what the call returned.
    """

    def __init__(
        self, call: Callable[[], int], done: Callable[[int], None], wake: threading.Condition
    ) -> None:
        self._call, self.done, self._wake = call, done, wake
        self.began = time.monotonic()
        self.new = 0
        self.error: Exception | None = None
        self._ended = threading.Event()

    def start(self) -> "_Errand":
        # Nobody waits for it at the end of the process: what it brings lies in the spool by then.
        threading.Thread(target=self._run, name="recorder-errand", daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            self.new = self._call()
        except Exception as error:
            self.error = error
        self._ended.set()
        with self._wake:
            self._wake.notify_all()

    def has_ended(self, within_s: float = 0.0) -> bool:
        return self._ended.wait(within_s)


class Recorder:
    """Takes rows and never makes an answer wait for them.

    A row is on the disk within 200 ms: in the database, or, when that is locked, full, damaged or silent, in
    the spool, from where it is taken up later exactly once: what a silent server takes in the end is known by
    its id then. When both fail rows wait in memory, at most `capacity`; beyond that the oldest is
    dropped and counted, and the count is written into the record as soon as that is possible again.
    """

    def __init__(
        self,
        store: AnalyticsStore,
        *,
        spool_path: Path | None = None,
        policy: TextPolicy | None = None,
        capacity: int = CAPACITY,
        linger_s: float = LINGER_S,
        closing_s: float = CLOSING_S,
    ) -> None:
        self._store = store
        self._spool = Spool(spool_path or store.path.parent / "spool")
        self._policy = policy or TextPolicy()
        self._capacity = capacity
        self._linger_s = linger_s
        self._closing_s = closing_s
        self._upkeep = Upkeep(store)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        # Guarded by _wake: what both sides touch.
        self._wake = threading.Condition(lock := threading.Lock())
        self._lock = lock  # the same, without the frames of Python that a condition puts around it
        self._queue: deque[QueryRecord] = deque()
        self._in_hand = 0
        self._idle = False  # the writer waits for a first row
        self._hurry = False  # somebody waits for the writer
        self._closing_at: float | None = None
        self._taken = self._settled = 0
        self._stored = self._spooled = self._dropped = 0
        self._untold: Counter[str] = Counter()
        self._problem = ""
        self._last_write_at: datetime | None = None
        # The writer thread's own.
        self._last_group = 0
        self._retry_s = 0.0
        self._is_busy = False
        self._retry_at = 0.0
        self._held: list[Fit] = []
        self._take_up_at = 0.0
        self._taking_up: Generator[Batch, None, None] | None = None
        self._errand: _Errand | None = None
        self._spooled_since = 0  # rows that came to the spool since its files are taken up

    # --- the answering side ----------------------------------------------------------------------

    async def __aenter__(self) -> "Recorder":
        """Opens or creates the record, and starts the writer.

        Raises StoreError when the file is of a newer mogine or cannot be written; a damaged one is
        moved aside, and a locked one, or a database that is away, does not keep a server from starting.
        """
        await asyncio.to_thread(self._prepare)
        self._thread.start()
        self._upkeep.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Brings everything that waits to the disk, then closes the store."""
        with self._wake:
            self._closing_at = time.monotonic() + self._closing_s
            self._wake.notify_all()
        await asyncio.shield(asyncio.to_thread(self._end))

    def _end(self) -> None:
        self._upkeep.stop()
        self._thread.join()

    def record(self, row: QueryRecord) -> None:
        """Takes `row`; never raises, never waits, from any thread."""
        with self._lock:
            self._taken += 1
            self._queue.append(row)
            if len(self._queue) + self._in_hand > self._capacity:
                self._queue.popleft()
                self._drop(1, "no room left in memory")
            # Waking a thread costs more than all the rest here: a writer that waits for company is let be.
            if self._idle or len(self._queue) == GROUP_ROWS:
                self._idle = False
                self._wake.notify_all()

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """True when every row taken so far is in the database, in the spool or counted as dropped."""
        return await asyncio.to_thread(self._wait_settled, timeout_s)

    def stats(self) -> RecorderStats:
        """The numbers for health and metrics."""
        with self._wake:
            return RecorderStats(
                stored=self._stored,
                waiting=len(self._queue) + self._in_hand,
                spooled=self._spooled,
                dropped=self._dropped,
                problem=self._problem,
                last_write_at=self._last_write_at,
            )

    async def give_feedback(
        self, id: str, rating: str, reason: str, comment: str, asker: Asker, *, handoff: bool = False
    ) -> bool:
        """See AnalyticsStore.give_feedback; False when the row is not the asker's own, or is not there.

        What was asked a moment ago is brought to the disk first. Raises Locked or StoreError.
        """
        await self.flush()
        words = self._policy.words(reason), self._policy.words(comment)
        return await asyncio.to_thread(
            partial(
                self._store.give_feedback,
                id,
                rating,
                reason=words[0],
                comment=words[1],
                handoff=handoff,
                asker=asker,
            )
        )

    def _wait_settled(self, timeout_s: float) -> bool:
        with self._wake:
            goal = self._taken
            self._hurry = True
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._settled >= goal, timeout_s)

    def _drop(self, rows: int, reason: str) -> None:
        """Under _wake."""
        self._dropped += rows
        self._settled += rows
        self._untold[reason] += rows

    # --- the writer thread -----------------------------------------------------------------------

    def _prepare(self) -> None:
        try:
            try:
                self._store.prepare()
                self._store.check(CHECK_S)
            except Damaged as damage:
                self._begin_anew(damage)
                self._store.prepare()
        except (Locked, Unavailable) as error:
            self._failed(error)

    def _run(self) -> None:
        while True:
            group, closing_at = self._next_group()
            self._welcome()
            rows = self._held or self._fit(group)
            if rows:
                self._settle(rows)
            self._catch_up(closing=closing_at is not None)
            if closing_at is not None and self._is_done(closing_at):
                break
        self._stop_taking_up()
        self._spool.release()
        self._store.close()

    def _next_group(self) -> tuple[list[QueryRecord], float | None]:
        """Waits for work, then for company: rows that come together are committed together."""
        with self._wake:
            if self._held:
                self._wake.wait(max(0.01, min(FIRST_RETRY_S, self._retry_at - time.monotonic())))
                return [], self._closing_at
            if not self._queue and self._errand is not None:
                self._idle = True
                self._wake.wait_for(
                    lambda: self._queue or self._errand is None or self._errand.has_ended(), LOOK_EVERY_S
                )
                self._idle = False
            elif not self._queue and self._closing_at is None and self._taking_up is None:
                due = self._retry_at if self._problem else self._take_up_at
                self._idle = True
                self._wake.wait(max(0.01, due - time.monotonic()))
                self._idle = False
            elif not self._queue and self._problem:
                self._wake.wait(max(0.01, min(FIRST_RETRY_S, self._retry_at - time.monotonic())))
            if self._queue and self._closing_at is None:
                self._wake.wait_for(
                    lambda: len(self._queue) >= GROUP_ROWS or self._hurry or self._closing_at is not None,
                    self._linger_s if self._last_group < CROWD_ROWS else max(self._linger_s, CROWD_LINGER_S),
                )
            self._hurry = False
            group = [self._queue.popleft() for _ in range(min(len(self._queue), GROUP_ROWS))]
            self._in_hand = self._last_group = len(group)
            return group, self._closing_at

    def _settle(self, rows: list[Fit]) -> None:
        """Brings `rows` to the disk; they are held, and tried again, while nothing takes them."""
        on_disk = self._to_database(rows) or self._to_spool(rows)
        self._held = [] if on_disk else rows
        with self._wake:
            if on_disk:
                self._in_hand = 0
                self._settled += len(rows)
            self._wake.notify_all()

    def _fit(self, group: list[QueryRecord]) -> list[Fit]:
        """`group` as it may be written; a row that cannot be is dropped, never written unmasked."""
        rows = []
        for record in group:
            try:
                row = self._policy.apply(record)
                rows.append((row, as_row(row)))
            except Exception:
                log.exception("question %r cannot be recorded", record.id)
                with self._wake:
                    self._in_hand -= 1
                    self._drop(1, "unusable values")
                    self._wake.notify_all()
        return rows

    def _to_database(self, rows: list[Fit]) -> bool:
        if self._errand is not None or (self._problem and time.monotonic() < self._retry_at):
            return False
        bound = [bound for _, bound in rows]
        return self._ask(
            partial(self._insert, bound), self._succeeded, PATIENCE_S + PATIENCE_ROW_S * len(rows)
        )

    def _ask(self, call: Callable[[], int], done: Callable[[int], None], patience_s: float) -> bool:
        """Whether `call` has succeeded; a server that takes longer than `patience_s` is heard later."""
        try:
            if self._store.is_file:
                done(call())
                return True
            self._errand = _Errand(call, done, self._wake).start()
        except Exception as error:
            self._failed(error)
            return False
        while not self._errand.has_ended(LISTEN_EVERY_S):
            is_slow = time.monotonic() - self._errand.began > SLOWEST_S
            if is_slow or self._store.silent_s > patience_s:
                return False
        return self._welcome()

    def _welcome(self) -> bool:
        """Takes notice of an errand that has ended; whether one has, with success."""
        errand = self._errand
        if errand is None:
            return False
        if not errand.has_ended():
            if time.monotonic() - errand.began > TOLD_S and self._store.silent_s > PATIENCE_S:
                self._degrade(f"{self._store.name} does not answer; look after the server")
            return False
        self._errand = None
        if errand.error is None:
            errand.done(errand.new)
            return True
        self._failed(errand.error)
        return False

    def _insert(self, rows: list[Bound]) -> int:
        try:
            return self._store.insert_bound(rows)
        except Damaged as damage:
            self._begin_anew(damage)
            return self._store.insert_bound(rows)

    def _to_spool(self, rows: list[Fit]) -> bool:
        try:
            self._spool.append([record for record, _ in rows])
        except StoreError as error:
            log.error("the spool fails too, rows wait in memory: %s", error.message)
            return False
        self._spooled_since += len(rows)
        with self._wake:
            self._spooled += len(rows)
        return True

    def _begin_anew(self, damage: Damaged) -> None:
        aside = self._store.move_aside(damage)
        if aside is not None:
            log.error("%s; it lies in %s now and a new record begins", damage.message, aside)

    def _succeeded(self, new: int) -> None:
        with self._wake:
            if self._problem:
                log.warning("the record of questions takes rows again")
            if self._spooled:
                self._take_up_at = 0.0
            self._problem, self._retry_s, self._retry_at = "", 0.0, 0.0
            if new:
                self._stored += new
                self._last_write_at = datetime.now(UTC)

    def _failed(self, error: Exception) -> None:
        problem = error.message if isinstance(error, MogineError) else f"{type(error).__name__}: {error}"
        self._retry_s = min(LAST_RETRY_S, self._retry_s * 2 or FIRST_RETRY_S)
        self._retry_at = time.monotonic() + self._retry_s
        self._is_busy = isinstance(error, Locked)
        self._stop_taking_up()
        self._degrade(problem)

    def _degrade(self, problem: str) -> None:
        with self._wake:
            if problem != self._problem:
                log.warning("rows go to the spool: %s", problem)
            self._problem = problem

    # --- what was left behind --------------------------------------------------------------------

    def _catch_up(self, *, closing: bool) -> None:
        """Takes up one batch of what was spooled, so that new rows never wait behind old ones."""
        now = time.monotonic()
        if self._errand is not None or (self._problem and now < self._retry_at):
            return
        left = self._spooled or self._untold
        if self._taking_up is None:
            if not (self._problem or now >= self._take_up_at or (closing and left)):
                return
            self._spool.release()
            self._spooled_since = 0
            self._taking_up = self._spool.take_up(GROUP_ROWS)
        try:
            batch = next(self._taking_up, None)
        except OSError as error:
            log.error("the spool cannot be read: %s", error)
            self._stop_taking_up()
            self._take_up_at = now + LOOK_AGAIN_S
            return
        self._ask(partial(self._take_in, batch), partial(self._took_up, batch), PATIENCE_S)

    def _take_in(self, batch: Batch | None) -> int:
        # Without rows to take up it is only a trial whether the database is there again.
        new = self._insert([as_row(record) for record in batch.records] if batch else [])
        self._tell_losses()
        return new

    def _took_up(self, batch: Batch | None, new: int) -> None:
        self._succeeded(new)
        with self._wake:
            if batch is None:
                self._taking_up = None
                self._spooled = self._spooled_since
                self._take_up_at = time.monotonic() + (0.0 if self._spooled else LOOK_AGAIN_S)
                return
            self._spooled = max(0, self._spooled - len(batch.records))
            if batch.damaged:
                self._dropped += batch.damaged
                self._untold["damaged line in the spool"] += batch.damaged

    def _tell_losses(self) -> None:
        with self._wake:
            losses = dict(self._untold)
        for reason, rows in losses.items():
            self._store.note_loss(rows, reason)
            with self._wake:
                self._untold.subtract({reason: rows})
                self._untold += Counter()  # leaves out what is told

    def _stop_taking_up(self) -> None:
        taking_up, self._taking_up = self._taking_up, None
        if taking_up is not None:
            taking_up.close()

    def _is_done(self, closing_at: float) -> bool:
        with self._wake:
            late = time.monotonic() >= closing_at
            if late and (left := len(self._queue) + len(self._held)):
                log.error("%d questions could not be written before the end", left)
                self._drop(left, "no disk at the end")
                self._queue.clear()
                self._held = []
                self._in_hand = 0
                self._wake.notify_all()
            left_behind = self._errand or self._taking_up or self._spooled or self._untold
            if self._problem:  # rows are safe in the spool, and the next start takes them up
                waited_s = time.monotonic() - (closing_at - self._closing_s)
                left_behind = left_behind and self._is_busy and waited_s < BUSY_CLOSING_S
            return late or not (self._queue or self._held or left_behind)


def open_recorder(settings: Settings) -> Recorder:
    """The recorder of a home, to be entered with `async with`."""
    policy = TextPolicy(
        questions=settings.analytics.store_questions,
        answers=settings.analytics.store_answers,
        salt=load_salt(settings.data_path / "question_salt")
        if settings.analytics.store_questions == "hash"
        else b"",
    )
    return Recorder(open_store(settings), spool_path=settings.data_path / "spool", policy=policy)
