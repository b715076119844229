"""The ground under every fake: a real aiohttp server on loopback that records what it was asked.

    async with DoubaoFake(script(say("好"))) as fake:      # in the test's own loop
        ... fake.base_url, fake.requests, await fake.wait_disconnect() ...
    with DoubaoFake(...).in_thread() as fake:              # in a thread of its own, for blocking callers
    python -m tests.upstreams.doubao --port 0              # as a process; prints one JSON line

A fake given several scripts plays one per request and then repeats the last; `play(...)` replaces them.
Leaving the `async with` raises when a handler of the fake itself crashed, so a broken fake fails its test.
"""

import argparse
import asyncio
import json
import signal
import ssl
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from tests.upstreams.script import Script, Step, as_script, parse_script, say, script, usage
from tests.upstreams.tls import certificate_files

POLL_S = 0.005
CONTROL = "/_fake/"

Playable = Script | Sequence[Step] | Step


@dataclass(slots=True)
class Recorded:
    """One request as it came; times are `time.monotonic()`.

    `disconnected_at` is set when the caller left before the answer was complete, `finished_at` when the
    answer was written whole, `cut_at` when the fake broke the connection itself: exactly one of them in
    the end. `connection` numbers the TCP connection from 1; `bytes_sent` counts body bytes handed over.
    """

    number: int
    method: str
    path: str
    headers: CIMultiDictProxy[str]
    connection: int
    arrived_at: float
    body: bytes = b""
    bytes_sent: int = 0
    head_at: float | None = None
    disconnected_at: float | None = None
    finished_at: float | None = None
    cut_at: float | None = None

    @property
    def json(self) -> Any:
        """The body parsed; raises ValueError when it is not JSON."""
        return json.loads(self.body)

    @property
    def bearer(self) -> str | None:
        """The key of `Authorization: Bearer`, None when absent or blank."""
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        return key.strip() or None if scheme.lower() == "bearer" else None

    @property
    def is_over(self) -> bool:
        return (self.disconnected_at or self.finished_at or self.cut_at) is not None

    def to_dict(self) -> dict[str, Any]:
        """For `GET /_fake/requests` of a fake that runs as a process."""
        return {
            **{name: getattr(self, name) for name in ("number", "method", "path", "connection")},
            "headers": dict(self.headers),
            "body": self.body.decode("utf-8", "replace"),
            "bytes_sent": self.bytes_sent,
            **{name: getattr(self, name) for name in ("arrived_at", "head_at", "disconnected_at")},
            **{name: getattr(self, name) for name in ("finished_at", "cut_at")},
        }


def default_script() -> Script:
    """What a fake answers when a test did not care: two frames of Chinese and a usage."""
    return script(say("你好，", "我是网站助手。🙂"), usage(15, 12))


@dataclass(slots=True)
class Exchange:
    """One request in the hands of a fake: what came, and the way to answer it."""

    fake: "Fake"
    request: web.Request
    record: Recorded
    script: Script = field(default_factory=default_script)

    def header(self, name: str) -> str:
        return self.record.headers.get(name, "")


class Fake(ABC):
    """A vendor on loopback. Subclasses answer in `respond` and say where their API starts in `prefix`."""

    prefix = ""

    def __init__(self, *scripts: Playable, tls: bool = False, port: int = 0) -> None:
        self._scripts = [as_script(one) for one in scripts] or [default_script()]
        self._turn = 0
        self._tls = tls
        self._wanted_port = port
        self._runner: web.AppRunner | None = None
        self._closing = asyncio.Event()
        self._connections: dict[Any, int] = {}
        self.port = 0
        self.requests: list[Recorded] = []
        self.crashes: list[BaseException] = []

    # --- for tests ---------------------------------------------------------------------------------

    @property
    def origin(self) -> str:
        """`http://127.0.0.1:PORT` (https with `tls=True`)."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What belongs into the vendor's `*_BASE_URL`."""
        return self.origin + self.prefix

    @property
    def environ(self) -> dict[str, str]:
        """Settings that point mogine at this fake, with an obviously fake key."""
        return {}

    @property
    def ca_file(self) -> Path:
        """The self-signed certificate to trust, for `tls=True`."""
        return certificate_files()[0]

    @property
    def open_connections(self) -> int:
        """TCP connections that callers hold open now."""
        server = self._runner.server if self._runner else None
        return len(server.connections) if server else 0

    def play(self, *scripts: Playable) -> None:
        """From the next request on: these scripts in turn, the last one repeated."""
        self._scripts, self._turn = [as_script(one) for one in scripts], 0

    async def wait_requests(self, count: int = 1, timeout_s: float = 5.0) -> list[Recorded]:
        """The requests, as soon as there are `count`; raises TimeoutError."""
        await self.wait_until(lambda: len(self.requests) >= count, f"{count} requests", timeout_s)
        return self.requests

    async def wait_disconnect(self, index: int = -1, timeout_s: float = 5.0) -> float:
        """When (monotonic) the caller of `requests[index]` left before the end; raises TimeoutError."""
        await self.wait_requests(index + 1 if index >= 0 else -index, timeout_s)
        record = self.requests[index]
        await self.wait_until(lambda: record.disconnected_at is not None, "the caller to leave", timeout_s)
        assert record.disconnected_at is not None
        return record.disconnected_at

    async def wait_until(self, true: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
        """Return once `true()`; raises TimeoutError that names `what` and the requests seen."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                seen = [f"{one.method} {one.path} over={one.is_over}" for one in self.requests]
                raise TimeoutError(f"waited {timeout_s} s for {what}; requests seen: {seen}")
            await asyncio.sleep(POLL_S)

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> Self:
        self._closing = asyncio.Event()
        app = web.Application(client_max_size=256 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.on_response_prepare.append(_drop_unasked_headers)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2, max_line_size=65536
        )
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, "127.0.0.1", self._wanted_port, ssl_context=_tls_context() if self._tls else None
        )
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if error is None:
            self.raise_crashes()

    def raise_crashes(self) -> None:
        """Raise what went wrong inside the fake itself, if anything did."""
        if self.crashes:
            raise AssertionError(f"the fake itself crashed: {self.crashes!r}") from self.crashes[0]

    @contextmanager
    def in_thread(self) -> Iterator[Self]:
        """Run in a loop and thread of its own; for blocking callers (vendors' SDKs, the command line)."""
        started = threading.Event()
        leave: list[Callable[[], object]] = []
        failure: list[BaseException] = []

        async def life() -> None:
            stopping, loop = asyncio.Event(), asyncio.get_running_loop()
            leave.append(partial(loop.call_soon_threadsafe, stopping.set))
            async with self:
                started.set()
                await stopping.wait()

        def body() -> None:
            try:
                asyncio.run(life())
            except BaseException as error:
                failure.append(error)
            finally:
                started.set()

        thread = threading.Thread(target=body, name=type(self).__name__, daemon=True)
        thread.start()
        started.wait()
        try:
            if failure:
                raise failure[0]
            yield self
        finally:
            if thread.is_alive():
                leave[0]()
            thread.join(10)
        self.raise_crashes()

    # --- for fakes ---------------------------------------------------------------------------------

    @abstractmethod
    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        """Answer one request, as the vendor would."""

    async def sleep(self, seconds: float) -> None:
        """Sleep, but wake when the fake stops."""
        if seconds > 0 and not self._closing.is_set():
            try:
                await asyncio.wait_for(self._closing.wait(), seconds)
            except TimeoutError:
                return

    async def hang(self) -> None:
        """Wait until the fake stops (a caller who leaves cancels this)."""
        await self._closing.wait()

    @property
    def is_closing(self) -> bool:
        return self._closing.is_set()

    def next_script(self) -> Script:
        """The script for the request at hand; requests turned away by the vendor's checks use none."""
        chosen = self._scripts[min(self._turn, len(self._scripts) - 1)]
        self._turn += 1
        return chosen

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path.startswith(CONTROL):
            return await self._control(request)
        record = self._record(request)
        self.requests.append(record)
        try:
            record.body = await request.read()
            response = await self.respond(Exchange(self, request, record))
        except (asyncio.CancelledError, ConnectionError) as error:
            # Stopping the fake cancels handlers too, and cutting a connection ends in these as well.
            if not self.is_closing and record.cut_at is None:
                record.disconnected_at = time.monotonic()
            # aiohttp would log a write to a connection that has just ended as a mistake of the handler's.
            raise asyncio.CancelledError from error
        except Exception as error:
            self.crashes.append(error)
            raise
        if record.cut_at is None:
            record.finished_at = time.monotonic()
        return response

    def _record(self, request: web.Request) -> Recorded:
        connection = self._connections.setdefault(request.protocol, len(self._connections) + 1)
        headers = CIMultiDictProxy(CIMultiDict(request.headers))
        number = len(self.requests) + 1
        return Recorded(number, request.method, request.raw_path, headers, connection, time.monotonic())

    async def _control(self, request: web.Request) -> web.Response:
        """What a test in another process needs: read the requests, change the script."""
        if request.path == CONTROL + "requests":
            return web.json_response([one.to_dict() for one in self.requests])
        if request.path == CONTROL + "script" and request.method == "POST":
            self.play(parse_script(await request.text()))
            return web.json_response({"scripts": len(self._scripts)})
        return web.json_response({"unknown": request.path}, status=404)


async def _drop_unasked_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """A header set to "-" is left out of the head, whatever default aiohttp has for it."""
    for name in [name for name, value in response.headers.items() if value == "-"]:
        del response.headers[name]


def _tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = certificate_files()
    context.load_cert_chain(certificate, key)
    return context


def run_standalone(
    make: Callable[..., Fake], argv: Iterable[str] | None = None, knobs: Mapping[str, str] | None = None
) -> None:
    """The `python -m` way: start, print `{"name", "base_url", "origin", "port", "ca_file"}` as one JSON line,
    serve until SIGTERM or SIGINT.

    `--port N`, `--tls`, `--say TEXT` (repeatable: one script a request), `--script JSON` (repeatable, see
    `parse_script`), and `--set NAME=VALUE` for the fake's own keyword arguments named in `knobs`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--say", action="append", default=[])
    parser.add_argument("--script", action="append", default=[])
    for name, help_text in (knobs or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=help_text, action="append")
    options = parser.parse_args(list(argv) if argv is not None else None)
    own = {name: tuple(value) for name in knobs or () if (value := getattr(options, name))}
    scripts = [script(say(text)) for text in options.say] + [parse_script(text) for text in options.script]
    asyncio.run(_serve(make(*scripts, tls=options.tls, port=options.port, **own)))


async def _serve(fake: Fake) -> None:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    async with fake:
        line: dict[str, Any] = {"name": type(fake).__name__, "base_url": fake.base_url, "origin": fake.origin}
        line |= {"port": fake.port, "environ": fake.environ}
        line |= {"ca_file": str(fake.ca_file)} if fake.origin.startswith("https") else {}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        await leave.wait()
