"""Where links and sessions of the owner lie when several machines are to know them: in Redis or Valkey.

Loaded only when MOGINE_REDIS_URL is set. Each lies in one place alone, here or in the files of one machine,
so that a link works once and a session that was ended is ended everywhere.
"""

import logging
import time
from collections.abc import Callable

from mogine.errors import Unavailable
from mogine.redis_client import FAILURES, PREFIX, open_blocking
from mogine.serve.admin_sessions import Shelf

ADMIN = f"{PREFIX}admin:"
TIMEOUT_S = 1.0
RETRY_S = 2.0

log = logging.getLogger(__name__)


class RedisShelf:
    """A `Shelf` for all machines; `files` takes what is made while Redis is away."""

    def __init__(
        self,
        url: str,
        files: Shelf,
        *,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._client = open_blocking(url, timeout_s)
        self._files = files
        self._clock = clock
        self._again_at = -RETRY_S
        self.is_alone = False

    def put(self, name: str, expires_at: int, lasts_s: float) -> None:
        """See `Shelf.put`."""
        self.is_alone = not self._tried(
            lambda: self._client.set(ADMIN + name, expires_at, ex=round(lasts_s))
        )[0]
        if self.is_alone:
            self._files.put(name, expires_at, lasts_s)

    def find(self, name: str) -> str | None:
        """See `Shelf.find`; what lies in Redis is not found while that is away."""
        found = self._files.find(name)
        return found if found is not None else self._tried(lambda: self._client.get(ADMIN + name))[1]

    def take(self, name: str) -> bool:
        """See `Shelf.take`. Raises Unavailable when nobody can tell."""
        if self._files.take(name):
            return True
        is_known, found = self._tried(lambda: self._client.getdel(ADMIN + name))
        if not is_known:
            raise Unavailable(
                "Redis, which knows whether this is still good, is away; try again", retry_after_s=5
            )
        return found is not None

    def clear(self) -> None:
        """See `Shelf.clear`."""
        self._files.clear()

        def forget() -> None:
            for key in self._client.scan_iter(ADMIN + "*", count=1000):
                self._client.delete(key)

        self._tried(forget)

    def _tried(self, call: Callable[[], object]) -> tuple[bool, str | None]:
        """Whether Redis has answered, and what; it is not asked again at once when it did not."""
        if self._clock() < self._again_at:
            return False, None
        try:
            answer = call()
        except FAILURES as error:
            self._again_at = self._clock() + RETRY_S
            log.warning(
                "Redis is away (%s: %.200s): no link or session is shared", type(error).__name__, error
            )
            return False, None
        return True, answer if isinstance(answer, str) else None
