"""systemd and PM2 are told what they wait for, and nobody else anything."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mogine.errors import SettingsError
from mogine.serve.notify import Herald
from tests.conftest import clean_environ
from tests.servers import DEFAULTS, Spawn


class Ear(asyncio.DatagramProtocol):
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.heard += data.decode().split("\n")

    async def until(self, line: str, times: int = 1) -> None:
        async with asyncio.timeout(30):
            while sum(heard.startswith(line) for heard in self.heard) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def listen(address: str) -> tuple[Ear, asyncio.DatagramTransport]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, ear = await loop.create_datagram_endpoint(Ear, sock=sock)
    return ear, transport


@pytest.mark.parametrize("more", [(), ("--apart",)])
async def test_systemd_hears_of_every_state_and_of_life(
    spawn: Spawn, tmp_path: Path, more: tuple[str, ...]
) -> None:
    address = str(tmp_path / "notify")
    ear, transport = await listen(address)
    child = await spawn("all", {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"}, *more)
    await ear.until("READY=1")
    assert any(line.startswith("STATUS=serving") for line in ear.heard)
    await ear.until("WATCHDOG=1", times=3)
    if not more:
        child.send(signal.SIGHUP)
        await ear.until("RELOADING=1")
        await ear.until("READY=1", times=2)
        (stamp,) = [line for line in ear.heard if line.startswith("MONOTONIC_USEC=")]
        assert int(stamp.partition("=")[2]) > 0
    child.send(signal.SIGTERM)
    await ear.until("STOPPING=1")
    assert await child.ended() == 0
    assert ear.heard.count("READY=1") == (1 if more else 2), "no child speaks for its parent"
    transport.close()


async def test_an_address_in_the_abstract_is_understood() -> None:
    name = f"mogine-test-{os.getpid()}"
    ear, transport = await listen(f"\0{name}")
    Herald(address=f"@{name}").ready("all is well")
    await ear.until("READY=1")
    assert ear.heard == ["READY=1", "STATUS=all is well"]
    transport.close()


def test_node_reads_one_word_when_the_servers_answer(home: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environ = clean_environ({**DEFAULTS, "NODE_CHANNEL_FD": str(theirs.fileno())})
        process = subprocess.Popen(
            [sys.executable, "-m", "mogine", "--home", home, "serve", "analytics"],
            env=environ,
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.DEVNULL,
        )
        ours.settimeout(60)
        assert ours.recv(100) == b'"ready"\n'
        process.terminate()
        assert process.wait(30) == 0


def test_a_supervisor_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    herald = Herald(address=str(tmp_path / "nobody"), watchdog_s=1.0, channel=writing)
    herald.ready("x")
    herald.alive()
    herald.stopping()
    os.close(writing)


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    assert Herald.of({"WATCHDOG_USEC": "30000000"}).beat_s == 10
    assert Herald.of({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}).beat_s == 10
    assert Herald.of({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}).beat_s == 0
    assert Herald.of({}).beat_s == 0


def test_words_where_numbers_belong_are_refused() -> None:
    with pytest.raises(SettingsError, match="NODE_CHANNEL_FD"):
        Herald.of({"NODE_CHANNEL_FD": "three"})
