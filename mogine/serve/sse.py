"""The event stream to a visitor: the only file that knows its headers, frames, pings and slow readers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing
from typing import Any

import orjson
from aiohttp import HttpVersion11, hdrs, web

from mogine.serve.heads import filled, template
from mogine.serve.requests import Request, ShortRequest

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
SHORT_HEAD = template({**HEADERS, hdrs.TRANSFER_ENCODING: "chunked"})
Push = Callable[[bytes], Awaitable[None] | None]
Source = Callable[[Push], Awaitable[None]]

PING = b": ping\n\n"
LAST_WORDS_S = 2.0
HIGH_WATER_BYTES = 64 * 1024


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One named event with JSON data. Never with an `id:` line: beside pings it breaks the OpenAI SDK."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(data))


class EventStream:
    """One stream to one visitor: begins with its first frame, pings when quiet, drops who stops reading.

    A write waits while more than 64 KiB are on their way to the visitor (aiohttp's own mark), which holds
    the vendor back through the reader's chain; so one stream never holds more than that and one frame.
    """

    __slots__ = (
        *("_begun", "_last", "_loop", "_ping", "_ping_s", "_progress_at", "_request", "_stall_s", "_timer"),
        *("_waiting", "_writing"),
    )

    def __init__(self, request: Request, *, ping_s: float, stall_s: float) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._begun = False
        self._writing = False
        self._ping: asyncio.Task[None] | None = None
        self._ping_s = ping_s
        self._stall_s = stall_s
        self._last = self._progress_at = self._loop.time()
        self._waiting = 0
        self._timer = self._loop.call_later(self._pause(self._last), self._tick)

    @property
    def begun(self) -> bool:
        """Whether the head is out, so that an error can only be told inside the stream."""
        return self._begun

    @property
    def response(self) -> web.StreamResponse:
        """What the handler returns."""
        raise NotImplementedError

    def push(self, frames: bytes) -> Awaitable[None] | None:
        """Whole frames, written at once. Nothing more may be pushed while a returned awaitable is not done:
        it sends the head with the first of them, or waits for a slow reader.

        Raises ConnectionResetError when the visitor has left.
        """
        raise NotImplementedError

    async def write(self, frames: bytes) -> None:
        """One or more whole frames; waits while the visitor reads slower than we write."""
        if (wait := self.push(frames)) is not None:
            await wait

    async def end(self, last_words: bytes = b"") -> None:
        """Finish the body, after `last_words` if there are any."""
        raise NotImplementedError

    async def break_off(self, last_words: bytes) -> None:
        """Finish after an error; a visitor who does not even take the last words is disconnected."""
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self.end(last_words)
        except TimeoutError:
            self._drop()

    def release(self) -> None:
        """Stop the clock; to be called on every way out."""
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    async def _drain(self) -> None:
        self._writing = True
        try:
            if isinstance(self._request, ShortRequest):
                await self._request.connection.drain()
            else:
                await self._request.writer.drain()
        finally:
            self._writing = False

    def _pause(self, now: float) -> float:
        return max(0.005, min(self._last + self._ping_s - now, self._stall_s / 4))

    def _tick(self) -> None:
        transport = self._request.transport
        if transport is None:
            return  # the visitor is gone, and the handler is being cancelled
        now = self._loop.time()
        waiting = transport.get_write_buffer_size()
        if not waiting or waiting != self._waiting:
            self._waiting, self._progress_at = waiting, now
        elif now - self._progress_at >= self._stall_s:
            self._drop()
            return
        if now - self._last >= self._ping_s and not self._writing:
            self._last = now
            self._ping = self._loop.create_task(self._send_ping())
        self._timer = self._loop.call_later(self._pause(now), self._tick)

    async def _send_ping(self) -> None:
        # Who leaves right now is noticed by the server, which cancels the handler.
        with contextlib.suppress(ConnectionError):
            await self.write(PING)

    def _drop(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


class ShortStream(EventStream):
    """To a visitor whose question came the short way: head and frames go straight to the transport."""

    __slots__ = ("_short",)

    def __init__(self, request: ShortRequest, *, ping_s: float, stall_s: float) -> None:
        super().__init__(request, ping_s=ping_s, stall_s=stall_s)
        self._short = request

    @property
    def response(self) -> web.StreamResponse:
        return SENT

    def push(self, frames: bytes) -> Awaitable[None] | None:
        transport = self._short.connection.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the visitor has left")
        if self._begun:
            transport.write(b"%x\r\n%b\r\n" % (len(frames), frames))
        else:
            self._begun = True
            transport.write(b"%b%x\r\n%b\r\n" % (filled(SHORT_HEAD, self._short), len(frames), frames))
        self._last = self._loop.time()
        return self._drain() if transport.get_write_buffer_size() > HIGH_WATER_BYTES else None

    async def end(self, last_words: bytes = b"") -> None:
        transport = self._short.connection.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the visitor has left")
        head = b"" if self._begun else filled(SHORT_HEAD, self._short)
        self._begun = True
        words = b"%x\r\n%b\r\n" % (len(last_words), last_words) if last_words else b""
        transport.write(b"%b%b0\r\n\r\n" % (head, words))
        if transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            await self._drain()


class LongStream(EventStream):
    """To a visitor whose request aiohttp has read: the head, and the first frames, go through its writer."""

    __slots__ = ("_chunked", "_long", "_opening", "_pending", "_response", "_transport")

    def __init__(self, request: web.Request, *, ping_s: float, stall_s: float) -> None:
        super().__init__(request, ping_s=ping_s, stall_s=stall_s)
        self._long = request
        self._response = web.StreamResponse(headers=HEADERS)
        self._opening = asyncio.Lock()
        self._chunked = (
            request.version >= HttpVersion11
        )  # for an older visitor the body ends with the connection
        self._transport: asyncio.Transport | None = None  # once frames may be pushed
        self._pending: list[bytes] = []

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    def push(self, frames: bytes) -> Awaitable[None] | None:
        transport = self._transport
        if transport is None:
            self._pending.append(frames)
            return self._open()
        if transport.is_closing():
            raise ConnectionResetError("the visitor has left")
        transport.write(b"%x\r\n%b\r\n" % (len(frames), frames) if self._chunked else frames)
        self._last = self._loop.time()
        return self._drain() if transport.get_write_buffer_size() > HIGH_WATER_BYTES else None

    async def _open(self) -> None:
        await self._begin()
        pending, self._pending = b"".join(self._pending), []
        if pending:
            await self._response.write(pending)
        self._last = self._loop.time()
        # From here on frames go past aiohttp's writer, in the framing that it has announced.
        self._transport = self._long.transport
        if self._transport is None:
            raise ConnectionResetError("the visitor has left")

    async def end(self, last_words: bytes = b"") -> None:
        await self._begin()
        if last_words:
            await self._response.write(last_words)
        await self._response.write_eof()

    async def _begin(self) -> None:
        async with self._opening:
            if not self._begun:
                await self._response.prepare(self._long)
                self._begun = True


class Sent(web.StreamResponse):
    """Stands for a response that has been written already; aiohttp never sees it."""

    status = 200

    def __init__(self) -> None:
        """Nothing of aiohttp's is set up."""


SENT = Sent()


async def respond(
    request: Request,
    frames: AsyncGenerator[bytes, None] | Source,
    *,
    within: AbstractContextManager[object],
    last_words: Callable[[Exception], bytes],
    ping_s: float,
    stall_s: float,
) -> web.StreamResponse:
    """Send `frames` as they come. An error before the first is raised, a later one becomes `last_words`.

    `frames` is read, or it pushes: a function that is called with `EventStream.push`.

    `within` surrounds the reading of frames and may end it with an error of its own (a time limit).
    When the visitor leaves, the handler is cancelled and so closes `frames` at once.
    """
    kind = ShortStream if isinstance(request, ShortRequest) else LongStream
    stream: EventStream = kind(request, ping_s=ping_s, stall_s=stall_s)  # type: ignore[arg-type]
    try:
        try:
            with within:
                if isinstance(frames, AsyncGenerator):
                    async with aclosing(frames):
                        async for frame in frames:
                            await stream.write(frame)
                else:
                    await frames(stream.push)
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.begun:
                raise
            await stream.break_off(last_words(error))
        else:
            await stream.end()
    finally:
        stream.release()
    return stream.response
