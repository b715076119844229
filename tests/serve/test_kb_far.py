"""The knowledge base of several machines over real servers: pulled over HTTP, and on a Chroma server."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mogine.doctor.home import House
from mogine.doctor.home import chroma as look
from mogine.errors import NotFound, UpstreamRefused, UpstreamUnreachable
from mogine.kb.embedders import open_embedder
from mogine.kb.generations import Generations
from mogine.kb.pull import Pulled, ServerSource, pull
from mogine.serve.kb import Shelf
from mogine.settings import load_settings
from tests.conftest import Run, clean_environ
from tests.kb.conftest import CharacterEmbedder, make_document, take_in
from tests.serve.conftest import Reply, Served, Start, assert_envelope
from tests.servers import ADMIN_TOKEN, Spawn
from tests.upstreams.chroma import ChromaProcess
from tests.upstreams.embeddings import EmbeddingsFake

QUESTION = {"question": "怎么退款", "stream": False}


async def ask(served: Served) -> Reply:
    reply: Reply = await served.post("/api/chat", QUESTION)
    return reply


async def health(served: Served) -> Mapping[str, object]:
    told: Mapping[str, object] = (await served.ask("GET", "/api/kb/health", server="kb")).json
    return told


async def far_tells(served: Served, field: str, value: str) -> None:
    """Returns once the health of the knowledge base says so."""
    async with asyncio.timeout(20):
        while value not in str((await health(served))[field]):  # noqa: ASYNC110 - a server is asked
            await asyncio.sleep(0.05)


async def found(served: Served, question: str, mode: str) -> Mapping[str, Any]:
    """What a search finds, as soon as it is made in this mode; none fails meanwhile."""
    async with asyncio.timeout(20):
        while True:
            reply = await served.ask("GET", f"/api/search?q={question}", server="kb")
            assert reply.status == 200
            told: Mapping[str, Any] = reply.json
            if told["mode"] == mode:
                return told


# --- pulled over HTTP ----------------------------------------------------------------------------


@pytest.fixture
async def writer(serve: Start) -> AsyncIterator[Served]:
    served = await serve("kb")
    take_in(Generations.of(served.settings), CharacterEmbedder(), make_document("a.md", "七天内退款"))
    yield served


def pulled_from(writer: Served, reader: Generations, token: str = ADMIN_TOKEN) -> Pulled:
    with contextlib.closing(ServerSource(writer.url("/", "kb"), token)) as source:
        return pull(reader, source, embedder="none")


async def test_generations_are_pulled_from_the_server(writer: Served, tmp_path: Path) -> None:
    reader = Generations(tmp_path / "reader" / "kb")
    first = await asyncio.to_thread(pulled_from, writer, reader)
    assert (first.generation, first.is_new) == ("g000001", True)
    assert not (await asyncio.to_thread(pulled_from, writer, reader)).is_new
    take_in(Generations.of(writer.settings), CharacterEmbedder(), make_document("b.md", "发票"))
    assert (await asyncio.to_thread(pulled_from, writer, reader)).generation == "g000002"
    assert set(reader.sources()) == {"a.md", "b.md"}


async def test_generations_are_for_the_admin(writer: Served, tmp_path: Path) -> None:
    """P20: whoever may not list the documents may not copy them."""
    block = "/api/kb/publication/block?generation=g000001&file=texts.db&number=0"
    for path in ("/api/kb/publication", block):
        assert_envelope(await writer.ask("GET", path, server="kb"), 401, "unauthorized")
    reader = Generations(tmp_path / "reader" / "kb")
    with pytest.raises(UpstreamRefused, match="MOGINE_ADMIN_TOKEN"):
        await asyncio.to_thread(pulled_from, writer, reader, "wrong-token")
    assert reader.current_name() is None


async def test_what_is_not_offered_is_not_found(writer: Served) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for query, status, reason in (
        ("generation=g000009&file=texts.db&number=0", 404, "not_found"),
        ("generation=../kb&file=lock&number=0", 404, "not_found"),
        ("generation=g000001&file=../../lock&number=0", 404, "not_found"),
        ("generation=g000001&file=texts.db&number=99", 404, "not_found"),
        ("generation=g000001&file=texts.db&number=-1", 400, "invalid_request"),
    ):
        assert (await writer.ask("GET", "/api/kb/publication", server="kb", headers=admin)).status == 200
        path = f"/api/kb/publication/block?{query}"
        assert_envelope(
            await writer.ask("GET", path, server="kb", headers=admin),
            status, reason, "number" if status == 400 else None,
        )  # fmt: skip


async def test_writer_without_documents_or_away_is_told(serve: Start, tmp_path: Path) -> None:
    served = await serve("kb")
    reader = Generations(tmp_path / "reader" / "kb")
    with pytest.raises(NotFound, match="mogine kb ingest"):
        await asyncio.to_thread(pulled_from, served, reader)
    with pytest.raises(UpstreamUnreachable, match="mogine serve kb"):
        pull(reader, ServerSource("http://127.0.0.1:1", "x"), embedder="none")


async def test_searches_never_fail_while_generations_are_pulled(writer: Served, tmp_path: Path) -> None:
    """Eight pulls under load: a server that runs follows within two seconds, and no search fails."""
    embedder = CharacterEmbedder()
    generations, reader = Generations.of(writer.settings), Generations(tmp_path / "reader" / "kb")
    with contextlib.closing(ServerSource(writer.url("/", "kb"), ADMIN_TOKEN)) as source:

        def follow(mark: int) -> str:
            documents = (make_document(f"{n}.md", f"mark{mark} words of document {n}") for n in range(8))
            take_in(generations, embedder, *documents)
            return pull(reader, source, embedder="characters").generation

        await asyncio.to_thread(follow, 0)
        shelf = Shelf(reader, embedder)
        watcher = asyncio.create_task(shelf.watch())
        await shelf.opened(15)
        running, seen = True, 0

        async def visitor(mode: str) -> None:
            nonlocal seen
            while running:
                hits = await shelf.run(lambda kb: kb.search("words of document", 50, mode))  # type: ignore[arg-type]
                assert len({hit.passage.text.split()[0] for hit in hits}) <= 2
                seen += 1
                await asyncio.sleep(0)

        visitors = [asyncio.create_task(visitor(mode)) for mode in ("hybrid", "vector", "keyword")]
        for mark in range(1, 9):
            name = await asyncio.to_thread(follow, mark)
            async with asyncio.timeout(2):
                while shelf.generation is None or shelf.generation.name != name:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        running = False
        await asyncio.gather(*visitors)
        assert seen > 8
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await asyncio.to_thread(shelf.close)


def followed(home: Path, url: str) -> tuple[str, int]:
    """The first line of `kb pull --every 1s`, and its exit code after Ctrl-C."""
    env = clean_environ({"MOGINE_EMBEDDER": "none", "MOGINE_ADMIN_TOKEN": ADMIN_TOKEN})
    command = [sys.executable, "-m", "mogine", "--home", str(home), "kb", "pull", url, "--every", "1s"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGINT)
    return line, child.returncode


async def test_commands_follow_the_writer(spawn: Spawn, mogine: Run, home: Path, tmp_path: Path) -> None:
    """As an owner does it: the token from a file, `--every` until Ctrl-C, and both ways out of a mistake."""
    writer_home = tmp_path / "writer"
    (writer_home / "docs").mkdir(parents=True)
    (writer_home / ".env").touch(mode=0o600)
    (writer_home / "docs" / "a.md").write_text("七天内可以退款。\n")
    words = {"MOGINE_EMBEDDER": "none"}
    where = ("--home", str(writer_home))

    def run(*args: str, **env: str) -> "tuple[int, str, str]":
        done = mogine(*args, env={**words, **env})
        return done.returncode, done.stdout, done.stderr

    assert run(*where, "kb", "ingest", str(writer_home / "docs"))[0] == 0
    child = await spawn("kb", home=writer_home)
    url = child.url("knowledge base") if "knowledge base" in child.stderr else child.url("kb")
    code, out, err = await asyncio.to_thread(lambda: run("kb", "pull", url, MOGINE_ADMIN_TOKEN=""))
    assert code == 2 and "--token-file" in err
    token = tmp_path / "token"
    token.write_text(ADMIN_TOKEN + "\n")
    code, out, err = await asyncio.to_thread(lambda: run("kb", "pull", url, "--token-file", str(token)))
    assert (code, err) == (0, "") and "generation g000001 serves now: 1 documents" in out
    code, out, err = await asyncio.to_thread(
        lambda: run("kb", "pull", MOGINE_KB_SHARE=url, MOGINE_ADMIN_TOKEN=ADMIN_TOKEN)
    )
    assert (code, out, err) == (0, "", ""), "cron has nothing to tell"
    (writer_home / "docs" / "b.md").write_text("周末营业。\n")
    assert run(*where, "kb", "ingest", str(writer_home / "docs"))[0] == 0
    line, code = await asyncio.to_thread(followed, home, url)
    assert "generation g000002 serves now: 2 documents" in line and code == 130
    code, out, _ = await asyncio.to_thread(lambda: run("kb", "search", "退款", "--json"))
    assert json.loads(out)["results"][0]["source"].endswith("docs/a.md")
    for args, told in (
        (("kb", "publish", url), "publish into a folder"),
        (("kb", "publish"), "MOGINE_KB_SHARE"),
        (("kb", "pull"), "MOGINE_KB_SHARE"),
        (("kb", "pull", url, "--every", "soon"), "30s"),
    ):
        code, _, err = await asyncio.to_thread(lambda args=args: run(*args))  # type: ignore[misc]
        assert code == 2 and told in err, err
    code, out, _ = await asyncio.to_thread(
        lambda: run(*where, "kb", "publish", str(tmp_path / "s"), "--json")
    )
    assert code == 0 and json.loads(out)["written_bytes"] > 0


# --- vectors on a Chroma server ------------------------------------------------------------------


@pytest.fixture
async def far(serve: Start, chroma: ChromaProcess, home: Path) -> AsyncIterator[Served]:
    """Proxy and knowledge base whose vectors are on the server, and an embedder without a model."""
    async with EmbeddingsFake() as fake:
        env = environment(chroma, fake)
        await asyncio.to_thread(prepare, home, env)
        yield await serve("kb", "proxy", env=env)


def environment(chroma: ChromaProcess, fake: EmbeddingsFake) -> dict[str, str]:
    return {
        "MOGINE_CHROMA_URL": chroma.url,
        "MOGINE_EMBEDDER": "http",
        "MOGINE_EMBED_BASE_URL": fake.base_url,
        "MOGINE_EMBED_MODEL": "characters",
    }


def prepare(home: Path, env: Mapping[str, str]) -> str:
    settings = load_settings(env, home)
    embedder = open_embedder(settings)
    try:
        return take_in(Generations.of(settings), embedder, make_document("a.md", "怎么退款：七天内退款。"))
    finally:
        embedder.close()


async def test_paused_chroma_costs_the_meaning_and_no_answer(far: Served, chroma: ChromaProcess) -> None:
    """P43, F28: SIGSTOP: passages are found by words, nobody waits, and it heals by itself."""
    assert (await found(far, "退款", "hybrid"))["results"][0]["source"] == "a.md"
    chroma.pause()
    for number in range(12):
        began = time.monotonic()
        told = (await far.ask("GET", f"/api/search?q=退款{number}", server="kb")).json
        assert (told["mode"], told["results"][0]["source"]) == ("keyword", "a.md")
        assert time.monotonic() - began < 2.9, "the chat waits 3 s for the knowledge base"
        reply = await ask(far)
        assert reply.status == 200 and reply.json["citations"][0]["source"] == "a.md"
    reply = await far.ask("GET", "/api/search?q=退款&mode=vector&top_k=2", server="kb")
    assert "MOGINE_CHROMA_URL" in assert_envelope(reply, 503, "kb_unavailable")
    assert "Retry-After" in reply.headers and chroma.url not in reply.body.decode()
    await far_tells(far, "status", "degraded")
    chroma.resume()
    await far_tells(far, "status", "ok")
    await found(far, "退款9", "hybrid")


async def test_chroma_that_is_started_empty_is_told_and_filled_again(
    far: Served, chroma: ChromaProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """P43, F28: killed, and back without its data: answers go on, the remedy is told, and it helps."""
    chroma.kill()
    assert (await ask(far)).json["citations"][0]["source"] == "a.md"
    chroma.start_empty()
    await far_tells(far, "problem", "mogine kb ingest")
    assert "does not have the vectors" in caplog.text
    assert (await ask(far)).status == 200
    settings = far.settings
    env = {
        "MOGINE_CHROMA_URL": chroma.url, "MOGINE_EMBEDDER": "http",
        "MOGINE_EMBED_BASE_URL": settings.kb.embed_base_url, "MOGINE_EMBED_MODEL": "characters",
    }  # fmt: skip
    assert await asyncio.to_thread(prepare, settings.home, env) == "g000002"
    await far_tells(far, "generation", "g000002")
    await far_tells(far, "status", "ok")
    await found(far, "退款了", "hybrid")


async def test_server_that_starts_before_chroma_serves_by_words(
    serve: Start, chroma: ChromaProcess, home: Path
) -> None:
    """P43: the order in which machines start does not matter."""
    async with EmbeddingsFake() as fake:
        env = environment(chroma, fake)
        await asyncio.to_thread(prepare, home, env)
        chroma.kill()
        served = await serve("kb", env=env)
        assert (await served.ask("GET", "/readyz", server="kb")).status == 200
        await found(served, "退款", "keyword")
        chroma.start()
        await found(served, "退款", "hybrid")
        await far_tells(served, "status", "ok")


async def test_answer_is_refused_where_the_knowledge_base_is_required(
    serve: Start, chroma: ChromaProcess, home: Path
) -> None:
    """P43: 503 kb_unavailable where so configured, from a Chroma server that is away as from no server."""
    async with EmbeddingsFake() as fake:
        env = {**environment(chroma, fake), "MOGINE_KB_REQUIRED": "true"}
        await asyncio.to_thread(prepare, home, env)
        served = await serve("kb", "proxy", env=env)
        assert (await ask(served)).status == 200
        chroma.kill()
        for stream in (False, True):
            reply = await served.post("/api/chat", {"question": f"怎么退款{stream}", "stream": stream})
            assert_envelope(reply, 503, "kb_unavailable")
            assert "Retry-After" in reply.headers
        assert_envelope(await served.ask("GET", "/api/search?q=退款", server="kb"), 503, "kb_unavailable")
        chroma.start()
        await far_tells(served, "status", "ok")
        assert (await ask(served)).status == 200
        assert [row.status for row in await served.rows()][:3] == ["ok", "error", "error"]


async def test_doctor_looks_at_the_chroma_server(far: Served, chroma: ChromaProcess) -> None:
    house = House(far.settings)
    (line,) = await asyncio.to_thread(lambda: list(look(house)))
    assert line.status == "ok" and "1 of 1 vectors" in line.detail
    chroma.kill()
    (line,) = await asyncio.to_thread(lambda: list(look(house)))
    assert line.status == "error" and "does not answer" in line.detail
    chroma.start_empty()
    (line,) = await asyncio.to_thread(lambda: list(look(house)))
    assert line.status == "error" and "mogine kb ingest" in line.fix
