"""Ark's own SDK judges the fake Ark, and finds in the recordings what they are said to hold."""

import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from volcenginesdkarkruntime import AsyncArk  # type: ignore[import-untyped]
from volcenginesdkarkruntime._exceptions import (  # type: ignore[import-untyped]
    ArkAPIError,
    ArkAPIStatusError,
    ArkAuthenticationError,
    ArkBadRequestError,
    ArkInternalServerError,
    ArkNotFoundError,
    ArkPermissionDeniedError,
    ArkRateLimitError,
)

from tests.upstreams.doubao import KEY, MODEL, MODELS, RETIRED_MODEL, DoubaoFake
from tests.upstreams.embeddings import ARK_MODEL, EmbeddingsFake, vector
from tests.upstreams.replay import Fixture, ReplayFake, fixtures
from tests.upstreams.script import (
    Step,
    call,
    cut,
    end,
    fail,
    finish,
    refuse,
    reply,
    say,
    script,
    seal,
    think,
    usage,
)

QUESTION = [{"role": "user", "content": "反向代理是什么？"}]
USAGE = {"include_usage": True}
CHAT = [one for one in fixtures(vendor="ark") if one.path.endswith("/chat/completions")]


def ark(base_url: str, **more: Any) -> AsyncArk:
    # A client without the certificates of the world: reading them costs more than any test here.
    http_client = httpx.AsyncClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    asked = {"api_key": KEY, "max_retries": 0, "http_client": http_client, **more}
    return AsyncArk(base_url=base_url, **asked)


class Heard:
    """What the SDK made of a stream."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.finish_reason: str | None = None
        self.usage: Any = None
        self.calls: list[tuple[str | None, str]] = []

    async def listen(self, stream: AsyncIterator[Any]) -> "Heard":
        async for chunk in stream:
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.text += choice.delta.content or ""
                self.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                self.finish_reason = choice.finish_reason or self.finish_reason
                for one in choice.delta.tool_calls or ():
                    self.calls.append((one.function.name, one.function.arguments))
        return self


async def ask(client: AsyncArk, **more: Any) -> Any:
    return await client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **more})


async def listen(client: AsyncArk, **more: Any) -> Heard:
    return await Heard().listen(await ask(client, stream=True, **more))


async def test_stream_is_read_with_thinking_and_usage() -> None:
    steps = script(
        think("\n", "先想想。"), seal("c2VhbA=="), say("站在", "服务器一侧。🙂"), usage(31, 58, 37), chop=5
    )
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        heard = await listen(client, stream_options=USAGE)
    assert (heard.reasoning, heard.text) == ("\n先想想。", "站在服务器一侧。🙂")
    assert heard.finish_reason == "stop"
    told = heard.usage
    assert (told.prompt_tokens, told.completion_tokens, told.total_tokens) == (31, 58, 89)
    assert told.completion_tokens_details.reasoning_tokens == 37
    assert told.prompt_tokens_details.cached_tokens == 0


async def test_body_is_read_with_thinking_and_usage() -> None:
    steps = script(think("先想想。"), say("站在", "一侧。"), usage(31, 58, 37, cached=8), finish("length"))
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        answer = await ask(client)
    choice = answer.choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("先想想。", "站在一侧。")
    assert (choice.finish_reason, answer.usage.prompt_tokens_details.cached_tokens) == ("length", 8)
    assert answer.id.startswith("02")


@pytest.mark.parametrize("off", [{"thinking": {"type": "disabled"}}, {"reasoning_effort": "minimal"}])
@pytest.mark.parametrize("streaming", [True, False])
async def test_thinking_that_is_switched_off_is_neither_sent_nor_billed(
    off: dict[str, Any], streaming: bool
) -> None:
    steps = script(think("先想想。"), say("好。"), usage(31, 58, 37))
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        if streaming:
            heard = await listen(client, stream_options=USAGE, **off)
            text, reasoning, told = heard.text, heard.reasoning, heard.usage
        else:
            answer = await ask(client, **off)
            message = answer.choices[0].message
            text, reasoning, told = message.content, message.reasoning_content, answer.usage
    assert (text, reasoning or "") == ("好。", "")
    assert (told.completion_tokens, told.completion_tokens_details.reasoning_tokens) == (21, 0)


async def test_usage_is_absent_unless_asked_for() -> None:
    async with DoubaoFake(script(say("好。"), usage(3, 2))) as fake, ark(fake.base_url) as client:
        assert (await listen(client)).usage is None


async def test_tool_calls_are_read() -> None:
    steps = script(call("lookup", '{"week":', " 3}"), finish("tool_calls"))
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        heard = await listen(client)
        whole = await ask(client)
    assert heard.calls == [("lookup", ""), (None, '{"week":'), (None, " 3}")]
    assert heard.finish_reason == "tool_calls"
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"week": 3}'


async def test_sdks_nulls_are_accepted_and_its_request_id_echoed() -> None:
    async with DoubaoFake() as fake, ark(fake.base_url) as client:
        answer = await client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION)
    sent = fake.requests[0]
    assert sum(value is None for value in sent.json.values()) > 15
    assert answer.headers["X-Client-Request-Id"] == sent.headers["X-Client-Request-Id"]
    assert answer.headers["X-Request-Id"].startswith("02")
    assert answer.headers["Server"] == "hertz"


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "InputTextSensitiveContentDetected", ArkBadRequestError),
        (401, "AuthenticationError", ArkAuthenticationError),
        (403, "AccountOverdueError", ArkPermissionDeniedError),
        (404, "ModelNotOpen", ArkNotFoundError),
        (429, "ModelAccountRpmRateLimitExceeded", ArkRateLimitError),
        (500, "InternalServiceError", ArkInternalServerError),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
async def test_refusals_become_the_sdks_own_errors(
    status: int, code: str, error: type[ArkAPIStatusError], streaming: bool
) -> None:
    async with DoubaoFake(script(refuse(status, code))) as fake, ark(fake.base_url) as client:
        with pytest.raises(error) as caught:
            await ask(client, stream=streaming)
    assert (caught.value.status_code, caught.value.code) == (status, code)


async def test_gateway_page_is_a_server_error_without_a_code() -> None:
    async with DoubaoFake(script(refuse(502))) as fake, ark(fake.base_url) as client:
        with pytest.raises(ArkInternalServerError) as caught:
            await ask(client)
    assert (caught.value.status_code, caught.value.code) == (502, None)


@pytest.mark.parametrize("before", [[], [say("学期第")]])
async def test_error_inside_a_stream_is_raised_with_its_code(before: list[Step]) -> None:
    steps = script(*before, fail(429, "RequestBurstTooFast"))
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        heard = Heard()
        with pytest.raises(ArkAPIError) as caught:
            await heard.listen(await ask(client, stream=True))
    assert (caught.value.code, caught.value.type) == ("RequestBurstTooFast", "TooManyRequests")
    assert heard.text == ("学期第" if before else "")


@pytest.mark.parametrize("reset", [False, True])
async def test_cut_connection_breaks_the_stream_after_the_whole_frames(reset: bool) -> None:
    steps = script(say("一", "二"), cut(inside="三四", reset=reset))
    async with DoubaoFake(steps) as fake, ark(fake.base_url) as client:
        heard = Heard()
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await heard.listen(await ask(client, stream=True))
    if not reset:  # a reset may overtake what was sent before it
        assert heard.text == "一二"
    assert fake.requests[0].cut_at is not None


async def test_end_without_finish_is_silent_to_the_sdk() -> None:
    async with DoubaoFake(script(say("一"), end())) as fake, ark(fake.base_url) as client:
        heard = await listen(client)
    assert (heard.text, heard.finish_reason) == ("一", None)


async def test_first_calls_refused_are_retried_with_new_request_ids() -> None:
    async with (
        DoubaoFake(script(refuse(429)), script(say("好。"))) as fake,
        ark(fake.base_url, max_retries=1) as client,
    ):
        # The SDK's own first wait is a whole second.
        client._calculate_retry_timeout = lambda *_: 0.01
        assert (await ask(client)).choices[0].message.content == "好。"
    ids = [one.headers["X-Client-Request-Id"] for one in fake.requests]
    assert len(set(ids)) == 2


async def test_checks_come_in_the_vendors_order() -> None:
    """Bearer, then model, then account, then parameters."""
    wrong = {"model": "nobodys-model", "messages": []}
    async with DoubaoFake(keys=("right",), overdue=True) as fake:
        async with ark(fake.base_url, api_key="wrong") as client:
            with pytest.raises(ArkAuthenticationError):
                await ask(client, **wrong)
        async with ark(fake.base_url, api_key="right") as client:
            with pytest.raises(ArkNotFoundError) as caught:
                await ask(client, **wrong)
            assert caught.value.code == "InvalidEndpointOrModel.NotFound"
            with pytest.raises(ArkPermissionDeniedError):
                await ask(client, messages=[])
            fake.overdue = False
            with pytest.raises(ArkBadRequestError) as missing:
                await ask(client, messages=[])
            assert missing.value.code == "MissingParameter"
            assert (await ask(client)).choices[0].message.content


async def test_retired_model_is_not_found_unless_brought_back() -> None:
    async with DoubaoFake() as fake, ark(fake.base_url) as client:
        with pytest.raises(ArkNotFoundError):
            await ask(client, model=RETIRED_MODEL)
    async with DoubaoFake(models=(*MODELS, RETIRED_MODEL)) as fake, ark(fake.base_url) as client:
        assert (await ask(client, model=RETIRED_MODEL)).model == RETIRED_MODEL


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "developer", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"temperature": 3},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stop": ["1", "2", "3", "4", "5"]},
        {"thinking": {"type": "perhaps"}},
    ],
)
async def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    async with DoubaoFake() as fake, ark(fake.base_url) as client:
        with pytest.raises(ArkBadRequestError):
            await ask(client, **wrong)


async def test_image_parts_are_accepted() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    parts = [{"type": "text", "text": "这是什么？"}, image]
    async with DoubaoFake(script(say("一张图。"))) as fake, ark(fake.base_url) as client:
        answer = await ask(client, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "一张图。"


async def test_wrong_path_is_an_empty_404_and_models_are_listed() -> None:
    async with DoubaoFake() as fake, httpx.AsyncClient() as client:
        lost = await client.post(fake.origin + "/v1/chat/completions", json={})
        listed = (await client.get(fake.base_url + "/models")).json()["data"]
    assert (lost.status_code, lost.content) == (404, b"")
    assert {row["id"]: row["status"] for row in listed}[RETIRED_MODEL] == "Shutdown"


async def test_several_texts_make_one_multimodal_vector() -> None:
    parts: Any = [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]
    async with EmbeddingsFake() as fake, ark(fake.ark_url) as client:
        one = await client.multimodal_embeddings.create(model=ARK_MODEL, input=parts)
        assert one.data.embedding == vector("一\n二")
        with pytest.raises(ArkBadRequestError):
            await client.embeddings.create(model=ARK_MODEL, input=["一"])


@pytest.mark.parametrize("recorded", [one for one in CHAT if one.kind == "sse"], ids=str)
async def test_recorded_streams_hold_what_the_manifest_says(recorded: Fixture) -> None:
    expect = recorded.expect or {}
    async with ReplayFake(recorded) as fake, ark(fake.base_url) as client:
        heard, error = Heard(), ""
        try:
            await heard.listen(await ask(client, stream=True))
        except ArkAPIError as raised:
            error = raised.code or ""
        except httpx.RemoteProtocolError:
            assert recorded.is_truncated
    assert heard.text == expect.get("text", "")
    assert heard.reasoning == expect.get("reasoning", "")
    assert heard.finish_reason == expect.get("finish_reason")
    assert error == (expect.get("error") or "")


@pytest.mark.parametrize("recorded", [one for one in CHAT if one.status >= 400], ids=str)
async def test_recorded_errors_hold_what_the_manifest_says(recorded: Fixture) -> None:
    async with ReplayFake(recorded) as fake, ark(fake.base_url) as client:
        with pytest.raises(ArkAPIStatusError) as caught:
            await ask(client)
    assert caught.value.status_code == recorded.status
    assert caught.value.code == (recorded.expect or {}).get("code")


async def test_any_http_answer_can_be_given() -> None:
    async with DoubaoFake(script(reply(204, b"", None))) as fake, httpx.AsyncClient() as client:
        head = {"Authorization": "Bearer k"}
        body = {"model": MODEL, "messages": QUESTION}
        answer = await client.post(fake.base_url + "/chat/completions", json=body, headers=head)
    assert (answer.status_code, answer.content, "content-type" in answer.headers) == (204, b"", False)
