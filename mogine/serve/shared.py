"""What several processes on one port must agree on, from a worker's side: asked of the parent over a socket.

One JSON object a line. What needs an answer bears a number, and answers come in the order of the questions.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import orjson
from aiohttp import web

from mogine.chat import ChatMessage
from mogine.errors import MogineError, RateLimited, Unavailable
from mogine.serve.keys import ServerState
from mogine.serve.limits import Limits, Place, TooOften
from mogine.serve.metrics import Snapshot
from mogine.settings import AccessSettings, RateLimit

MAX_LINE_BYTES = 4 * 1024 * 1024
REPORT_S = 1.0
WITHOUT_LIMIT = (RateLimit(10**9, 1),)

log = logging.getLogger(__name__)

Message = Mapping[str, Any]


class Admission(Protocol):
    """Who must agree to an answer beside this process."""

    async def admit(self, place: Place, visitor: str, asked: Collection[str] = ()) -> None:
        """Raises as `Limits.open` when there is no room for one more; `asked` are the vendors that may have
        to answer."""


class Remote:
    """The parent, as a worker sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Future[Message]] = deque()
        self._ticket = 0

    @classmethod
    async def open(cls, descriptor: int) -> "Remote":
        """The parent at the other end of an inherited socket."""
        end = socket.socket(fileno=descriptor)
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES))

    async def listen(self, gone: Callable[[], None]) -> None:
        """Hand answers to who waits for them; `gone` is called when the parent is no more."""
        try:
            while line := await self._reader.readline():
                future = self._waiting.popleft()
                if not future.done():
                    future.set_result(orjson.loads(line))
        except (ConnectionError, ValueError) as error:
            log.error("the way to the parent is broken (%s)", type(error).__name__)
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        gone()

    def tell(self, **message: Any) -> None:
        """Something that needs no answer."""
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(message) + b"\n")

    async def ask(self, **message: Any) -> Message:
        """Something that does. Raises Unavailable when the parent is no more."""
        if self._writer.is_closing():
            raise _stopping()
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._writer.write(orjson.dumps({**message, "answer": True}) + b"\n")
        try:
            answer = await future
        except asyncio.CancelledError:
            if self._writer.is_closing() or self._reader.at_eof():
                raise _stopping() from None
            raise
        if (error := answer.get("error")) is not None:
            raise decode_error(error)
        return answer

    async def admit(self, place: Place, visitor: str, asked: Collection[str] = ()) -> None:
        """Whether all workers together have room for one more answer; raises as `Limits.open`."""
        self._ticket += 1
        place.ticket = self._ticket
        await self.ask(do="admit", ticket=place.ticket, visitor=visitor)

    async def open_session(self, id: str, visitor: str) -> tuple[str, tuple[ChatMessage, ...]]:
        """`Sessions.open`."""
        answer = await self.ask(do="open_session", id=id, visitor=visitor)
        turns = tuple(ChatMessage(role, text) for role, text in answer["messages"])
        return str(answer["id"]), turns

    async def allows(self, id: str, visitor: str) -> bool:
        """`VendorSessions.allows`."""
        return bool((await self.ask(do="allows", id=id, visitor=visitor))["allowed"])

    async def metrics(self, own: Snapshot) -> Snapshot:
        """The numbers of all workers, with `own` fresh and the others at most REPORT_S old."""
        return Snapshot.from_json(await self.ask(do="metrics", snapshot=own.to_json()))


class SharedLimits(Limits):
    """Counts what is open here; whether more may be is asked of the parent by `Remote.admit`."""

    def __init__(self, access: AccessSettings, state: ServerState, remote: Remote) -> None:
        unlimited = AccessSettings(
            rate_limit=WITHOUT_LIMIT,
            site_rate_limit=WITHOUT_LIMIT,
            max_streams=access.max_streams,
            max_streams_per_visitor=access.max_streams,
        )
        super().__init__(unlimited, state)
        self._remote = remote

    def refund(self, visitor: str) -> bool:
        self._remote.tell(do="refund", visitor=visitor)
        return super().refund(visitor)

    def leave(self, place: Place) -> None:
        super().leave(place)
        if place.ticket:
            self._remote.tell(do="leave", ticket=place.ticket)


def encode_error(error: MogineError) -> dict[str, Any]:
    """An error of `Limits` for the way to a worker."""
    return {
        "status": error.status,
        "message": error.message,
        "reason": error.reason,
        "retry_after_s": error.retry_after_s,
        "repeated": getattr(error, "repeated", None),
    }


def decode_error(data: Message) -> MogineError:
    """The other end of that way."""
    message, wait = str(data["message"]), data["retry_after_s"]
    if data["repeated"] is not None:
        return TooOften(message, retry_after_s=wait, repeated=bool(data["repeated"]))
    kind = RateLimited if data["status"] == RateLimited.status else Unavailable
    return kind(message, reason=data["reason"], retry_after_s=wait)


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping; ask again in a moment", reason="shutting_down")


SHARED = web.AppKey("SHARED", Remote)
