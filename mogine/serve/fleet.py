"""What proxies on several machines must agree on, kept in Redis or Valkey.

Rates, open answers, spending, vendors that are left alone and keys that rest. Loaded only when
MOGINE_REDIS_URL is set. Every process still holds its own limits first: what one of them has given too often,
all together have. So when Redis is away nothing else needs to happen than that nobody is asked.

One script decides about a question, in one step: all rates and both counts of open answers, exactly; its
answer brings along what all others have spent and learnt of vendors. That is why the package `limits` is not
used: it knows no open answers, and takes from one rate before it looks at the next. All calls go over one
connection in the order in which they are made, those that wait together in one piece. Nothing of it is on the
way of a token.

Open answers belong to a *life* of a process, which ends when it is not renewed for LEASE_S. Of a process that
is killed nothing stays open for longer than that. One that lost Redis begins a new life and tells what Redis
cannot know: what it has open and has given, and all that it knows of spending, also of others', if everything
was forgotten.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import blake2b
from itertools import islice
from secrets import token_hex
from typing import Any

from mogine.errors import MogineError
from mogine.providers.care import PROBE_S, QUOTA_REST_S
from mogine.providers.registry import Roster
from mogine.redis_client import FAILURES, PREFIX, AsyncClient, Forgotten, open_async
from mogine.serve import scripts
from mogine.serve.budget import Budget
from mogine.serve.limits import Place, Window, overloaded, too_many_streams, too_often
from mogine.serve.shared import Remote
from mogine.serve.visitors import Visitors
from mogine.settings import AccessSettings, RateLimit

LEASE_S = 15.0
RETRY_S = 1.0
TIMEOUT_S = 1.0
MONTHS_KEPT_S = 40 * 86400
UNIT = 10**9  # of a CNY, see `scripts`
MAX_UNTOLD = 20_000
MAX_RECALLED = 2_000  # moments of one visitor
AT_ONCE = 500
SPANS = (round(PROBE_S * 1e6), round(QUOTA_REST_S * 1e6))

log = logging.getLogger(__name__)

Words = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class _Call:
    script: str
    keys: Sequence[str]
    args: Words
    answer: "asyncio.Future[Any]"


class Fleet:
    """One process among all that use one Redis. `admit` is all that a handler needs.

    `home` names the record of questions: what different ones say was spent is added up. Of `budget` and
    `roster` all are told, and they are told of all; `visitors` are hashed with the salt of all.
    """

    def __init__(
        self,
        url: str,
        access: AccessSettings,
        home: str,
        parent: Remote | None = None,
        *,
        budget: Budget | None = None,
        roster: Roster | None = None,
        visitors: Visitors | None = None,
        lease_s: float = LEASE_S,
        retry_s: float = RETRY_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._url = url
        self._access = access
        self._home = home
        self._parent = parent
        self._budget = budget if budget is not None and budget.is_set else None
        self._roster = roster
        self._visitors = visitors
        self._lease_s = lease_s
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._queue: deque[_Call] = deque()
        self._wanted = asyncio.Event()
        self._open: dict[int, str] = {}
        self._ticket = 0
        self._name = token_hex(8)
        self._lives = 0
        self._memory = ""
        self._given = (Window(*access.rate_limit), Window(*access.site_rate_limit, max_keys=1))
        self._untold: deque[tuple[str, float]] = deque(maxlen=MAX_UNTOLD)
        self._spent: dict[str, dict[str, int]] = {}
        self._trouble = "not reached yet"
        self._told = False
        self._stopping = False
        self._tried = asyncio.Event()
        if self._budget is not None:
            self._budget.tell = self._spend
        if roster is not None:
            roster.join(partial(_Peers, self))

    async def tried(self) -> None:
        """Return once Redis is in use, or the first try has failed."""
        await self._tried.wait()

    @property
    def trouble(self) -> str:
        """Why Redis is not in use right now; "" when it is."""
        return self._trouble

    async def admit(self, place: Place, visitor: str, asked: Collection[str] = ()) -> None:
        """Whether all processes together have room for one more answer; raises as `Limits.open`.

        Afterwards the budget and the care for vendors know what all others do; of the vendors `asked` one
        that is due for a trial may be tried by this very question.
        """
        if self._parent is not None:
            await self._parent.admit(place, visitor)
        self._ticket += 1
        ticket, key = self._ticket, blake2b(visitor.encode(), digest_size=16).hexdigest()
        place.after = partial(self._leave, ticket)
        if self._trouble:
            self._give(ticket, key, told=False)
            return
        periods = self._budget.periods() if self._budget is not None else ()
        try:
            verdict = await self._put(
                scripts.ADMIT,
                (*_rate_keys(key), *map(_spent_key, periods)),
                self._question(ticket, key, asked),
            )
        except asyncio.CancelledError:
            self._leave(ticket)  # it may have been let in, and nobody will come
            raise
        if verdict is None or verdict[0] == 0:
            self._give(ticket, key, told=verdict is not None)
            if verdict is not None:
                self._hear(periods, *verdict[2:])
            return
        place.after = None
        raise self._refusal(place, verdict[0], verdict[1] / 1e6)

    def _question(self, ticket: int, key: str, asked: Collection[str]) -> Words:
        access = self._access
        words: list[str | int] = [*self._life(), ticket, key]
        words += (access.max_streams, access.max_streams_per_visitor, self._home, *SPANS)
        for each in (asked, _numbers(access.rate_limit), _numbers(access.site_rate_limit)):
            words += (len(each), *each)
        return words

    def _refusal(self, place: Place, code: int, wait_s: float) -> MogineError:
        repeated, access = place.refund(), self._access
        if code == 1:
            return overloaded()
        if code == 2:
            return too_many_streams(access.max_streams_per_visitor)
        whose, rates = ("you", access.rate_limit) if code == 3 else ("all visitors", access.site_rate_limit)
        return too_often(whose, rates, wait_s, repeated=repeated)

    def _give(self, ticket: int, key: str, *, told: bool) -> None:
        self._open[ticket] = key
        now = asyncio.get_running_loop().time()
        visitors, site = self._given
        visitors.take(key, now)
        site.take("", now)
        if not told:
            self._untold.append((key, now))

    def _leave(self, ticket: int) -> None:
        self._open.pop(ticket, None)
        self._tell(scripts.LEAVE, (), ticket)

    async def call(self, script: str, keys: Sequence[str], *words: str | int) -> Any:
        """What a script answers; None when Redis is away. Keys get the prefix of all that is ours."""
        if self._trouble:
            return None
        return await self._put(script, [PREFIX + key for key in keys], (*self._life(), *words))

    def tell(self, script: str, keys: Sequence[str], *words: str | int) -> None:
        """A script whose answer nobody needs; nothing happens while Redis is away."""
        self._tell(script, [PREFIX + key for key in keys], *words)

    # --- what all know -----------------------------------------------------------------------------

    def _hear(self, periods: Sequence[str], sums: Sequence[Sequence[bytes]], news: Sequence[Any]) -> None:
        if self._budget is not None:
            told = ((int(own) / UNIT, int(others) / UNIT) for own, others in sums)
            self._budget.hear(dict(zip(periods, told, strict=True)))
        self._hear_of_vendors(news)

    def _hear_of_vendors(self, news: Sequence[Any]) -> None:
        if self._roster is None:
            return
        known = {field.decode(): (int(left) / 1e6, granted == 1) for field, left, granted in news}
        for vendor in self._roster.vendors:
            wait_s, granted = known.get(f"open:{vendor.name}", (None, False))
            vendor.care.hear(wait_s, granted=granted)
            for key in vendor.care.keys.all if known else ():
                rest_s, _ = known.get(f"rest:{_digest(key)}", (0.0, False))
                if rest_s > vendor.care.keys.rests(key) + 1:
                    vendor.care.keys.rest(key, rest_s)

    def learn(self, of: str, seconds: float) -> None:
        """Tell all: `of` is so for so long."""
        self._tell(scripts.KNOW, (), of, round(seconds * 1e6))

    def unlearn(self, of: str) -> None:
        """Tell all that it is so no longer."""
        self._tell(scripts.FORGET, (), of)

    def _spend(self, at: datetime, cny: float) -> None:
        if self._budget is not None:
            keys = [_spent_key(period) for period in self._budget.periods(at)]
            self._tell(scripts.SPEND, keys, self._home, MONTHS_KEPT_S, round(cny * UNIT))

    async def exchange(self) -> None:
        """Tell what this home has spent as its record says, and hear what all others have."""
        if self._budget is not None and not self._trouble:
            own = self._own_spending()
            found = await self._put(scripts.SPENT, *self._spending(own))
            self._take_up(own, found)

    def _own_spending(self) -> dict[str, dict[str, int]]:
        own = {} if self._budget is None else self._budget.own_cny()
        return {period: {self._home: round(cny * UNIT)} for period, cny in own.items()}

    def _spending(self, spent: Mapping[str, Mapping[str, int]]) -> tuple[Sequence[str], Words]:
        words: list[str | int] = [*self._life(), MONTHS_KEPT_S]
        for homes in spent.values():
            words += (2 * len(homes), *(word for pair in homes.items() for word in pair))
        return [_spent_key(period) for period in spent], words

    def _take_up(self, periods: Collection[str], found: Sequence[Sequence[bytes]] | None) -> None:
        if self._budget is None or found is None:
            return
        for period, flat in zip(periods, found, strict=True):
            self._spent[period] = {
                home.decode(): int(cny) for home, cny in zip(flat[::2], flat[1::2], strict=True)
            }
        self._spent = {period: self._spent[period] for period in periods}
        self._budget.hear(
            {
                period: (homes.get(self._home, 0) / UNIT, sum(_without(homes, self._home)) / UNIT)
                for period, homes in self._spent.items()
            }
        )

    # --- the one connection ------------------------------------------------------------------------

    async def run(self) -> None:
        """Talk to Redis until told to `stop`, or cancelled."""
        client: AsyncClient | None = None
        try:
            while True:
                try:
                    client = open_async(self._url, self._timeout_s)
                    async with asyncio.timeout(5 * self._timeout_s):
                        await self._begin(client)
                    await self._converse(client)
                    return
                except FAILURES as error:
                    self._lost(error)
                    self._tried.set()
                await _close(client)
                await asyncio.sleep(self._retry_s)
        finally:
            self._lost(None)
            self._tried.set()
            await _close(client)

    def stop(self) -> None:
        """Tell Redis what is left to tell, that this process is no more, and end."""
        self._stopping = True
        self._tell(scripts.END, ())
        self._wanted.set()

    async def _begin(self, client: AsyncClient) -> None:
        """Begin a new life with what Redis cannot know; from here on questions are put to it."""
        load = client.pipeline(transaction=False)
        for script in scripts.ALL:
            load.script_load(script)
        await load.execute()
        if self._lives:
            await self._run(client, scripts.END)
        self._lives += 1
        memory = (await self._run(client, scripts.MEMORY, (), token_hex(8))).decode()
        told = dict(self._open)
        await self._run(client, scripts.ENTER, (), *(part for pair in told.items() for part in pair))
        untold = len(self._untold)
        recalled = self._recalled(everything=memory != self._memory)
        while some := list(islice(recalled, AT_ONCE)):
            await self._send(client, [self._unanswered(scripts.RECALL, *call) for call in some])
        self._memory = memory
        for _ in range(untold):
            self._untold.popleft()
        await self._tell_spending(client)
        for day, salt, seconds_left in self._proposals():
            found = await self._run(client, scripts.SALT, (_salt_key(day),), salt, seconds_left)
            self._agree(day, found)
        for of, seconds in self._known_of_vendors():
            await self._run(client, scripts.KNOW, (), of, round(seconds * 1e6))
        self._trouble = ""
        # What has come and gone meanwhile, without any wait in between.
        new = [part for ticket, key in self._open.items() if ticket not in told for part in (ticket, key)]
        self._tell(scripts.ENTER, (), *new)
        self._tell(scripts.LEAVE, (), *(told.keys() - self._open.keys()))
        for keys, words in self._recalled(everything=False):
            self._put(scripts.RECALL, keys, words)
        self._untold.clear()
        self._tried.set()
        if self._told:
            log.warning("Redis is back: limits are shared again with all who use it")
        else:
            log.info("limits are shared with all who use this Redis")
        self._told = False

    def _recalled(self, *, everything: bool) -> Iterator[tuple[Sequence[str], Words]]:
        """Keys and words of each RECALL: for all questions that this process has let in, or for those that
        Redis was not told of."""
        now = asyncio.get_running_loop().time()
        visitors: dict[str, list[float]] = {}
        if everything:
            visitors, site = (dict(given.recent(now)) for given in self._given)
        else:
            for key, at in self._untold:
                visitors.setdefault(key, []).append(at)
            site = {"": [at for _, at in self._untold]} if self._untold else {}
        for rates, kept in ((self._access.rate_limit, visitors), (self._access.site_rate_limit, site)):
            most = max(rate.count for rate in rates)
            longest_ms = 1000 * max(rate.window_s for rate in rates)
            for key, moments in kept.items():
                ages = [round((now - at) * 1e6) for at in moments[-MAX_RECALLED:]]
                yield (_rate_keys(key)[not key],), (*self._life(), most, longest_ms, *ages)

    async def _tell_spending(self, client: AsyncClient) -> None:
        own = self._own_spending()
        if own:
            told = {period: {**self._spent.get(period, {}), **homes} for period, homes in own.items()}
            keys, words = self._spending(told)
            self._take_up(told, await _evaluate(client, scripts.SPENT, keys, words))

    def _known_of_vendors(self) -> Iterator[tuple[str, float]]:
        for vendor in self._roster.vendors if self._roster is not None else ():
            if vendor.care.breaker.state != "closed":
                yield f"open:{vendor.name}", PROBE_S
            for key in vendor.care.keys.all:
                if rest_s := vendor.care.keys.rests(key):
                    yield f"rest:{_digest(key)}", rest_s

    async def _converse(self, client: AsyncClient) -> None:
        """Put calls to Redis as they come; returns when there is to be an end."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + self._lease_s / 5
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(renew_at):
                    await self._wanted.wait()
            self._wanted.clear()
            if loop.time() >= renew_at:
                renewed = self._put(scripts.RENEW, (), (*self._life(), self._memory, *SPANS))
                salts = {
                    day: self._put(scripts.SALT, (_salt_key(day),), (*self._life(), salt, seconds_left))
                    for day, salt, seconds_left in self._proposals()
                }
                renew_at = loop.time() + self._lease_s / 5
            else:
                renewed, salts = None, {}
            calls, self._queue = self._queue, deque()
            try:
                await self._send(client, calls)
            finally:
                _answer_nothing(calls)
            if self._stopping and not self._queue:
                return
            if renewed is not None:
                is_known, *news = renewed.result()
                if not is_known:
                    raise Forgotten("it has forgotten this process")
                self._hear_of_vendors(*news)
            for day, agreed in salts.items():
                self._agree(day, agreed.result())

    def _proposals(self) -> list[tuple[str, str, int]]:
        return [] if self._visitors is None else self._visitors.proposals()

    def _agree(self, day: str, salt: bytes | None) -> None:
        if self._visitors is not None and salt is not None:
            self._visitors.agree(day, salt.decode())

    async def _send(self, client: AsyncClient, calls: Collection[_Call]) -> None:
        pipeline = client.pipeline(transaction=False)
        for call in calls:
            pipeline.evalsha(scripts.SHA[call.script], len(call.keys), *call.keys, *map(str, call.args))
        async with asyncio.timeout(self._timeout_s):
            answers = await pipeline.execute()
        for call, answer in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    def _lost(self, error: Exception | None) -> None:
        self._trouble = "stopped" if error is None else type(error).__name__
        calls, self._queue = self._queue, deque()
        _answer_nothing(calls)
        for vendor in self._roster.vendors if self._roster is not None else ():
            vendor.care.breaker.hear_nothing()
        if error is not None and not self._told:
            self._told = True
            log.warning(
                "Redis is away (%s: %.200s): until it is back, each process holds its limits by itself",
                type(error).__name__,
                error,
            )

    def _tell(self, script: str, keys: Sequence[str], *words: str | int) -> None:
        """Something that needs no answer, unless Redis is away; what matters is told when it is back."""
        if not self._trouble:
            self._put(script, keys, (*self._life(), *words))

    def _put(self, script: str, keys: Sequence[str], words: Words) -> "asyncio.Future[Any]":
        """The script's answer to come; None when Redis goes away over it."""
        call = self._unanswered(script, keys, words)
        self._queue.append(call)
        self._wanted.set()
        return call.answer

    def _unanswered(self, script: str, keys: Sequence[str], words: Words) -> _Call:
        return _Call(script, keys, words, asyncio.get_running_loop().create_future())

    async def _run(self, client: AsyncClient, script: str, keys: Words = (), *words: str | int) -> Any:
        return await _evaluate(client, script, keys, (*self._life(), *words))

    def _life(self) -> tuple[str, str, int]:
        return PREFIX, f"{self._name}.{self._lives}", round(self._lease_s * 1000)


class _Peers:
    """All processes, from the side of one vendor's care: see `mogine.providers.care.Peers`."""

    def __init__(self, fleet: Fleet, vendor: str) -> None:
        self._fleet = fleet
        self._vendor = vendor

    def opened(self, seconds: float) -> None:
        self._fleet.learn(f"open:{self._vendor}", seconds)

    def closed(self) -> None:
        self._fleet.unlearn(f"open:{self._vendor}")

    def rests(self, key: str, seconds: float) -> None:
        self._fleet.learn(f"rest:{_digest(key)}", seconds)


@asynccontextmanager
async def joined(fleet: Fleet) -> AsyncIterator[Fleet]:
    """`fleet`, talking to Redis for as long as the context lasts."""
    task = asyncio.create_task(fleet.run())
    try:
        await fleet.tried()
        yield fleet
    finally:
        if not fleet.trouble:
            fleet.stop()
            await asyncio.wait((task,), timeout=2 * TIMEOUT_S)
        while not task.done():  # the package may swallow a cancellation: `wait_for` of Python 3.11 does
            task.cancel()
            await asyncio.wait((task,), timeout=0.1)


async def _evaluate(client: Any, script: str, keys: Words, words: Words) -> Any:
    return await client.evalsha(scripts.SHA[script], len(keys), *map(str, (*keys, *words)))


async def _close(client: AsyncClient | None) -> None:
    if client is not None:
        with suppress(*FAILURES):
            await client.aclose()


def _answer_nothing(calls: Collection[_Call]) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_result(None)


def _digest(key: str) -> str:
    """What tells a vendor's key from others without telling it."""
    return blake2b(key.encode(), digest_size=16, person=b"mogine-key").hexdigest()


def _rate_keys(visitor: str) -> tuple[str, str]:
    return f"{PREFIX}rate:{visitor}", f"{PREFIX}site"


def _spent_key(period: str) -> str:
    return f"{PREFIX}spent:{period}"


def _salt_key(day: str) -> str:
    return f"{PREFIX}salt:{day}"


def _without(homes: Mapping[str, int], home: str) -> Iterator[int]:
    return (amount for other, amount in homes.items() if other != home)


def _numbers(limits: Sequence[RateLimit]) -> list[int]:
    return [number for limit in limits for number in (limit.count, limit.window_s)]
