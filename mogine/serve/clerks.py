"""Changes that come over HTTP, one at a time, each done by a child process while searches go on."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from mogine.errors import Locked, StoreError
from mogine.ingest import clerk
from mogine.ingest.clerk import Outcome
from mogine.settings import Settings

log = logging.getLogger(__name__)

RETRY_S = 5.0


class Clerks:
    """Starts the child for a change and waits for it; giving up ends the child, and nothing is changed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_busy = False

    async def take_in(self, documents: Sequence[tuple[str, str, Path]]) -> Outcome:
        """(source, name, file) of each document. Raises Locked, StoreError, and what a document deserves."""
        return await self._work(clerk.job(self._settings, add=documents))

    async def take_out(self, source: str) -> Outcome:
        """Raises Locked, NotFound, StoreError."""
        return await self._work(clerk.job(self._settings, remove=[source]))

    async def _work(self, job: bytes) -> Outcome:
        if self._is_busy:
            raise Locked("another change of the documents is running; try again", retry_after_s=RETRY_S)
        self._is_busy = True
        try:
            return clerk.outcome(await self._ask(job))
        except Locked as error:
            error.retry_after_s = RETRY_S
            raise
        except StoreError as error:
            # It names a path, which is for the owner.
            log.error("knowledge base: %s", error.message)
            raise StoreError(
                "the knowledge base could not be changed and is as it was; the server's log says why"
            ) from error
        finally:
            self._is_busy = False

    async def _ask(self, job: bytes) -> bytes:
        child = await asyncio.create_subprocess_exec(
            *clerk.program(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then ends the child
        )
        try:
            reply, _ = await child.communicate(job)
            return reply
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await asyncio.shield(child.wait())
