"""What several machines share: whether it is there, and fit to be relied on."""

import importlib
from collections.abc import Iterator

from mogine.doctor.line import Line, error, ok, warning
from mogine.settings import Settings

VARIABLE = "MOGINE_REDIS_URL"


def redis(settings: Settings) -> Iterator[Line]:
    """The Redis or Valkey of the settings answers, is new enough, and forgets nothing."""
    url = settings.access.redis_url
    if not url:
        return
    try:
        client = importlib.import_module("mogine.redis_client")
    except ImportError:
        yield error(
            "redis", f"{VARIABLE} is set and the package redis is missing", "pip install 'mogine[redis]'"
        )
        return
    try:
        found = client.examine(url)
    except client.FAILURES as problem:
        yield error(
            "redis",
            f"cannot be used ({type(problem).__name__}: {problem}): each process holds its limits by itself",
            f"start it, or correct {VARIABLE}; servers take it up again by themselves within a few seconds",
        )
        return
    words = f"{found.name} {found.version}"
    if found.is_old:
        yield error("redis", f"{words} is too old", "Redis 6.2 or newer, or Valkey")
    if found.is_replica:
        yield error("redis", f"{words} is a replica, in which nothing can be counted", "name the primary")
    if found.may_forget:
        yield warning(
            "redis",
            f"{words} drops keys when its memory is full (maxmemory-policy {found.policy}), also limits",
            "maxmemory-policy noeviction in redis.conf, or a Redis for mogine alone",
        )
    if not (found.is_old or found.is_replica or found.may_forget):
        limit = found.max_memory_bytes
        room = f", {limit / 1024**2:.0f} MiB at most" if limit else ""
        yield ok("redis", f"{words} answers{room}")
