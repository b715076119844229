"""A real Chroma server of its own, empty at first: a pytest plugin with the fixture `chroma`.

`chroma.url` is what MOGINE_CHROMA_URL gets. It can be paused and resumed (SIGSTOP), killed, and started again
with what it had or empty.
"""

import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import httpx
import pytest

from mogine.kb.chroma import Chroma, ChromaServer
from tests.upstreams.engine import EngineProcess


class ChromaProcess(EngineProcess):
    """`chroma run` on loopback, its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def chroma(self) -> Chroma:
        """What a Generations of a home with this address has."""
        return Chroma(self.url)

    def names(self) -> list[str]:
        """Of all collections of ours."""
        server = ChromaServer(self.chroma)
        found = server.names("mogine-")
        server.close()
        return sorted(found)

    @property
    def command(self) -> Sequence[str | Path]:
        program = Path(sys.executable).with_name("chroma")
        where = ("--path", str(self.folder / "data"), "--host", "127.0.0.1", "--port", str(self._port))
        return (program, "run", *where)

    def start_empty(self) -> Self:
        """As after a new disk."""
        shutil.rmtree(self.folder / "data")
        return self.start()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/v2/heartbeat", timeout=1, trust_env=False).is_success
        except httpx.HTTPError:
            return False


@pytest.fixture
def chroma() -> Iterator[ChromaProcess]:
    """One that runs; killed at the end."""
    with tempfile.TemporaryDirectory(prefix="chroma-") as folder:
        server = ChromaProcess(Path(folder)).start()
        yield server
        server.kill()
