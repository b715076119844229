"""`mogine chat --server`: through the real proxy, and against servers that are none."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mogine.answer import AnswerEvent, Answering
from mogine.chat import ChatMessage, Citation, Citations, Delta, Finish, Reasoning, Usage
from mogine.commands.remote import error_of, open_server, server_root
from mogine.errors import (
    RateLimited,
    RequestError,
    SettingsError,
    Unavailable,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamUnreachable,
)
from mogine.serve.proxy import create_app
from mogine.settings import Settings, load_settings
from tests.conftest import clean_environ
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import cut, say, script, think, usage

QUESTION = [ChatMessage("user", "保修多久？")]


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """`app` on a free loopback port, started as in production."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def answering(*frames: bytes, status: int = 200, kind: str = "text/event-stream") -> web.Application:
    """A server that answers every question with these bytes."""

    async def chat(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": kind})
        await response.prepare(request)
        for frame in frames:
            await response.write(frame)
        return response

    app = web.Application()
    app.router.add_post("/prefix/api/chat", chat)
    return app


async def ask(address: str, provider: str | None = None) -> list[AnswerEvent]:
    async with open_server(address, provider, "") as asker:
        return [event async for event in asker.ask(QUESTION)]


async def test_answer_of_the_real_proxy_comes_as_events(home: Path) -> None:
    answer = script(think("hm"), say("zwei", " Jahre"), usage(31, 58, reasoning=37))
    async with DoubaoFake(answer) as fake:
        settings = load_settings({**fake.environ, "MOGINE_KB_URL": "http://127.0.0.1:9"}, home)
        async with serving(create_app(settings)) as root, open_server(root, None, "") as asker:
            events = [event async for event in asker.ask(QUESTION)]
            assert events == [
                Citations(()),
                Reasoning("hm"),
                Delta("zwei"),
                Delta(" Jahre"),
                Usage(31, 58, 37),
                Answering("doubao", fake.environ["DOUBAO_MODEL"]),
                Finish("stop", fake.environ["DOUBAO_MODEL"]),
            ]
            first = asker.session_id
            assert len(first) >= 22
            async for _ in asker.ask([ChatMessage("user", "und Stühle?")]):
                pass
            assert asker.session_id == first
        said = [m["content"] for m in fake.requests[-1].json["messages"] if m["role"] != "system"]
        assert said == ["保修多久？", "zwei Jahre", "und Stühle?"]


async def test_command_line_asks_the_server(home: Path, settings: Settings) -> None:
    async with serving(create_app(settings)) as root:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mogine", "chat", "Hello?", "--provider", "extract", "--json"),
            *("--server", root),
            cwd=home,
            env=clean_environ(),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(child.communicate(), 60)
        assert child.returncode == 0
        answer = json.loads(out)
        assert answer["provider"] == "extract"
        assert answer["answer"].startswith("Nothing about this was found")


async def test_error_within_the_stream_is_raised_after_what_came_before(home: Path) -> None:
    async with DoubaoFake(script(say("half"), cut())) as fake:
        settings = load_settings({**fake.environ, "MOGINE_KB_URL": "http://127.0.0.1:9"}, home)
        async with serving(create_app(settings)) as root, open_server(root, None, "") as asker:
            events: list[AnswerEvent] = []
            with pytest.raises(UpstreamError):
                async for event in asker.ask(QUESTION):
                    events.append(event)
            assert Delta("half") in events


async def test_refusal_of_the_real_proxy_keeps_its_words_and_reason(settings: Settings) -> None:
    async with serving(create_app(settings)) as root, open_server(root, None, "") as asker:
        with pytest.raises(RequestError) as caught:
            async for _ in asker.ask([ChatMessage("user", "x" * 8001)]):
                pass
        assert caught.value.reason == "question_too_long"
        assert "request " in caught.value.message


async def test_citations_of_another_server_are_read_with_care() -> None:
    citations = {
        "citations": [{"number": 1, "title": "T", "excerpt": "e", "score": 0.5}, "junk", {"score": "x"}]
    }
    app = answering(
        b": ping\n\n",
        b"event: citations\ndata: " + json.dumps(citations).encode() + b"\n\nevent: del",
        b'ta\ndata: {"text": "a"}\n\nevent: news\ndata: {}\n\n',
        b'event: usage\ndata: {"prompt_tokens": true}\n\n',
        b"event: done\ndata: not json\n\n",
    )
    async with serving(app) as origin:
        assert await ask(f"{origin}/prefix/chat/") == [
            Citations((Citation(1, "T", "", "", "", "e", 0.5), Citation(0, "", "", "", "", "", 0.0))),
            Delta("a"),
            Usage(0, 0),
            Answering("", ""),
            Finish("stop", ""),
        ]


@pytest.mark.parametrize(
    ("app", "words"),
    [
        (answering(b'event: delta\ndata: {"text": "a"}\n\n'), "before it was complete"),
        (answering(b"<html>", status=200, kind="text/html"), "no mogine server"),
        (answering(b"<html>" * 50_000, status=502, kind="text/html"), "no mogine server"),
        (answering(b'{"detail": "x"}', status=404, kind="application/json"), "no mogine server"),
    ],
)
async def test_server_that_is_none_is_told(app: web.Application, words: str) -> None:
    async with serving(app) as origin:
        with pytest.raises(UpstreamBadResponse, match=words):
            await ask(f"{origin}/prefix")


async def test_no_server_says_how_to_start_one(unused_tcp_port: int) -> None:
    with pytest.raises(UpstreamUnreachable, match="mogine serve all"):
        await ask(f"http://127.0.0.1:{unused_tcp_port}")


@pytest.mark.parametrize(
    ("told", "kind", "code"),
    [
        ({"type": "rate_limit_error", "reason": "budget_exhausted"}, RateLimited, 6),
        ({"type": "rate_limit_error", "reason": "upstream_busy"}, UpstreamBusy, 4),
        ({"type": "proxy_error", "reason": "upstream_refused"}, UpstreamError, 4),
        ({"type": "server_error", "reason": "upstream_unavailable"}, UpstreamError, 4),
        ({"type": "server_error", "reason": "shutting_down"}, Unavailable, 1),
        ({"type": "invalid_request_error", "reason": "question_too_long"}, RequestError, 2),
        ({}, UpstreamError, 4),
        (None, UpstreamError, 4),
    ],
)
def test_envelope_becomes_an_error_with_its_exit_code(
    told: dict[str, Any] | None, kind: type[Exception], code: int
) -> None:
    error = error_of(told)
    assert isinstance(error, kind)
    assert error.exit_code == code


@pytest.mark.parametrize(
    ("address", "root"),
    [
        ("http://127.0.0.1:8741", "http://127.0.0.1:8741"),
        ("127.0.0.1:8741/", "http://127.0.0.1:8741"),
        ("https://site.example/~temp/mogine_agent/chat/", "https://site.example/~temp/mogine_agent"),
        ("http://[::1]:8741", "http://[::1]:8741"),
    ],
)
def test_address_of_a_server_or_its_page_will_do(address: str, root: str) -> None:
    assert server_root(address) == root


@pytest.mark.parametrize(
    "address", ["", "ftp://x", "http://", "http://h:99999", "http://u:p@h", "http://h/?q"]
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="expected an address"):
        server_root(address)
