"""How often and how much at once: rates per visitor and site, open answers, and each answer's own end."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from mogine.errors import MogineError, RateLimited, Unavailable
from mogine.serve.keys import ServerState
from mogine.settings import AccessSettings, RateLimit

MAX_TRACKED_VISITORS = 10_000
THUMB_RATE = RateLimit(30, 60)
BUSY_RETRY_S = 5.0
TOLD_AGAIN_S = 60.0
OVERLOADED_RETRY_S = 2.0


class TooOften(RateLimited):
    """`repeated`: the visitor has been told so within the last minute, which need not be recorded again."""

    def __init__(self, message: str, *, retry_after_s: float, repeated: bool) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.repeated = repeated


def overloaded() -> Unavailable:
    """As many answers are open as there may be in all."""
    return Unavailable(
        "too many answers are being given right now; ask again in a moment", retry_after_s=OVERLOADED_RETRY_S
    )


def too_many_streams(allowed: int) -> RateLimited:
    """As many answers of one visitor are open as there may be."""
    return RateLimited(
        f"{allowed} of your answers are still running; wait for one to end",
        reason="too_many_streams",
        retry_after_s=BUSY_RETRY_S,
    )


def too_often(whose: str, rates: Sequence[RateLimit], wait_s: float, *, repeated: bool) -> TooOften:
    """More questions of `whose` ("you", "all visitors") than `rates` allow."""
    allowed = " and ".join(map(str, rates))
    return TooOften(
        f"too many questions from {whose}: {allowed} are allowed; wait {max(1, round(wait_s))} s",
        retry_after_s=wait_s,
        repeated=repeated,
    )


class Window:
    """At most `count` takings per key in any `window_s` seconds, for each of `limits`; for a bounded
    number of keys. Exact: the moments of the last takings are kept, as many as the largest count."""

    def __init__(self, *limits: RateLimit, max_keys: int = MAX_TRACKED_VISITORS) -> None:
        self._limits = tuple((limit.count, float(limit.window_s)) for limit in limits)
        self._longest_s = max(window_s for _, window_s in self._limits)
        self._kept = max(count for count, _ in self._limits)
        self._max_keys = max_keys
        self._taken: OrderedDict[str, deque[float]] = OrderedDict()
        self._refused_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def wait_s(self, key: str, now: float) -> float:
        """Seconds until `key` may take again; 0 when it may now."""
        times = self._taken.get(key)
        if times is None:
            return 0.0
        while times and now - times[0] >= self._longest_s:
            times.popleft()
        wait = 0.0
        for count, window_s in self._limits:
            if len(times) >= count and (left := window_s - (now - times[-count])) > wait:
                wait = left
        return wait

    def take(self, key: str, now: float) -> None:
        """Count one for `key`; the key that was quiet longest is forgotten when there are too many."""
        times = self._taken.get(key)
        if times is None:
            times = self._taken[key] = deque(maxlen=self._kept)
        times.append(now)
        self._taken.move_to_end(key)
        if len(self._taken) > self._max_keys:
            forgotten, _ = self._taken.popitem(last=False)
            self._refused_at.pop(forgotten, None)

    def recent(self, now: float) -> Iterator[tuple[str, list[float]]]:
        """The moments of each key that still count."""
        for key, times in self._taken.items():
            if times and now - times[-1] < self._longest_s:
                yield key, [taken for taken in times if now - taken < self._longest_s]

    def give_back(self, key: str) -> None:
        """Forget the last taking of `key`: it came to nothing."""
        if times := self._taken.get(key):
            times.pop()

    def refuse(self, key: str, now: float) -> bool:
        """Note a refusal; whether there was one in the minute before."""
        before = self._refused_at.get(key)
        repeated = before is not None and now - before < TOLD_AGAIN_S
        if not repeated and key in self._taken:
            self._refused_at[key] = now
        return repeated


class Limits:
    """Decides whether one more answer may begin; every open answer has a `Place`."""

    def __init__(
        self, access: AccessSettings, state: ServerState, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._access = access
        self._state = state
        self._clock = clock
        self._visitors = Window(*access.rate_limit)
        self._site = Window(*access.site_rate_limit, max_keys=1)
        self._thumbs = Window(THUMB_RATE)
        self._open: dict[str, int] = {}

    @property
    def tracked(self) -> int:
        """How many visitors' rates are remembered."""
        return len(self._visitors)

    @property
    def open_by_visitor(self) -> dict[str, int]:
        """How many answers each visitor has open."""
        return dict(self._open)

    def take_thumb(self, visitor: str) -> None:
        """Count one thumb of `visitor`; RateLimited when there were too many."""
        now = self._clock()
        if wait := self._thumbs.wait_s(visitor, now):
            raise RateLimited(
                f"too many ratings from you: {THUMB_RATE} are allowed; wait {max(1, round(wait))} s",
                retry_after_s=wait,
            )
        self._thumbs.take(visitor, now)

    def open(self, visitor: str) -> "Place":
        """A place for one answer, to be left by `with`.

        Raises Unavailable (shutting_down, overloaded) or RateLimited (too_many_streams, rate_limited).
        """
        if self._state.refusing:
            raise Unavailable("the server is stopping; ask again in a moment", reason="shutting_down")
        if len(self._state.running) >= self._access.max_streams:
            raise overloaded()
        if self._open.get(visitor, 0) >= self._access.max_streams_per_visitor:
            raise too_many_streams(self._access.max_streams_per_visitor)
        now = self._clock()
        for window, key, whose in ((self._visitors, visitor, "you"), (self._site, "", "all visitors")):
            if wait := window.wait_s(key, now):
                rates = self._access.rate_limit if key else self._access.site_rate_limit
                raise too_often(whose, rates, wait, repeated=self._visitors.refuse(visitor, now))
        self._visitors.take(visitor, now)
        self._site.take("", now)
        return Place(self, visitor)

    def refund(self, visitor: str) -> bool:
        """The question for which `open` gave the last place was refused elsewhere and takes nothing from the
        rates; whether that was so in the minute before, too."""
        self._visitors.give_back(visitor)
        self._site.give_back("")
        return self._visitors.refuse(visitor, self._clock())

    def enter(self, place: "Place") -> None:
        """Count `place` as open."""
        self._state.running.add(place)
        self._open[place.visitor] = self._open.get(place.visitor, 0) + 1

    def leave(self, place: "Place") -> None:
        """Count `place` as open no longer."""
        self._state.running.discard(place)
        left = self._open.get(place.visitor, 0) - 1
        if left > 0:
            self._open[place.visitor] = left
        else:
            self._open.pop(place.visitor, None)


class Deadlines:
    """Ends the answers that take longer than `seconds`: one timer for all of them, since they are due in the
    order in which they began. `error` makes what they end with."""

    def __init__(self, seconds: float, error: Callable[[], MogineError]) -> None:
        self._seconds = seconds
        self._error = error
        self._loop = asyncio.get_running_loop()
        self._due: dict[Deadline, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, deadline: "Deadline") -> None:
        """From now on it counts."""
        due = self._due[deadline] = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._ring)

    def end(self, deadline: "Deadline") -> None:
        """It is over, in time."""
        self._due.pop(deadline, None)

    def _ring(self) -> None:
        self._timer = None
        now = self._loop.time()
        for deadline, due in tuple(self._due.items()):
            if due > now:
                self._timer = self._loop.call_at(due, self._ring)
                break
            del self._due[deadline]
            deadline.end(self._error())


class Place:
    """One open answer: counted while `with` holds, and ended from outside by `stop`."""

    __slots__ = ("_limits", "after", "deadline", "ticket", "visitor")

    def __init__(self, limits: Limits, visitor: str) -> None:
        self._limits = limits
        self.visitor = visitor
        self.deadline: Deadline | None = None
        self.ticket = 0  # by which the parent of several workers knows it
        self.after: Callable[[], None] | None = None  # called when it has been left

    def __enter__(self) -> Self:
        self._limits.enter(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._limits.leave(self)
        if self.after is not None:
            self.after()

    def refund(self) -> bool:
        """`Limits.refund`."""
        return self._limits.refund(self.visitor)

    def within(self, deadlines: Deadlines) -> "Deadline":
        """A context that ends when `deadlines` say so, or with the error that `stop` gives."""
        self.deadline = Deadline(deadlines)
        return self.deadline

    def stop(self, error: MogineError) -> None:
        """End the answer now, with `error`."""
        if self.deadline is not None:
            self.deadline.end(error)


class Deadline:
    """Ends the block that it surrounds, at a time limit or when told to, by raising its error there.

    What asyncio.timeout does, at a small part of its price, and with an error of choice.
    """

    __slots__ = ("_cancelling", "_deadlines", "_error", "_task")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._error: MogineError | None = None  # set once it has ended
        self._cancelling = 0
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is None:
            raise RuntimeError("a deadline works inside of a task")
        self._cancelling = self._task.cancelling()
        self._deadlines.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._deadlines.end(self)
        # Someone else may have cancelled the task, too: then that counts.
        if (
            self._error is not None
            and task is not None
            and task.uncancel() <= self._cancelling
            and kind is not None
            and issubclass(kind, asyncio.CancelledError)
        ):
            raise self._error from None

    def end(self, error: MogineError) -> None:
        """Raise `error` in the block now; too late is no harm."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()
