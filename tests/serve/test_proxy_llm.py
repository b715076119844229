"""`POST /api/llm/{provider}`: what goes upstream, what comes back, what is refused, what is recorded."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.serve.conftest import Served, Start, assert_envelope, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import KEY, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.raw import closed_port
from tests.upstreams.script import (
    cut,
    endless,
    fail,
    garble,
    redirect,
    refuse,
    say,
    script,
    think,
    usage,
)

LLM = "/api/llm/doubao"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(think("嗯，"), say("你好，", "世界"), usage(31, 58, reasoning=3))) as fake:
        yield fake


@pytest.fixture
async def proxy(serve: Start, doubao: DoubaoFake) -> Served:
    served: Served = await serve(env=doubao.environ)
    return served


# --- what goes upstream --------------------------------------------------------------------------


async def test_only_words_and_harmless_knobs_go_upstream(proxy: Served, doubao: DoubaoFake) -> None:
    """P15, P17, B1."""
    body = question(
        "你好",
        temperature=0.5,
        top_p=0.9,
        stop=["。"],
        n=50,
        user="visitor",
        tools=[{"type": "function", "function": {"name": "pay"}}],
        tool_choice="auto",
        thinking={"type": "enabled"},
        logprobs=True,
        response_format={"type": "json_object"},
        base_url="http://evil.example",
        api_base="http://evil.example",
        api_key="visitor-key",
        app_id="visitor-app",
        service_tier="fast",
        extra_headers={"X": "y"},
    )
    reply = await proxy.post(
        LLM + "?base_url=http://evil.example&api_key=visitor-key",
        body,
        headers={"Authorization": "Bearer visitor-key", "X-Api-Key": "visitor-key", "Cookie": "a=b"},
    )
    assert reply.status == 200
    (request,) = doubao.requests
    assert request.json == {
        "model": doubao.environ["DOUBAO_MODEL"],
        "messages": [{"role": "user", "content": "你好"}],
        "stream": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["。"],
        "max_tokens": 2048,
    }
    assert request.bearer == KEY
    assert request.headers["User-Agent"] == "Mogine-AI-Chatbot/1.0"
    assert b"visitor-key" not in request.body
    assert not {"Cookie", "X-Api-Key", "X-Forwarded-For", "Origin", "Referer"} & set(request.headers)


@pytest.mark.parametrize(("asked", "sent"), [(10, 10), (10**9, 2048), (None, 2048), (2048.0, 2048)])
async def test_max_tokens_is_clamped(proxy: Served, doubao: DoubaoFake, asked: Any, sent: int) -> None:
    """P15, B3."""
    for name in ("max_tokens", "max_completion_tokens"):
        assert (await proxy.post(LLM, question(**{name: asked}))).status == 200
    assert [request.json["max_tokens"] for request in doubao.requests] == [sent, sent]


async def test_a_visitor_may_name_only_models_that_the_owner_allows(serve: Start) -> None:
    async with DoubaoFake(models=("cheap", "dear", "main")) as fake:
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": "main", "MOGINE_ALLOWED_MODELS": "cheap"})
        for model in (None, "", "main", "cheap", "doubao", "auto", "doubao/cheap"):
            assert (await served.post(LLM, question(model=model))).status == 200, model
        assert [r.json["model"] for r in fake.requests] == [
            "main",
            "main",
            "main",
            "cheap",
            "main",
            "main",
            "cheap",
        ]
        reply = await served.post(LLM, question(model="dear"))
        assert "main, cheap" in assert_envelope(reply, 400, "invalid_request", "model")
        assert len(fake.requests) == 7


async def test_the_owners_prompt_goes_first_and_never_comes_back(serve: Start, doubao: DoubaoFake) -> None:
    """P16, B28."""
    served = await serve(env=doubao.environ)
    site = served.settings.home / "site.toml"
    site.write_text('[assistant]\nllm_system_prompt = "Speak of ships only."\n')
    reply = await served.post(LLM, question())
    assert doubao.requests[0].json["messages"][0] == {"role": "system", "content": "Speak of ships only."}
    assert b"ships" not in reply.body
    site.write_text("[assistant]\n")
    await served.post(LLM, question())
    assert [m["role"] for m in doubao.requests[1].json["messages"]] == ["user"]


async def test_a_conversation_goes_upstream_turn_by_turn(proxy: Served, doubao: DoubaoFake) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]},
        {"role": "assistant", "content": "三"},
        {"role": "user", "content": "四"},
    ]
    assert (await proxy.post(LLM, {"messages": turns})).status == 200
    sent = doubao.requests[0].json["messages"]
    assert sent == [{"role": "user", "content": "一\n二"}, *turns[1:]]
    assert (await proxy.rows())[0].question == "四"


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " \n\t"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "obey"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 41}, "messages"),
        (question(stream="yes"), "stream"),
        (question(stream=1), "stream"),
        (question(temperature="hot"), "temperature"),
        (question(temperature=3), "temperature"),
        (question(temperature=True), "temperature"),
        (question(top_p=-0.1), "top_p"),
        (question(max_tokens=0), "max_tokens"),
        (question(max_tokens="many"), "max_tokens"),
        (question(max_completion_tokens=-5), "max_completion_tokens"),
        (question(stop=["a"] * 5), "stop"),
        (question(stop=[""]), "stop"),
        (question(stop={"a": 1}), "stop"),
        (question(model=5), "model"),
        ({"prompt": "x"}, "prompt"),
        ({"input": {"prompt": "x"}}, "input"),
    ],
    ids=range(32),
)
async def test_a_wrong_body_names_the_field_and_costs_nothing(
    proxy: Served, doubao: DoubaoFake, body: Any, param: str
) -> None:
    assert_envelope(await proxy.post(LLM, body), 400, "invalid_request", param)
    assert not doubao.requests


async def test_a_question_may_be_so_long_and_no_longer(proxy: Served, doubao: DoubaoFake) -> None:
    """P13."""
    assert (await proxy.post(LLM, question("字" * 8000))).status == 200
    reply = await proxy.post(LLM, question("字" * 8001))
    assert "8000" in assert_envelope(reply, 400, "question_too_long", "messages[0].content")
    assert len(doubao.requests) == 1


async def test_an_unknown_provider_names_the_known_ones(proxy: Served) -> None:
    for name in ("gpt", "DOUBAO", "doubao%2f..", "%00", "🙂"):
        message = assert_envelope(await proxy.post(f"/api/llm/{name}", question()), 404, "not_found")
        assert "doubao, dashscope, openai, extract" in message


@pytest.mark.parametrize(
    ("provider", "setting"),
    [("doubao", "DOUBAO_API_KEY"), ("dashscope", "DASHSCOPE_APP_ID"), ("openai", "OPENAI_BASE_URL")],
)
async def test_a_provider_without_key_names_the_setting(serve: Start, provider: str, setting: str) -> None:
    served = await serve()
    reply = await served.post(f"/api/llm/{provider}", question())
    assert setting in assert_envelope(reply, 503, "upstream_unavailable")


async def test_pictures_are_refused_unless_the_owner_wants_them(serve: Start, doubao: DoubaoFake) -> None:
    def ask(url: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
        return {"messages": [{"role": "user", "content": parts}]}

    served = await serve(env=doubao.environ)
    assert "MOGINE_ALLOW_IMAGES" in assert_envelope(
        await served.post(LLM, ask(PIXEL)), 400, "invalid_request"
    )
    served = await serve(env={**doubao.environ, "MOGINE_ALLOW_IMAGES": "true"})
    for url in (
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "//169.254.169.254/",
        "data:text/html,<b>",
        "data:image/png,abc",
        "DATA:image/png;base64,AAAA",
    ):
        assert_envelope(await served.post(LLM, ask(url)), 403, "url_not_allowed")
    for url in (
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/png;base64,????",
        "data:image/png;base64,AAAA",
        "data:image/jpeg;base64," + PIXEL.partition(",")[2],
        "data:image/webp;base64,UklGRgAAAABBVkkg",
    ):
        assert_envelope(await served.post(LLM, ask(url)), 400, "invalid_request")
    assert not doubao.requests
    assert (await served.post(LLM, ask(PIXEL))).status == 200
    assert doubao.requests[0].json["messages"][0]["content"][1]["image_url"]["url"] == PIXEL


# --- what comes back -----------------------------------------------------------------------------


async def test_a_stream_bears_the_headers_that_let_every_piece_through(proxy: Served) -> None:
    reply = await proxy.post(LLM, question(stream=True), headers={"Accept-Encoding": "gzip, br"})
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-cache, no-transform"
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert not {"Content-Encoding", "Content-Length", "ETag"} & set(reply.headers)
    assert not {"X-Client-Request-Id", "Vary"} & set(reply.headers), "headers of the vendor"


async def test_totals_are_sent_to_who_asks_for_them(proxy: Served) -> None:
    quiet = await proxy.post(LLM, question(stream=True))
    assert all(frame == "[DONE]" or frame["choices"] for frame in quiet.frames)
    told = await proxy.post(LLM, question(stream=True, stream_options={"include_usage": True}))
    assert told.frames[-2]["usage"]["total_tokens"] == 89
    assert [row.completion_tokens for row in await proxy.rows()] == [58, 58]


async def test_a_row_tells_what_became_of_the_question(proxy: Served) -> None:
    reply = await proxy.post(LLM, question("你好", stream=True), headers={"X-Forwarded-For": "203.0.113.9"})
    row = await proxy.row_with("ok")
    assert row.id == reply.headers["X-Request-Id"]
    assert (row.kind, row.provider, row.question, row.answer) == ("llm", "doubao", "你好", "你好，世界")
    assert (row.prompt_tokens, row.completion_tokens, row.reasoning_tokens) == (31, 58, 3)
    assert not row.tokens_estimated
    assert row.search_ms is None, "a vendor is asked without the documents"
    assert row.first_token_ms is not None and row.duration_ms is not None
    assert 0 <= row.first_token_ms <= row.duration_ms
    assert len(row.visitor) == 16 and "203" not in row.visitor


async def test_tokens_are_estimated_and_said_to_be_when_the_vendor_did_not_tell(serve: Start) -> None:
    async with DoubaoFake(script(say("一二三四"), cut())) as fake:
        served = await serve(env=fake.environ)
        await served.post(LLM, question("你好", stream=True))
        row = await served.row_with("error")
        assert (row.prompt_tokens, row.completion_tokens, row.tokens_estimated) == (2, 4, True)
        assert row.answer == "一二三四"


async def test_openai_bodies_to_dashscope_are_answered_in_openai_shape(serve: Start) -> None:
    async with DashScopeFake(script(think("嗯"), say("图", "书馆"), usage(21, 5, model="qwen"))) as fake:
        served = await serve(env=fake.environ)
        stream = await served.post("/api/llm/dashscope", question(stream=True))
        chunks = [frame for frame in stream.frames if frame != "[DONE]"]
        assert stream.frames[-1] == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert said == "图书馆"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        whole = await served.post("/api/llm/dashscope", question())
        assert whole.json["choices"][0]["message"]["content"] == "图书馆"
        assert whole.json["usage"]["total_tokens"] == 26
        assert fake.requests[0].json["input"] == {"prompt": "你好"}
        assert "model" not in fake.requests[0].json


@pytest.mark.parametrize("body", [{"input": {"prompt": "你好"}, "parameters": {}}, {"prompt": "你好"}])
async def test_native_bodies_to_dashscope_are_answered_natively(serve: Start, body: dict[str, Any]) -> None:
    async with DashScopeFake(script(say("图", "书馆"), usage(21, 5, model="qwen"))) as fake:
        served = await serve(env=fake.environ)
        whole = await served.post("/api/llm/dashscope", body)
        assert whole.json["output"]["text"] == "图书馆"
        for headers in ({"X-DashScope-SSE": "enable"}, {"Accept": "text/event-stream"}):
            stream = await served.post("/api/llm/dashscope", body, headers=headers)
            texts = [data["output"]["text"] for _, data in stream.events]
            assert texts[-1] == "图书馆", "cumulative unless asked otherwise, as the vendor's are"
            assert stream.body.startswith(b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:{")
            assert b"[DONE]" not in stream.body
        assert [row.answer for row in await served.rows()] == ["图书馆"] * 3


async def test_native_pieces_are_pieces_when_asked_for(serve: Start) -> None:
    async with DashScopeFake(script(say("图", "书馆"))) as fake:
        served = await serve(env=fake.environ)
        body = {"input": {"prompt": "你好"}, "parameters": {"incremental_output": True}}
        reply = await served.post("/api/llm/dashscope", body, headers={"X-DashScope-SSE": "enable"})
        assert [data["output"]["text"] for _, data in reply.events] == ["图", "书馆", ""]
        assert fake.requests[0].json["parameters"]["incremental_output"] is True


async def test_nothing_dear_or_dangerous_goes_into_a_native_request(serve: Start) -> None:
    """P15."""
    async with DashScopeFake() as fake:
        served = await serve(env=fake.environ)
        body = {
            "app_id": "other",
            "model": "qwen-dear",
            "input": {
                "prompt": "你好",
                "biz_params": {"user_defined_params": {"pay": {}}},
                "image_list": ["http://127.0.0.1/"],
                "file_list": ["http://127.0.0.1/"],
                "memory_id": "m",
            },
            "parameters": {
                "rag_options": {"pipeline_ids": ["p"]},
                "enable_thinking": True,
                "temperature": 0.1,
            },
            "debug": {"x": 1},
        }
        assert (await served.post("/api/llm/dashscope", body)).status == 200
        (request,) = fake.requests
        assert request.json == {"input": {"prompt": "你好"}, "parameters": {"temperature": 0.1}, "debug": {}}
        assert request.path == f"/api/v1/apps/{fake.environ['DASHSCOPE_APP_ID']}/completion"


async def test_a_vendors_session_goes_on_for_its_visitor_and_for_nobody_else(serve: Start) -> None:
    """B11."""
    async with DashScopeFake() as fake:
        served = await serve(env=fake.environ)

        async def ask(session: str | None, address: str) -> Any:
            body = {"prompt": "你好", "session_id": session}
            reply = await served.post("/api/llm/dashscope", body, headers={"X-Forwarded-For": address})
            assert reply.status == 200
            return reply.json["output"]["session_id"]

        first = await ask(None, "203.0.113.1")
        assert await ask(first, "203.0.113.1") == first
        assert await ask(first, "203.0.113.2") != first
        sent = [request.json["input"].get("session_id") for request in fake.requests]
        assert sent == [None, first, None]


async def test_extract_quotes_without_any_model(serve: Start) -> None:
    served = await serve()
    whole = await served.post("/api/llm/extract", question("退款"))
    assert "没有找到" in whole.json["choices"][0]["message"]["content"]
    assert whole.json["model"] == "extract"
    stream = await served.post("/api/llm/extract", question("refund", stream=True))
    assert stream.frames[-1] == "[DONE]"
    rows = await served.rows()
    assert [row.provider for row in rows] == ["extract", "extract"]
    assert all(row.search_ms is not None for row in rows)


async def test_any_compatible_server_can_be_asked(serve: Start) -> None:
    async with OpenAIFake(script(say("Hello"), usage(3, 1))) as fake:
        served = await serve(env=fake.environ)
        reply = await served.post("/api/llm/openai", question("hi"))
        assert reply.json["choices"][0]["message"]["content"] == "Hello"


# --- when the vendor fails -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("step", "status", "reason", "word"),
    [
        (refuse(401, leak=True), 502, "upstream_refused", "DOUBAO_API_KEY"),
        (refuse(403, leak=True), 502, "upstream_refused", "DOUBAO"),
        (refuse(404), 502, "upstream_refused", "DOUBAO_MODEL"),
        (refuse(400, leak=True), 502, "upstream_error", "400"),
        (refuse(429, headers={"Retry-After": "60"}), 429, "upstream_busy", "429"),
        (redirect("http://127.0.0.1:1/"), 502, "upstream_bad_response", "302"),
        (garble("html"), 502, "upstream_bad_response", ""),
        (garble("json"), 502, "upstream_bad_response", ""),
    ],
    ids=["401", "403", "404", "400", "429", "redirect", "html", "json"],
)
async def test_a_vendor_that_fails_at_once_is_a_plain_error(
    serve: Start, step: Any, status: int, reason: str, word: str, stream: bool
) -> None:
    async with DoubaoFake(script(step)) as fake:
        served = await serve(env=fake.environ)
        reply = await served.post(LLM, question(stream=stream))
        message = assert_envelope(reply, status, reason)
        assert message.startswith("API proxy error: ")
        assert word in message
        assert KEY not in str(reply)
        row = await served.row_with("error")
        assert (row.error_type, row.provider, row.answer) == (reason, "doubao", "")


async def test_a_vendor_that_cannot_be_reached_is_told_with_its_setting(serve: Start) -> None:
    with closed_port() as port:
        served = await serve(
            env={"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}/api/v3"}
        )
        reply = await served.post(LLM, question(stream=True))
        assert "DOUBAO_BASE_URL" in assert_envelope(reply, 502, "upstream_error")


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((cut(),), "upstream_bad_response"),
        ((cut(inside="周末"),), "upstream_bad_response"),
        ((cut(reset=True),), "upstream_bad_response"),
        ((fail(500, leak=True),), "upstream_error"),
        ((fail(429),), "upstream_busy"),
        ((garble("utf8"),), "upstream_bad_response"),
        ((garble("json"),), "upstream_bad_response"),
    ],
    ids=["cut", "cut-in-character", "reset", "error", "busy", "utf8", "json"],
)
async def test_an_answer_that_breaks_ends_with_an_error_and_never_looks_complete(
    serve: Start, steps: tuple[Any, ...], reason: str
) -> None:
    async with DoubaoFake(script(say("一", "二"), *steps)) as fake:
        served = await serve(env=fake.environ)
        reply = await served.post(LLM, question(stream=True))
        assert reply.status == 200
        assert "一二" in "".join(
            f["choices"][0]["delta"].get("content") or "" for f in reply.frames if "choices" in f
        )
        name, error = reply.events[-1]
        assert name == "error"
        assert error["error"]["reason"] == reason
        assert error["error"]["request_id"] == reply.headers["X-Request-Id"]
        assert b"[DONE]" not in reply.body and b'"stop"' not in reply.body
        assert KEY.encode() not in reply.body
        row = await served.row_with("error")
        assert (row.error_type, row.answer) == (reason, "一二")


async def test_a_native_answer_that_breaks_ends_as_the_vendors_own_clients_expect(serve: Start) -> None:
    async with DashScopeFake(script(say("一"), cut())) as fake:
        served = await serve(env=fake.environ)
        reply = await served.post(
            "/api/llm/dashscope", {"prompt": "x"}, headers={"X-DashScope-SSE": "enable"}
        )
        last = reply.body.rstrip().split(b"\n\n")[-1].split(b"\n")
        assert last[1:3] == [b"event:error", b":HTTP_STATUS/502"]
        data = json.loads(last[3].removeprefix(b"data:"))
        assert data["code"] == "upstream_bad_response"
        assert data["error"]["request_id"] == data["request_id"] == reply.headers["X-Request-Id"]


async def test_an_endless_answer_is_ended(serve: Start) -> None:
    async with DoubaoFake(script(endless("字" * 500))) as fake:
        served = await serve(env=fake.environ)
        reply = await served.post(LLM, question(stream=True))
        assert reply.events[-1][1]["error"]["reason"] == "answer_too_long"
        assert len(reply.body) < 1_000_000
        await fake.wait_disconnect()


async def test_a_slow_answer_is_ended_at_the_time_limit(serve: Start) -> None:
    async with DoubaoFake(script(endless("字", every_s=0.01))) as fake:
        served = await serve(env={**fake.environ, "MOGINE_ANSWER_TIMEOUT": "0.3"})
        reply = await served.post(LLM, question(stream=True))
        assert reply.events[-1][1]["error"]["reason"] == "upstream_timeout"
        assert "MOGINE_ANSWER_TIMEOUT" in reply.events[-1][1]["error"]["message"]
        await fake.wait_disconnect()
        assert (await served.row_with("error")).answer.startswith("字")
