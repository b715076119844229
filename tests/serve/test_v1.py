"""`/v1` as OpenAI's own client sees it, against every provider, in good days and bad ones."""

import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from mogine.errors import RateLimited, UpstreamBusy, UpstreamError, UpstreamRefused
from mogine.serve.middlewares import worth_asking_again
from tests.serve.conftest import Reply, Served, Start, assert_envelope, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.raw import closed_port
from tests.upstreams.script import cut, hang, pause, refuse, say, script, think, usage
from tests.upstreams.server import Fake

PLAY = script(think("想"), say("你", "好"), usage(31, 58, 37))
ASK: list[Any] = [{"role": "user", "content": "你好"}]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(600)
FAKES: Mapping[str, Callable[..., Fake]] = {
    "doubao": DoubaoFake,
    "dashscope": DashScopeFake,
    "openai": OpenAIFake,
}


def environ(*fakes: Fake) -> dict[str, str]:
    found: dict[str, str] = {"MOGINE_CONNECT_TIMEOUT": "1"}
    for fake in fakes:
        found |= fake.environ
    if "OPENAI_BASE_URL" in found:
        found["OPENAI_MODEL"] = "test-model"
    return found


@asynccontextmanager
async def client_of(served: Served, **how: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    how.setdefault("max_retries", 0)
    async with openai.AsyncOpenAI(base_url=served.url("/v1"), api_key="test-key-visitor", **how) as client:
        yield client


@pytest.mark.parametrize("name", FAKES)
async def test_a_whole_answer_reads_like_openais(name: str, serve: Start) -> None:
    async with FAKES[name](PLAY) as fake:
        served = await serve(env=environ(fake))
        async with client_of(served) as client:
            answer = await client.chat.completions.create(model=name, messages=ASK)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("你好", "stop")
    assert choice.message.reasoning_content == "想"  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (31, 58)
    row = await served.row_with("ok")
    assert (row.kind, row.provider, row.prompt_tokens, row.completion_tokens) == ("v1", name, 31, 58)
    assert "test-key-visitor" not in str(dict(fake.requests[0].headers))


@pytest.mark.parametrize("name", FAKES)
async def test_a_streamed_answer_reads_like_openais(name: str, serve: Start) -> None:
    async with FAKES[name](PLAY) as fake:
        served = await serve(env=environ(fake))
        async with client_of(served) as client:
            stream = await client.chat.completions.create(
                model=name, messages=ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "你好"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    totals = [c.usage for c in chunks if c.usage is not None]
    assert [(t.prompt_tokens, t.completion_tokens) for t in totals] == [(31, 58)]


@pytest.mark.parametrize("name", FAKES)
async def test_usage_is_left_out_of_a_stream_unless_asked_for(name: str, serve: Start) -> None:
    async with FAKES[name](PLAY) as fake:
        served = await serve(env=environ(fake))
        async with client_of(served) as client:
            stream = await client.chat.completions.create(model=name, messages=ASK, stream=True)
            chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (await served.row_with("ok")).prompt_tokens == 31


async def test_without_any_key_extract_answers(serve: Start) -> None:
    served = await serve()
    async with client_of(served) as client:
        answer = await client.chat.completions.create(model="auto", messages=ASK)
    assert answer.choices[0].message.content
    assert (await served.row_with("ok")).provider == "extract"


async def test_extract_streams_like_any_other(serve: Start) -> None:
    served = await serve()
    async with client_of(served) as client:
        stream = await client.chat.completions.create(
            model="extract", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert (await served.row_with("ok")).provider == "extract"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", FAKES)
async def test_refusals_and_stalls_of_every_vendor_are_errors_of_the_client(
    name: str, stream: bool, serve: Start
) -> None:
    async with FAKES[name](refuse(401)) as fake:
        served = await serve(env={**environ(fake), "MOGINE_FIRST_BYTE_TIMEOUT": "0.2"})
        async with client_of(served) as client:
            for play, status in ((refuse(401), 502), (refuse(404), 502), (hang(), 504)):
                fake.play(play)
                with pytest.raises(openai.APIStatusError) as refused:
                    await client.chat.completions.create(model=name, messages=ASK, stream=stream)
                error = refused.value
                assert error.status_code == status
                assert error.request_id == error.response.headers["x-request-id"]
                assert error.code == str(status), "the client reads our envelope"


@pytest.mark.parametrize("name", FAKES)
async def test_a_stall_within_an_answer_of_any_vendor_raises_in_the_client(name: str, serve: Start) -> None:
    async with FAKES[name](script(say("一"), hang())) as fake:
        served = await serve(env={**environ(fake), "MOGINE_IDLE_TIMEOUT": "0.2"})
        async with client_of(served) as client:
            stream = await client.chat.completions.create(model=name, messages=ASK, stream=True)
            pieces = []
            with pytest.raises(openai.APIError, match="fell silent"):
                async for chunk in stream:
                    pieces.append(chunk.choices[0].delta.content)
    assert "一" in pieces


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", FAKES)
async def test_the_clients_own_timeout_ends_any_vendors_work(name: str, stream: bool, serve: Start) -> None:
    async with FAKES[name](script(hang())) as fake:
        served = await serve(env=environ(fake))
        async with client_of(served, timeout=0.3) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model=name, messages=ASK, stream=stream)
        await fake.wait_disconnect()
    assert (await served.row_with("aborted")).error_type == "client_left"


async def test_models_are_what_may_be_asked_for(serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL, "MOGINE_ALLOWED_MODELS": "m2"})
        async with client_of(served) as client:
            listed = [model.id async for model in client.models.list()]
            assert listed == ["auto", "doubao", f"doubao/{MODEL}", "doubao/m2", "extract"]
            for name in listed:
                assert (await client.models.retrieve(name)).id == name
            with pytest.raises(openai.NotFoundError) as missing:
                await client.models.retrieve("gpt-none")
    assert missing.value.param == "model"


@pytest.mark.parametrize(
    ("model", "sent"),
    [("doubao", "m1"), ("doubao/m1", "m1"), ("m1", "m1"), ("doubao/m2", "m2"), ("auto", "m1"), (None, "m1")],
)
async def test_a_model_is_named_in_many_ways(model: str | None, sent: str, serve: Start) -> None:
    async with DoubaoFake(PLAY, models=("m1", "m2")) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": "m1", "MOGINE_ALLOWED_MODELS": "m2"})
        reply = await served.post("/v1/chat/completions", question(model=model))
    assert (reply.status, fake.requests[0].json["model"]) == (200, sent)


@pytest.mark.parametrize(
    ("body", "status", "reason", "param"),
    [
        ({"model": "gpt-9", "messages": ASK}, 404, "not_found", "model"),
        ({"model": "dashscope", "messages": ASK}, 503, "upstream_unavailable", None),
        ({"model": "doubao/dearest", "messages": ASK}, 400, "invalid_request", "model"),
        ({"model": 7, "messages": ASK}, 400, "invalid_request", "model"),
        ({"model": "doubao"}, 400, "invalid_request", "messages"),
        ({"model": "doubao", "input": {"prompt": "x"}}, 400, "invalid_request", "messages"),
        ({"model": "doubao", "messages": ASK, "n": 50}, 400, "invalid_request", "n"),
        ({"messages": [{"role": "system", "content": "x"}, *ASK]}, 400, "invalid_request", None),
    ],
)
async def test_what_may_not_be_asked_costs_nothing(
    body: dict[str, Any], status: int, reason: str, param: str | None, serve: Start
) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env=environ(fake))
        reply = await served.post("/v1/chat/completions", body)
        assert_envelope(reply, status, reason, param)
        assert "param" in reply.json["error"]
        assert fake.requests == []


# --- errors and retries ------------------------------------------------------------------------------


async def test_errors_are_of_the_clients_own_classes(serve: Start) -> None:
    async with DoubaoFake(refuse(401)) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL})
        async with client_of(served, max_retries=2) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(model="doubao", messages=ASK)
    error = refused.value
    assert (error.status_code, error.type, error.code) == (502, "proxy_error", "502")
    assert "check DOUBAO_API_KEY" in error.message
    assert error.request_id == (await served.rows())[0].id
    assert len(fake.requests) == 1, "the client was told that asking again is useless"


async def test_a_client_waits_as_long_as_it_is_told(serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "MOGINE_RATE_LIMIT": "1/second", "DOUBAO_MODEL": MODEL})
        async with client_of(served, max_retries=1) as client:
            await client.chat.completions.create(model="doubao", messages=ASK)
            began = time.monotonic()
            await client.chat.completions.create(model="doubao", messages=ASK)
    assert time.monotonic() - began >= 0.9


async def test_a_client_that_would_wait_long_is_told_at_once(serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "MOGINE_RATE_LIMIT": "1/hour", "DOUBAO_MODEL": MODEL})
        async with client_of(served, max_retries=2) as client:
            await client.chat.completions.create(model="doubao", messages=ASK)
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(model="doubao", messages=ASK)
    assert limited.value.response.headers["x-should-retry"] == "false"
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("error", "worth"),
    [
        (RateLimited("x", retry_after_s=5), True),
        (RateLimited("x", retry_after_s=3000), False),
        (RateLimited("x", reason="budget_exhausted", retry_after_s=5), False),
        (UpstreamRefused("x"), False),
        (UpstreamBusy("x", retry_after_s=120), False),
        (UpstreamBusy("x", retry_after_s=1), True),
        (UpstreamError("x"), True),
    ],
)
def test_asking_again_is_advised_where_it_may_help(error: Any, worth: bool) -> None:
    assert worth_asking_again(error) is worth


@pytest.mark.parametrize("model", ["doubao", "auto"])
async def test_an_answer_that_is_cut_raises_in_the_client(model: str, serve: Start) -> None:
    async with DoubaoFake(script(say("你"), cut())) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL})
        texts: list[str] = []
        async with client_of(served) as client:
            stream = await client.chat.completions.create(model=model, messages=ASK, stream=True)
            with pytest.raises(openai.APIError) as broken:
                async for chunk in stream:
                    texts += [c.delta.content or "" for c in chunk.choices]
    assert "".join(texts) == "你"
    assert (broken.value.type, broken.value.code) == ("proxy_error", "502")
    assert (await served.row_with("error")).error_type == "upstream_bad_response"


async def test_pings_do_not_disturb_the_client(serve: Start) -> None:
    async with OpenAIFake(script(pause(0.1), say("好"), usage(1, 1))) as fake:
        served = await serve(env={**environ(fake), "MOGINE_PING_INTERVAL": "0.05"})
        async with client_of(served) as client:
            stream = await client.chat.completions.create(model="openai", messages=ASK, stream=True)
            texts = [c.choices[0].delta.content or "" async for c in stream]
        raw = await served.post("/v1/chat/completions", question(model="openai", stream=True))
    assert "".join(texts) == "好"
    assert b": ping" in raw.body and b"\nid:" not in raw.body


async def test_a_client_that_gives_up_ends_the_vendors_work(serve: Start) -> None:
    async with OpenAIFake(script(pause(30), say("好"))) as fake:
        served = await serve(env=environ(fake))
        async with client_of(served, timeout=0.2) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="openai", messages=ASK)
        await fake.wait_disconnect(timeout_s=1.5)
    assert (await served.row_with("aborted")).kind == "v1"


# --- fail-over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_auto_asks_the_next_provider_when_one_fails(stream: bool, serve: Start) -> None:
    async with OpenAIFake(PLAY) as fake:
        with closed_port() as port:
            env = {
                **environ(fake),
                "DOUBAO_API_KEY": "test-key",
                "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}",
                "MOGINE_PROVIDERS": "doubao,openai",
            }
            served = await serve(env=env)
            reply = await served.post("/v1/chat/completions", question(model="auto", stream=stream))
            alone = await served.post("/v1/chat/completions", question(model="doubao", stream=stream))
    assert reply.status == 200 and "好".encode() in reply.body
    assert_envelope(alone, 502, "upstream_error")
    first, second = await served.rows()
    assert (first.provider, first.status, first.model) == ("openai", "ok", "test-model")
    assert (second.provider, second.status) == ("doubao", "error")


async def test_when_all_fail_the_first_error_is_told_or_extract_answers(serve: Start) -> None:
    async with DoubaoFake(refuse(500)) as one, DashScopeFake(refuse(503)) as two:
        served = await serve(env={**environ(one, two), "DOUBAO_MODEL": MODEL})
        reply = await served.post("/v1/chat/completions", question(model="auto"))
    assert reply.status == 200
    assert (await served.rows())[0].provider == "extract"


async def test_a_question_that_is_declined_is_not_taken_elsewhere(serve: Start) -> None:
    async with (
        DoubaoFake(refuse(400, "SensitiveContentDetected")) as one,
        OpenAIFake(PLAY) as two,
    ):
        served = await serve(env={**environ(one, two), "DOUBAO_MODEL": MODEL})
        reply = await served.post("/v1/chat/completions", question(model="auto"))
        assert_envelope(reply, 400, "invalid_request")
        assert two.requests == []


# --- pictures ----------------------------------------------------------------------------------------


def picture(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return pictured(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def pictured(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "看"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "doubao", "messages": [{"role": "user", "content": parts}]}


async def send(served: Served, path: str, body: Any) -> Reply:
    """A post in pieces, as large ones are made."""
    data = io.BytesIO(json.dumps(body).encode())
    return await served.ask("POST", path, data=data, headers={"Content-Type": "application/json"})


PICTURES = {"MOGINE_ALLOW_IMAGES": "true", "DOUBAO_MODEL": MODEL}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0" + bytes(64), "image/jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(64), "image/webp"),
        (PNG + bytes(2 * 1024**2), "image/png"),
    ],
    ids=["png", "jpeg", "webp", "larger than MOGINE_MAX_BODY_BYTES"],
)
async def test_a_picture_reaches_the_vendor_as_it_was_sent(data: bytes, kind: str, serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), **PICTURES})
        body = picture(data, kind)
        reply = await send(served, "/v1/chat/completions", body)
        assert reply.status == 200, reply.body
        sent = fake.requests[0].json["messages"][-1]["content"]
    assert sent[1]["image_url"]["url"] == body["messages"][0]["content"][1]["image_url"]["url"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (pictured("http://169.254.169.254/latest"), 403, "url_not_allowed"),
        (pictured("https://example.com/a.png"), 403, "url_not_allowed"),
        (pictured("file:///etc/passwd"), 403, "url_not_allowed"),
        (pictured("//example.com/a.png"), 403, "url_not_allowed"),
        (pictured("data:image/png,notbase64"), 403, "url_not_allowed"),
        (picture(PNG, "image/gif"), 400, "invalid_request"),
        (picture(PNG, "image/jpeg"), 400, "invalid_request"),
        (picture(b"RIFF\0\0\0\0WAVEfmt ", "image/webp"), 400, "invalid_request"),
        (picture(PNG + bytes(1024**2)), 400, "invalid_request"),
        (pictured("data:image/png;base64,****"), 400, "invalid_request"),
    ],
)
async def test_other_pictures_are_refused(body: Any, status: int, reason: str, serve: Start) -> None:
    """B12."""
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), **PICTURES, "MOGINE_MAX_IMAGE_BYTES": "1MiB"})
        for path in ("/v1/chat/completions", "/api/llm/doubao"):
            assert_envelope(await send(served, path, {**body, "model": None}), status, reason)
        assert fake.requests == []


async def test_pictures_are_off_by_default(serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL})
        message = assert_envelope(
            await served.post("/v1/chat/completions", picture(PNG)), 400, "invalid_request"
        )
    assert "MOGINE_ALLOW_IMAGES" in message


async def test_a_body_far_above_a_picture_is_too_large(serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), **PICTURES, "MOGINE_MAX_IMAGE_BYTES": "1MiB"})
        reply = await send(served, "/v1/chat/completions", picture(PNG + bytes(3 * 1024**2)))
    assert_envelope(reply, 413, "payload_too_large")


# --- traces ------------------------------------------------------------------------------------------

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", question(model="doubao")),
        ("/api/llm/doubao", question(stream=True)),
        ("/api/chat", {"question": "你好"}),
    ],
)
async def test_a_trace_goes_on_to_the_vendor_and_into_the_log(
    path: str, body: Any, serve: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL})
        with caplog.at_level("INFO", "mogine.access"):
            assert (await served.post(path, body, headers={"traceparent": TRACE})).status == 200
            await served.until(lambda: "trace=4bf92f3577b34da6a3ce929d0e0e4736" in caplog.text)
    assert fake.requests[0].headers["traceparent"] == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        TRACE.upper(),
        "01" + TRACE[2:],
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
        TRACE + "-x",
    ],
)
async def test_what_is_no_trace_goes_nowhere(value: str, serve: Start) -> None:
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**environ(fake), "DOUBAO_MODEL": MODEL})
        headers = {"traceparent": value}
        assert (await served.post("/api/llm/doubao", question(), headers=headers)).status == 200
    assert "traceparent" not in fake.requests[0].headers
