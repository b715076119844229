"""Workers that read on, or end, an answer which another of them gives."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import pytest

from mogine.serve import siblings
from mogine.serve.replay import Replay, Replays
from mogine.serve.siblings import LENGTH, Siblings
from tests.serve.conftest import assert_envelope, read_rows
from tests.serve.test_resume import CHAT, RESUME, SESSION, last_id, place, read_until
from tests.serve.test_workers import Site, site
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import hang, pause, say, script


async def begin(served: Site) -> aiohttp.ClientResponse:
    asked = {"question": "q", "session_id": SESSION, "resume": True}
    return await served.session.post(f"http://127.0.0.1:{served.port}{CHAT}", json=asked)


async def resume(served: Site, where: dict[str, str]) -> aiohttp.ClientResponse:
    return await served.session.post(f"http://127.0.0.1:{served.port}{RESUME}", json=where)


async def test_an_answer_is_read_on_and_stopped_through_any_worker(home: Path) -> None:
    """P5, B11: each request has a connection of its own, and the kernel chooses among three workers."""
    answers = [*[script(say("one "), pause(0.3), say("two"))] * 4, *[script(say("half"), hang())] * 4]
    async with DoubaoFake(*answers) as fake:
        env = {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_RESUME_GRACE": "60"}
        async with site(home, {**env, "MOGINE_RATE_LIMIT": "99/minute"}, workers=3) as served:
            for number in range(4):
                first = await begin(served)
                got = await read_until(first, "one ")
                first.close()
                where, after = place(got), {"Last-Event-ID": last_id(got)}
                rests = [served.ask("POST", RESUME, json=where, headers=after) for _ in range(4)]
                for reply in await asyncio.gather(*rests):
                    assert [data["text"] for name, data in reply.events if name == "delta"] == ["two"]
                    assert reply.events[-1][0] == "done"
                foreign = {**where, "session_id": "b" * 32}
                assert_envelope(await served.post(RESUME, foreign), 404, "not_found")
                assert len(fake.requests) == number + 1, "it was asked for once"
            for number in range(4, 8):
                first = await begin(served)
                where = place(await read_until(first, "half"))
                foreign = {**where, "session_id": "b" * 32}
                assert_envelope(await served.post("/api/chat/stop", foreign), 404, "not_found")
                assert (await served.post("/api/chat/stop", where)).json == {"status": "stopped"}
                await fake.wait_disconnect(number)
                first.close()
            assert await served.stop() == 0
    assert [row.status for row in read_rows(home)].count("aborted") == 4


async def test_readers_through_other_workers_who_leave_end_the_answer_after_the_grace(home: Path) -> None:
    """P5"""
    async with DoubaoFake(script(say("half"), hang())) as fake:
        env = {**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_RESUME_GRACE": "0.5"}
        async with site(home, env, workers=3) as served:
            first = await begin(served)
            where = place(await read_until(first, "half"))
            readers = [await resume(served, where) for _ in range(6)]
            for reader in readers:
                await read_until(reader, "half")
            first.close()
            with pytest.raises(TimeoutError):
                await fake.wait_disconnect(0, timeout_s=1)
            for reader in readers:
                reader.close()
            await fake.wait_disconnect(0)
            assert await served.stop() == 0


# --- without processes around it ------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the sockets lie: a short path, as sockets need it."""
    with TemporaryDirectory() as path:
        yield Path(path)


@asynccontextmanager
async def worker(folder: Path, name: str, replays: Replays) -> AsyncIterator[None]:
    """One that answers its siblings."""
    tasks: list[asyncio.Task[None]] = []

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(siblings.answer(replays, reader, writer)))

    server = await asyncio.start_unix_server(take, str(folder / name))
    yield
    server.close()
    await replays.close()
    await asyncio.gather(*tasks)


async def halves(replay: Replay) -> None:
    replay.push(b"data: 1\n\n")
    await asyncio.Event().wait()


async def test_a_worker_that_is_dead_or_does_not_reply_is_passed_over(folder: Path) -> None:
    """F28: the answer is found at the last of them, once the silent one was waited for."""
    replays = Replays(60)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(worker(folder, "9", replays))
        (folder / "2").touch()
        dead, silent = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        dead.bind(str(folder / "3"))
        dead.close()
        silent.bind(str(folder / "4"))
        silent.listen()
        replays.start("x", "me", SESSION, halves)
        here = Siblings(folder / "1")
        frames = await here.read("x", "me", SESSION, 0)
        assert frames is not None
        async with contextlib.aclosing(frames):
            assert await anext(frames) == b"id: 1\ndata: 1\n\n"
        silent.close()
        assert await here.read("x", "you", SESSION, 0) is None
        assert not await here.stop("x", "me", "b" * 32)
        assert await here.stop("x", "me", SESSION)
        assert await here.read("x", "me", SESSION, 0) is None, "it is over"


async def test_a_folder_that_somebody_has_tidied_away_is_nobody_there(folder: Path) -> None:
    assert await Siblings(folder / "gone" / "1").read("x", "me", SESSION, 0) is None


async def test_frames_end_early_when_the_worker_that_gives_them_dies(folder: Path) -> None:
    def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(siblings.HERE + LENGTH.pack(3) + b"one" + LENGTH.pack(3) + b"t")
        writer.close()

    server = await asyncio.start_unix_server(cut, str(folder / "2"))
    frames = await Siblings(folder / "1").read("x", "me", SESSION, 0)
    assert frames is not None
    assert [block async for block in frames] == [b"one"]
    server.close()


def listening(pids: Iterable[int]) -> list[Path]:
    """The named sockets of these processes that are the workers' own."""
    held = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                held.add(os.readlink(fd))
    lines = Path("/proc/net/unix").read_text().splitlines()
    sockets = [line.split() for line in lines if "/mogine-" in line]
    return [Path(path) for *_, number, path in sockets if f"socket:[{number}]" in held]


async def test_only_this_user_may_enter_the_folder_of_the_sockets(home: Path) -> None:
    """B11"""
    async with site(home, {}) as served:
        sockets = listening(served.children())
        assert len(sockets) == 2
        folder = sockets[0].parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert await served.stop() == 0
    assert not folder.exists()
