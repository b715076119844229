"""Vendors over real connections: refusals in our words, second tries, cut answers, keys, leaving."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from mogine.chat import Chunk
from mogine.errors import (
    AnswerTooLong,
    ContentFiltered,
    MogineError,
    RequestError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from mogine.providers import doubao
from mogine.providers.vendor import (
    MAX_TEXT_BYTES,
    NEVER_HEALS,
    Refusal,
    VendorProvider,
    parse_refusal,
    safe_code,
)
from mogine.settings import DoubaoSettings
from mogine.upstream import Client, Limits, Retries, open_client
from tests.providers.conftest import Ask, no_sleep, retries
from tests.providers.outcome import Outcome, ask, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.replay import Fixture, ReplayFake, fixtures
from tests.upstreams.script import (
    Step,
    call,
    comment,
    cut,
    drip,
    endless,
    fail,
    finish,
    garble,
    gzip_bomb,
    hang,
    head,
    redirect,
    refuse,
    reply,
    say,
    script,
    send_raw,
    think,
    usage,
)
from tests.upstreams.server import Playable

ERRORS = [f for f in fixtures() if f.status >= 400 and "mbedding" not in f.file]

CLASSES: dict[str, type[MogineError]] = {
    "ark_error_400.json": UpstreamError,
    "ark_error_400_missing.json": UpstreamError,
    "ark_error_400_sensitive.json": ContentFiltered,
    "ark_error_400_image_url.json": RequestError,
    "ark_error_401.json": UpstreamRefused,
    "ark_error_403_overdue.json": UpstreamRefused,
    "ark_error_404.json": UpstreamRefused,
    "ark_error_404_not_open.json": UpstreamRefused,
    "ark_error_429.json": UpstreamBusy,
    "ark_error_429_overloaded.json": UpstreamBusy,
    "ark_error_429_set_limit.json": UpstreamBusy,
    "ark_error_429_tpm.json": UpstreamBusy,
    "ark_error_500.json": UpstreamError,
    "ark_error_502_html.txt": UpstreamError,
    "dashscope_error_400.json": UpstreamRefused,
    "dashscope_error_400_arrearage.json": UpstreamRefused,
    "dashscope_error_400_inspection.json": ContentFiltered,
    "dashscope_error_400_missing.json": UpstreamError,
    "dashscope_error_400_sse.sse": UpstreamRefused,
    "dashscope_error_400_sse_as_json.sse": UpstreamError,
    "dashscope_error_401.json": UpstreamRefused,
    "dashscope_error_401_no_content_type.json": UpstreamRefused,
    "dashscope_error_403.json": UpstreamRefused,
    "dashscope_error_403_workspace.json": UpstreamRefused,
    "dashscope_error_404.json": UpstreamRefused,
    "dashscope_error_429.json": UpstreamBusy,
    "dashscope_error_429_quota.json": UpstreamBusy,
    "dashscope_error_429_throttling.json": UpstreamBusy,
    "dashscope_error_500.json": UpstreamError,
    "dashscope_error_500_app.json": UpstreamError,
    "dashscope_error_503.json": UpstreamError,
    "openai_error_400.json": UpstreamError,
    "openai_error_401.json": UpstreamRefused,
    "openai_error_404.json": UpstreamRefused,
    "openai_error_429.json": UpstreamBusy,
    "openai_error_500.json": UpstreamError,
}
TRIED_ONCE = {"ark_error_429_set_limit.json"}


def vendor_words(fixture: Fixture) -> str:
    """The text of the vendor's message, as it must not reach anybody."""
    text = fixture.body.decode()
    return text.partition('"message":"')[2].partition('"')[0] or "<html"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fixture", ERRORS, ids=str)
async def test_every_recorded_error_is_told_in_our_words(
    fixture: Fixture, stream: bool, ark: Ask, app: Ask, server: Ask
) -> None:
    make = {"ark": ark, "dashscope": app, "openai": server}[fixture.vendor]
    async with ReplayFake(fixture) as fake:
        outcome = await ask(make(fake), question(stream=stream))
    error = outcome.error
    expect = fixture.expect or {}
    assert type(error) is CLASSES[fixture.file]
    assert (outcome.chunks, error.upstream_status) == (0, fixture.status)
    assert error.upstream_code == expect.get("code", expect.get("error"))
    assert vendor_words(fixture) not in error.message
    may_heal = fixture.status == 429 or fixture.status >= 500
    assert len(fake.requests) == (3 if may_heal and fixture.file not in TRIED_ONCE else 1)
    if isinstance(error, UpstreamBusy):
        assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 120


@pytest.mark.parametrize(
    ("fixture", "setting"),
    [
        ("ark_error_401.json", "DOUBAO_API_KEY"),
        ("ark_error_403_overdue.json", "DOUBAO_API_KEY"),
        ("ark_error_404.json", "check DOUBAO_MODEL"),
        ("ark_error_404_not_open.json", "DOUBAO_MODEL"),
        ("dashscope_error_400.json", "DASHSCOPE_APP_ID"),
        ("dashscope_error_401.json", "DASHSCOPE_API_KEY"),
        ("dashscope_error_403.json", "DASHSCOPE_APP_ID"),
        ("openai_error_401.json", "OPENAI_API_KEY"),
        ("openai_error_404.json", "OPENAI_MODEL"),
    ],
)
async def test_a_refusal_names_the_setting_to_change(
    fixture: str, setting: str, ark: Ask, app: Ask, server: Ask
) -> None:
    async with ReplayFake(fixture) as fake:
        make = {"ark": ark, "dashscope": app, "openai": server}[fixture.partition("_")[0]]
        outcome = await ask(make(fake))
    assert outcome.error is not None and setting in outcome.error.message


async def test_the_retired_default_model_is_told_with_its_successor(ark: Ask) -> None:
    async with DoubaoFake() as fake:
        outcome = await ask(ark(fake, DoubaoSettings().model))
    assert isinstance(outcome.error, UpstreamRefused)
    assert "set DOUBAO_MODEL, e.g. to doubao-seed-2-1-turbo-260628" in outcome.error.message


async def test_the_message_is_the_one_of_the_contract(ark: Ask) -> None:
    async with DoubaoFake(refuse(401, leak=True)) as fake:
        outcome = await ask(ark(fake))
    assert outcome.error is not None
    assert outcome.error.message == (
        "API proxy error: upstream Volcengine Ark answered 401 Unauthorized (AuthenticationError);"
        " check DOUBAO_API_KEY"
    )


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refusal_without_a_body_is_understood_by_its_status(status: int, ark: Ask) -> None:
    async with DoubaoFake(reply(status)) as fake:
        outcome = await ask(ark(fake))
    assert isinstance(outcome.error, UpstreamRefused) and "DOUBAO_" in outcome.error.message


# --- second tries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [refuse(429), refuse(500), refuse(503), fail(429, "RequestBurstTooFast"), fail(500), cut()],
    ids=["429", "500", "503", "429 in the stream", "500 in the stream", "cut before the head"],
)
async def test_what_heals_is_not_seen_by_the_visitor(first: Playable, ark: Ask) -> None:
    """P4."""
    async with DoubaoFake(first, script(say("好"), usage(3, 1))) as fake:
        outcome = await ask(ark(fake))
    assert (outcome.error, outcome.text, len(fake.requests)) == (None, "好", 2)


async def test_the_throttling_that_dashscope_tells_under_http_200_is_tried_again(app: Ask) -> None:
    async with DashScopeFake(fail(429, "Throttling.RateQuota"), script(say("好"))) as fake:
        outcome = await ask(app(fake))
    assert (outcome.error, outcome.text, len(fake.requests)) == (None, "好", 2)


async def test_after_the_first_word_nothing_is_tried_again(ark: Ask) -> None:
    async with DoubaoFake(script(say("一"), fail(429, "RequestBurstTooFast"))) as fake:
        outcome = await ask(ark(fake))
    assert isinstance(outcome.error, UpstreamBusy)
    assert (outcome.text, len(fake.requests)) == ("一", 1)
    assert outcome.error.retry_after_s == 5.0


@pytest.mark.parametrize("code", sorted(NEVER_HEALS))
async def test_quotas_and_bills_are_not_tried_again(code: str, ark: Ask) -> None:
    """P4."""
    async with DoubaoFake(refuse(429, code)) as fake:
        outcome = await ask(ark(fake))
    assert isinstance(outcome.error, UpstreamBusy) and "console" in outcome.error.message
    assert (outcome.error.retry_after_s, len(fake.requests)) == (120.0, 1)


async def test_a_long_retry_after_is_the_visitors(ark: Ask) -> None:
    async with DoubaoFake(refuse(429, headers={"Retry-After": "30"})) as fake:
        outcome = await ask(ark(fake))
    assert outcome.error is not None
    assert (outcome.error.retry_after_s, len(fake.requests)) == (30.0, 1)


async def test_each_try_takes_the_next_key(client: Client) -> None:
    async with DoubaoFake(refuse(429), script(say("好"))) as fake:
        settings = DoubaoSettings(("key-a", "key-b"), fake.base_url, MODEL)
        provider = doubao.provider(settings, client, retries())
        for _ in range(2):
            await ask(provider)
    assert [request.bearer for request in fake.requests] == ["key-a", "key-b", "key-a"]


async def test_without_a_key_no_authorization_is_sent(server: Ask) -> None:
    async with OpenAIFake(models=()) as fake:
        assert (await ask(server(fake))).error is None
    assert "Authorization" not in fake.requests[0].headers


# --- answers that go wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "play",
    [
        [say("一"), cut()],
        [say("一"), cut(reset=True)],
        [say("一"), cut(inside="二")],
        [say("一"), hang()],
        [say("一"), send_raw(b"data: [DONE]\n\n"), cut()],
    ],
    ids=["cut", "reset", "inside a character", "silence", "done without finish"],
)
async def test_a_cut_answer_keeps_its_text_and_has_no_end(play: list[Step]) -> None:
    limits = Limits(connect_s=1, first_byte_s=1, idle_s=0.1, answer_s=5)
    async with open_client(limits) as client, DoubaoFake(script(*play)) as fake:
        provider = doubao.provider(DoubaoSettings(("k",), fake.base_url, MODEL), client, retries())
        outcome = await ask(provider)
    assert isinstance(outcome.error, UpstreamBadResponse | UpstreamTimeout)
    assert (outcome.text, outcome.finish) == ("一", None)
    assert b"[DONE]" not in outcome.raw and len(fake.requests) == 1


async def test_an_answer_that_ends_early_was_cut(app: Ask) -> None:
    async with ReplayFake("dashscope_stream_no_stop.sse") as fake:
        outcome = await ask(app(fake))
    assert isinstance(outcome.error, UpstreamBadResponse)
    assert outcome.error.message.endswith("the answer was cut")
    assert outcome.text == "图书馆周一至周五"


async def test_a_connection_lost_after_the_finish_reason_costs_nothing(ark: Ask) -> None:
    async with DoubaoFake(script(say("一"), finish(done=False), cut())) as fake:
        outcome = await ask(ark(fake))
    assert outcome.error is None and outcome.finish is not None
    assert outcome.raw.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["json", "utf8", "nul", "list", "html"])
async def test_a_broken_frame_ends_the_answer(kind: str, ark: Ask) -> None:
    async with DoubaoFake(script(say("一"), garble(kind))) as fake:  # type: ignore[arg-type]
        outcome = await ask(ark(fake))
    assert isinstance(outcome.error, UpstreamBadResponse) and outcome.text == "一"


@pytest.mark.parametrize(
    "play",
    [
        reply(200, "<html>Service is being updated</html>", "text/html"),
        reply(200, b"", None),
        reply(204, b"", None),
        reply(200, '{"half":'),
        reply(200, "[1,2]"),
        reply(200, b"\xff\xfe{}"),
        reply(200, "{}"),
        redirect("http://127.0.0.1:9/"),
        gzip_bomb(4),
        reply(200, b" " * 65536, times=100),
    ],
    ids=["html", "empty", "204", "half", "list", "utf16", "no choices", "redirect", "gzip", "huge"],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_no_answer_is_a_bad_response(play: Playable, stream: bool, ark: Ask) -> None:
    async with DoubaoFake(play) as fake:
        outcome = await ask(ark(fake), question(stream=stream))
    assert isinstance(outcome.error, UpstreamBadResponse)
    assert (outcome.raw, len(fake.requests)) == (b"", 1)


async def test_a_line_without_end_is_refused(ark: Ask) -> None:
    async with DoubaoFake(script(say("一"), send_raw(b"x" * 65536, times=400))) as fake:
        outcome = await ask(ark(fake))
    assert isinstance(outcome.error, UpstreamBadResponse) and outcome.text == "一"
    assert fake.requests[0].bytes_sent < 16 * 1024 * 1024


async def test_an_answer_that_grows_without_end_is_ended(ark: Ask) -> None:
    async with DoubaoFake(endless("长" * 1000)) as fake:
        outcome = await ask(ark(fake))
        await fake.wait_disconnect(timeout_s=1.0)
    assert isinstance(outcome.error, AnswerTooLong)
    assert len(outcome.text.encode()) <= MAX_TEXT_BYTES


async def test_bytes_that_drip_one_by_one_are_understood(ark: Ask) -> None:
    async with DoubaoFake(script(think("想"), drip(1, 0.0), say("一🙂"), usage(3, 2, 1))) as fake:
        outcome = await ask(ark(fake))
    assert (outcome.error, outcome.text, outcome.reasoning) == (None, "一🙂", "想")


async def test_comments_are_handed_on_without_events(ark: Ask) -> None:
    async with DoubaoFake(script(comment("busy thinking"), say("一"))) as fake:
        outcome = await ask(ark(fake))
    assert outcome.raw.startswith(b": busy thinking\n\n") and outcome.text == "一"


async def test_a_json_answer_to_a_streaming_request_is_understood(ark: Ask, app: Ask) -> None:
    async with ReplayFake("ark_nonstream.json") as fake:
        outcome = await ask(ark(fake))
    assert outcome.text.startswith("反向代理站在") and outcome.raw.endswith(b"data: [DONE]\n\n")
    async with ReplayFake("dashscope_nonstream.json") as fake:
        outcome = await ask(app(fake))
    assert outcome.text.startswith("图书馆周一") and outcome.raw.startswith(b"id:1\nevent:result\n")


async def test_a_whole_answer_is_one_chunk_with_the_vendors_body(ark: Ask) -> None:
    play = script(think("想"), say("好"), call("look", "{}"), usage(9, 5, reasoning=2, cached=1))
    async with DoubaoFake(play) as fake:
        outcome = await ask(ark(fake), question(stream=False))
    body = json.loads(outcome.raw)
    assert (outcome.chunks, body["object"], outcome.text) == (1, "chat.completion", "好")
    assert outcome.fragments == body["choices"][0]["message"]["tool_calls"]
    assert outcome.usage is not None and outcome.usage.cached_tokens == 1


async def test_moderation_after_some_text_is_told_politely(app: Ask) -> None:
    async with ReplayFake("dashscope_stream_error_inspection.sse") as fake:
        outcome = await ask(app(fake))
    assert isinstance(outcome.error, ContentFiltered)
    assert (outcome.error.status, outcome.error.reason) == (400, "invalid_request")
    assert (outcome.error.upstream_code, outcome.text) == ("DataInspectionFailed", "图书馆周一至周五")


async def test_an_endless_error_body_does_not_fill_the_memory(ark: Ask) -> None:
    async with DoubaoFake(reply(403, b"x" * 65536, times=4000)) as fake:
        outcome = await ask(ark(fake))
        await fake.wait_disconnect(timeout_s=1.0)
    assert isinstance(outcome.error, UpstreamRefused)


# --- visitors who leave -----------------------------------------------------------------------------


async def first_of(chunks: AsyncIterator[Chunk]) -> Chunk:
    return await anext(chunks)


async def test_closing_early_aborts_the_vendor(ark: Ask) -> None:
    async with DoubaoFake(endless("字", 0.01)) as fake:
        async with aclosing(ark(fake).stream(question())) as chunks:
            assert (await first_of(chunks)).raw
        await fake.wait_disconnect(timeout_s=1.0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("play", [[hang()], [head(), hang()]], ids=["no head", "head alone"])
async def test_leaving_before_the_first_word_aborts_the_vendor(
    play: list[Step], stream: bool, ark: Ask
) -> None:
    async with DoubaoFake(script(*play)) as fake:
        task = asyncio.create_task(ask(ark(fake), question(stream=stream)))
        await fake.wait_requests()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fake.wait_disconnect(timeout_s=1.0)


async def test_an_answer_read_to_its_end_keeps_the_connection(ark: Ask) -> None:
    async with DoubaoFake() as fake:
        provider = ark(fake)
        for _ in range(3):
            assert (await ask(provider)).error is None
    assert {request.connection for request in fake.requests} == {1}


async def test_one_provider_serves_many_at_once(ark: Ask) -> None:
    async with DoubaoFake(script(say(*"一二三四五"), pace_s=0.005)) as fake:
        provider = ark(fake)
        outcomes: list[Outcome] = await asyncio.gather(*(ask(provider) for _ in range(20)))
    assert {outcome.text for outcome in outcomes} == {"一二三四五"}


# --- codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("InvalidEndpointOrModel.NotFound", "InvalidEndpointOrModel.NotFound"),
        ("rate_limit-1", "rate_limit-1"),
        ("", None),
        ("bad code", None),
        ("<b>", None),
        ("x" * 81, None),
        ("换", None),
        ("key-test-key-1-refused", None),
    ],
)
def test_only_plain_codes_without_a_key_are_repeated(code: str, safe: str | None) -> None:
    assert safe_code(code, ("test-key-1",)) == safe


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (b"", Refusal(400)),
        (b"<html>", Refusal(400)),
        (b'\xef\xbb\xbf {"error":{"code":"A","message":"m"}}', Refusal(400, "A", "m")),
        (b'{"error":"plain"}', Refusal(400, "", "plain")),
        (b'{"error":{"code":429,"type":"overloaded","message":"m"}}', Refusal(429, "overloaded", "m")),
        (b'{"error":{"code":7,"message":null}}', Refusal(400)),
        (b'{"code":"A","message":"m","request_id":"r"}', Refusal(400, "A", "m")),
        (b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"A"}', Refusal(429, "A")),
        (b'{"detail":"not ours"}', Refusal(400)),
        (b"{", Refusal(400)),
        (b"x" * (600 * 1024), Refusal(400)),
    ],
)
def test_errors_are_read_in_every_envelope(body: bytes, refusal: Refusal) -> None:
    assert parse_refusal(body, 400) == refusal


async def test_a_number_as_code_is_a_status(server: Ask) -> None:
    body = b'data: {"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}\n\n'
    async with OpenAIFake(script(send_raw(body), cut()), script(say("好")), models=()) as fake:
        outcome = await ask(server(fake))
    assert (outcome.error, outcome.text, len(fake.requests)) == (None, "好", 2)


async def test_a_provider_is_described_by_its_settings(client: Client) -> None:
    provider = doubao.provider(DoubaoSettings(keys=("k",)), client, Retries(sleep=no_sleep))
    assert isinstance(provider, VendorProvider)
    assert (provider.name, provider.dialect) == ("doubao", "openai")
    assert provider.default_model == "doubao-1-5-thinking-vision-pro-250428"
