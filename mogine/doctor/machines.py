"""What several machines share: whether it is there, and fit to be relied on."""

import importlib
from collections.abc import Iterator
from contextlib import closing

from mogine.doctor.line import Line, error, ok, warning
from mogine.errors import MogineError, Unavailable
from mogine.kb.chroma import Chroma, ChromaServer, Collection
from mogine.kb.generations import Generations
from mogine.settings import Settings

VARIABLE = "MOGINE_REDIS_URL"
PATIENCE_S = 5.0


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


def chroma(s: Settings) -> Iterator[Line]:
    """The Chroma server answers, and has the vectors of the generation that serves."""
    server = Chroma.of(s.kb)
    if server is None:
        return
    try:
        with closing(ChromaServer(server, PATIENCE_S)) as asked:
            words = f"{s.kb.chroma_url} answers (version {asked.version()})"
    except Unavailable as problem:
        start = (
            "start it (`chroma run --path FOLDER`) or correct MOGINE_CHROMA_URL; words are searched meanwhile"
        )
        yield error("chroma", f"{s.kb.chroma_url}: {problem.message}", start)
        return
    try:
        generation = Generations.of(s).current()
    except MogineError:
        generation = None  # told by the line about the knowledge base
    if generation is None or not generation.manifest.collection:
        fix = "" if generation is None else "; the next `mogine kb ingest` moves the vectors there"
        yield ok("chroma", words + fix)
        return
    wanted = generation.manifest.passages
    fill = "`mogine kb ingest ./docs` fills it again from the cache, on the machine that writes"
    try:
        with closing(Collection(server, generation.manifest.collection, timeout_s=PATIENCE_S)) as collection:
            count = collection.count()
    except Unavailable as problem:
        yield error("chroma", f"{words}: {problem.message}", fill)
        return
    if count != wanted:
        yield error("chroma", f"{words}, and has {count} of {wanted} vectors of {generation.name}", fill)
    else:
        yield ok("chroma", f"{words}: {count} of {wanted} vectors of {generation.name}")
