"""The knowledge base server: the contract's routes, and swaps that no search notices."""

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mogine.errors import StoreError, Unavailable, UpstreamUnavailable
from mogine.kb.client import KnowledgeClient
from mogine.kb.embedders import NoEmbedder, Vectors, open_embedder
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.passages import Document, Hit, Passage, document_id
from mogine.serve.kb import NO_GENERATION, Query, Shelf
from mogine.serve.runner import started
from mogine.settings import Settings, load_settings
from tests.kb.conftest import CharacterEmbedder, make_document, take_in
from tests.upstreams.embeddings import EmbeddingsFake

ADMIN = {"Authorization": "Bearer " + "test-admin-token-" * 3}


@pytest.fixture
def words(home: Path) -> Settings:
    """Settings of a base without vectors: no model is loaded."""
    none = {"MOGINE_EMBEDDER": "none", "MOGINE_ADMIN_TOKEN": "test-admin-token-" * 3, "MOGINE_KB_PORT": "0"}
    return load_settings(none, home)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The server as it runs in production, and a client for it."""
    async with (
        started(settings, ["kb"]) as running,
        httpx.AsyncClient(base_url=running.url("kb"), trust_env=False, timeout=30) as client,
    ):
        yield client


async def until(
    client: httpx.AsyncClient, path: str, is_right: Callable[[httpx.Response], bool]
) -> httpx.Response:
    """Asks until the answer is right; the test's own time limit ends it otherwise."""
    async with asyncio.timeout(60):
        while True:
            response = await client.get(path)
            if is_right(response):
                return response
            await asyncio.sleep(0.02)


async def ready(client: httpx.AsyncClient) -> None:
    await until(client, "/readyz", lambda response: response.status_code == 200)


def ingest(settings: Settings, *documents: tuple[Document, list[Passage]]) -> str:
    embedder = open_embedder(settings)
    with Generations(settings.kb_path).begin(embedder) as draft:
        for document, passages in documents:
            draft.replace(document, passages)
        name = draft.commit()
    embedder.close()
    return name


def assert_envelope(response: httpx.Response, status: int, reason: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["reason"]) == (status, status, reason)
    assert error.get("param") == param
    assert error["request_id"] == response.headers["X-Request-Id"]
    return str(error["message"])


# --- search --------------------------------------------------------------------------------------


async def test_search_answers_as_the_contract_says(words: Settings) -> None:
    document = Document("docs/faq.pdf", "常见问题", "", "d1", "https://example.com/faq")
    passage = Passage(
        "d1:0", "docs/faq.pdf", "常见问题", "售后", 0, "七天内退款。", "https://example.com/faq", 4
    )
    name = ingest(words, (document, [passage]), make_document("b.md", "发票", title="发票"))
    async with serving(words) as client:
        await ready(client)
        response = await client.get("/api/search", params={"q": " 退款 ", "top_k": "1", "mode": "keyword"})
    body = response.json()
    assert response.headers["Content-Type"] == "application/json"
    assert list(body) == ["query", "mode", "generation", "took_ms", "results"]
    assert (body["query"], body["mode"], body["generation"]) == ("退款", "keyword", name)
    assert body["took_ms"] > 0
    (result,) = body["results"]
    assert 0 < result.pop("score") <= 1
    assert result == {
        "id": "d1:0",
        "text": "七天内退款。",
        "title": "常见问题",
        "heading": "售后",
        "source": "docs/faq.pdf",
        "url": "https://example.com/faq",
        "page": 4,
        "rank": 1,
    }


async def test_three_results_are_the_default(words: Settings) -> None:
    ingest(words, *(make_document(f"{n}.md", f"refund {n}") for n in range(9)))
    async with serving(words) as client:
        await ready(client)
        body = (await client.get("/api/search?q=refund")).json()
    assert body["mode"] == "hybrid"
    assert [result["rank"] for result in body["results"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({}, "q"),
        ({"q": ""}, "q"),
        ({"q": " \t\n"}, "q"),
        ({"q": "\0"}, "q"),
        ({"q": "退" * 2001}, "q"),
        ({"q": "a", "top_k": "0"}, "top_k"),
        ({"q": "a", "top_k": "51"}, "top_k"),
        ({"q": "a", "top_k": "-1"}, "top_k"),
        ({"q": "a", "top_k": "3.5"}, "top_k"),
        ({"q": "a", "top_k": ""}, "top_k"),
        ({"q": "a", "top_k": "٣"}, "top_k"),
        ({"q": "a", "top_k": "9" * 1000}, "top_k"),
        ({"q": "a", "mode": "magic"}, "mode"),
        ({"q": "a", "mode": "Hybrid"}, "mode"),
        ({"q": "a", "mode": "vector"}, "mode"),
    ],
)
async def test_wrong_parameter_is_named(words: Settings, parameters: dict[str, str], param: str) -> None:
    ingest(words, make_document("a.md", "a"))
    async with serving(words) as client:
        await ready(client)
        assert_envelope(await client.get("/api/search", params=parameters), 400, "invalid_request", param)


@pytest.mark.parametrize(
    "query", ["%ff%fe", "%ed%a0%80", "%00a", "a%0d%0aX: y", "%F0%9F%99%82", "%22%20OR%20%22"]
)
async def test_strange_bytes_in_a_question_are_no_fault_of_the_server(words: Settings, query: str) -> None:
    ingest(words, make_document("a.md", "a"))
    async with serving(words) as client:
        await ready(client)
        response = await client.get(f"/api/search?q={query}")
    assert response.status_code in (200, 400)
    assert "error" in response.json() or response.json()["results"] is not None


async def test_bundled_model_finds_meaning_in_both_languages(settings: Settings) -> None:
    ingest(
        settings,
        make_document("zh.md", "您可以在收货后七天内申请退款，款项将原路退回。"),
        make_document("en.md", "Our shop in Shanghai opens at nine in the morning and closes at five."),
        make_document("other.md", "公司总部位于深圳市南山区，成立于二零零五年。"),
    )
    async with serving(settings) as client:
        assert (await client.get("/healthz")).status_code == 200, "the model is loaded in the background"
        await ready(client)
        asked = {"How do I get my money back?": "zh.md", "上海的店几点开门？": "en.md", "退款": "zh.md"}
        for question, source in asked.items():
            body = (await client.get("/api/search", params={"q": question})).json()
            assert body["results"][0]["source"] == source
            assert body["mode"] == "hybrid"


async def test_embedder_elsewhere_that_fails_costs_the_meaning_not_the_words(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with EmbeddingsFake() as fake:
        settings = load_settings({**fake.environ, "MOGINE_KB_PORT": "0"}, home)
        await asyncio.to_thread(ingest, settings, make_document("a.md", "退款"))
        async with serving(settings) as client:
            await ready(client)
            body = (await client.get("/api/search?q=退款")).json()
            assert body["mode"] == "hybrid"
            await fake.stop()
            for _ in range(2):
                body = (await client.get("/api/search?q=申请退款")).json()
                assert (body["mode"], body["results"][0]["source"]) == ("keyword", "a.md")
            body = (await client.get("/api/search?q=退款")).json()
            assert body["mode"] == "hybrid", "an answer of before is still known, one by words alone is not"
            response = await client.get("/api/search?q=退款&mode=vector")
            assert_envelope(response, 503, "upstream_unavailable")
    assert "keywords only" in caplog.text


async def test_known_answer_ends_with_its_generation(words: Settings) -> None:
    ingest(words, make_document("a.md", "refund policy"))
    async with serving(words) as client:
        await ready(client)
        first = (await client.get("/api/search?q=refund")).json()
        again = (await client.get("/api/search?q=refund")).json()
        assert (again["results"], again["generation"]) == (first["results"], first["generation"])
        name = await asyncio.to_thread(ingest, words, make_document("b.md", "refund refund"))
        await until(client, "/api/kb/health", lambda r: r.json()["generation"] == name)
        later = (await client.get("/api/search?q=refund")).json()
    assert {result["source"] for result in later["results"]} == {"a.md", "b.md"}


async def test_search_whose_client_has_left_is_not_finished(words: Settings) -> None:
    ingest(words, make_document("a.md", "refund"))
    is_asked, may_go_on, outcome = threading.Event(), threading.Event(), []

    class Slow(NoEmbedder):
        name = "slow"
        dimensions = 2

        def embed_passages(self, texts: Sequence[str]) -> Vectors:
            return np.tile(np.array([1, 0], dtype=np.float32), (len(texts), 1))

        def embed_questions(self, texts: Sequence[str]) -> Vectors:
            is_asked.set()
            outcome.append(may_go_on.wait(10))
            return self.embed_passages(texts)

    embedder = Slow()
    generations = Generations(words.kb_path)
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "refund"))
        draft.commit()
    shelf = Shelf(generations, embedder)
    may_go_on.set()
    await asyncio.to_thread(shelf.refresh)
    may_go_on.clear()
    is_asked.clear()
    query = Query("refund", 3, "hybrid")
    search = asyncio.create_task(shelf.search(query))
    await asyncio.to_thread(is_asked.wait, 10)
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    may_go_on.set()
    _, _, hits = await shelf.search(query)
    assert hits and len(outcome) >= 2, "what was left undone is not taken for an answer"
    await asyncio.to_thread(shelf.close)


# --- before and after documents ------------------------------------------------------------------


async def test_before_the_first_ingest_the_remedy_is_told(words: Settings) -> None:
    async with serving(words) as client:
        response = await until(client, "/readyz", lambda r: "kb ingest" in r.text)
        assert response.status_code == 503
        assert response.json()["problems"] == {"knowledge": NO_GENERATION}
        response = await client.get("/api/search?q=退款")
        assert "mogine kb ingest ./docs" in assert_envelope(response, 503, "kb_unavailable")
        assert int(response.headers["Retry-After"]) >= 1
        assert (await client.get("/api/kb/health")).json()["status"] == "unavailable"
        assert_envelope(await client.get("/api/search?q="), 400, "invalid_request", "q")
        await asyncio.to_thread(ingest, words, make_document("a.md", "退款"))
        await ready(client)
        assert (await client.get("/api/search?q=退款")).json()["results"][0]["source"] == "a.md"


async def test_new_generation_serves_without_a_restart(words: Settings) -> None:
    ingest(words, make_document("a.md", "退款"))
    async with serving(words) as client:
        await ready(client)
        name = await asyncio.to_thread(ingest, words, make_document("b.md", "发票"))
        await until(client, "/api/search?q=发票", lambda r: bool(r.json()["results"]))
        health = (await client.get("/api/kb/health")).json()
        assert (health["generation"], health["documents"], health["passages"]) == (name, 2, 2)
        Generations(words.kb_path).rollback()
        await until(client, "/api/search?q=发票", lambda r: not r.json()["results"])


async def test_damaged_base_is_told_without_a_path(words: Settings, caplog: pytest.LogCaptureFixture) -> None:
    ingest(words, make_document("a.md", "退款"))
    (words.kb_path / "generations" / "g000001" / "texts.db").write_bytes(b"x" * 9000)
    async with serving(words) as client:
        response = await until(client, "/readyz", lambda r: "cannot be read" in r.text)
        assert str(words.home) not in response.text
        assert_envelope(await client.get("/api/search?q=退款"), 503, "kb_unavailable")
    assert str(words.home) in caplog.text, "the owner is told which file"


async def test_base_of_another_embedder_is_told_with_the_remedy(words: Settings, settings: Settings) -> None:
    ingest(words, make_document("a.md", "退款"))
    async with serving(settings) as client:
        response = await until(client, "/readyz", lambda r: "MOGINE_EMBEDDER" in r.text)
        assert "mogine kb ingest" in response.text


# --- documents, company --------------------------------------------------------------------------


async def test_documents_are_for_the_admin(words: Settings) -> None:
    ingest(words, make_document("docs/a.md", "one", "two", title="A", url="https://example.com/a"))
    id = document_id("docs/a.md")
    async with serving(words) as client:
        await ready(client)
        for path in ("/api/documents", f"/api/documents/{id}", "/api/documents/unknown"):
            assert_envelope(await client.get(path), 401, "unauthorized")
            assert (await client.head(path)).status_code == 401
        body = (await client.get("/api/documents", headers=ADMIN)).json()
        (listed,) = body["documents"]
        assert (body["generation"], listed["id"], listed["passage_count"]) == ("g000001", id, 2)
        shown = (await client.get(f"/api/documents/{id}", headers=ADMIN)).json()
        assert [passage["text"] for passage in shown["passages"]] == ["one", "two"]
        assert (shown["source"], shown["title"], shown["url"]) == ("docs/a.md", "A", "https://example.com/a")
        assert_envelope(await client.get("/api/documents/unknown", headers=ADMIN), 404, "not_found")


async def test_company_is_told_once_until_it_changes(words: Settings) -> None:
    text = '[company]\nname = "示例科技"\nproducts = ["A", "B"]\nfounded = 2005-04-01\n'
    text += '[company.contact]\nphone = "1"\n'
    (words.home / "site.toml").write_text(text, "utf-8")
    async with serving(words) as client:
        response = await client.get("/api/company_info")
        assert response.json() == {
            "name": "示例科技",
            "products": ["A", "B"],
            "founded": "2005-04-01",
            "contact": {"phone": "1"},
        }
        tag = response.headers["ETag"]
        again = await client.get("/api/company_info", headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        assert (await client.get("/api/company_info", headers={"If-None-Match": '"x"'})).status_code == 200


async def test_unknown_company_is_not_found(words: Settings) -> None:
    async with serving(words) as client:
        assert "site.toml" in assert_envelope(await client.get("/api/company_info"), 404, "not_found")


async def test_proxy_finds_what_the_server_serves(words: Settings) -> None:
    name = ingest(words, make_document("a.md", "七天内退款", title="售后"))
    async with serving(words) as http:
        await ready(http)
        async with KnowledgeClient(str(http.base_url)) as client:
            result = await client.search("退款", 3)
    assert result.generation == name
    assert [(hit.passage.source, hit.passage.title) for hit in result.hits] == [("a.md", "售后")]


# --- the shelf -----------------------------------------------------------------------------------


async def test_searches_never_fail_while_generations_are_swapped(tmp_path: Path) -> None:
    """Twelve ingests under load: each answer is whole, and belongs to the generation that gave it."""
    embedder = CharacterEmbedder()
    generations = Generations(tmp_path / "kb")
    seed = random.randrange(10**6)
    print(f"seed {seed}")

    def publish(mark: int) -> None:
        take_in(
            generations,
            embedder,
            *(make_document(f"{n}.md", f"mark{mark} words of document {n}") for n in range(8)),
        )

    await asyncio.to_thread(publish, 0)
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)
    watcher = asyncio.create_task(shelf.watch())
    running = True
    seen: list[set[str]] = []

    async def visitor(chance: random.Random) -> None:
        while running:
            mode = chance.choice(["hybrid", "vector", "keyword"])
            hits = await shelf.run(methodcaller("search", "words of document", 50, mode))
            seen.append({hit.passage.text.split()[0] for hit in hits})
            assert len(hits) == 8
            await asyncio.sleep(0)

    visitors = [asyncio.create_task(visitor(random.Random(seed + n))) for n in range(4)]
    for mark in range(1, 13):
        await asyncio.to_thread(publish, mark)
        await asyncio.get_running_loop().run_in_executor(None, shelf.refresh)
    running = False
    await asyncio.gather(*visitors)
    assert all(len(marks) == 1 for marks in seen), "no answer mixes two generations"
    assert len({frozenset(marks) for marks in seen}) > 3
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    await asyncio.to_thread(shelf.close)


class Gated(CharacterEmbedder):
    """An embedder whose questions wait until they are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()
        self.asked = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def embed_questions(self, texts: Any) -> Vectors:
        self.loop.call_soon_threadsafe(self.asked.set)
        asyncio.run_coroutine_threadsafe(self.may_go.wait(), self.loop).result()
        return super().embed_questions(texts)

    def embed_passages(self, texts: Any) -> Vectors:
        return CharacterEmbedder.embed_questions(self, texts)


async def test_running_search_finishes_on_the_generation_it_began_with(tmp_path: Path) -> None:
    embedder = Gated()
    generations = Generations(tmp_path / "kb")
    take_in(generations, embedder, make_document("a.md", "old words"))
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)
    search = asyncio.create_task(shelf.run(lambda knowledge: (knowledge, knowledge.search("words", 1))))
    await embedder.asked.wait()
    await asyncio.to_thread(take_in, generations, embedder, make_document("a.md", "new words"))
    await asyncio.to_thread(shelf.refresh)
    assert shelf.generation is not None
    assert shelf.generation.name == "g000002"
    embedder.may_go.set()
    knowledge, hits = await search
    assert (knowledge.name, hits[0].passage.text) == ("g000001", "old words")
    assert (await shelf.run(lambda k: k.search("words", 1)))[0].passage.text == "new words"
    await asyncio.to_thread(shelf.close)


async def test_search_whose_files_have_gone_is_answered_by_the_next_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kb compact --forget` removes them at once, and a server sees the pointer's move a moment later."""
    search = KnowledgeBase.search

    def search_but_in_the_first(knowledge: KnowledgeBase, *args: Any, **options: Any) -> list[Hit]:
        if knowledge.name == "g000001":
            raise StoreError("unable to open database file")
        return search(knowledge, *args, **options)

    monkeypatch.setattr(KnowledgeBase, "search", search_but_in_the_first)
    embedder = CharacterEmbedder()
    generations = Generations(tmp_path / "kb")
    take_in(generations, embedder, make_document("a.md", "old words"))
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)
    with pytest.raises(StoreError):
        await shelf.search(Query("words", 1, "hybrid"))
    await asyncio.to_thread(take_in, generations, embedder, make_document("a.md", "new words"))
    _, name, hits = await shelf.search(Query("words", 1, "hybrid"))
    assert (name, hits[0].passage.text) == ("g000002", "new words")
    await asyncio.to_thread(shelf.close)


async def test_too_many_waiting_searches_are_sent_away(tmp_path: Path) -> None:
    embedder = Gated()
    generations = Generations(tmp_path / "kb")
    take_in(generations, embedder, make_document("a.md", "words"))
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)

    def work(knowledge: KnowledgeBase) -> int:
        return len(knowledge.search("words", 1))

    waiting = [asyncio.create_task(shelf.run(work)) for _ in range(64)]
    await embedder.asked.wait()
    with pytest.raises(Unavailable) as caught:
        await shelf.run(work)
    assert caught.value.reason == "overloaded"
    for task in waiting[32:]:
        task.cancel()
    await asyncio.gather(*waiting[32:], return_exceptions=True)
    late = asyncio.create_task(shelf.run(work))
    embedder.may_go.set()
    assert await asyncio.gather(*waiting[:32], late) == [1] * 33
    await asyncio.to_thread(shelf.close)


async def test_generation_that_cannot_be_opened_leaves_the_old_one_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = NoEmbedder()
    generations = Generations(tmp_path / "kb")
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("a.md", "words"))
        draft.commit()
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "words"))
        name = draft.commit()
    (tmp_path / "kb" / "generations" / name / "texts.db").write_bytes(b"x" * 9000)
    caplog.set_level(logging.ERROR)
    for _ in range(5):
        await asyncio.to_thread(shelf.refresh)
    assert shelf.problem == ""
    assert len(await shelf.run(lambda knowledge: knowledge.search("words", 5))) == 1
    assert len(caplog.records) == 1, "told once, not at every look"
    generations.rollback()
    await asyncio.to_thread(shelf.refresh)
    assert shelf.generation is not None
    assert shelf.generation.name == "g000001"
    await asyncio.to_thread(shelf.close)


async def test_error_of_a_search_reaches_the_caller(tmp_path: Path) -> None:
    embedder = NoEmbedder()
    generations = Generations(tmp_path / "kb")
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("a.md", "words"))
        draft.commit()
    shelf = Shelf(generations, embedder)
    await asyncio.to_thread(shelf.refresh)

    def fail(knowledge: KnowledgeBase) -> None:
        raise UpstreamUnavailable("down")

    with pytest.raises(UpstreamUnavailable):
        await shelf.run(fail)
    await asyncio.to_thread(shelf.close)
    with pytest.raises(Unavailable):
        await shelf.run(fail)
