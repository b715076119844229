"""The short way in: whole POSTs to a few declared addresses are read and answered here, all else by aiohttp.

aiohttp spends more on a request than all our checks together. A connection begins in the lane; its first
request that is anything but a plain POST with a `Content-Length` (another method or address, chunked, an
upgrade, odd HTTP) hands the whole connection over to aiohttp, bytes included, and aiohttp keeps it. So the
lane may be strict, and what it does not understand is refused in one place.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import httptools
from aiohttp import hdrs, web
from multidict import CIMultiDict

from mogine.serve.app import BODY_IDLE_S, FRAME, SHORT_ROUTES, Route, ShortJson
from mogine.serve.heads import filled, of_response, template
from mogine.serve.keys import STATE
from mogine.serve.requests import ShortRequest
from mogine.serve.sse import Sent

MAX_HEAD_BYTES = 8_000  # well below aiohttp's own limits, which then apply
MAX_EARLY_BYTES = 64 * 1024
LINGER_S = 10.0
FLUSH_S = 0.2
JSON_HEAD = template({hdrs.CONTENT_TYPE: "application/json", hdrs.CACHE_CONTROL: "no-store"})
# Whoever sends these is not understood here.
UNUSUAL = frozenset((b"transfer-encoding", b"upgrade", b"expect", b"content-encoding", b"te", b"trailer"))

log = logging.getLogger("mogine.http")


class Lanes:
    """All connections of one server that came the short way; called for each new one."""

    def __init__(
        self,
        app: web.Application,
        aiohttp_protocol: Callable[[], asyncio.Protocol],
        *,
        max_body_bytes: int,
        keep_alive_s: float,
    ) -> None:
        self.app = app
        self.aiohttp_protocol = aiohttp_protocol
        self.routes: Mapping[bytes, tuple[str, Route, Mapping[str, str]]] = {
            path.encode("ascii"): (path, route, found) for path, (route, found) in app[SHORT_ROUTES].items()
        }
        self.frame = app[FRAME]
        self.state = app[STATE]
        self.max_body_bytes = max_body_bytes
        self.keep_alive_s = keep_alive_s
        self.loop = asyncio.get_running_loop()
        self.open: set[Lane] = set()

    def __call__(self) -> asyncio.Protocol:
        return Lane(self)

    async def shutdown(self, seconds: float) -> None:
        """Ends all connections: idle ones at once, answers that still run when they do not end in time."""
        tasks = [task for lane in tuple(self.open) if (task := lane.wind_down()) is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for lane in tuple(self.open):
            lane.wind_down()
        end = self.loop.time() + FLUSH_S  # for what was written and has not left yet
        # Connections end by themselves, one by one; a look now and then is simpler than news from each.
        while self.open and self.loop.time() < end and not any(lane.is_busy for lane in self.open):  # noqa: ASYNC110
            await asyncio.sleep(FLUSH_S / 20)
        for lane in tuple(self.open):
            lane.abort()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)


class Lane(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        *("_body", "_complete", "_drained", "_due", "_early", "_extra", "_headers", "_in_head"),
        *("_keep_alive", "_lanes", "_length", "_lingering", "_parser", "_paused", "_raw", "_rings_at"),
        *("_target", "_task", "_timer", "_unusual", "_url", "peer", "transport"),
    )

    def __init__(self, lanes: Lanes) -> None:
        self.transport: asyncio.Transport | None = None
        self.peer = ""
        self._lanes = lanes
        self._parser: Any = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self._early = b""  # came while an answer was given
        self._lingering = False  # the answer is out, and what still comes is thrown away
        self._expect_request()

    def _expect_request(self) -> None:
        self._raw: list[bytes] = []  # as it came, for aiohttp, should the head turn out to be for it
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._length = -1
        self._unusual = False
        self._keep_alive = True
        self._in_head = True
        self._complete = False
        self._extra = False
        self._target: tuple[str, Route, Mapping[str, str]] | None = None
        self._due = self._lanes.loop.time() + self._lanes.keep_alive_s

    # --- what asyncio tells -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lanes.open.add(self)
        self._ring_at(self._due)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._lanes.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._parser = None  # it holds this object
        if self._task is not None:
            self._task.cancel()  # a visitor who leaves must not go on costing money
        self._wake(ConnectionResetError("the visitor has left"))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake(None)

    def data_received(self, data: bytes) -> None:
        if self._task is not None:
            self._keep(data)
        elif not self._lingering:
            self._read(data)

    def _keep(self, data: bytes) -> None:
        self._early += data
        if len(self._early) > MAX_EARLY_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def _read(self, data: bytes) -> None:
        if self._in_head:
            self._raw.append(data)
            begin = self._raw[0] if len(self._raw[0]) >= 5 else b"".join(self._raw)
            if not b"POST ".startswith(begin[:5]):
                self._hand_over()
                return
        else:
            missing = self._length - sum(map(len, self._body))
            data, self._early = data[:missing], data[missing:]
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._unusual = True
            self._extra = True
        if self._in_head:
            if self._unusual or sum(map(len, self._raw)) > MAX_HEAD_BYTES:
                self._hand_over()
        elif self._complete or self._length > self._lanes.max_body_bytes:
            if self._extra:
                self._set_apart()
            self._answer()
        else:
            self._due = self._lanes.loop.time() + BODY_IDLE_S
            if self._due < self._rings_at:
                self._ring_at(self._due)

    def _set_apart(self) -> None:
        """More than one request came in one piece: the parser has begun the next, which has to wait."""
        raw = b"".join(self._raw)
        end = raw.find(b"\r\n\r\n") + 4 + self._length
        self._early = raw[end:] + self._early
        self._parser = httptools.HttpRequestParser(self)

    # --- what the parser tells --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins: the first, or one more that came with it."""
        self._extra = self._complete

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        if not self._complete:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Trailers do not come: a chunked body is not for us."""
        if self._complete:
            return
        name = name.lower()
        self._headers.append((name, value))
        if name == b"content-length":
            self._length = int(value) if value.isdigit() and len(value) < 16 else -1
        elif name == b"connection":
            wish = value.strip().lower()
            self._keep_alive = wish != b"close"
            self._unusual |= wish not in (b"close", b"keep-alive")
        elif name in UNUSUAL:
            self._unusual = True

    def on_headers_complete(self) -> None:
        """The head is whole: is it one for the lane?"""
        if self._complete:
            return
        parser = self._parser
        if (
            self._unusual
            or self._length < 0
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or (target := self._lanes.routes.get(self._url)) is None
        ):
            self._unusual = True
            return
        self._target = target
        self._in_head = False

    def on_body(self, piece: bytes) -> None:
        """A part of the body."""
        if not self._complete and self._length <= self._lanes.max_body_bytes:
            self._body.append(piece)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._complete = True

    # --- the two ways on --------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """From here on the connection is aiohttp's."""
        transport, raw = self.transport, b"".join(self._raw)
        if transport is None:
            return
        self._lanes.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._parser = None
        successor = self._lanes.aiohttp_protocol()
        transport.set_protocol(successor)
        successor.connection_made(transport)
        successor.data_received(raw)

    def _answer(self, *, is_late: bool = False) -> None:
        if self._target is None:
            return
        path, route, found = self._target
        body = self._body
        request = ShortRequest(
            self._lanes.app,
            self,
            path,
            found,
            CIMultiDict(
                [
                    (name.decode("latin-1"), value.strip(b" \t").decode("utf-8", "surrogateescape"))
                    for name, value in self._headers
                ]
            ),
            keep_alive=self._keep_alive and self._complete and not self._lanes.state.draining,
            content_length=self._length,
            body=body[0] if len(body) == 1 else b"".join(body),
            is_late=is_late,
        )
        request.cors = self._lanes.frame.cors_lines(request)
        self._task = self._lanes.loop.create_task(self._run(request, route))

    async def _run(self, request: ShortRequest, route: Route) -> None:
        try:
            response = await self._lanes.frame.answer(request, route.handler, route.access, route.path)
            self._send(response, request)
        except asyncio.CancelledError:
            self._drop()  # else it is the server that ends
            return  # nobody waits for this task
        except ConnectionError:
            self._drop()
        except Exception:
            log.exception("an answer could not be sent")
            self._drop()
        self._done(request)

    def _send(self, response: web.StreamResponse, request: ShortRequest) -> None:
        transport = self.transport
        if isinstance(response, Sent) or transport is None:
            return
        if isinstance(response, ShortJson):
            body = response.short_body
            head = filled(JSON_HEAD, request, b"Content-Length: %d\r\n" % len(body))
        elif isinstance(response, web.Response) and isinstance(response.body, bytes | bytearray | None):
            body = bytes(response.body or b"")
            head = of_response(response, len(body), request)
        else:
            raise TypeError(f"a short request cannot be answered with {type(response).__name__}")
        transport.write(head + body)

    def _done(self, request: ShortRequest) -> None:
        """The answer is out: wait for the next request, or end."""
        self._task = None
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if not self._complete:
            # Closing now would take the answer away from who is still sending.
            self._lingering = True
            self._ring_at(self._lanes.loop.time() + LINGER_S)
            if not transport.is_reading():
                transport.resume_reading()
            transport.write_eof()
            return
        if not request.keep_alive:
            transport.close()
            return
        self._expect_request()
        if self._early:
            early, self._early = self._early, b""
            if not transport.is_reading():
                transport.resume_reading()
            self.data_received(early)

    # --- time and backpressure --------------------------------------------------------------------

    def _ring_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = at
        self._timer = self._lanes.loop.call_at(at, self._ring)

    def _ring(self) -> None:
        transport = self.transport
        if transport is None:
            return
        now = self._lanes.loop.time()
        if self._task is not None:
            self._ring_at(now + self._lanes.keep_alive_s)  # an answer has its own clocks
        elif self._lingering:
            transport.abort()
        elif now < self._due:
            self._ring_at(self._due)
        elif not self._in_head:
            self._ring_at(now + self._lanes.keep_alive_s)
            self._answer(is_late=True)
        elif transport.get_write_buffer_size():
            transport.abort()  # it does not even take its answer
        else:
            transport.close()

    async def drain(self) -> None:
        """Wait while the visitor reads slower than we write. Raises ConnectionResetError."""
        if self.transport is None:
            raise ConnectionResetError("the visitor has left")
        while self._paused:
            if self._drained is None:
                self._drained = self._lanes.loop.create_future()
            await asyncio.shield(self._drained)

    def _wake(self, error: Exception | None) -> None:
        waiter, self._drained = self._drained, None
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)

    # --- the end ----------------------------------------------------------------------------------

    def wind_down(self) -> "asyncio.Task[None] | None":
        """Closes an idle connection; else the task whose answer is awaited first."""
        if self._task is None and self.transport is not None:
            self.transport.close()
        return self._task

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being given."""
        return self._task is not None

    def abort(self) -> None:
        """Ends the connection, and with it its answer."""
        self._drop()
        if self._task is not None:
            self._task.cancel()

    def _drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()
