"""Files nobody vouches for are parsed in a child process that may be lost: little memory, time, no network.

One child serves a whole run, since its imports cost half a second; when it dies or overruns it is replaced.
It is started afresh (not forked), without the parent's environment, and gets bytes and gives JSON.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Any, Self

from mogine.children import import_path
from mogine.errors import MogineError, TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest.load import parse
from mogine.ingest.loaders.parsed import Parsed

_LENGTHS = struct.Struct(">II")
_LENGTH = struct.Struct(">I")
# JSON may write a character in six bytes; what parse() lets through is far below.
_MAX_REPLY_BYTES = 128 * 1024**2
# -I: neither the current folder nor the environment may lend modules to the child; -B: it writes no file.
_START = "import sys; sys.path[:] = sys.argv[2:]; from mogine.ingest.worker import serve; serve(sys.argv[1])"
_PROGRAM = (sys.executable, "-I", "-B", "-X", "utf8", "-c", _START)
_RAISED: dict[str, type[MogineError]] = {
    cls.__name__: cls for cls in (UnreadableDocument, UnsupportedMedia, TooLarge)
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the child may use; time counts per document."""

    memory_bytes: int = 512 * 1024**2
    cpu_s: int = 30
    wall_s: float = 60.0
    files: int = 64


class Parser:
    """Reads documents in a child process, one at a time; callers on other threads wait."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def parse(self, name: str, data: bytes) -> Parsed:
        """As `load.parse`, and also raises UnreadableDocument when the document is too much for the child."""
        with self._lock:
            child = self._started()
            try:
                reply = self._ask(child, name, data)
            except BaseException:
                self._stop()
                raise
            if reply.get("is_last"):
                self._stop()
        if "error" in reply:
            raise _RAISED[reply["error"]](reply["message"])
        return Parsed(**{**reply["parsed"], "notes": tuple(reply["parsed"]["notes"])})

    def abort(self) -> None:
        """End the child at once, from any thread; who waits for its document is told that it broke off."""
        if (child := self._child) is not None:
            child.kill()

    def close(self) -> None:
        """End the child; the parser may be used again."""
        with self._lock:
            self._stop()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._stop()
            self._child = subprocess.Popen(  # noqa: S603 (our own interpreter and a fixed program)
                [*_PROGRAM, json.dumps(asdict(self._limits)), *import_path()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                # Ctrl-C is for the parent, which then ends the child.
                start_new_session=True,
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _ask(self, child: "subprocess.Popen[bytes]", name: str, data: bytes) -> dict[str, Any]:
        title = name.encode("utf-8", "surrogateescape")
        deadline = time.monotonic() + self._limits.wall_s
        try:
            _write(child, [_LENGTHS.pack(len(title), len(data)), title, data], deadline)
            (length,) = _LENGTH.unpack(_read(child, _LENGTH.size, deadline))
            if length > _MAX_REPLY_BYTES:
                raise UnreadableDocument("gives far more text than a document has; split it")
            reply: dict[str, Any] = json.loads(_read(child, length, deadline))
        except (EOFError, BrokenPipeError) as error:
            raise UnreadableDocument(self._epitaph(child)) from error
        except TimeoutError as error:
            raise UnreadableDocument(f"took longer than {self._limits.wall_s:g} seconds to read") from error
        return reply

    def _epitaph(self, child: "subprocess.Popen[bytes]") -> str:
        """Why the child died, in words about the document."""
        if child.wait() == -signal.SIGXCPU:
            return f"took more than {self._limits.cpu_s} seconds of computing to read"
        return "could not be read: its parser broke off; the file may be damaged or made to do harm"


def _write(child: "subprocess.Popen[bytes]", pieces: list[bytes], deadline: float) -> None:
    """All of it, unless the child stops reading."""
    descriptor = _descriptor(child.stdin)
    os.set_blocking(descriptor, False)
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            _wait(descriptor, select.POLLOUT, deadline)
            rest = rest[os.write(descriptor, rest[: 1024 * 1024]) :]


def _read(child: "subprocess.Popen[bytes]", count: int, deadline: float) -> bytes:
    descriptor = _descriptor(child.stdout)
    received = bytearray()
    while len(received) < count:
        _wait(descriptor, select.POLLIN, deadline)
        block = os.read(descriptor, min(count - len(received), 1024 * 1024))
        if not block:
            raise EOFError
        received += block
    return bytes(received)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Not select(): a server may have more than 1,024 descriptors open."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _descriptor(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise AssertionError("the child is started with both pipes")
    return pipe.fileno()


# --- in the child --------------------------------------------------------------------------------


def serve(limits_json: str) -> None:
    """Answer documents from standard input until it ends."""
    limits = Limits(**json.loads(limits_json))
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    # A library that prints must not speak into the answers.
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(silence, descriptor)
    _confine(limits)
    while head := requests.read(_LENGTHS.size):
        name_length, data_length = _LENGTHS.unpack(head)
        name = requests.read(name_length).decode("utf-8", "surrogateescape")
        data = requests.read(data_length)
        if len(data) < data_length:
            return
        _allow_cpu(limits.cpu_s)
        answer = _answer(name, data)
        is_last = bool(answer.get("is_last"))
        reply = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
        replies.write(_LENGTH.pack(len(reply)) + reply)
        replies.flush()
        if is_last:
            return


def _answer(name: str, data: bytes) -> dict[str, Any]:
    try:
        return {"parsed": asdict(parse(name, data))}
    except (UnreadableDocument, UnsupportedMedia, TooLarge) as error:
        return {"error": type(error).__name__, "message": error.message}
    except MemoryError:
        # What is left of the memory may be in shreds: the next document gets a new child.
        message = "needs more memory to read than any document should"
        return {"error": UnreadableDocument.__name__, "message": message, "is_last": True}


def _confine(limits: Limits) -> None:
    """Memory, files, core dumps; then nothing but reading files from here on."""
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_NOFILE, limits.files)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    sys.addaudithook(_forbid)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # macOS refuses some limits, that of memory above all; the others and the time still hold there.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (value, value))


def _allow_cpu(seconds: int) -> None:
    """The limit counts the whole life of the process, so it moves on with every document."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "ftplib.",
    "http.",
    "urllib.",
    "smtplib.",
    "webbrowser.",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Parsers have no business with the network, other programs, or writing files."""
    is_writing = event == "open" and len(arguments) > 2 and bool((arguments[2] or 0) & _WRITES)
    if is_writing or event.startswith(_FORBIDDEN):
        raise PermissionError(f"a parser tried {event}")
