"""What happens around every request: an id, the gate, errors in the one shape, a line in the log."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from mogine.errors import (
    AnswerTooLong,
    ErrorEnvelope,
    MethodNotAllowed,
    MogineError,
    NotFound,
    RequestError,
    TooLarge,
    Unauthorized,
    UpstreamRefused,
)
from mogine.serve.access import Access, Gate
from mogine.serve.heads import COMMON_HEADERS
from mogine.serve.keys import NOTE, REQUEST_ID, STATE
from mogine.serve.logs import RequestLog
from mogine.serve.metrics import Meters
from mogine.serve.requests import Request, ShortRequest
from mogine.serve.traces import trace_id, trace_of

if TYPE_CHECKING:
    from mogine.serve.telemetry import Tracing

log = logging.getLogger(__name__)

CORS_METHODS = "GET, POST, DELETE, OPTIONS"
CORS_HEADERS = "Content-Type, Authorization, Last-Event-ID"
CORS_EXPOSED = "X-Request-Id, Retry-After"
PREFLIGHT_HEADERS = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: CORS_METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: CORS_HEADERS,
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}
DEFAULT_RETRY_AFTER_S = 5
IDS_AT_ONCE = 64
PATIENCE_S = 60.0  # who has to wait longer had better tell a person than ask again
OPENAI_PATHS = "/v1/"
TRACING: web.AppKey["Tracing"] = web.AppKey("TRACING")  # only where spans are made


class RequestIds:
    """44 hex digits each: milliseconds since 1970 (sorts by time), then 128 random bits.

    The bits are drawn for many ids at once: each call of the system hands the interpreter to other threads.
    """

    def __init__(self) -> None:
        self._drawn: list[str] = []

    def new(self) -> str:
        """The next one."""
        if not self._drawn:
            bits = os.urandom(16 * IDS_AT_ONCE).hex()
            self._drawn = [bits[place : place + 32] for place in range(0, len(bits), 32)]
        return f"{time.time_ns() // 1_000_000:012x}{self._drawn.pop()}"


class Frame:
    """What surrounds every request of a server: id, log, errors, access, in this order.

    One function instead of four middlewares keeps the cost of a request low.
    """

    def __init__(
        self,
        lines: RequestLog,
        gate: Gate,
        meters: Meters,
        recognise: Callable[[web.Request], Awaitable[None]],
    ) -> None:
        """`recognise` looks for the owner's session before the gate asks for it."""
        self._lines = lines
        self._gate = gate
        self._meters = meters
        self._recognise = recognise
        self._ids = RequestIds()
        self.tracing: Tracing | None = None

    def middleware(self, levels: Mapping[object, Access]) -> Middleware:
        """For requests that aiohttp has read; `levels` maps each route's handler to who may call it."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            found = request.match_info
            resource = found.route.resource  # as it was declared, so that there are never more than we have
            route = "" if resource is None else resource.canonical
            return await self.answer(request, handler, levels.get(found.handler), route)

        return middleware

    async def answer(
        self,
        request: Request,
        handler: Callable[[Any], Awaitable[web.StreamResponse]],
        level: Access | None,
        route: str,
    ) -> web.StreamResponse:
        """The answer of `handler`, or the error in its place; only a visitor's leaving is raised."""
        request_id = request[REQUEST_ID] = self._ids.new()
        request[NOTE] = ""
        started = time.perf_counter()
        span = None if self.tracing is None else self.tracing.begin(request, route)
        status, reason = 499, ""
        try:
            if level is Access.ADMIN and isinstance(request, web.Request):
                await self._recognise(request)
            response = self._admit(request, level) or await handler(request)
            status = response.status
            return response
        except asyncio.CancelledError:
            reason = "client_left"
            raise
        except ConnectionResetError:
            # aiohttp raises it for a write to a visitor who has left; there is nobody to answer.
            reason = "client_left"
            raise
        except Exception as error:
            told = translate(error)
            response = error_response(told, request_id, openai=request.path.startswith(OPENAI_PATHS))
            status = response.status
            reason = told.reason if isinstance(told, MogineError) else type(told).__name__
            if not isinstance(told, MogineError):
                log.exception("request %s failed", request_id)
            return response
        finally:
            duration_ms = (time.perf_counter() - started) * 1000
            self._meters.request(request.method, route, status)
            reason = reason or request[NOTE]
            trace = trace_of(request.headers)
            if span is not None:
                trace = span.end(status, reason)
            self._lines.note(
                request.method,
                request.path,
                status,
                duration_ms,
                request_id,
                reason,
                trace_id(trace) if trace else "",
            )

    def _admit(self, request: Request, level: Access | None) -> web.Response | None:
        """Lets the request in (None), answers a preflight, or raises."""
        gate = self._gate
        gate.check_host(request)
        if isinstance(request, ShortRequest):  # a visitor's POST, see `Route.short`
            gate.check_origin(request)
            return None
        method = request.method
        if method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            gate.check_origin(request)
            return web.Response(status=204, headers=PREFLIGHT_HEADERS)
        if level is Access.ADMIN:
            gate.check_admin(request)
        elif level is Access.LOCAL:
            gate.check_local(request)
        elif level is Access.VISITOR and method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            gate.check_origin(request)
        return None

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers that every response bears, streams and errors included.

        Set in aiohttp's `on_response_prepare`: a middleware is too late for a stream.
        """
        headers = response.headers
        if request.app[STATE].draining:
            headers[hdrs.CONNECTION] = "close"
            response.force_close()
        headers["X-Request-Id"] = request.get(REQUEST_ID) or self._ids.new()
        for header, value in COMMON_HEADERS.items():
            headers[header] = value
        for header, value in self._cors(request):
            headers.add(header, value)

    def cors_lines(self, request: Request) -> bytes:
        """What the head of a response has for a browser page, for who writes heads without aiohttp."""
        pairs = self._cors(request)
        return "".join(f"{name}: {value}\r\n" for name, value in pairs).encode("ascii") if pairs else b""

    def _cors(self, request: Request) -> Sequence[tuple[str, str]]:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return ()
        if not origin.isascii() or not self._gate.allows_origin(origin, request):
            return ((hdrs.VARY, "Origin"),)
        return (
            (hdrs.VARY, "Origin"),
            (hdrs.ACCESS_CONTROL_ALLOW_ORIGIN, origin),
            (hdrs.ACCESS_CONTROL_EXPOSE_HEADERS, CORS_EXPOSED),
        )


def error_response(error: BaseException, request_id: str, *, openai: bool = False) -> web.Response:
    """Any exception as the JSON answer of the contract, with the headers that its kind needs."""
    envelope = ErrorEnvelope.of(error, request_id)
    response = web.Response(
        status=envelope.code,
        body=orjson.dumps(error_body(envelope, openai=openai)),
        content_type="application/json",
        headers={hdrs.CACHE_CONTROL: "no-store"},
    )
    if isinstance(error, MogineError):
        if (wait := retry_after_s(error)) is not None:
            response.headers[hdrs.RETRY_AFTER] = str(wait)
        if not worth_asking_again(error):
            response.headers["x-should-retry"] = "false"
        if isinstance(error, Unauthorized):
            response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="mogine"'
        if isinstance(error, MethodNotAllowed):
            response.headers[hdrs.ALLOW] = error.allowed
    return response


def error_body(envelope: ErrorEnvelope, *, openai: bool) -> dict[str, Any]:
    """The error object; on `/v1` with the `param` that OpenAI's clients look for, null as it may be."""
    body = envelope.to_dict()
    if openai:
        body["error"].setdefault("param", None)
    return body


def worth_asking_again(error: MogineError) -> bool:
    """Whether the same question may be answered soon; the vendors' own clients ask again if not told."""
    if isinstance(error, UpstreamRefused | AnswerTooLong) or error.reason == "budget_exhausted":
        return False
    return error.retry_after_s is None or error.retry_after_s <= PATIENCE_S


def retry_after_s(error: MogineError) -> int | None:
    """Whole seconds for `Retry-After`: always set on 429 and 503, at most 120.

    The OpenAI SDK does not retry at all when it is told to wait longer than two minutes.
    """
    if error.retry_after_s is None:
        return DEFAULT_RETRY_AFTER_S if error.status in (429, 503) else None
    return max(1, min(120, math.ceil(error.retry_after_s)))


def translate(error: Exception) -> Exception:
    """aiohttp's own errors as ours; anything else stays what it is."""
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return MethodNotAllowed(
                f"this address does not take that method; allowed: {allowed}", allowed=allowed
            )
        case web.HTTPNotFound():
            return NotFound("there is nothing at this address")
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("the request body is too large")
        case web.HTTPException() if 400 <= error.status < 500:
            return RequestError("the request cannot be understood")
    return error
