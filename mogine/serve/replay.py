"""Answers that outlive their connection for a moment, so that a visitor can read on on the next page."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from aiohttp import web

MAX_ENDED = 500
MAX_FRAMES_BYTES = 4 * 1024 * 1024

log = logging.getLogger(__name__)


class Replay:
    """One answer: its numbered frames, and the task that writes them until nobody has wanted it for a while.

    Whoever leaves before the first frame was on its way cannot come back, since the id was in it: then,
    and at `stop`, there is no grace.
    """

    def __init__(self, visitor: str, session: str, grace_s: float) -> None:
        self.visitor = visitor
        self.session = session
        self._grace_s = grace_s
        self._frames: list[bytes] = []
        self._size = 0
        self._grown = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._readers = 0
        self._sent = False
        self._timer: asyncio.TimerHandle | None = None
        self.on_forgotten: Callable[[], None] = lambda: None

    @property
    def begun(self) -> bool:
        """Whether a frame was written, so that an error can only be told by another."""
        return bool(self._frames)

    @property
    def ended(self) -> bool:
        """Whether all frames are written."""
        return self._task is not None and self._task.done()

    def start(self, write: Callable[["Replay"], Awaitable[None]]) -> None:
        """Run `write`, which calls `push`; what it raises before the first frame, the reader raises."""
        self._task = asyncio.create_task(self._run(write))
        self._task.add_done_callback(lambda _: self._on_end())

    def push(self, frame: bytes) -> None:
        """One whole event; it is given the next number. Raises ValueError for an answer beyond all limits."""
        self._size += len(frame)
        if self._size > MAX_FRAMES_BYTES:
            raise ValueError("the answer is longer than what can be kept of it")
        self._frames.append(b"id: %d\n%b" % (len(self._frames) + 1, frame))
        self._wake()

    async def read(self, after: int = 0) -> AsyncGenerator[bytes, None]:
        """The frames after number `after`, those to come too, several at once where they wait."""
        self._readers += 1
        if not self.ended:
            self._cancel_timer()
        try:
            at = min(after, len(self._frames))
            while True:
                if at < len(self._frames):
                    waiting = self._frames[at:]
                    at += len(waiting)
                    self._sent = True
                    yield b"".join(waiting)
                elif self.ended:
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    return
                else:
                    await self._grown.wait()
        finally:
            self._readers -= 1
            if self._readers == 0:
                self._left()

    def stop(self) -> None:
        """End the answer now; it is recorded as one that the visitor left."""
        self._cancel_timer()
        if self._task is not None:
            self._task.cancel()
        self.on_forgotten()

    async def closed(self) -> None:
        """Wait until the task has told the record how it ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self, write: Callable[["Replay"], Awaitable[None]]) -> None:
        try:
            await write(self)
        except Exception as error:
            if self.begun or self._readers == 0:
                log.exception("an answer broke off")
            else:
                self._error = error

    def _on_end(self) -> None:
        self._wake()
        if self._readers == 0 and self._timer is None:
            self._left()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def _left(self) -> None:
        if not self._sent and not self.ended:
            self.stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._grace_s, self.stop)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Replays:
    """Answers by the id of their request, of use in the hands of the visitor and session that asked."""

    def __init__(self, grace_s: float, *, max_ended: int = MAX_ENDED) -> None:
        self._grace_s = grace_s
        self._max_ended = max_ended
        self._known: OrderedDict[str, Replay] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def start(
        self, id: str, visitor: str, session: str, write: Callable[[Replay], Awaitable[None]]
    ) -> Replay:
        """An answer that `write` gives from now on."""
        replay = Replay(visitor, session, self._grace_s)
        self._known[id] = replay
        replay.on_forgotten = lambda: self._forget(id)
        replay.start(write)
        if len(self._known) > self._max_ended:
            ended = [known for known in self._known.values() if known.ended]
            for known in ended[: len(self._known) - self._max_ended]:
                known.stop()
        return replay

    def find(self, id: str, visitor: str, session: str) -> Replay | None:
        """The answer, for who asked; None for everybody else, as for one that never was."""
        replay = self._known.get(id)
        if replay is None or replay.visitor != visitor or not session or replay.session != session:
            return None
        return replay

    async def close(self) -> None:
        """End what still runs."""
        for replay in list(self._known.values()):
            replay.stop()
            await replay.closed()

    def _forget(self, id: str) -> None:
        self._known.pop(id, None)


REPLAYS = web.AppKey("REPLAYS", Replays)


def keeping(grace_s: float) -> Callable[[web.Application], AsyncIterator[None]]:
    """A cleanup context: REPLAYS, for as long as the server runs."""

    async def keep(app: web.Application) -> AsyncIterator[None]:
        replays = app[REPLAYS] = Replays(grace_s)
        yield
        await replays.close()

    return keep
