"""Answers that another worker of this machine gives: read on, or ended, over that worker's own socket.

Whoever is asked for an answer that it does not have asks the others in turn, so nobody has to remember where
an answer runs. The sockets lie in a folder of the parent that only its user may enter, and the parent removes
them. A question is one line of JSON; the reply is one byte, then for `read` blocks of frames, each after its
length, an empty one at the end.
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from mogine.serve.replay import REPLAYS, Replays
from mogine.serve.shared import SHARED

PATIENCE_S = 1.0  # a worker that does not even reply by then is not waited for
HERE, NOT_HERE = b"+", b"-"
LENGTH = struct.Struct("!I")
FAILURES = (OSError, EOFError, TimeoutError)

log = logging.getLogger(__name__)


class Siblings:
    """The other workers, by their sockets, which lie beside this one's."""

    def __init__(self, own: Path) -> None:
        self._own = own

    async def read(
        self, id: str, visitor: str, session: str, after: int
    ) -> AsyncGenerator[bytes, None] | None:
        """`Replays.find` and `Replay.read` of whichever worker has the answer; None when nobody has it.

        The frames end early when that worker dies.
        """
        asked = {"do": "read", "id": id, "visitor": visitor, "session": session, "after": after}
        found = await self._ask(asked)
        return None if found is None else _blocks(*found)

    async def stop(self, id: str, visitor: str, session: str) -> bool:
        """`Replay.stop` by whichever worker has the answer; whether one had it."""
        found = await self._ask({"do": "stop", "id": id, "visitor": visitor, "session": session})
        if found is None:
            return False
        found[1].close()
        return True

    async def _ask(
        self, asked: Mapping[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        line = orjson.dumps(asked) + b"\n"
        for path in sorted(set(self._own.parent.glob("*")) - {self._own}):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    found = await _asked(path, line)
            except FAILURES as error:
                log.info("worker %s does not say what answers it has (%s)", path.name, type(error).__name__)
                continue
            if found is not None:
                return found
        return None


async def _asked(path: Path, line: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    with contextlib.ExitStack() as unless_here:
        reader, writer = await asyncio.open_unix_connection(str(path))
        unless_here.callback(writer.close)
        writer.write(line)
        if await reader.readexactly(len(HERE)) == HERE:
            unless_here.pop_all()
            return reader, writer
        return None


async def _blocks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncGenerator[bytes, None]:
    try:
        while size := LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]:
            yield await reader.readexactly(size)
    except FAILURES as error:
        log.warning("the worker that gave an answer is gone (%s)", type(error).__name__)
    finally:
        writer.close()


async def answer(replays: Replays, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One question of a sibling."""
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        if not (line := await reader.readline()):
            return
        asked = orjson.loads(line)
        replay = replays.find(asked["id"], asked["visitor"], asked["session"])
        writer.write(NOT_HERE if replay is None else HERE)
        if replay is None:
            return
        if asked["do"] == "stop":
            replay.stop()
            return
        sending = asyncio.create_task(_send(replay.read(asked["after"]), writer))
        leaving = asyncio.create_task(reader.read())  # ends when the sibling hangs up: its visitor has left
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.wait((sending, leaving))


async def _send(frames: AsyncGenerator[bytes, None], writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        async with aclosing(frames):
            async for block in frames:
                writer.write(LENGTH.pack(len(block)) + block)
                await writer.drain()
        writer.write(LENGTH.pack(0))
        await writer.drain()


SIBLINGS = web.AppKey("SIBLINGS", Siblings)


async def meeting(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: SIBLINGS, and an open ear for them, where there are several workers."""
    remote = app.get(SHARED)
    own = "" if remote is None else (await remote.ask(do="meet"))["socket"]
    if not own:
        yield
        return
    app[SIBLINGS] = Siblings(Path(own))
    questions: set[asyncio.Task[None]] = set()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(app[REPLAYS], reader, writer))
        questions.add(task)
        task.add_done_callback(questions.discard)

    server = await asyncio.start_unix_server(take, own)
    yield
    server.close()
    for task in tuple(questions):
        task.cancel()
    if questions:
        await asyncio.wait(tuple(questions))
