"""Several processes on one port: a parent that starts them, keeps what they share, and starts them again."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import orjson

from mogine.errors import SettingsError
from mogine.serve.keeper import Keeper
from mogine.serve.notify import Herald
from mogine.serve.runner import SERVERS, beating, bind
from mogine.serve.shared import MAX_LINE_BYTES, Message
from mogine.settings import Settings

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
SETTLED_S = 60.0
FORWARDED = (signal.SIGTERM, signal.SIGINT)
FOR_PARENT = frozenset(("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "NODE_CHANNEL_FD"))

log = logging.getLogger(__name__)

# How a worker is started: from its servers and the descriptor of its end of the socket.
CommandLine = Callable[[Sequence[str], int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Group:
    """Servers that answer, in processes of their own. `settings` has the real ports."""

    settings: Settings
    names: tuple[str, ...]

    def url(self, name: str) -> str:
        """Where this machine reaches the server."""
        return self.settings.server_url(name)


class Ended(Exception):
    """A worker could not start; it has told why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Supervisor:
    """The parent. The proxy runs in `workers` processes, all other servers in one of their own, or with
    `apart` in one for each."""

    def __init__(
        self,
        settings: Settings,
        names: Sequence[str],
        workers: int,
        command: CommandLine,
        environ: Mapping[str, str],
        *,
        apart: bool = False,
    ) -> None:
        self._settings = settings
        others = tuple(name for name in names if name != "proxy")
        grouped = [(name,) for name in others] if apart else [others] * bool(others)
        self._duties: list[tuple[str, ...]] = [*grouped, *([("proxy",)] * (workers * ("proxy" in names)))]
        self._herald = Herald.of(environ)
        self._names = tuple(names)
        self._workers = workers
        self._command = command
        # What concerns the parent alone: a child would speak to the supervisor in its name.
        self._environ = {name: value for name, value in environ.items() if name not in FOR_PARENT}
        self._keeper = Keeper(settings.access)
        self._numbers = count(1)
        self._running: set[Process] = set()
        self._stopping = asyncio.Event()
        self._sockets: Path | None = None  # where workers ask each other, see `siblings`

    async def run(self, announce: Callable[[Group], Awaitable[None]] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. Raises Ended when a worker cannot start, and SettingsError."""
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        with contextlib.ExitStack() as stack:
            self._reserve(stack)
            if self._duties.count(("proxy",)) > 1:
                # In the system's folder and not in data/: the path of a socket must be short.
                self._sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mogine-")))
            ready = [loop.create_future() for _ in self._duties]
            keeping = [
                asyncio.create_task(self._keep(duty, told))
                for duty, told in zip(self._duties, ready, strict=True)
            ]
            try:
                await asyncio.gather(*ready)
                if announce is not None and not self._stopping.is_set():
                    await announce(Group(self._settings, self._names))
                self._herald.ready(f"serving {', '.join(self._names)} in {len(self._duties)} processes")
                async with beating(self._herald):
                    await asyncio.gather(*keeping)
            finally:
                self._stopping.set()
                self._pass_on(signal.SIGTERM)
                await asyncio.gather(*keeping, return_exceptions=True)

    def _reserve(self, stack: contextlib.ExitStack) -> None:
        """Take the ports before anything starts, and keep them: nobody listens on these sockets."""
        for name in self._names:
            server = SERVERS[name]
            # First without sharing: a port on which somebody else listens is in use, shared or not.
            trial = bind(self._settings.host, server.port(self._settings), server.port_setting)
            port = trial[0].getsockname()[1]
            for each in trial:
                each.close()
            if name == "proxy":
                for each in bind(self._settings.host, port, server.port_setting, shared=True):
                    stack.callback(each.close)
            section = replace(getattr(self._settings, name), port=port)
            self._settings = replace(self._settings, **{name: section})

    async def _keep(self, duty: tuple[str, ...], ready: "asyncio.Future[None]") -> None:
        """Have a worker running until the end; start it again, less and less eagerly, when it dies."""
        loop = asyncio.get_running_loop()
        wait_s = FIRST_WAIT_S
        while not self._stopping.is_set():
            began = loop.time()
            exit_code = await self._one_life(duty, ready)
            if self._stopping.is_set():
                break
            if not ready.done():
                ready.set_exception(Ended(exit_code if exit_code > 0 else 1))
                return
            if loop.time() - began > SETTLED_S:
                wait_s = FIRST_WAIT_S
            log.error("a worker (%s) has ended with %d; again in %g s", ",".join(duty), exit_code, wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)
            self._keeper.restarts += 1
        if not ready.done():
            ready.set_result(None)

    async def _one_life(self, duty: tuple[str, ...], ready: "asyncio.Future[None]") -> int:
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command(duty, theirs.fileno()),
                env=self._environ_with_ports(),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, who tells the children once
            )
        self._running.add(process)
        self._keeper.workers += "proxy" in duty
        listening = asyncio.create_task(self._listen(number, ours, ready))
        if self._stopping.is_set():
            process.send_signal(signal.SIGTERM)
        try:
            return await process.wait()
        finally:
            self._running.discard(process)
            self._keeper.workers -= "proxy" in duty
            await listening
            self._keeper.gone(number)
            if self._sockets is not None:
                (self._sockets / str(number)).unlink(missing_ok=True)

    async def _listen(self, number: int, end: socket.socket, ready: "asyncio.Future[None]") -> None:
        reader, writer = await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES)
        try:
            while line := await reader.readline():
                message = orjson.loads(line)
                if message["do"] == "ready":
                    if not ready.done():
                        ready.set_result(None)
                    continue
                if message["do"] == "meet":
                    answer: Message = {"socket": "" if self._sockets is None else f"{self._sockets}/{number}"}
                else:
                    answer = self._keeper.handle(number, message)
                if message.get("answer"):
                    writer.write(orjson.dumps(answer) + b"\n")
        except ConnectionError as error:
            log.info("worker %d is gone (%s)", number, type(error).__name__)
        finally:
            writer.close()

    def _environ_with_ports(self) -> dict[str, str]:
        ports = {SERVERS[name].port_setting: str(SERVERS[name].port(self._settings)) for name in self._names}
        return {**self._environ, **ports}

    def _stop(self, number: signal.Signals) -> None:
        self._stopping.set()
        self._herald.stopping()
        self._pass_on(number)

    def _pass_on(self, number: signal.Signals) -> None:
        for process in tuple(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def run(
    settings: Settings,
    names: Sequence[str],
    workers: int,
    *,
    environ: Mapping[str, str],
    apart: bool = False,
    command: CommandLine | None = None,
    announce: Callable[[Group], Awaitable[None]] | None = None,
) -> int:
    """Serve until a signal ends it; the exit code."""
    if workers > 1 and "proxy" not in names:
        raise SettingsError("--workers is for the proxy: `mogine serve proxy --workers N`, or `serve all`")
    line = command or _command_of(settings)

    async def serve() -> None:
        await Supervisor(settings, names, workers, line, environ, apart=apart).run(announce)

    try:
        asyncio.run(serve())
    except Ended as ended:
        return ended.exit_code
    return 0


def _command_of(settings: Settings) -> CommandLine:
    def command(names: Sequence[str], descriptor: int) -> Sequence[str]:
        home = str(settings.home)
        return (
            *(sys.executable, "-m", "mogine", "--home", home),
            *("worker", ",".join(names), "--descriptor", str(descriptor)),
        )

    return command
