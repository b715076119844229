"""Whose port it is, as the kernel tells."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mogine.ports import holder, listening_addresses
from tests.conftest import Run
from tests.servers import DEFAULTS, Spawn

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")


async def test_a_port_in_use_names_the_server_that_has_it(spawn: Spawn, mogine: Run) -> None:
    child = await spawn("analytics")
    done = mogine(
        "serve", "analytics", env={**DEFAULTS, "MOGINE_ANALYTICS_PORT": str(child.port("analytics"))}
    )
    assert done.returncode == 2
    assert f"in use by process {child.process.pid} (mogine --home" in done.stderr
    assert "serve analytics" in done.stderr and "MOGINE_ANALYTICS_PORT" in done.stderr


def test_of_another_program_only_the_name_is_told() -> None:
    code = (
        "import socket, sys\ns = socket.create_server(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "--password=test-secret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = holder(int(process.stdout.readline()))
        assert told == f"process {process.pid} ({Path(sys.executable).name})"
        process.stdin.close() if process.stdin else None


def test_nobody_holds_a_port_that_is_free() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert holder(port) == ""
        assert listening_addresses(port) == []
        sock.listen()
        assert holder(port).startswith(f"process {os.getpid()} (")
        assert listening_addresses(port) == ["127.0.0.1"]


def test_addresses_of_both_families_are_read() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6) as six:
        assert listening_addresses(six.getsockname()[1]) == ["::"]


def test_a_machine_without_proc_knows_nothing(tmp_path: Path) -> None:
    assert holder(80, tmp_path) == ""
    assert listening_addresses(80, tmp_path) == []
