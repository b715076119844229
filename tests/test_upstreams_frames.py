"""The fakes' bytes against the vendors': each recorded answer, written as a script, comes out the same."""

import json
import ssl
from typing import Any

import httpx
import pytest

from tests.upstreams import dashscope, doubao, openai_like
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import MODELS, RETIRED_MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.replay import fixture
from tests.upstreams.script import (
    Script,
    Step,
    call,
    cite,
    comment,
    cut,
    end,
    fail,
    finish,
    no_usage,
    refuse,
    say,
    script,
    seal,
    think,
    usage,
)

# No certificates are needed on plain HTTP, and reading them costs more than any test here.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ARK_ID = "0217953372001235f0c9a7e41d2b86370f5e1c4a9d8b2760e3f1a"
ARK_REQUEST = "02179533720012300000000000000000000ffffac1a2b3c4d5e6f"
CREATED = 1795337200
SESSION = "7c1e5b0f9a2d4c6e8b3f1a5d7e9c0b24"
REQUEST = "3b6f2a91-5c4d-9e70-8a1b-2f7c6d5e4b3a"
THINKER = {"model": RETIRED_MODEL}
ASKED_USAGE = {"stream_options": {"include_usage": True}}


async def ask(url: str, body: dict[str, Any], **headers: str) -> tuple[int, bytes, bool]:
    """Status, body, and whether the body came to its proper end."""
    data, whole = b"", True
    head = {"Authorization": "Bearer test-key", **headers}
    async with (
        httpx.AsyncClient(verify=PLAIN) as client,
        client.stream("POST", url, json=body, headers=head) as answer,
    ):
        try:
            async for piece in answer.aiter_raw():
                data += piece
        except httpx.RemoteProtocolError:
            whole = False
        return answer.status_code, data, whole


async def ask_ark(steps: Script, **more: Any) -> tuple[int, bytes, bool]:
    known = (*MODELS, RETIRED_MODEL)
    fake = DoubaoFake(steps, models=known, answer_id=ARK_ID, created=CREATED, request_id=ARK_REQUEST)
    body = {"model": doubao.MODEL, "messages": [{"role": "user", "content": "问"}], "stream": True, **more}
    async with fake:
        return await ask(fake.base_url + "/chat/completions", body)


BEFORE_THE_WORDS = think(
    "\n", "用户想要", "一句话的解释，", "关键是说清“替谁转发”。", "生僻字也要能过：𠮷野家。"
)
ARK_STREAMS: dict[str, tuple[Script, dict[str, Any]]] = {
    "ark_stream_thinking.sse": (
        script(
            BEFORE_THE_WORDS,
            say("反向代理", "站在服务器一侧，", "替后端接收请求", "再把结果送回给访客。", "🙂"),
            usage(31, 58, 37),
        ),
        THINKER | ASKED_USAGE,
    ),
    "ark_stream_chunk_include_usage.sse": (
        script(say("你好，", "我是网站助手，", "有什么可以帮你？"), usage(15, 12)),
        {"stream_options": {"chunk_include_usage": True}},
    ),
    "ark_stream_encrypted_thinking.sse": (
        script(
            think("\n先判断用户意图。"),
            seal("ZmFrZS1lbmNyeXB0ZWQtdGhvdWdodA=="),
            say("好的，", "马上为你查询。"),
            usage(22, 30, 19),
        ),
        ASKED_USAGE,
    ),
    "ark_stream_content_filter.sse": (
        script(say("这个问题"), usage(26, 3), finish("content_filter", moderation="violence")),
        ASKED_USAGE,
    ),
    "ark_stream_error_midway.sse": (
        script(think("\n", "先查一下校历。"), say("学期第"), fail(429, "RequestBurstTooFast")),
        {},
    ),
    "ark_stream_error_first.sse": (script(fail(429, "RequestBurstTooFast")), {}),
    "ark_stream_truncated.sse": (
        script(BEFORE_THE_WORDS, say("反向代理"), cut(inside="站在")),
        THINKER,
    ),
    "ark_stream_no_done.sse": (
        script(
            BEFORE_THE_WORDS,
            say("反向代理", "站在服务器一侧，", "替后端接收请求"),
            end(),
        ),
        THINKER,
    ),
    "ark_stream_keepalive.sse": (
        script(comment(), say("心跳"), comment(), say("不应打断解析。"), finish()),
        {},
    ),
}


@pytest.mark.parametrize("name", ARK_STREAMS)
async def test_ark_frames_are_the_recorded_ones(name: str) -> None:
    steps, more = ARK_STREAMS[name]
    status, data, whole = await ask_ark(steps, **more)
    assert data.decode(errors="replace") == fixture(name).body.decode(errors="replace")
    assert (status, whole) == (200, not fixture(name).is_truncated)


async def test_ark_tool_calls_come_in_the_recorded_fragments() -> None:
    recorded = fixture("ark_stream_tool_calls.sse").body.decode()
    frames = [json.loads(line[6:]) for line in recorded.splitlines() if line.startswith("data: {")]
    deltas = [frame["choices"][0]["delta"] for frame in frames if frame["choices"]]
    calls = [one["tool_calls"][0]["function"]["arguments"] for one in deltas if "tool_calls" in one]
    told = frames[-1]["usage"]
    reasoning = told["completion_tokens_details"]["reasoning_tokens"]
    steps = script(
        think("\n", "需要先查课表。"),
        call("lookup_timetable", *calls[1:]),
        usage(told["prompt_tokens"], told["completion_tokens"], reasoning),
        finish("tool_calls"),
    )
    assert (await ask_ark(steps, **ASKED_USAGE))[1].decode() == recorded


ARK_ANSWERS = {
    "ark_nonstream.json": (
        script(
            think("\n用户想要一句话的解释，", "关键是说清“替谁转发”。正向代理替客户端，反向代理替服务器。"),
            say("反向代理站在服务器一侧，", "替后端接收请求再把结果送回给访客。🙂"),
            usage(31, 58, 37),
        ),
        THINKER,
    ),
    "ark_nonstream_length.json": (
        script(say("网站的常见问题可以分为三类：第一类是"), usage(18, 12), finish("length")),
        {},
    ),
    "ark_nonstream_content_filter.json": (
        script(usage(26, 0), finish("content_filter", moderation="violence")),
        {},
    ),
    "ark_nonstream_tool_calls.json": (
        script(
            think("\n需要先查课表。"),
            call("lookup_timetable", ' {"week": 3,', ' "campus": "东校区"}'),
            usage(142, 41, 12),
            finish("tool_calls"),
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", ARK_ANSWERS)
async def test_ark_bodies_are_the_recorded_ones(name: str) -> None:
    steps, more = ARK_ANSWERS[name]
    assert (await ask_ark(steps, stream=False, **more))[1].decode() == fixture(name).body.decode()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ark_error_429.json", refuse(429)),
        ("ark_error_429_tpm.json", refuse(429, "RateLimitExceeded.EndpointTPMExceeded")),
        ("ark_error_429_overloaded.json", refuse(429, "ServerOverloaded")),
        ("ark_error_429_set_limit.json", refuse(429, "SetLimitExceeded")),
        ("ark_error_500.json", refuse(500)),
        ("ark_error_403_overdue.json", refuse(403)),
        ("ark_error_400_sensitive.json", refuse(400, "InputTextSensitiveContentDetected")),
    ],
)
async def test_ark_errors_are_the_recorded_ones(name: str, step: Step) -> None:
    status, data, _ = await ask_ark(script(step))
    assert (status, data.decode()) == (fixture(name).status, fixture(name).body.decode())


async def ask_dashscope(
    steps: Script, parameters: dict[str, Any], app_id: str = dashscope.APP_ID, **knobs: Any
) -> tuple[int, bytes, bool]:
    async with DashScopeFake(steps, session_id=SESSION, request_id=REQUEST, **knobs) as fake:
        body = {"input": {"prompt": "图书馆几点开门"}, "parameters": parameters, "debug": {}}
        url = f"{fake.base_url}/apps/{app_id}/completion"
        return await ask(url, body, **{"X-DashScope-SSE": "enable"})


INCREMENTAL = {"incremental_output": True}
THOUGHTS = {"has_thoughts": True}


def counted(*pieces: tuple[str, int], prompt: int = 214) -> list[Step]:
    """Pieces of text, each with the tokens told in its frame."""
    steps: list[Step] = []
    for text, tokens in pieces:
        steps += [usage(prompt, tokens), say(text)]
    return steps


LIBRARY = counted(
    *(("图", 1), ("书馆", 2), ("周一至周五", 6), ("8:00–22:00 开放，", 17)),
    *(("周末 9:00–18:00。", 28), ("欢迎来𠮷野阅览室🙂", 37)),
)
THINKING: list[Step] = [
    *(
        usage(198, 3),
        think("先"),
        usage(198, 6),
        think("确认访客"),
        usage(198, 11),
        think("问的是开放时间，"),
    ),
    *(usage(198, 17), think("资料里写得很清楚。")),
    *counted(("图书馆", 20), ("工作日 8 点开门，", 27), ("周末 9 点🙂。", 34), prompt=198),
]
FIRST_REFERENCE = cite(
    1,
    text="【文档名】:开放时间\n【标题】:图书馆\n"
    "【正文】:周一至周五 8:00–22:00；周末 9:00–18:00；法定节假日另行通知。",
    title="图书馆",
    doc_name="开放时间",
    doc_id="file_0f1e2d3c4b5a69788796a5b4c3d2e1f0_10000001",
)
SECOND_REFERENCE = cite(
    2,
    text="【文档名】:读者须知\n【正文】:闭馆前 30 分钟停止入馆。",
    title="读者须知",
    doc_name="读者须知",
    doc_id="file_1a2b3c4d5e6f708192a3b4c5d6e7f809_10000001",
)
DASHSCOPE_STREAMS: dict[str, tuple[Script, dict[str, Any]]] = {
    "dashscope_stream_incremental.sse": (script(*LIBRARY), INCREMENTAL),
    "dashscope_stream_cumulative.sse": (script(*LIBRARY), {}),
    "dashscope_stream_thoughts.sse": (script(*THINKING), INCREMENTAL | THOUGHTS),
    "dashscope_stream_thoughts_cumulative.sse": (script(*THINKING), THOUGHTS),
    "dashscope_stream_citations.sse": (
        script(
            *counted(("图书馆工作日", 20), (" 8 点开门<", 25), ("ref>[1", 28), prompt=1893),
            FIRST_REFERENCE,
            *counted(("]</ref>，", 32), ("闭馆前 30 分钟停止入馆<ref>", 42), prompt=1893),
            SECOND_REFERENCE,
            *counted(("[2]</ref>。", 46), prompt=1893),
        ),
        INCREMENTAL,
    ),
    "dashscope_stream_error_midway.sse": (
        script(*LIBRARY[:6], fail(429, "Throttling.AllocationQuota")),
        INCREMENTAL,
    ),
    "dashscope_stream_error_inspection.sse": (
        script(
            *LIBRARY[:6],
            fail(400, "DataInspectionFailed", "Output data may contain inappropriate content."),
        ),
        INCREMENTAL,
    ),
    "dashscope_stream_error_500.sse": (script(fail(500, "InternalError.Algo")), INCREMENTAL),
    "dashscope_stream_no_stop.sse": (script(*LIBRARY[:6], end()), INCREMENTAL),
    "dashscope_stream_truncated.sse": (
        script(*LIBRARY[:8], usage(214, 28), cut(inside="周末")),
        INCREMENTAL,
    ),
}


@pytest.mark.parametrize("name", DASHSCOPE_STREAMS)
async def test_dashscope_frames_are_the_recorded_ones(name: str) -> None:
    steps, parameters = DASHSCOPE_STREAMS[name]
    status, data, whole = await ask_dashscope(steps, parameters)
    assert data.decode(errors="replace") == fixture(name).body.decode(errors="replace")
    assert (status, whole) == (200, not fixture(name).is_truncated)


@pytest.mark.parametrize(
    ("name", "mode", "pieces"),
    [
        (
            "dashscope_stream_workflow_message_format.sse",
            "message_format",
            ("报名", "已受理，", "编号 A-17。"),
        ),
        (
            "dashscope_stream_workflow_message_format_plus.sse",
            "message_format_plus",
            ("报名", "已受理，编号 A-17。"),
        ),
    ],
)
async def test_workflow_frames_are_the_recorded_ones(name: str, mode: str, pieces: tuple[str, ...]) -> None:
    steps = script(say(*pieces), usage(96, 14))
    _, data, _ = await ask_dashscope(steps, INCREMENTAL | {"flow_stream_mode": mode}, workflow=True)
    assert data.decode() == fixture(name).body.decode()


async def test_unknown_app_is_told_in_a_frame_under_200() -> None:
    status, data, _ = await ask_dashscope(script(), INCREMENTAL, app_id="nobodys-app")
    assert (status, data) == (200, fixture("dashscope_stream_error.sse").body)


async def test_framed_refusal_has_the_status_and_content_type_asked_for() -> None:
    status, data, _ = await ask_dashscope(script(refuse(400, framed=True)), INCREMENTAL)
    assert (status, data) == (400, fixture("dashscope_error_400_sse.sse").body)


async def test_dashscope_body_is_the_recorded_one() -> None:
    steps = script(no_usage(), say("已为你生成", "报名确认单。"))
    async with DashScopeFake(steps, session_id=SESSION, request_id=REQUEST) as fake:
        url = f"{fake.base_url}/apps/{dashscope.APP_ID}/completion"
        _, data, _ = await ask(url, {"input": {"prompt": "报名"}})
    assert data == fixture("dashscope_nonstream_workflow.json").body


async def test_usage_of_several_models_is_a_list() -> None:
    steps = script(
        say("三门课的对比如下：高等数学每周 6 学时。"),
        usage(412, 18, model="qwen3.7-flash"),
        usage(988, 64, model="qwen3.7-plus"),
    )
    async with DashScopeFake(steps, session_id=SESSION, request_id=REQUEST) as fake:
        url = f"{fake.base_url}/apps/{dashscope.APP_ID}/completion"
        _, data, _ = await ask(url, {"input": {"prompt": "对比"}})
    assert data == fixture("dashscope_nonstream_multi_model.json").body


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("dashscope_error_400_arrearage.json", refuse(400, "Arrearage")),
        ("dashscope_error_403.json", refuse(403)),
        ("dashscope_error_404.json", refuse(404)),
        ("dashscope_error_429.json", refuse(429)),
        ("dashscope_error_429_quota.json", refuse(429, "Throttling.AllocationQuota")),
        ("dashscope_error_429_throttling.json", refuse(429, "Throttling")),
        ("dashscope_error_500.json", refuse(500)),
        ("dashscope_error_500_app.json", refuse(500, "AppProcessFailed")),
        ("dashscope_error_503.json", refuse(503)),
    ],
)
async def test_dashscope_errors_are_the_recorded_ones(name: str, step: Step) -> None:
    status, data, _ = await ask_dashscope(script(step), INCREMENTAL)
    assert (status, data.decode()) == (fixture(name).status, fixture(name).body.decode())


OPENAI_STEPS = script(think("先想清楚替谁转发。"), say("反向代理", "替服务器接收请求。🙂"), usage(31, 58, 37))


async def ask_openai(steps: Script, **more: Any) -> bytes:
    model = "mogine-doubao"
    fake = OpenAIFake(steps, models=(model,), answer_id="chatcmpl-mgn3f8a1c2d4e5b6978", created=CREATED)
    async with fake:
        body = {"model": model, "messages": [{"role": "user", "content": "问"}], **more}
        return (await ask(fake.base_url + "/chat/completions", body))[1]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("openai_stream.sse", {"stream": True}),
        ("openai_stream_usage.sse", {"stream": True, "stream_options": {"include_usage": True}}),
        ("openai_chat_nonstream.json", {}),
    ],
)
async def test_openai_bytes_are_the_recorded_ones(name: str, more: dict[str, Any]) -> None:
    assert (await ask_openai(OPENAI_STEPS, **more)).decode() == fixture(name).body.decode()


async def test_openai_errors_are_the_recorded_ones() -> None:
    async with OpenAIFake(keys=(openai_like.KEY,)) as fake:
        status, data, _ = await ask(fake.base_url + "/chat/completions", {})
    assert (status, data) == (401, fixture("openai_error_401.json").body)
    assert await ask_openai(script(refuse(429))) == fixture("openai_error_429.json").body
