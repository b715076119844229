"""A home whose file system is read-only, or becomes so while the proxy answers."""

import asyncio
import re
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mogine.analytics.store import AnalyticsStore
from tests.serve.conftest import question
from tests.servers import ADMIN_TOKEN, Child
from tests.waiting import until

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def own_mount(home: Path, *, mode: str = "rw") -> tuple[str, ...]:
    """Before a command: it sees `home` through a mount of its own, and nobody else does."""
    script = f'mount --bind "$0" "$0" && mount -o "remount,bind,{mode}" "$0" && exec "$@"'
    command = ("unshare", "-r", "-m", "sh", "-c", script, str(home))
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    return command


@pytest.fixture
def serve_apart(home: Path) -> Iterator[Callable[[], Child]]:
    """Starts `mogine serve proxy` where its home alone can be made read-only."""
    by = own_mount(home)
    children: list[Child] = []

    def start() -> Child:
        log = home.parent / f"stderr-{len(children)}.log"
        children.append(Child(home, ("proxy",), {}, log, by=by))
        return children[-1]

    yield start
    for child in children:
        child.close()


def turn(child: Child, mode: str) -> bool:
    """Makes the child's file system `ro` or `rw`: no, while a file is open for writing."""
    enter = ("nsenter", "-t", str(child.process.pid), "-U", "-m", "--preserve-credentials")
    mount = ("mount", "-o", f"remount,bind,{mode}", str(child.home))
    return subprocess.run([*enter, *mount], capture_output=True).returncode == 0


async def make_read_only(child: Child, store: AnalyticsStore, ask: Callable[[int], Any]) -> None:
    """While the record is locked, and the rows that were spooled wait, nothing is open for writing."""
    locker = sqlite3.connect(store.path, isolation_level=None)
    try:
        locker.execute("BEGIN IMMEDIATE")
        await ask(3)
        await until(lambda: any((child.home / "data/spool").glob("*.jsonl")))
        await until(lambda: asyncio.to_thread(turn, child, "ro"))
    finally:
        locker.close()


@pytest.mark.parametrize("end", ["writable again", "stopped"])
async def test_a_file_system_that_turns_read_only_costs_no_answer_and_no_row_untold(
    serve_apart: Callable[[], Child], home: Path, end: str
) -> None:
    """F18, P27."""
    child = await serve_apart().started()
    store = AnalyticsStore(home / "data/analytics.db")
    async with aiohttp.ClientSession() as session:

        async def ask(times: int) -> None:
            for number in range(times):
                body = question(f"question {number}", model="extract")
                async with session.post(f"{child.url()}/api/llm/extract", json=body) as response:
                    assert response.status == 200 and (await response.json())["choices"]

        async def wait_for_record(wanted: bool) -> None:
            async with asyncio.timeout(30):
                while True:
                    async with session.get(f"{child.url()}/readyz", headers=ADMIN) as response:
                        if ("record" in (await response.json())["problems"]) is wanted:
                            return
                    await asyncio.sleep(0.05)

        await ask(2)
        await until(lambda: store.summary().rows == 2)
        await make_read_only(child, store, ask)
        await ask(4)
        await wait_for_record(True)
        await ask(4)
        assert store.summary().rows == 2
        if end == "writable again":
            await until(lambda: asyncio.to_thread(turn, child, "rw"))
            await ask(1)
            await wait_for_record(False)
            await until(lambda: store.summary().rows == 14)
            assert store.summary().lost == 0
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    if end == "stopped":
        told = re.search(r"(\d+) questions could not be written before the end", child.stderr)
        assert told and int(told[1]) == 8
        # The next start takes up what was spooled before.
        child = await serve_apart().started()
        await until(lambda: store.summary().rows == 5)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("which", ["proxy", "all"])
@pytest.mark.parametrize("is_new", [True, False])
async def test_a_start_on_a_read_only_file_system_is_refused_with_its_remedy(
    home: Path, which: str, is_new: bool
) -> None:
    """F18."""
    if not is_new:
        (home / "data").mkdir(mode=0o700)
        AnalyticsStore(home / "data/analytics.db").prepare()
    by = await asyncio.to_thread(own_mount, home, mode="ro")
    child = Child(home, (which,), {}, home.parent / "stderr.log", by=by)
    try:
        assert await child.ended() in (1, 2)
    finally:
        child.close()
    assert "read-only" in child.stderr.lower() and "Traceback" not in child.stderr
