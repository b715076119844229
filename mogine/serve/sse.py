"""The event stream to a visitor: the only file that knows its headers, frames, pings and slow readers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import orjson
from aiohttp import HttpVersion11, hdrs, web

HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
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
        *("_begun", "_chunked", "_last", "_loop", "_opening", "_pending", "_ping", "_ping_s", "_progress_at"),
        *("_request", "_stall_s", "_timer", "_transport", "_waiting", "_writing", "response"),
    )

    def __init__(self, request: web.Request, *, ping_s: float, stall_s: float) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._opening = asyncio.Lock()
        self._begun = False
        self._writing = False
        self._chunked = (
            request.version >= HttpVersion11
        )  # for an older visitor the body ends with the connection
        self._transport: asyncio.Transport | None = None  # once frames may be pushed
        self._pending: list[bytes] = []
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

    async def write(self, frame: bytes) -> None:
        """One or more whole frames; waits while the visitor reads slower than we write."""
        if not self._begun:
            await self._begin()
        self._writing = True
        try:
            await self.response.write(frame)
        finally:
            self._writing = False
        self._last = self._loop.time()

    def push(self, frames: bytes) -> Awaitable[None] | None:
        """Whole frames, written at once. Nothing more may be pushed while a returned awaitable is not done:
        it sends the head with the first of them, and later waits for a slow reader.

        Raises ConnectionResetError when the visitor has left.
        """
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
        pending, self._pending = b"".join(self._pending), []
        await self.write(pending)
        # From here on frames go past aiohttp's writer, in the framing that it has announced.
        self._transport = self._request.transport
        if self._transport is None:
            raise ConnectionResetError("the visitor has left")

    async def _drain(self) -> None:
        self._writing = True
        try:
            await self._request.writer.drain()
        finally:
            self._writing = False

    async def end(self, last_words: bytes = b"") -> None:
        """Finish the body, after `last_words` if there are any."""
        if not self._begun:
            await self._begin()
        if last_words:
            await self.response.write(last_words)
        await self.response.write_eof()

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

    async def _begin(self) -> None:
        async with self._opening:
            if not self._begun:
                await self.response.prepare(self._request)
                self._begun = True

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
            await self._begin()
            await self.response.write(PING)

    def _drop(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


async def respond(
    request: web.Request,
    frames: AsyncGenerator[bytes, None] | Source,
    *,
    within: AbstractAsyncContextManager[object],
    last_words: Callable[[Exception], bytes],
    ping_s: float,
    stall_s: float,
) -> web.StreamResponse:
    """Send `frames` as they come. An error before the first is raised, a later one becomes `last_words`.

    `frames` is read, or it pushes: a function that is called with `EventStream.push`.

    `within` surrounds the reading of frames and may end it with an error of its own (a time limit).
    When the visitor leaves, the handler is cancelled and so closes `frames` at once.
    """
    stream = EventStream(request, ping_s=ping_s, stall_s=stall_s)
    try:
        try:
            async with within:
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
