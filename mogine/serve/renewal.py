"""New keys without a restart: a change of `.env`, or SIGHUP, is taken up while answers run on."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from mogine.errors import SettingsError
from mogine.providers.registry import Roster
from mogine.serve.logs import redact_also
from mogine.settings import with_fresh_vendors

LOOK_S = 0.3

log = logging.getLogger(__name__)


class Renewal:
    """Looks at the `.env` of a home; a wrong one leaves everything as it was, with a word in the log."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._path = roster.settings.home / ".env"
        self._taken = self._seen = mark(self._path)

    def look(self) -> bool:
        """Take up the file if it has changed, and stayed so since the last look; whether that was so.

        An editor may write a file piece by piece, and half of one is not to be believed.
        """
        before, self._seen = self._seen, mark(self._path)
        if self._seen == self._taken or self._seen != before:
            return False
        self._taken = self._seen
        self.take_up()
        return True

    def take_up(self) -> None:
        """Read the vendors' settings anew."""
        before = self._roster.settings
        try:
            settings = with_fresh_vendors(before)
        except SettingsError as error:
            log.error("the settings stay as they were: %s", error.message)
            return
        if settings == before:
            return
        redact_also(settings)
        self._roster.renew(settings)
        log.info("new vendor settings are in force: providers %s", ", ".join(self._roster))


@asynccontextmanager
async def watching(renewal: Renewal, hooks: list[Callable[[], None]]) -> AsyncIterator[None]:
    """Look again and again while the context lasts; `hooks` are called at SIGHUP."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            renewal.look()

    hooks.append(renewal.take_up)
    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        hooks.remove(renewal.take_up)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def mark(path: Path) -> tuple[int, int, int]:
    """What changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)
