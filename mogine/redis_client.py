"""The way to Redis or Valkey, and whether that one is fit for us; the only home of the package `redis`.

Loaded only when MOGINE_REDIS_URL is set. What an error says is safe to show: the package names the host,
never the password of an address.
"""

from dataclasses import dataclass

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

PREFIX = "{mogine}:"  # the braces keep all keys on one node of a cluster
FAILURES = (RedisError, OSError, TimeoutError)
OLDEST = (6, 2)  # what older ones lack: GETDEL

AsyncClient = AsyncRedis


class Forgotten(RedisError):
    """Redis does not know any more what it was told."""


def open_async(url: str, timeout_s: float) -> AsyncClient:
    """A client with one connection and no second tries, that connects within `timeout_s`.

    Who calls sets the limits of all else: the package's own cost more than the call, a task for each.
    """
    return AsyncRedis.from_url(
        url,
        max_connections=1,
        socket_connect_timeout=timeout_s,
        socket_timeout=None,
        retry=AsyncRetry(NoBackoff(), 0),
    )


def open_blocking(url: str, timeout_s: float) -> Redis:
    """The same for threads and for the command line; text comes as `str`."""
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=timeout_s,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


@dataclass(frozen=True, slots=True)
class Condition:
    """What a Redis says of itself; what it keeps to itself is None."""

    name: str  # "Redis" or "Valkey"
    version: str
    max_memory_bytes: int | None
    policy: str | None  # which keys go when memory is full
    is_replica: bool

    @property
    def is_old(self) -> bool:
        """Older than what our scripts and commands need."""
        numbers = [int(part) for part in self.version.split(".")[:2] if part.isdecimal()]
        return len(numbers) == 2 and tuple(numbers) < OLDEST

    @property
    def may_forget(self) -> bool:
        """Whether counters may be dropped for other keys when memory is full."""
        return self.policy is not None and self.policy != "noeviction"


def examine(url: str, timeout_s: float = 2.0) -> Condition:
    """The Redis at `url`. Blocks; raises one of FAILURES when it is not to be had."""
    with open_blocking(url, timeout_s) as client:
        info = client.info()
        memory = _configured(client, "maxmemory")
        return Condition(
            "Valkey" if "valkey_version" in info else "Redis",
            str(info.get("valkey_version") or info.get("redis_version", "")),
            None if memory is None else int(memory),
            info.get("maxmemory_policy") or _configured(client, "maxmemory-policy"),
            info.get("role") in ("slave", "replica"),
        )


def _configured(client: Redis, name: str) -> str | None:
    """A hosted Redis may not tell."""
    try:
        return client.config_get(name).get(name)  # type: ignore[union-attr, no-any-return]
    except ResponseError:
        return None
