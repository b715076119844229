"""The knowledge base's client: what it gives, and its one kind of failure."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from mogine.errors import Unavailable
from mogine.kb.client import KnowledgeClient, SearchResult
from mogine.kb.passages import MAX_QUERY_CHARS, Hit, Passage
from mogine.serve.runner import MAX_LINE_BYTES

RESULT = {
    "id": "d1:0",
    "text": "七天内退款。",
    "title": "常见问题",
    "heading": "售后",
    "source": "faq.md",
    "url": "https://example.com/faq",
    "page": 4,
    "score": 0.75,
    "rank": 1,
}
BODY = {"query": "退款", "mode": "hybrid", "generation": "g000007", "took_ms": 12.5, "results": [RESULT]}
ENVELOPE = {"error": {"message": "run `mogine kb ingest ./docs`", "type": "server_error", "code": 503}}


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """A server that answers searches with `handler`; its address."""
    app = web.Application()
    app.router.add_get("/api/search", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.05, max_line_size=MAX_LINE_BYTES)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


async def test_search_asks_and_gives_hits() -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        return web.json_response(BODY)

    async with serving(handler) as address, KnowledgeClient(address) as client:
        result = await client.search("退款&x=1", 5)
    passage = Passage("d1:0", "faq.md", "常见问题", "售后", 0, "七天内退款。", "https://example.com/faq", 4)
    assert result == SearchResult((Hit(passage, 0.75),), "g000007", 12.5)
    assert asked == [{"q": "退款&x=1", "top_k": "5", "mode": "hybrid"}]


async def test_long_question_is_cut_and_an_empty_one_not_asked() -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.query["q"])
        return web.json_response({**BODY, "results": []})

    async with serving(handler) as address, KnowledgeClient(address) as client:
        assert (await client.search(" \n", 3)).hits == ()
        assert (await client.search("\udc80", 3)).hits == ()
        await client.search("退" * 8000, 3)
    assert [len(question) for question in asked] == [MAX_QUERY_CHARS]


@pytest.mark.parametrize(
    "response",
    [
        (503, json.dumps(ENVELOPE)),
        (500, "<html>"),
        (404, "[]"),
        (302, ""),
        (200, "no json"),
        (200, "[]"),
        (200, json.dumps({**BODY, "results": [{"id": 1}]})),
        (200, json.dumps({**BODY, "results": [{**RESULT, "score": "high"}]})),
        (200, json.dumps({**BODY, "results": None})),
    ],
)
async def test_anything_but_an_answer_is_unavailable(response: tuple[int, str]) -> None:
    async def handler(request: web.Request) -> web.Response:
        headers = {"Location": "http://127.0.0.1:9/"} if response[0] == 302 else {}
        return web.Response(status=response[0], text=response[1], headers=headers)

    async with serving(handler) as address, KnowledgeClient(address) as client:
        with pytest.raises(Unavailable) as caught:
            await client.search("退款")
    assert caught.value.reason == "kb_unavailable"


async def test_remedy_of_the_server_is_passed_on() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(ENVELOPE, status=503)

    async with serving(handler) as address, KnowledgeClient(address) as client:
        with pytest.raises(Unavailable, match=r"mogine kb ingest \./docs"):
            await client.search("退款")


async def test_slow_and_absent_servers_are_unavailable() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError("the client has waited")

    async with serving(handler) as address, KnowledgeClient(address, timeout_s=0.05) as client:
        with pytest.raises(Unavailable, match="mogine serve kb"):
            await client.search("退款")
    async with KnowledgeClient(address) as client:
        with pytest.raises(Unavailable, match="mogine serve kb"):
            await client.search("退款")
