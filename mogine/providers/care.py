"""Care for one vendor: its keys in turn, which of them rest, and whether it is asked at all just now."""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from mogine.errors import (
    AnswerTooLong,
    MogineError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamCut,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)

FAILURES = 5
WITHIN_S = 30.0
PROBE_S = 10.0
REFUSED_REST_S = 300.0
QUOTA_REST_S = 900.0
GRANT_S = 9.0  # less than PROBE_S, when the trial is granted to the next
APART_S = 60.0
ELSEWHERE_S = 1.0  # while another process makes the trial

KINDS: tuple[tuple[type[UpstreamError], str], ...] = (
    (UpstreamUnreachable, "unreachable"),
    (UpstreamTimeout, "timeout"),
    (UpstreamCut, "cut"),
    (UpstreamBadResponse, "bad_response"),
    (UpstreamRefused, "refused"),
    (UpstreamBusy, "busy"),
    (UpstreamUnavailable, "unavailable"),
    (AnswerTooLong, "too_long"),
)

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class Peers(Protocol):
    """Other processes that ask the same vendor. What one of them learns is told to all."""

    def opened(self, seconds: float) -> None:
        """The vendor is left alone, for so long at first."""

    def closed(self) -> None:
        """The vendor answers again."""

    def rests(self, key: str, seconds: float) -> None:
        """A key is left alone for so long."""


class Keys:
    """The keys of one vendor, taken in turn; one that was refused rests while there are others."""

    def __init__(self, keys: Sequence[str], *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._turn = 0
        self._rests: dict[str, float] = {}
        self.all: tuple[str, ...] = tuple(keys)

    def replace(self, keys: Sequence[str]) -> None:
        """From the next question on these are the keys; answers that are running keep theirs."""
        self.all = tuple(keys)
        self._turn = 0
        self._rests = {key: until for key, until in self._rests.items() if key in self.all}

    def take(self) -> str:
        """The next key that does not rest; when all do, the one that rests the shortest. "" without keys."""
        if not self.all:
            return ""
        if self._rests:
            return self._awake() or min(self.all, key=lambda key: self._rests.get(key, 0.0))
        key = self.all[self._turn % len(self.all)]
        self._turn += 1
        return key

    def _awake(self) -> str:
        self._wake()
        for _ in self.all:
            key = self.all[self._turn % len(self.all)]
            self._turn += 1
            if key not in self._rests:
                return key
        return ""

    def rest(self, key: str, seconds: float) -> bool:
        """Leave `key` alone for a while; whether it was not resting already."""
        self._wake()
        if key not in self.all:
            return False
        fresh = key not in self._rests
        self._rests[key] = self._clock() + seconds
        return fresh

    def rests(self, key: str) -> float:
        """Seconds that `key` still rests."""
        return max(0.0, self._rests.get(key, 0.0) - self._clock())

    @property
    def resting(self) -> int:
        """How many keys rest now."""
        if self._rests:
            self._wake()
        return len(self._rests)

    def _wake(self) -> None:
        now = self._clock()
        self._rests = {key: until for key, until in self._rests.items() if until > now}


class Breaker:
    """Leaves a vendor alone that keeps failing, and tries it with one question now and then.

    It opens when failures outnumber answers by FAILURES within WITHIN_S: each answer makes up for one
    failure, so that a few among many do no harm. While it is open one question in PROBE_S gets through;
    the first that is taken closes it.

    One of several processes is told by `hear` what all know; then the one question is that of the process
    to whom it was granted. When it opens again here soon after another process has closed it, the way from
    here to the vendor is broken and not the vendor: then it is open here alone.
    """

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._failed_at: deque[float] = deque(maxlen=FAILURES)
        self._probe_at: float | None = None  # set while open
        self._probing = False
        self._is_shared = False  # all know that it is open
        self._granted_until = -math.inf  # until then the trial is ours to make
        self._closed_by_others_at = -math.inf

    @property
    def state(self) -> str:
        """closed, open, or half_open while a trial is due or under way."""
        if self._probe_at is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._probe_at else "open"

    def wait_s(self) -> float:
        """0 when the vendor may be asked, which counts as the trial of an open breaker; else seconds."""
        if self._probe_at is None:
            return 0.0
        now = self._clock()
        if now < self._probe_at:
            return self._probe_at - now
        if self._is_shared and now >= self._granted_until:
            return ELSEWHERE_S
        self._granted_until = -math.inf
        # A trial that hangs must not keep the next one from being made.
        self._probe_at = now + PROBE_S
        self._probing = True
        return 0.0

    def taken(self) -> bool:
        """The vendor has begun to answer; whether that has closed the breaker."""
        was_open = self._probe_at is not None
        if was_open:
            self._probe_at = None
            self._probing = self._is_shared = False
            self._granted_until = -math.inf
            self._failed_at.clear()
        return was_open

    @property
    def is_apart(self) -> bool:
        """Whether others have found the vendor well only a moment ago."""
        return self._clock() - self._closed_by_others_at < APART_S

    def hear(self, wait_s: float | None, *, granted: bool = False) -> None:
        """What all processes know: None when it is closed, else seconds until it is tried again, and
        whether that is up to this one now. Heard before each question, if it is heard at all."""
        now = self._clock()
        if wait_s is None:
            if self._is_shared and self.taken():
                self._closed_by_others_at = now
        elif granted or now >= self._granted_until:
            self._is_shared = True
            self._granted_until = now + GRANT_S if granted else -math.inf
            if not self._probing or granted:
                self._probe_at = now + wait_s

    def hear_nothing(self) -> None:
        """The others are out of reach: from here on it is decided here alone."""
        self._is_shared = False

    def succeeded(self) -> None:
        """An answer was complete."""
        if self._failed_at:
            self._failed_at.popleft()

    def failed(self) -> bool:
        """The vendor has failed a question; whether that has opened the breaker."""
        now = self._clock()
        if self._probe_at is not None:
            if self._probing:
                self._probing = False
                self._probe_at = now + PROBE_S
            return False
        self._failed_at.append(now)
        if len(self._failed_at) < FAILURES or now - self._failed_at[0] > WITHIN_S:
            return False
        self._probe_at = now + PROBE_S
        return True


class Care:
    """What is known of one vendor, and counted of it since the start."""

    def __init__(
        self,
        label: str,
        key_setting: str,
        keys: Sequence[str],
        *,
        quota_codes: frozenset[str] = frozenset(),
        clock: Clock = time.monotonic,
    ) -> None:
        self.label = label
        self.key_setting = key_setting
        self.keys = Keys(keys, clock=clock)
        self.breaker = Breaker(clock=clock)
        self.peers: Peers | None = None
        self.errors: Counter[str] = Counter()
        self.key_changes = 0
        self._quota_codes = quota_codes

    def turn(self) -> "Turn":
        """One question's way to the vendor."""
        return Turn(self)

    def rest(self, key: str, error: UpstreamError) -> bool:
        """Whether `error` was about `key`, which rests from now on."""
        code = error.upstream_code or ""
        if code in self._quota_codes:
            seconds = QUOTA_REST_S
        elif isinstance(error, UpstreamRefused) and error.upstream_status != 404:
            seconds = REFUSED_REST_S
        else:
            return False
        if not key:
            return False
        if self.keys.rest(key, seconds):
            if self.peers is not None:
                self.peers.rests(key, seconds)
            log.error(
                "%s refused the key ending in %s of %s (%s); it rests for %g s while there are others",
                self.label,
                shown(key),
                self.key_setting,
                code or error.upstream_status,
                seconds,
            )
        return True

    def ended(self, error: MogineError | None, *, begun: bool) -> None:
        """A question has come to its end: with its answer, or with `error`."""
        if isinstance(error, UpstreamError):
            self.errors[kind_of(error)] += 1
        if error is None:
            self.breaker.succeeded()
        elif not begun and _is_failure(error) and self.breaker.failed():
            log.error(
                "%s has failed %d times within %g s: it is left alone, and tried every %g s",
                self.label,
                FAILURES,
                WITHIN_S,
                PROBE_S,
            )
            if self.peers is not None and not self.breaker.is_apart:
                self.peers.opened(PROBE_S)
        elif not _is_failure(error):
            self.taken()

    def hear(self, wait_s: float | None, *, granted: bool) -> None:
        """See `Breaker.hear`."""
        before = self.breaker.state
        self.breaker.hear(wait_s, granted=granted)
        after = self.breaker.state
        if before == "closed" != after:
            log.error("%s has failed another process too often: it is left alone here, too", self.label)
        elif before != "closed" == after:
            log.warning("%s answers again, as another process has found", self.label)

    def taken(self) -> None:
        """The vendor is there."""
        if self.breaker.taken():
            log.warning("%s answers again", self.label)
            if self.peers is not None:
                self.peers.closed()


class Turn:
    """One question's way to its vendor; watched by `Retries`."""

    __slots__ = ("_care", "_key")

    def __init__(self, care: Care) -> None:
        self._care = care
        self._key = ""

    def admit(self) -> None:
        """Raises UpstreamUnavailable at once while the vendor is left alone."""
        if wait := self._care.breaker.wait_s():
            self._care.errors["unavailable"] += 1
            raise UpstreamUnavailable(
                f"API proxy error: {self._care.label} keeps failing and is left alone for a moment",
                retry_after_s=wait,
            )

    def key(self) -> str:
        """The key for the next try."""
        self._key = self._care.keys.take()
        return self._key

    def taken(self) -> None:
        """The vendor has begun to answer."""
        self._care.taken()

    def again(self, error: UpstreamError) -> bool:
        """Whether a try with another key may go better, at once."""
        care = self._care
        if not care.rest(self._key, error) or care.keys.resting >= len(care.keys.all):
            return False
        care.key_changes += 1
        return True

    def ended(self, error: MogineError | None, *, begun: bool) -> None:
        """See `Care.ended`."""
        self._care.ended(error, begun=begun)


def kind_of(error: UpstreamError) -> str:
    """A stable word for what went wrong at a vendor."""
    return next((kind for cls, kind in KINDS if isinstance(error, cls)), "error")


def shown(key: str) -> str:
    """As much of a key as may be seen, to tell it from others."""
    return f"...{key[-4:]}" if len(key) >= 16 else "..."


def _is_failure(error: MogineError) -> bool:
    """Whether the vendor itself is in trouble; a refused key or a full queue is no such sign."""
    if isinstance(error, UpstreamUnreachable | UpstreamTimeout | UpstreamBadResponse):
        return True
    return type(error) is UpstreamError and (error.upstream_status or 500) >= 500
