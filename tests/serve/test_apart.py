"""`mogine serve all --apart`: the death of one server leaves the others answering, and it comes back."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp

from tests.serve.conftest import events_of, read_rows
from tests.servers import Child, Spawn


def children(child: Child) -> dict[str, int]:
    """Server to process id."""
    pid = child.process.pid
    found = {}
    for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{one}/cmdline").read_bytes().decode().split("\0")
        if "worker" in words:
            found[words[words.index("worker") + 1]] = int(one)
    return found


async def test_who_dies_is_started_again_while_the_others_answer(spawn: Spawn, home: Path) -> None:
    child = await spawn("all", {}, "--apart")
    before = children(child)
    assert set(before) == {"analytics", "kb", "proxy"}
    async with aiohttp.ClientSession() as session:
        for name in ("kb", "analytics"):
            os.kill(before[name], signal.SIGKILL)
            async with session.post(child.url() + "/api/chat", json={"question": "退款"}) as response:
                assert events_of(await response.read())[-1][0] == "done"
        for title in ("knowledge base", "analytics", "proxy"):
            async with asyncio.timeout(60):
                while True:
                    try:
                        async with session.get(child.url(title) + "/healthz") as response:
                            assert response.status == 200
                            break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.05)
    after = children(child)
    assert after["proxy"] == before["proxy"] and after["kb"] != before["kb"]
    assert "a worker (kb) has ended with -9" in child.stderr
    child.send(signal.SIGTERM)
    assert await child.ended() == 0
    assert len(read_rows(home)) == 2
