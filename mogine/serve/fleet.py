"""What proxies on several machines must agree on, kept in Redis or Valkey: rates, open answers, spending.

The only home of the package `redis`, and loaded only when MOGINE_REDIS_URL is set. Every process still holds
its own limits first: what one of them has given too often, all together have. So when Redis is away nothing
else needs to happen than that nobody is asked.

One script decides about a question, in one step: all rates and both counts of open answers, exactly. That is
why the package `limits` is not used: it knows no open answers, and takes from one rate before it looks at the
next. All calls go over one connection in the order in which they are made, those that wait together in one
piece.

Open answers belong to a *life* of a process, which ends when it is not renewed for LEASE_S. Of a process that
is killed nothing stays open for longer than that; one that lost Redis begins a new life and tells what it has
open.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, sha1
from secrets import token_hex
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from mogine.serve.limits import Place, overloaded, too_many_streams, too_often
from mogine.serve.shared import Remote
from mogine.settings import AccessSettings, RateLimit

LEASE_S = 15.0
RETRY_S = 1.0
TIMEOUT_S = 1.0
MONTHS_KEPT_S = 40 * 86400
PREFIX = "{mogine}:"  # the braces keep all keys on one node of a cluster
FAILURES = (RedisError, OSError, TimeoutError)

log = logging.getLogger(__name__)

# Times are microseconds by Redis' own clock, the only one that all machines share.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function text(number) return string.format('%.0f', number) end
"""
_LIFE = """
local prefix, life, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local alive, open, visitors = prefix .. 'alive', prefix .. 'open:' .. life, prefix .. 'visitors:' .. life
local function renew()
  redis.call('ZADD', alive, text(now + lease_ms * 1000), life)
  redis.call('PEXPIRE', open, lease_ms)
  redis.call('PEXPIRE', visitors, lease_ms)
end
local function enter(ticket, visitor)
  redis.call('HSET', open, ticket, visitor)
  redis.call('HINCRBY', visitors, visitor, 1)
end
"""
# ARGV from 4: ticket, visitor, streams in all, streams per visitor, how many rates of the visitor, then count
# and seconds of each, and the same of the site's. Returns a verdict and microseconds to wait.
ADMIT = (
    _NOW
    + _LIFE
    + """
local ticket, visitor = ARGV[4], ARGV[5]
-- A clock that was set back would keep the dead alive: nobody's lease ends that late.
redis.call('ZREMRANGEBYSCORE', alive, '-inf', text(now))
redis.call('ZREMRANGEBYSCORE', alive, text(now + 2000 * lease_ms), '+inf')
local all, own = 0, 0
for _, one in ipairs(redis.call('ZRANGE', alive, 0, -1)) do
  all = all + redis.call('HLEN', prefix .. 'open:' .. one)
  own = own + (redis.call('HGET', prefix .. 'visitors:' .. one, visitor) or 0)
end
if all >= tonumber(ARGV[6]) then return {1, 0} end
if own >= tonumber(ARGV[7]) then return {2, 0} end

local first = 9
local middle = first + 2 * tonumber(ARGV[8])
local function wait(key, from, upto)
  local longest, most, left = 0, 0, 0
  local last = redis.call('LINDEX', key, -1)
  if last and tonumber(last) > now then redis.call('DEL', key) end
  for place = from, upto, 2 do
    local count, window = tonumber(ARGV[place]), ARGV[place + 1] * 1000000
    local taken = redis.call('LINDEX', key, -count)
    if taken then left = math.max(left, window - (now - taken)) end
    longest, most = math.max(longest, window), math.max(most, count)
  end
  return left, longest, most
end
local function take(key, longest, most)
  redis.call('RPUSH', key, text(now))
  redis.call('LTRIM', key, -most, -1)
  redis.call('PEXPIRE', key, text(longest / 1000))
end
local left, longest, most = wait(KEYS[1], first, middle - 1)
if left > 0 then return {3, left} end
local site_left, site_longest, site_most = wait(KEYS[2], middle, #ARGV)
if site_left > 0 then return {4, site_left} end
take(KEYS[1], longest, most)
take(KEYS[2], site_longest, site_most)
enter(ticket, visitor)
renew()
return {0, 0}
"""
)
# ARGV from 4: tickets.
LEAVE = (
    _NOW
    + _LIFE
    + """
for place = 4, #ARGV do
  local visitor = redis.call('HGET', open, ARGV[place])
  if visitor then
    redis.call('HDEL', open, ARGV[place])
    if redis.call('HINCRBY', visitors, visitor, -1) <= 0 then redis.call('HDEL', visitors, visitor) end
  end
end
"""
)
# ARGV from 4: tickets and visitors, in pairs. For what began while Redis was away.
ENTER = (
    _NOW
    + _LIFE
    + """
for place = 4, #ARGV, 2 do enter(ARGV[place], ARGV[place + 1]) end
renew()
"""
)
RENEW = (
    _NOW
    + _LIFE
    + """
if not redis.call('ZSCORE', alive, life) then return 0 end
renew()
return 1
"""
)
END = (
    _NOW
    + _LIFE
    + """
redis.call('ZREM', alive, life)
redis.call('DEL', open, visitors)
"""
)
# KEYS: periods. ARGV: home, seconds to keep, then its amount for each. Returns what the others have spent.
SPENT = """
local sums = {}
for place, key in ipairs(KEYS) do
  redis.call('HSET', key, ARGV[1], ARGV[2 + place])
  redis.call('EXPIRE', key, ARGV[2])
  local sum, found = 0, redis.call('HGETALL', key)
  for index = 1, #found, 2 do
    if found[index] ~= ARGV[1] then sum = sum + tonumber(found[index + 1]) end
  end
  sums[place] = string.format('%.6f', sum)
end
return sums
"""
SCRIPTS = (ADMIT, LEAVE, ENTER, RENEW, END, SPENT)
SHA = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in SCRIPTS}


@dataclass(frozen=True, slots=True)
class _Call:
    script: str
    keys: Sequence[str]
    args: Sequence[str | int]
    answer: "asyncio.Future[Any]"


class Fleet:
    """One process among all that use one Redis. `admit` is all that a handler needs."""

    def __init__(
        self,
        url: str,
        access: AccessSettings,
        home: str,
        parent: Remote | None = None,
        *,
        lease_s: float = LEASE_S,
        retry_s: float = RETRY_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._url = url
        self._access = access
        self._home = home
        self._parent = parent
        self._lease_s = lease_s
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._queue: deque[_Call] = deque()
        self._wanted = asyncio.Event()
        self._open: dict[int, str] = {}
        self._ticket = 0
        self._name = token_hex(8)
        self._lives = 0
        self._trouble = "not reached yet"
        self._told = False
        self._tried = asyncio.Event()

    async def tried(self) -> None:
        """Return once Redis is in use, or the first try has failed."""
        await self._tried.wait()

    @property
    def trouble(self) -> str:
        """Why Redis is not in use right now; "" when it is."""
        return self._trouble

    async def admit(self, place: Place, visitor: str) -> None:
        """Whether all processes together have room for one more answer; raises as `Limits.open`."""
        if self._parent is not None:
            await self._parent.admit(place, visitor)
        self._ticket += 1
        ticket, key = self._ticket, blake2b(visitor.encode(), digest_size=16).hexdigest()
        place.after = partial(self._leave, ticket)
        if self._trouble:
            self._open[ticket] = key
            return
        try:
            verdict = await self._call(
                ADMIT,
                (f"{PREFIX}rate:{key}", f"{PREFIX}site"),
                (
                    *self._life(),
                    *(ticket, key, self._access.max_streams, self._access.max_streams_per_visitor),
                    len(self._access.rate_limit),
                    *_numbers(self._access.rate_limit),
                    *_numbers(self._access.site_rate_limit),
                ),
            )
        except asyncio.CancelledError:
            self._leave(ticket)  # it may have been let in, and nobody will come
            raise
        code, wait_us = verdict or (0, 0)
        if code == 0:
            self._open[ticket] = key
            return
        place.after = None
        repeated, wait_s = place.refund(), wait_us / 1e6
        if code == 1:
            raise overloaded()
        if code == 2:
            raise too_many_streams(self._access.max_streams_per_visitor)
        whose, rates = (
            ("you", self._access.rate_limit) if code == 3 else ("all visitors", self._access.site_rate_limit)
        )
        raise too_often(whose, rates, wait_s, repeated=repeated)

    async def exchange(self, spent: Mapping[str, float]) -> Sequence[float] | None:
        """Tell what this home has spent in each period, in CNY; what all others have. None: nobody knows."""
        if self._trouble:
            return None
        sums = await self._call(
            SPENT,
            [f"{PREFIX}spent:{period}" for period in spent],
            (self._home, MONTHS_KEPT_S, *(f"{cny:.6f}" for cny in spent.values())),
        )
        return None if sums is None else [float(one) for one in sums]

    # --- the one connection ------------------------------------------------------------------------

    async def run(self) -> None:
        """Talk to Redis until cancelled."""
        loop = asyncio.get_running_loop()
        client: Redis | None = None
        try:
            while True:
                try:
                    client = self._client()
                    async with asyncio.timeout(2 * self._timeout_s):
                        await self._begin(client)
                    await self._converse(client, loop)
                except FAILURES as error:
                    self._lost(error)
                    self._tried.set()
                await self._close(client)
                await asyncio.sleep(self._retry_s)
        finally:
            if client is not None and not self._trouble:
                with suppress(*FAILURES):
                    async with asyncio.timeout(self._timeout_s):
                        await _run(client, END, *self._life())
            self._lost(None)
            await self._close(client)

    def _client(self) -> Redis:
        return Redis.from_url(
            self._url,
            max_connections=1,
            socket_connect_timeout=self._timeout_s,
            socket_timeout=self._timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    async def _close(self, client: Redis | None) -> None:
        if client is not None:
            with suppress(*FAILURES):
                await client.aclose()

    async def _begin(self, client: Redis) -> None:
        """Begin a new life with what is open now; from here on questions are put to Redis."""
        for script in SCRIPTS:
            await client.script_load(script)
        if self._lives:
            await _run(client, END, *self._life())
        self._lives += 1
        told = dict(self._open)
        pairs = [part for pair in told.items() for part in pair]
        await _run(client, ENTER, *self._life(), *pairs)
        self._trouble = ""
        # What has come and gone meanwhile, without any wait in between.
        if new := [
            part for ticket, key in self._open.items() if ticket not in told for part in (ticket, key)
        ]:
            self._put(ENTER, (), (*self._life(), *new))
        if gone := told.keys() - self._open.keys():
            self._put(LEAVE, (), (*self._life(), *gone))
        self._tried.set()
        log.info("limits are shared with all who use this Redis")
        self._told = False

    async def _converse(self, client: Redis, loop: asyncio.AbstractEventLoop) -> None:
        renew_at = loop.time() + self._lease_s / 3
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(renew_at):
                    await self._wanted.wait()
            self._wanted.clear()
            if loop.time() >= renew_at:
                renewed = self._put(RENEW, (), self._life())
                renew_at = loop.time() + self._lease_s / 3
            else:
                renewed = None
            calls, self._queue = self._queue, deque()
            try:
                await self._send(client, calls)
            finally:
                _answer_nothing(calls)
            if renewed is not None and not renewed.result():
                raise RedisError("it has forgotten this process")

    async def _send(self, client: Redis, calls: Sequence[_Call]) -> None:
        pipeline = client.pipeline(transaction=False)
        for call in calls:
            pipeline.evalsha(SHA[call.script], len(call.keys), *call.keys, *map(str, call.args))
        async with asyncio.timeout(self._timeout_s):
            answers = await pipeline.execute()
        for call, answer in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    def _lost(self, error: Exception | None) -> None:
        self._trouble = "stopped" if error is None else type(error).__name__
        calls, self._queue = self._queue, deque()
        _answer_nothing(calls)
        if error is not None and not self._told:
            self._told = True
            log.warning(
                "Redis is away (%s: %.200s): until it is back, each process holds its limits by itself",
                type(error).__name__,
                error,
            )

    def _leave(self, ticket: int) -> None:
        self._open.pop(ticket, None)
        if not self._trouble:
            self._put(LEAVE, (), (*self._life(), ticket))

    def _put(self, script: str, keys: Sequence[str], args: Sequence[str | int]) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append(_Call(script, keys, args, answer))
        self._wanted.set()
        return answer

    async def _call(self, script: str, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """The script's answer; None when Redis went away over it."""
        return await self._put(script, keys, args)

    def _life(self) -> tuple[str, str, int]:
        return PREFIX, f"{self._name}.{self._lives}", round(self._lease_s * 1000)


@asynccontextmanager
async def joined(fleet: Fleet) -> AsyncIterator[Fleet]:
    """`fleet`, talking to Redis for as long as the context lasts."""
    task = asyncio.create_task(fleet.run())
    try:
        await fleet.tried()
        yield fleet
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _run(client: Any, script: str, *args: str | int) -> None:
    await client.execute_command("EVALSHA", SHA[script], 0, *args)


def _answer_nothing(calls: Sequence[_Call]) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_result(None)


def _numbers(limits: Sequence[RateLimit]) -> list[int]:
    return [number for limit in limits for number in (limit.count, limit.window_s)]
