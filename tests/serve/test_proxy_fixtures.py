"""Every recorded answer of the vendors, replayed through the proxy in both dialects."""

import json
from typing import Any

import pytest

from mogine.errors import UpstreamError
from mogine.providers.compatible import CompletionParser
from mogine.providers.dashscope import ApplicationParser
from tests.providers.outcome import Outcome, parse
from tests.serve.conftest import Reply, Served, Start, assert_envelope, question
from tests.upstreams.dashscope import APP_ID
from tests.upstreams.replay import Fixture, ReplayFake, fixtures

PROVIDERS = {"ark": "doubao", "dashscope": "dashscope", "openai": "openai"}
SECRET = "test-key-that-nobody-may-see"

CHATS = [f for f in fixtures() if f.path.endswith(("/chat/completions", "/completion"))]
STREAMS = [f for f in CHATS if f.kind == "sse" and f.status == 200]
ANSWERS = [f for f in CHATS if f.kind == "json" and f.status == 200]
ERRORS = [f for f in CHATS if f.status != 200]
# Those that may heal are asked again after a wait: once through is enough.
ASKED_ERRORS = [(f, True) for f in ERRORS] + [(f, False) for f in ERRORS if f.status in (400, 401, 403, 404)]
UNDERSTOOD = [f for f in STREAMS if f.expect is not None]
COMPLETE = [f for f in STREAMS if (f.expect or {}).get("done")]


def environ(fake: ReplayFake) -> dict[str, str]:
    return {
        **{f"{name}_API_KEY": SECRET for name in ("DOUBAO", "DASHSCOPE", "OPENAI")},
        **{f"{name}_BASE_URL": fake.base_url for name in ("DOUBAO", "DASHSCOPE", "OPENAI")},
        "DASHSCOPE_APP_ID": APP_ID,
        "OPENAI_MODEL": "test-model",
    }


async def ask(served: Served, fixture: Fixture, *, stream: bool, native: bool = False) -> Reply:
    path = "/api/llm/" + PROVIDERS[fixture.vendor]
    if native:
        cumulative = "cumulative" in fixture.file
        parameters = {"has_thoughts": True, "incremental_output": not cumulative}
        headers = {"X-DashScope-SSE": "enable"} if stream else {}
        return await served.post(
            path, {"input": {"prompt": "你好"}, "parameters": parameters}, headers=headers
        )
    return await served.post(path, question(stream=stream, stream_options={"include_usage": True}))


def heard(body: bytes, *, native: bool) -> Outcome:
    """What the visitor understood; of the error the reason alone."""
    parser = ApplicationParser() if native else CompletionParser()
    return parse(parser, [body])


def expected_text(fixture: Fixture, *, native: bool) -> str:
    text = str((fixture.expect or {}).get("text", ""))
    return text.replace("<ref>", "").replace("</ref>", "")


def check(outcome: Outcome, fixture: Fixture, body: bytes, *, native: bool) -> None:
    expect: dict[str, Any] = dict(fixture.expect or {})
    complete = "finish_reason" in expect
    assert outcome.text == expected_text(fixture, native=native)
    assert outcome.reasoning == expect.get("reasoning", "")
    assert (outcome.finish.reason if outcome.finish else None) == expect.get("finish_reason")
    assert (outcome.error is None) == complete
    assert body.decode("utf-8")
    if native:
        assert b"[DONE]" not in body
    else:
        assert body.count(b"data: [DONE]\n\n") == int(complete)
        assert b"\nid:" not in body


@pytest.mark.parametrize("chop", [5, 0], ids=["five-bytes", "at-once"])
@pytest.mark.parametrize("fixture", UNDERSTOOD, ids=str)
async def test_every_recorded_stream_reaches_the_visitor_in_the_openai_dialect(
    serve: Start, fixture: Fixture, chop: int
) -> None:
    async with ReplayFake(fixture, chop=chop) as fake:
        served = await serve(env=environ(fake))
        reply = await ask(served, fixture, stream=True)
        if "text" not in (fixture.expect or {}) and "finish_reason" not in (fixture.expect or {}):
            assert reply.status >= 400
            assert_envelope(reply, reply.status, reply.json["error"]["reason"])
        else:
            assert reply.status == 200
            assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            check(heard(reply.body, native=False), fixture, reply.body, native=False)
        row = (await served.rows())[-1]
        assert row.status == ("ok" if "finish_reason" in (fixture.expect or {}) else row.status)
        assert SECRET.encode() not in reply.body


@pytest.mark.parametrize("fixture", [f for f in UNDERSTOOD if f.vendor == "dashscope"], ids=str)
async def test_every_recorded_dashscope_stream_reaches_the_visitor_in_its_own_dialect(
    serve: Start, fixture: Fixture
) -> None:
    async with ReplayFake(fixture) as fake:
        served = await serve(env=environ(fake))
        reply = await ask(served, fixture, stream=True, native=True)
        expect = fixture.expect or {}
        if "text" not in expect:
            assert_envelope(reply, reply.status, reply.json["error"]["reason"])
            return
        check(heard(reply.body, native=True), fixture, reply.body, native=True)
        if "finish_reason" in expect:
            whole = fixture.body.removeprefix(b"\xef\xbb\xbf")
            assert reply.body == whole, "the vendor's own bytes"
        else:
            assert reply.events[-1][0] == "error"
            assert set(reply.events[-1][1]) == {"code", "message", "request_id", "error"}


@pytest.mark.parametrize("fixture", COMPLETE, ids=str)
async def test_a_whole_stream_in_the_visitors_dialect_is_passed_on_byte_for_byte(
    serve: Start, fixture: Fixture
) -> None:
    async with ReplayFake(fixture) as fake:
        served = await serve(env=environ(fake))
        reply = await ask(served, fixture, stream=True)
        ours, theirs = (one.rstrip().rpartition(b"data:")[0] for one in (reply.body, fixture.body))
        assert ours == theirs


@pytest.mark.parametrize("fixture", ANSWERS, ids=str)
async def test_every_recorded_answer_is_passed_on_or_translated(serve: Start, fixture: Fixture) -> None:
    async with ReplayFake(fixture) as fake:
        served = await serve(env=environ(fake))
        native = fixture.vendor == "dashscope"
        own = await ask(served, fixture, stream=False, native=native)
        assert (own.status, own.body) == (200, fixture.body)
        assert own.headers["Content-Type"] == "application/json"
        translated = await ask(served, fixture, stream=False)
        choice = translated.json["choices"][0]
        assert translated.json["object"] == "chat.completion"
        if native:
            text = json.loads(fixture.body)["output"]["text"]
            assert choice["message"]["content"] == text.replace("<ref>", "").replace("</ref>", "")
            assert choice["finish_reason"] == "stop"
        assert [row.status for row in await served.rows()] == ["ok", "ok"]


@pytest.mark.parametrize(("fixture", "stream"), ASKED_ERRORS, ids=str)
async def test_every_recorded_refusal_becomes_our_envelope_and_tells_nothing_of_the_vendors_words(
    serve: Start, fixture: Fixture, stream: bool
) -> None:
    async with ReplayFake(fixture, chop=0) as fake:
        served = await serve(env=environ(fake))
        reply = await ask(served, fixture, stream=stream)
        message = assert_envelope(reply, reply.status, reply.json["error"]["reason"])
        assert reply.status in (400, 429, 502)
        said = [text for text in texts_of(fixture.body) if len(text) > 30 and " " in text]
        assert not any(text in message for text in said)
        row = await served.row_with("refused" if "content filter" in message else "error")
        assert row.error_type == reply.json["error"]["reason"]
        assert row.question == "你好"


def texts_of(body: bytes) -> list[str]:
    """Every text in a vendor's error body."""
    try:
        value = json.loads(body)
    except ValueError:
        return []
    found: list[str] = []
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, str):
            found.append(item)
    return found


async def test_frames_with_ids_and_comments_do_not_reach_a_client_that_chokes_on_them(serve: Start) -> None:
    (trap,) = (f for f in STREAMS if f.expect is None)
    async with ReplayFake(trap) as fake:
        served = await serve(env=environ(fake))
        reply = await ask(served, trap, stream=True)
        assert b"id:" not in reply.body
        outcome = heard(reply.body, native=False)
        assert outcome.finish is not None
        assert not isinstance(outcome.error, UpstreamError)
