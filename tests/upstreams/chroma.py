"""A real Chroma server of its own, empty at first: a pytest plugin with the fixture `chroma`.

`chroma.url` is what MOGINE_CHROMA_URL gets. It can be paused and resumed (SIGSTOP), killed, and started again
with what it had or empty.
"""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import pytest

from mogine.kb.chroma import Chroma, ChromaServer

PATIENCE_S = 40.0


class ChromaProcess:
    """`chroma run` on loopback, its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

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

    def start(self) -> Self:
        """Return once it answers."""
        program = Path(sys.executable).with_name("chroma")
        where = ("--path", str(self._folder / "data"), "--host", "127.0.0.1", "--port", str(self._port))
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "run", *where], cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, "the Chroma server does not answer"
            time.sleep(0.05)
        return self

    def start_empty(self) -> Self:
        """As after a new disk."""
        shutil.rmtree(self._folder / "data")
        return self.start()

    def pause(self) -> None:
        """It takes connections and says nothing."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "the Chroma server is not running"
        return self._process

    def _answers(self) -> bool:
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
