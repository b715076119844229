"""A real Redis of its own, empty and without a file on disk: a pytest plugin with the fixture `redis`.

`redis.url` is what MOGINE_REDIS_URL gets. It can be paused and resumed (SIGSTOP), killed, and started again.
"""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

PATIENCE_S = 20.0


class RedisServer:
    """On a socket in `folder`, so that no port can be in somebody else's hands."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._path = folder / "redis.sock"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        return self._running.pid

    def start(self) -> Self:
        """Start empty, and return once it answers."""
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        assert binary, "Redis is not installed; run scripts/test-system"
        self._path.unlink(missing_ok=True)
        where = ("--port", "0", "--unixsocket", str(self._path), "--dir", str(self._folder))
        self._process = subprocess.Popen(
            [binary, *where, "--save", "", "--appendonly", "no", *self._options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)
        return self

    def pause(self) -> None:
        """It takes connections and says nothing."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """All that it held is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "redis-server is not running"
        return self._process

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self._path))
                probe.sendall(b"PING\r\n")
                return bool(probe.recv(64))
            except OSError:
                return False


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """One that runs; killed at the end."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder)).start()
        yield server
        server.kill()
