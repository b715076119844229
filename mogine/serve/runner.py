"""Starts servers in one process, watches for the signal to stop, and ends what runs before it leaves."""

import asyncio
import contextlib
import errno
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

from aiohttp import web

from mogine.errors import SettingsError, Unavailable
from mogine.ports import holder
from mogine.serve.app import SHORT_ROUTES
from mogine.serve.dialects import max_body_bytes
from mogine.serve.door import Door
from mogine.serve.keys import SETTINGS, STATE
from mogine.serve.lane import Lanes
from mogine.serve.notify import Herald
from mogine.serve.shared import SHARED, Remote
from mogine.settings import Settings

KEEP_ALIVE_S = 30.0  # also what a visitor has to send a request's head
UNACKNOWLEDGED_MS = 60_000
BACKLOG = 1024
SEND_BUFFER_BYTES = 128 * 1024
CLEANUP_S = 2.0
LAST_CALL_S = 2.0  # longer than nginx keeps a connection to one of several proxies, see `deploy/nginx.py`
MAX_LINE_BYTES = 32 * 1024  # a search of 2,000 characters stands in the address, with up to 12 bytes each
POLL_S = 0.05
GARBAGE_THRESHOLD = 20_000
SWITCH_S = 0.0005  # how long a thread at work, such as the record's writer, may keep a token waiting

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """One of our servers: its module (imported when started), its settings, what the port is called."""

    name: str
    module: str
    port_setting: str

    def create_app(self, settings: Settings) -> web.Application:
        """The server's application."""
        app = importlib.import_module(self.module).create_app(settings)
        if not isinstance(app, web.Application):
            raise TypeError(f"{self.module}.create_app must return an application")
        return app

    def port(self, settings: Settings) -> int:
        """The port that the settings give it."""
        return int(getattr(settings, self.name).port)


# In the order of their start: who is called by another server comes first. Stopped in reverse.
SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server("analytics", "mogine.serve.analytics", "MOGINE_ANALYTICS_PORT"),
        Server("kb", "mogine.serve.kb", "MOGINE_KB_PORT"),
        Server("proxy", "mogine.serve.proxy", "MOGINE_PROXY_PORT"),
    )
}


@dataclass(frozen=True, slots=True)
class Running:
    """Servers that answer. `settings` has the real ports where 0 was asked for."""

    settings: Settings
    apps: Mapping[str, web.Application]
    doors: Sequence[Door] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Which servers they are."""
        return tuple(self.apps)

    def url(self, name: str) -> str:
        """Where this machine reaches the server."""
        return self.settings.server_url(name)

    def hang_up(self) -> None:
        """Read again what can be read again while serving."""
        for app in self.apps.values():
            for hook in app[STATE].on_hangup:
                hook()

    def drain(self) -> None:
        """From now on health says so, and a connection ends with the answer that it carries."""
        for app in self.apps.values():
            app[STATE].draining = True

    def refuse(self) -> None:
        """From now on new questions are refused."""
        for app in self.apps.values():
            app[STATE].refusing = True

    async def close_doors(self) -> None:
        """From now on there are no new connections."""
        await asyncio.gather(*(door.close() for door in self.doors))

    @property
    def connections(self) -> int:
        """How many connections are open, idle ones included."""
        return sum(door.connections() for door in self.doors)

    @property
    def answers(self) -> int:
        """How many answers are being given."""
        return sum(len(app[STATE].running) for app in self.apps.values())

    def end_answers(self) -> None:
        """End each of them with an error that its visitor can read."""
        error = Unavailable("the server is stopping; ask again in a moment", reason="shutting_down")
        for app in self.apps.values():
            for answer in tuple(app[STATE].running):
                answer.stop(error)


@dataclass(slots=True)
class Stop:
    """The wish to stop: `asked` at the first signal, `now` at the second; the third is the end."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)

    def signal(self) -> None:
        """One more signal has come."""
        if self.now.is_set():
            os._exit(130)
        (self.now if self.asked.is_set() else self.asked).set()


def run(
    settings: Settings,
    names: Sequence[str],
    *,
    announce: Callable[[Running], Awaitable[None]] | None = None,
    parent: int | None = None,
    herald: Herald | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Returns when all is ended and written.

    `announce` is called once all servers answer, and `herald` tells the supervisor. Raises SettingsError when
    one cannot be started; then none is left running. `parent` is the socket to the parent of several workers.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, names, announce, parent, herald or Herald()))


async def _serve(
    settings: Settings,
    names: Sequence[str],
    announce: Callable[[Running], Awaitable[None]] | None,
    parent: int | None,
    herald: Herald,
) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.signal)
    async with AsyncExitStack() as stack:
        remote = None if parent is None else await Remote.open(parent)
        if remote is not None:
            listening = asyncio.create_task(remote.listen(stop.signal))
            stack.callback(listening.cancel)
        running = await stack.enter_async_context(started(settings, names, remote))
        words = f"serving {', '.join(running.names)}"

        def hang_up() -> None:
            herald.reloading()
            running.hang_up()
            herald.ready(words)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        if remote is not None:
            remote.tell(do="ready")
        if announce is not None:
            await announce(running)
        spare_tokens()
        herald.ready(words)
        async with beating(herald):
            await stop.asked.wait()
            herald.stopping()
            await wind_down(running, stop)


@asynccontextmanager
async def beating(herald: Herald) -> AsyncIterator[None]:
    """Tell the supervisor's watchdog that this loop turns, for as long as the context lasts."""

    async def beat() -> None:
        while True:
            herald.alive()
            await asyncio.sleep(herald.beat_s)

    task = asyncio.create_task(beat()) if herald.beat_s else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


def spare_tokens() -> None:
    """Leave what lives as long as the process out of the search for garbage, and search less often: no token
    moves while it goes through all that was imported. Let threads hand over sooner, too."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)
    sys.setswitchinterval(SWITCH_S)


async def wind_down(running: Running, stop: Stop) -> None:
    """Take no new questions, let the running answers finish for a while, then end them.

    In a rolling restart another proxy answers what cannot come in here any more, and what comes over a
    connection that the front has kept open is answered: the front could not ask it elsewhere.
    """
    running.drain()
    proxy = running.settings.proxy
    log.info("stopping: %d answers are running and get up to %g s", running.answers, proxy.shutdown_grace_s)
    if proxy.rolling_restart:
        await running.close_doors()
        await _until_idle(running, proxy.shutdown_grace_s, stop.now, quiet_s=LAST_CALL_S)
    else:
        running.refuse()
        await _until_idle(running, proxy.shutdown_grace_s, stop.now)
    if running.answers:
        running.refuse()
        running.end_answers()
        await _until_idle(running, CLEANUP_S, None)


async def _until_idle(
    running: Running, seconds: float, now: asyncio.Event | None, *, quiet_s: float = 0.0
) -> None:
    """Until no answer runs, and, while connections are open, none has run for `quiet_s`."""
    loop = asyncio.get_running_loop()
    ran_at = loop.time()
    end = ran_at + seconds
    # The answers belong to several servers; a look now and then is simpler than news from each.
    while loop.time() < end and not (now and now.is_set()):
        if running.answers:
            ran_at = loop.time()
        elif not running.connections or loop.time() - ran_at >= quiet_s:
            return
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def started(
    settings: Settings, names: Sequence[str], remote: Remote | None = None
) -> AsyncIterator[Running]:
    """The servers `names`, answering for as long as the context lasts; with `remote`, as one of several
    processes that share the port of the proxy.

    All ports are taken before the first server is opened, so that a port in use leaves nothing half-started.
    """
    wanted = [server for server in SERVERS.values() if server.name in names]
    async with AsyncExitStack() as stack:
        sockets: dict[str, list[socket.socket]] = {}
        for server in wanted:
            shared = remote is not None and server.name == "proxy"
            bound = bind(settings.host, server.port(settings), server.port_setting, shared=shared)
            sockets[server.name] = bound
            for each in bound:
                stack.callback(each.close)
            section = replace(getattr(settings, server.name), port=bound[0].getsockname()[1])
            settings = replace(settings, **{server.name: section})
        apps: dict[str, web.Application] = {}
        doors: list[Door] = []
        for server in wanted:
            app = apps[server.name] = server.create_app(settings)
            if remote is not None:
                app[SHARED] = remote
            doors.append(await _open(stack, app, sockets[server.name], server))
        yield Running(settings, apps, doors)


async def _open(
    stack: AsyncExitStack, app: web.Application, sockets: Sequence[socket.socket], server: Server
) -> Door:
    runner = web.AppRunner(
        app,
        access_log=None,  # the middleware writes our own line
        logger=_http_log(),
        handler_cancellation=True,  # a visitor who leaves must not go on costing money
        auto_decompress=False,
        max_line_size=MAX_LINE_BYTES,
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=CLEANUP_S,
    )
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    aiohttp_server = runner.server
    if aiohttp_server is None:
        raise RuntimeError("a server that is set up takes connections")
    protocol: Callable[[], asyncio.Protocol] = aiohttp_server
    in_lanes: Collection[object] = ()
    if app[SHORT_ROUTES]:
        lanes = Lanes(
            app,
            protocol,
            max_body_bytes=max_body_bytes(app[SETTINGS].proxy),
            keep_alive_s=KEEP_ALIVE_S,
        )
        stack.push_async_callback(lanes.shutdown, CLEANUP_S)
        protocol, in_lanes = lanes, lanes.open
    loop = asyncio.get_running_loop()
    listeners: list[asyncio.Server] = []
    for each in sockets:
        try:
            listeners.append(await loop.create_server(protocol, sock=each, backlog=BACKLOG))
            stack.callback(listeners[-1].close)
        except OSError as error:  # two runs may bind one port as long as neither listens
            host, port, *_ = each.getsockname()
            raise _no_port(error, host, port, server.port_setting) from error
    return Door(sockets, listeners, lambda: len(in_lanes) + len(aiohttp_server.connections))


def bind(host: str, port: int, setting: str, *, shared: bool = False) -> list[socket.socket]:
    """Sockets for every address of `host`, bound and not yet listening; SettingsError names the remedy.

    With `shared` other processes may listen on the same port, and the kernel spreads connections.
    """
    try:
        addresses = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as error:
        raise SettingsError(f"MOGINE_HOST: {host!r} is no address of this machine") from error
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sock = undo.enter_context(socket.socket(family, kind, protocol))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Else the system takes up to 4 MiB of an answer from the vendor for a reader who has stopped.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Who acknowledges nothing for a minute is gone; connections inherit this from their listener.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            try:
                sock.bind((address[0], port, *address[2:]))
            except OSError as error:
                raise _no_port(error, host, port, setting) from error
            port = sock.getsockname()[1]
            sockets.append(sock)
        undo.pop_all()
    return sockets


def _no_port(error: OSError, host: str, port: int, setting: str) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        by = holder(port)
        whose = f"by {by}" if by else "(is mogine running already?)"
        return SettingsError(
            f"port {port} on {host} is in use {whose}: stop what runs there or set {setting} to a free port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return SettingsError(f"port {port} may not be opened by this user: set {setting} to one above 1023")
    return SettingsError(
        f"MOGINE_HOST: cannot listen on {host}, port {port} ({os.strerror(error.errno or 0)})"
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: a little faster, nothing else depends on it."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _http_log() -> logging.Logger:
    logger = logging.getLogger("mogine.http")
    if not any(isinstance(f, _OneLine) for f in logger.filters):
        logger.addFilter(_OneLine())
    return logger


class _OneLine(logging.Filter):
    """aiohttp logs a traceback for every malformed request; the kind of error says all there is to say."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BaseException):
            record.msg, record.args = (
                f"{record.getMessage()}: {type(error).__name__}",
                (),
            )
            record.exc_info = record.exc_text = None
            if isinstance(error, web.RequestPayloadError) or 400 <= getattr(error, "code", 500) < 500:
                record.levelno, record.levelname = logging.INFO, "INFO"
        return True
