"""`mogine serve` as processes of their own, as a user starts them: a pytest plugin with `spawn`."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environ

ADMIN_TOKEN = "test-admin-token-" * 3
DEFAULTS = {
    "MOGINE_PROXY_PORT": "0",
    "MOGINE_KB_PORT": "0",
    "MOGINE_ANALYTICS_PORT": "0",
    "MOGINE_EMBEDDER": "none",
    "MOGINE_ADMIN_TOKEN": ADMIN_TOKEN,
    "MOGINE_RATE_LIMIT": "100000/minute",
    "MOGINE_SITE_RATE_LIMIT": "100000/minute",
}


class Child:
    """`mogine serve` as a process of its own, started by the command `by` if there is one."""

    def __init__(
        self, home: Path, args: Sequence[str], env: Mapping[str, str], log: Path, by: Sequence[str] = ()
    ) -> None:
        self.home = home
        self.path = log
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [*by, sys.executable, "-m", "mogine", "--home", str(home), "serve", *args],
            env=clean_environ({**DEFAULTS, **env}),
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def stderr(self) -> str:
        return self.path.read_text()

    async def started(self) -> "Child":
        async with asyncio.timeout(60):
            while "Ctrl-C stops." not in self.stderr:
                assert self.process.poll() is None, self.stderr
                await asyncio.sleep(0.02)
        return self

    def url(self, title: str = "proxy") -> str:
        match = re.search(rf"^[├└]─ {title} +(http://\S+)", self.stderr, re.MULTILINE)
        assert match, self.stderr
        return match[1]

    def port(self, server: str = "proxy") -> int:
        return int(self.url(server).rpartition(":")[2])

    def memory_kib(self, name: str = "VmRSS") -> int:
        """A line of the kernel's about the process: `VmRSS` now, `VmHWM` the most since `forget_peak`."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith(name + ":")]
        return int(line.split()[1])

    def forget_peak(self) -> None:
        """From here on `VmHWM` begins anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def descriptors(self) -> int:
        """How many files and sockets the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def command_line(self) -> str:
        """What any user of the machine can see of it."""
        return Path(f"/proc/{self.process.pid}/cmdline").read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, 30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


Spawn = Callable[..., Any]


@pytest.fixture
def spawn(home: Path) -> Iterator[Spawn]:
    """Starts `mogine serve WHICH ...` in the home, or in another: `child = await spawn("proxy", env)`."""
    children: list[Child] = []

    async def start(
        which: str = "proxy", env: Mapping[str, str] | None = None, *more: str, home: Path = home
    ) -> Child:
        log = home / f"stderr-{len(children)}.log"
        children.append(Child(home, (which, *more), env or {}, log))
        return await children[-1].started()

    yield start
    for child in children:
        child.close()
