"""What all servers are made of: routes with declared access, common routes, JSON bodies."""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from mogine.errors import RequestError, RequestTimeout, SettingsError, TooLarge, UnsupportedMedia
from mogine.serve.access import Access, Gate
from mogine.serve.admin_sessions import AdminToken, Doorkeeper, open_sessions
from mogine.serve.keys import METERS, SETTINGS, SITE, STATE, Readiness, ServerState
from mogine.serve.logs import RequestLog
from mogine.serve.metrics import CONTENT_TYPE, Meters, Snapshot, render
from mogine.serve.middlewares import TRACING, Frame
from mogine.serve.requests import Request, ShortRequest
from mogine.settings import Settings, load_site

log = logging.getLogger(__name__)

SMALL_BODY_BYTES = 64 * 1024
MAX_JSON_DEPTH = 32
BODY_IDLE_S = 15.0

DOORKEEPER = web.AppKey("DOORKEEPER", Doorkeeper)

Snapshots = Callable[[web.Application], Awaitable[Snapshot]]
RouteHandler = Callable[[Any], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One line of a server's table; there is no route without an access level. GET answers HEAD too.

    `short` are the exact addresses, with what is matched in them, by which a POST may come the short way
    (see `serve/lane.py`).
    """

    method: str
    path: str
    handler: RouteHandler
    access: Access
    short: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


FRAME = web.AppKey("FRAME", Frame)
SHORT_ROUTES = web.AppKey("SHORT_ROUTES", Mapping[str, tuple[Route, Mapping[str, str]]])


def base_app(
    settings: Settings,
    name: str,
    routes: Sequence[Route],
    *,
    ready: Readiness | None = None,
    details: Callable[[web.Application], Mapping[str, Any]] | None = None,
    snapshot: Snapshots | None = None,
) -> web.Application:
    """An application with `routes` and what every server has.

    That is: request ids, the gate, errors in the one shape, `/healthz`, `/readyz`, and under keys
    SETTINGS, SITE, STATE and METERS. `ready` tells which part cannot serve, and why (empty: all is well);
    `details` what else `/readyz` has to say; `snapshot` gives the numbers for `/metrics`.
    One handler function serves one access level: the level is looked up by handler.
    """
    token = AdminToken(settings)
    doorkeeper = Doorkeeper(settings, open_sessions(settings, token))
    gate = Gate(settings, token, admits=doorkeeper.admits)
    table = [
        *routes,
        Route("GET", "/healthz", _healthz, Access.PUBLIC),
        Route("GET", "/metrics", _metrics(snapshot or _own_snapshot), Access.LOCAL),
        Route(
            "GET", "/readyz", _readyz(ready or (lambda app: {}), details or (lambda app: {})), Access.PUBLIC
        ),
    ]
    levels: dict[object, Access] = {}
    for route in table:
        if levels.setdefault(route.handler, route.access) is not route.access:
            raise SettingsError(f"{route.path}: one handler cannot have two access levels")
        if route.short and (route.method, route.access) != (hdrs.METH_POST, Access.VISITOR):
            raise SettingsError(f"{route.path}: only a visitor's POST comes the short way")
    lines = RequestLog(name)
    meters = Meters(name)
    around = Frame(lines, gate, meters, doorkeeper.recognise)
    app = web.Application(middlewares=[around.middleware(levels)])
    app.on_cleanup.append(_flushing(lines))
    if settings.otel.target:
        app.cleanup_ctx.append(_tracing(name))
    app[SETTINGS] = settings
    app[SITE] = load_site(settings.home / "site.toml")
    app[STATE] = ServerState()
    app[METERS] = meters
    app[DOORKEEPER] = doorkeeper
    app.on_response_prepare.append(around.on_prepare)
    app[FRAME] = around
    app[SHORT_ROUTES] = {path: (route, found) for route in table for path, found in route.short.items()}
    for route in table:
        if route.method == hdrs.METH_GET:
            app.router.add_get(route.path, route.handler)
        else:
            app.router.add_route(route.method, route.path, route.handler)
    return app


def _flushing(lines: RequestLog) -> Callable[[web.Application], Awaitable[None]]:
    async def flush(_: web.Application) -> None:
        lines.flush()

    return flush


def _tracing(name: str) -> Callable[[web.Application], AsyncIterator[None]]:
    async def tracing(app: web.Application) -> AsyncIterator[None]:
        settings = app[SETTINGS]
        async with AsyncExitStack() as stack:
            try:
                opened = await stack.enter_async_context(_open_tracing(settings, name))
            except SettingsError as error:
                if settings.sources[settings.otel.asked_by] != "environment":
                    raise
                # An address for all programs of a machine is no order to mogine.
                log.warning("no traces are sent: %s", error)
            else:
                app[TRACING] = app[FRAME].tracing = opened
            yield

    return tracing


def _open_tracing(settings: Settings, name: str) -> AbstractAsyncContextManager[Any]:
    try:
        telemetry = importlib.import_module("mogine.serve.telemetry")
    except ImportError as error:
        raise SettingsError(
            f"{settings.otel.asked_by} asks for traces, which need packages of their own: "
            "pip install 'mogine[otel]', or set OTEL_SDK_DISABLED=true"
        ) from error
    opened: AbstractAsyncContextManager[Any] = telemetry.open_tracing(settings, name)
    return opened


async def _own_snapshot(app: web.Application) -> Snapshot:
    return app[METERS].snapshot()


def _metrics(snapshot: Snapshots) -> RouteHandler:
    async def metrics(request: web.Request) -> web.Response:
        text = render(await snapshot(request.app))
        headers = {hdrs.CONTENT_TYPE: CONTENT_TYPE, hdrs.CACHE_CONTROL: "no-store"}
        return web.Response(body=text, headers=headers)

    return metrics


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`value` as compact UTF-8 JSON; never cached unless `headers` say so."""
    return web.Response(
        status=status,
        body=orjson.dumps(value),
        content_type="application/json",
        headers={hdrs.CACHE_CONTROL: "no-store", **(headers or {})},
    )


class ShortJson(web.StreamResponse):
    """A whole JSON answer to a short request, which `serve/lane.py` writes; aiohttp never sees it, so
    nothing of its own is set up."""

    status = 200

    def __init__(self, body: bytes) -> None:
        self.short_body = body


def json_bytes(request: Request, body: bytes) -> web.StreamResponse:
    """`body`, which is JSON, never cached, by the shortest way that `request` allows."""
    if isinstance(request, ShortRequest):
        return ShortJson(body)
    return web.Response(body=body, content_type="application/json", headers={hdrs.CACHE_CONTROL: "no-store"})


async def read_json(request: Request, max_bytes: int = SMALL_BODY_BYTES) -> dict[str, Any]:
    """The JSON object of the request's body.

    Raises UnsupportedMedia, TooLarge, RequestTimeout, or RequestError(reason="invalid_json").
    """
    if request.content_type != "application/json":
        raise UnsupportedMedia("send the body as Content-Type: application/json")
    body = await read_body(request, max_bytes)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"the body is no valid JSON in UTF-8 (near byte {error.pos})", reason="invalid_json"
        ) from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object, in { }", reason="invalid_json")
    # Most bodies have too few brackets to nest deeply; only the others are walked.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and too_deep(value):
        raise RequestError(f"the body nests deeper than {MAX_JSON_DEPTH} levels", reason="invalid_json")
    return value


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, refused before reading when announced too large, and by count when not."""
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise UnsupportedMedia("send the body uncompressed, without Content-Encoding")
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    if isinstance(request, ShortRequest):
        if request.is_late:
            raise _late()
        return request.body
    if request.content.is_eof() and request.content.exception() is None:
        body = request.content.read_nowait()  # as nearly every body, it came together with its head
    else:
        body = await _read_on(request, max_bytes)
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def _read_on(request: web.Request, max_bytes: int) -> bytes:
    blocks: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                block = await request.content.readany()
        except TimeoutError as error:
            raise _late() from error
        except web.HTTPException:
            raise
        except (ValueError, OSError, HttpProcessingError, web.RequestPayloadError) as error:
            raise RequestError("the body is broken HTTP") from error
        if not block:
            return b"".join(blocks)
        size += len(block)
        if size > max_bytes:
            raise _too_large(max_bytes)
        blocks.append(block)


def too_deep(value: Any) -> bool:
    """Whether a JSON value nests deeper than MAX_JSON_DEPTH; walks without recursion."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _late() -> RequestTimeout:
    return RequestTimeout(f"no part of the body came for {BODY_IDLE_S:g} s")


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {max_bytes} bytes allowed")


async def _healthz(request: web.Request) -> web.Response:
    return json_response({"status": "draining" if request.app[STATE].draining else "ok"})


def _readyz(ready: Readiness, details: Callable[[web.Application], Mapping[str, Any]]) -> RouteHandler:
    async def readyz(request: web.Request) -> web.Response:
        problems = dict(ready(request.app))
        if request.app[STATE].draining:
            problems["server"] = "stopping"
        status = "not_ready" if problems else "ready"
        body = {"status": status, "problems": problems, **details(request.app)}
        return json_response(body, status=503 if problems else 200)

    return readyz
