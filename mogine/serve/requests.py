"""What a handler is given: aiohttp's request, or our own for questions that come the short way."""

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from aiohttp import hdrs, web
from multidict import CIMultiDict

T = TypeVar("T")


class Connection(Protocol):
    """The visitor's end, as a short request sees it."""

    transport: asyncio.Transport | None  # None once the visitor is gone
    peer: str

    async def drain(self) -> None:
        """Wait while the visitor reads slower than we write. Raises ConnectionResetError."""


class ShortRequest:
    """A whole POST of HTTP/1.1, already read. It has of `web.Request` what our handlers use, and means the
    same by it; `cors` are the lines of its response's head that its `Origin` deserves. When `is_late`, the
    body did not come in time."""

    __slots__ = (
        *("_values", "app", "body", "connection", "content_length", "cors", "headers", "keep_alive"),
        *("is_late", "match_info", "path"),
    )
    method: ClassVar[str] = hdrs.METH_POST

    def __init__(
        self,
        app: web.Application,
        connection: Connection,
        path: str,
        match_info: Mapping[str, str],
        headers: CIMultiDict[str],
        *,
        keep_alive: bool,
        content_length: int,
        body: bytes,
        is_late: bool = False,
    ) -> None:
        self.app = app
        self.connection = connection
        self.path = path
        self.match_info = match_info
        self.headers = headers
        self.keep_alive = keep_alive
        self.content_length = content_length
        self.body = body
        self.is_late = is_late
        self.cors = b""
        self._values: dict[Any, Any] = {}

    @property
    def transport(self) -> asyncio.Transport | None:
        """None once the visitor is gone."""
        return self.connection.transport

    @property
    def content_type(self) -> str:
        """The media type, without parameters."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()

    def __getitem__(self, key: web.RequestKey[T]) -> T:
        value: T = self._values[key]
        return value

    def __setitem__(self, key: web.RequestKey[T], value: T) -> None:
        self._values[key] = value


Request = web.Request | ShortRequest


def peer_of(request: web.BaseRequest | ShortRequest) -> str:
    """The address at the other end of the connection; "" when there is none."""
    if isinstance(request, ShortRequest):
        return request.connection.peer
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return str(peer[0]) if isinstance(peer, tuple) else ""
