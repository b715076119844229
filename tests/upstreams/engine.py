"""A server of somebody else's as a process of a test: started until it answers, paused, resumed, killed."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

PATIENCE_S = 40.0
LOOK_EVERY_S = 0.02


class EngineProcess:
    """What all of them have; a subclass says how it is started and when it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> Sequence[str | Path]:
        """How it is started."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it takes questions."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Of the running server."""
        return self._running.pid

    def start(self) -> Self:
        """Return once it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self.answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"{self.command[0]} does not answer"
            time.sleep(LOOK_EVERY_S)
        return self

    def pause(self) -> None:
        """It takes connections and says nothing."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a power cut does, for what it holds in memory."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, f"{self.command[0]} is not running"
        return self._process
