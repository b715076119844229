"""What `mogine doctor --public` asks from outside: a stream that ticks, and how a request arrives here."""

import asyncio
import contextlib

import orjson
from aiohttp import hdrs, web

from mogine.errors import RateLimited, RequestError, Unavailable
from mogine.serve.access import Access
from mogine.serve.app import Route, json_response
from mogine.serve.desk import DESK
from mogine.serve.limits import Window
from mogine.serve.sse import HEADERS
from mogine.settings import RateLimit

TICKS = 15
EVERY_S = 0.1
MAX_PAUSE_S = 60
MOST_AT_ONCE = 8
RATE = RateLimit(30, 60)


class Probes:
    """Keeps the stream from being a toy for strangers: few at once, few per visitor."""

    def __init__(self) -> None:
        self._window = Window(RATE)
        self._open = 0

    def __enter__(self) -> None:
        if self._open >= MOST_AT_ONCE:
            raise Unavailable("too many probes at once; try again in a moment", retry_after_s=5)
        self._open += 1

    def __exit__(self, *exc: object) -> None:
        self._open -= 1

    def take(self, visitor: str, now: float) -> None:
        """Count one of `visitor`. Raises RateLimited."""
        if wait := self._window.wait_s(visitor, now):
            raise RateLimited(f"too many probes from you: {RATE} are allowed", retry_after_s=wait)
        self._window.take(visitor, now)


PROBES = web.AppKey("PROBES", Probes)


async def ticks(request: web.Request) -> web.StreamResponse:
    """A stream with the headers of an answer: TICKS events, EVERY_S apart, each with when it was sent.

    With `?pause=SECONDS` two events with that silence between them: does whoever is in between hold out?
    """
    pause_s = _pause(request)
    loop = asyncio.get_running_loop()
    began = loop.time()
    probes = request.app[PROBES]
    probes.take(request.app[DESK].bucket(request), began)
    with probes:
        response = web.StreamResponse(headers=HEADERS)
        with contextlib.suppress(ConnectionResetError):  # who asked has left
            await response.prepare(request)
            for tick in range(2 if pause_s else TICKS):
                await asyncio.sleep(max(0.0, began + tick * (pause_s or EVERY_S) - loop.time()))
                sent_ms = round((loop.time() - began) * 1000)
                await response.write(
                    b"event: tick\ndata: %b\n\n" % orjson.dumps({"tick": tick, "sent_ms": sent_ms})
                )
            await response.write_eof()
        return response


def _pause(request: web.Request) -> int:
    text = request.query.get("pause", "0")
    if not text.isascii() or not text.isdigit() or int(text[:4]) > MAX_PAUSE_S:
        raise RequestError(f"pause must be a whole number from 0 to {MAX_PAUSE_S}", param="pause")
    return int(text)


async def arrival(request: web.Request) -> web.Response:
    """As whom the caller is counted, and by what scheme and name the request came; nothing of others."""
    return json_response(
        {
            "visitor": request.app[DESK].bucket(request),
            "scheme": request.headers.get("X-Forwarded-Proto", "")[:10],
            "host": request.headers.get(hdrs.HOST, "")[:260],
            "base_path": request.app[DESK].settings.proxy.base_path,
            "max_body_bytes": request.app[DESK].settings.proxy.max_body_bytes,
        }
    )


def add_probes(app: web.Application) -> None:
    """What the routes need."""
    app[PROBES] = Probes()


PROBE_ROUTES = (
    Route(hdrs.METH_GET, "/api/probe/ticks", ticks, Access.PUBLIC),
    Route(hdrs.METH_GET, "/api/probe/arrival", arrival, Access.PUBLIC),
)
