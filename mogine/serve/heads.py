"""Heads of responses: what each of them bears, and the whole of it for questions that come the short way.

aiohttp's making of headers costs as much as all our checks; these are filled into templates instead.
"""

import email.utils
import time
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from aiohttp import hdrs, web

from mogine.serve.keys import REQUEST_ID
from mogine.serve.requests import ShortRequest

COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    hdrs.SERVER: "mogine",
}
CLOSE = b"Connection: close\r\n"


def template(headers: Mapping[str, str]) -> bytes:
    """The head of a 200 with `headers` and the common ones, for `filled`."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **COMMON_HEADERS}.items())
    return f"HTTP/1.1 200 OK\r\n{lines}X-Request-Id: %b\r\nDate: %b\r\n%b\r\n".encode("ascii")


def filled(head: bytes, request: ShortRequest, more: bytes = b"") -> bytes:
    """`head`, a template, for the answer to `request`, with `more` lines."""
    id = request[REQUEST_ID].encode("ascii")
    return head % (id, http_date(time.time()), more + _end(request))


def of_response(response: web.Response, length: int, request: ShortRequest) -> bytes:
    """The head of a response that a handler made for aiohttp, with `length` bytes of body."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = ""
    # aiohttp adds some of its own when it prepares a response; here nothing does.
    pairs = [*response.headers.items(), *COMMON_HEADERS.items(), ("X-Request-Id", request[REQUEST_ID])]
    lines = "".join(f"{name}: {value}\r\n" for name, value in pairs)
    return b"HTTP/1.1 %d %b\r\n%bContent-Length: %d\r\nDate: %b\r\n%b\r\n" % (
        response.status,
        phrase.encode("ascii"),
        lines.encode("utf-8"),
        length,
        http_date(time.time()),
        _end(request),
    )


def _end(request: ShortRequest) -> bytes:
    return request.cors if request.keep_alive else request.cors + CLOSE


@lru_cache(maxsize=2)
def _date_of(second: int) -> bytes:
    return email.utils.formatdate(second, usegmt=True).encode("ascii")


def http_date(now: float) -> bytes:
    """`now` as headers write it."""
    return _date_of(int(now))
