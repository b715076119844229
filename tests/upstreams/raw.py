"""Upstreams that do not even speak HTTP properly: exact bytes on a socket, closed ports, deaf listeners.

async with RawFake(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhe") as fake: ...
with closed_port() as port: ...            # nothing listens there: connection refused
with deaf_port() as port: ...              # connects hang: the backlog is full and nobody accepts
"""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

PARTS_READ = 65536


@dataclass(slots=True)
class RawConnection:
    """One connection: what came in, when it opened and when the caller closed it (monotonic)."""

    opened_at: float
    received: bytes = b""
    disconnected_at: float | None = None


class RawFake:
    """Waits for the blank line after a request's head, then writes each of `parts` as it is.

    Between parts `every_s` passes. At the end the connection is closed, or kept open with `hold=True` until
    the caller leaves.
    """

    def __init__(self, *parts: bytes, every_s: float = 0.0, hold: bool = False) -> None:
        self._parts, self._every_s, self._hold = parts, every_s, hold
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections: list[RawConnection] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = RawConnection(time.monotonic())
        self.connections.append(connection)
        try:
            while b"\r\n\r\n" not in connection.received:
                data = await reader.read(PARTS_READ)
                if not data:
                    connection.disconnected_at = time.monotonic()
                    return
                connection.received += data
            for part in self._parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(self._every_s)
            while self._hold and (data := await reader.read(PARTS_READ)):
                connection.received += data
            if self._hold:
                connection.disconnected_at = time.monotonic()
        except ConnectionError:
            connection.disconnected_at = time.monotonic()
        finally:
            writer.close()


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that is reserved and refuses every connection."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port whose queue is full: a connect gets no reply at all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        callers = [socket.socket() for _ in range(4)]
        try:
            for caller in callers:
                caller.setblocking(False)
                caller.connect_ex(("127.0.0.1", port))
            yield port
        finally:
            for caller in callers:
                caller.close()
