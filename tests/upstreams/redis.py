"""A real Redis of its own, empty and without a file on disk: a pytest plugin with the fixture `redis`.

`redis.url` is what MOGINE_REDIS_URL gets. It can be paused and resumed (SIGSTOP), killed, and started again.
"""

import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.upstreams.engine import EngineProcess


class RedisServer(EngineProcess):
    """On a socket in `folder`, so that no port can be in somebody else's hands."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder)
        self._path = folder / "redis.sock"
        self._options = options

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    @property
    def command(self) -> Sequence[str | Path]:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        assert binary, "Redis is not installed; run scripts/test-system"
        where = ("--port", "0", "--unixsocket", str(self._path), "--dir", str(self.folder))
        return (binary, *where, "--save", "", "--appendonly", "no", *self._options)

    def start(self) -> Self:
        """Start empty, and return once it answers."""
        self._path.unlink(missing_ok=True)
        return super().start()

    def answers(self) -> bool:
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
