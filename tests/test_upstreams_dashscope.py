"""Both generations of DashScope's own SDK judge the fake DashScope, and read the recordings."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import dashscope
import httpx
import pytest
import requests
from dashscope.api_entities.http_request import close_shared_sync_session
from dashscope.v2 import errors

from tests.upstreams.dashscope import APP_ID, KEY, DashScopeFake
from tests.upstreams.embeddings import EmbeddingsFake, vector
from tests.upstreams.replay import Fixture, ReplayFake, fixture, fixtures
from tests.upstreams.script import (
    Script,
    cite,
    cut,
    end,
    fail,
    no_usage,
    refuse,
    say,
    script,
    think,
    usage,
)

APPS = [one for one in fixtures(vendor="dashscope") if "/apps/" in one.path]
# What the vendor's SDKs make of these two is their own defect, told in the manifest.
UNREADABLE = {
    "classic": {"dashscope_error_400_sse_as_json.sse"},
    "new": {
        "dashscope_stream_unicode_separators.sse",
        "dashscope_stream_workflow_message_format.sse",
        "dashscope_stream_workflow_message_format_plus.sse",
    },
}


@pytest.fixture(autouse=True)
def _no_connections_left() -> Iterator[None]:
    """The classic SDK pools its connections for the life of the process."""
    yield
    close_shared_sync_session()


class Heard:
    """What an SDK made of an answer, whole or in pieces."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.references: list[str] = []
        self.session_id = self.code = ""
        self.status = 200
        self.finish_reason: str | None = None
        self.usage: list[tuple[str, int, int]] = []
        self.broken = False

    def take(self, answer: Any, usage: Any) -> None:
        self.texts.append(answer.text or "")
        for thought in answer.thoughts or ():
            self.thoughts.append(thought.thought or "")
        self.references = [one.doc_name for one in answer.doc_references or ()]
        self.session_id = answer.session_id or self.session_id
        self.finish_reason = answer.finish_reason
        models = (usage.models if usage else None) or ()
        self.usage = [(one.model_id, one.input_tokens, one.output_tokens) for one in models]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def listen_classic(base_url: str, *, streaming: bool = True, api_key: str = KEY, **more: Any) -> Heard:
    """The classic API: errors are told in the response, not raised."""
    heard = Heard()
    asked = {"app_id": APP_ID, "prompt": "图书馆几点开门", **more}
    answer: Any = dashscope.Application.call(
        api_key=api_key, base_address=base_url, stream=streaming, **asked
    )
    try:
        for one in answer if streaming else [answer]:
            if one.status_code != 200:
                heard.status, heard.code = one.status_code, one.code
            else:
                heard.take(one.output, one.usage)
    except requests.exceptions.ChunkedEncodingError:
        heard.broken = True
    return heard


def listen_new(base_url: str, *, streaming: bool = True, api_key: str = KEY, **more: Any) -> Heard:
    """The new client: errors are raised."""
    heard = Heard()
    client = dashscope.Client(api_key=api_key, base_url=base_url, max_retries=0)
    asked = {"app_id": APP_ID, "prompt": "图书馆几点开门", **more}
    try:
        answer: Any = client.apps.completions.create(stream=streaming, **asked)
        for one in answer if streaming else [answer]:
            heard.take(one, one.usage)
    except errors.DashScopeError as error:
        heard.status, heard.code = error.status_code or 0, error.code or ""
    except (httpx.RemoteProtocolError, httpx.ReadError):
        heard.broken = True
    finally:
        client.close()
    return heard


Listen = Callable[..., Heard]
SDKS = pytest.mark.parametrize("listen", [listen_classic, listen_new], ids=["classic", "new"])


async def hear(listen: Listen, fake: DashScopeFake | ReplayFake, **more: Any) -> Heard:
    return await asyncio.to_thread(listen, fake.base_url, **more)


@SDKS
async def test_incremental_stream_is_read(listen: Listen) -> None:
    steps = script(say("图", "书馆", "🙂"), usage(214, 37), chop=5)
    async with DashScopeFake(steps) as fake:
        heard = await hear(listen, fake, incremental_output=True)
    assert heard.texts == ["图", "书馆", "🙂", ""]
    assert (heard.finish_reason, heard.usage) == ("stop", [("qwen3.7-plus", 214, 37)])
    assert heard.session_id in fake.sessions


@SDKS
async def test_cumulative_stream_is_what_comes_unasked(listen: Listen) -> None:
    async with DashScopeFake(script(say("图", "书馆"))) as fake:
        heard = await hear(listen, fake)
    assert heard.texts == ["图", "图书馆", "图书馆"]


@SDKS
async def test_stream_in_gzip_is_read(listen: Listen) -> None:
    async with DashScopeFake(script(say("图", "书馆"), gzip=True)) as fake:
        heard = await hear(listen, fake, incremental_output=True)
    assert heard.text == "图书馆"


@SDKS
async def test_body_is_read_with_thoughts_and_references(listen: Listen) -> None:
    steps = script(think("先", "查"), say("八点<ref>[1]</ref>。"), cite(1, doc_name="开放时间"), usage(9, 4))
    async with DashScopeFake(steps) as fake:
        heard = await hear(listen, fake, streaming=False, has_thoughts=True)
    assert (heard.text, heard.thoughts) == ("八点<ref>[1]</ref>。", ["先查"])
    assert (heard.references, heard.usage) == (["开放时间"], [("qwen3.7-plus", 9, 4)])


@SDKS
async def test_thoughts_come_only_when_asked_for(listen: Listen) -> None:
    async with DashScopeFake(script(think("先", "查"), say("八点。"))) as fake:
        asked = await hear(listen, fake, incremental_output=True, has_thoughts=True)
        unasked = await hear(listen, fake, incremental_output=True)
    assert (asked.thoughts, asked.texts) == (["先", "查", "", ""], ["", "", "八点。", ""])
    assert (unasked.thoughts, unasked.texts) == ([], ["八点。", ""])


@SDKS
async def test_usage_may_be_empty_or_of_several_models(listen: Listen) -> None:
    both = script(say("甲"), usage(1, 2, model="a"), usage(3, 4, model="b"))
    async with DashScopeFake(both, script(say("甲"), no_usage())) as fake:
        assert (await hear(listen, fake, streaming=False)).usage == [("a", 1, 2), ("b", 3, 4)]
        assert (await hear(listen, fake, streaming=False)).usage == []


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "DataInspectionFailed"),
        (400, "Arrearage"),
        (401, "InvalidApiKey"),
        (403, "App.AccessDenied"),
        (404, "ModelNotFound"),
        (429, "Throttling.RateQuota"),
        (500, "AppProcessFailed"),
        (503, "ModelUnavailable"),
    ],
)
@SDKS
async def test_refusals_are_told_by_status_and_code(
    listen: Listen, status: int, code: str, streaming: bool
) -> None:
    async with DashScopeFake(script(refuse(status, code))) as fake:
        heard = await hear(listen, fake, streaming=streaming)
    assert (heard.status, heard.code) == (status, code)


@pytest.mark.parametrize("before", [(), ("学期", "第")])
@SDKS
async def test_error_inside_a_stream_is_told_by_code_alone(listen: Listen, before: tuple[str, ...]) -> None:
    """The classic SDK calls every one of them 400, the new one 200: neither reads `:HTTP_STATUS`."""
    steps = script(say(*before), fail(429, "Throttling.AllocationQuota"))
    async with DashScopeFake(steps) as fake:
        heard = await hear(listen, fake, incremental_output=True)
    assert heard.code == "Throttling.AllocationQuota"
    assert heard.status == (400 if listen is listen_classic else 200)
    assert heard.texts == list(before)


@SDKS
async def test_unknown_app_is_a_frame_in_a_stream_and_a_400_without(listen: Listen) -> None:
    async with DashScopeFake() as fake:
        for streaming in (True, False):
            heard = await hear(listen, fake, streaming=streaming, app_id="nobodys-app")
            assert (heard.code, heard.texts) == ("InvalidParameter", [])


@SDKS
async def test_wrong_key_is_refused(listen: Listen) -> None:
    async with DashScopeFake(keys=("right",)) as fake:
        heard = await hear(listen, fake, api_key="wrong")
        assert (heard.status, heard.code) == (401, "InvalidApiKey")
        assert (await hear(listen, fake, api_key="right")).status == 200
    assert [one.bearer for one in fake.requests] == ["wrong", "right"]


@SDKS
async def test_cut_connection_breaks_after_the_whole_frames(listen: Listen) -> None:
    async with DashScopeFake(script(say("一", "二"), cut(inside="三四"))) as fake:
        heard = await hear(listen, fake, incremental_output=True)
    assert (heard.texts, heard.broken) == (["一", "二"], True)


@SDKS
async def test_end_without_stop_is_silent_to_the_sdks(listen: Listen) -> None:
    async with DashScopeFake(script(say("一"), end())) as fake:
        heard = await hear(listen, fake, incremental_output=True)
    assert (heard.texts, heard.finish_reason, heard.broken) == (["一"], "null", False)


@SDKS
async def test_session_goes_on_when_its_id_comes_back(listen: Listen) -> None:
    async with DashScopeFake() as fake:
        first = await hear(listen, fake, prompt="我叫小明")
        second = await hear(listen, fake, prompt="我叫什么", session_id=first.session_id)
    assert second.session_id == first.session_id
    assert fake.sessions[first.session_id].prompts == ["我叫小明", "我叫什么"]
    assert len(first.session_id) == 32


@SDKS
async def test_session_expires_after_an_idle_hour_and_after_fifty_rounds(listen: Listen) -> None:
    now = [0.0]
    async with DashScopeFake(clock=lambda: now[0]) as fake:
        first = await hear(listen, fake)
        now[0] = 3601
        second = await hear(listen, fake, session_id=first.session_id)
        assert second.session_id != first.session_id
        fake.sessions[second.session_id].prompts.extend(["…"] * 49)
        third = await hear(listen, fake, session_id=second.session_id)
        assert third.session_id != second.session_id


@SDKS
async def test_strict_fake_refuses_a_session_it_does_not_know(listen: Listen) -> None:
    async with DashScopeFake(strict_sessions=True) as fake:
        assert (await hear(listen, fake, session_id="0" * 32)).code == "InvalidParameter"


@SDKS
async def test_messages_win_over_the_session(listen: Listen) -> None:
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    async with DashScopeFake(strict_sessions=True) as fake:
        heard = await hear(listen, fake, messages=history, session_id="0" * 32)
    assert heard.status == 200
    assert fake.requests[0].json["input"]["messages"][-1]["content"] == "图书馆几点开门"


@SDKS
async def test_workspace_is_asked_for(listen: Listen) -> None:
    async with DashScopeFake(workspace="ws-1") as fake:
        assert (await hear(listen, fake)).code == "Workspace.AccessDenied"


async def test_workflow_messages_are_read_by_the_classic_sdk() -> None:
    def messages(base_url: str) -> list[tuple[str, str]]:
        answers: Any = dashscope.Application.call(
            app_id=APP_ID,
            prompt="报名",
            api_key=KEY,
            base_address=base_url,
            stream=True,
            flow_stream_mode="message_format",
        )
        found = [one.output.workflow_message for one in answers]
        return [(one["node_type"], one["message"]["content"]) for one in found if one]

    async with DashScopeFake(script(say("报名", "已受理。")), workflow=True) as fake:
        assert await asyncio.to_thread(messages, fake.base_url) == [
            ("End", "报名"),
            ("End", "已受理。"),
            ("End", ""),
        ]


async def test_async_client_reads_the_same_stream() -> None:
    async with (
        DashScopeFake(script(say("图", "书馆"))) as fake,
        dashscope.AsyncClient(api_key=KEY, base_url=fake.base_url) as client,
    ):
        stream: Any = await client.apps.completions.create(
            app_id=APP_ID, prompt="图书馆", stream=True, incremental_output=True
        )
        assert [one.text async for one in stream] == ["图", "书馆", ""]


@pytest.mark.parametrize(
    ("script_steps", "accept"),
    [(script(), {"Accept": "text/event-stream"}), (script(), {"X-DashScope-SSE": "enable"})],
)
async def test_either_header_asks_for_a_stream(script_steps: Script, accept: dict[str, str]) -> None:
    async with DashScopeFake(script_steps) as fake, httpx.AsyncClient() as client:
        url = f"{fake.base_url}/apps/{APP_ID}/completion"
        head = {"Authorization": "Bearer k", **accept}
        answer = await client.post(url, json={"input": {"prompt": "问"}}, headers=head)
    assert answer.headers["Content-Type"] == "text/event-stream;charset=UTF-8"
    assert answer.headers["x-dashscope-finished"] == "false"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "BadRequest.EmptyInput"),
        ({"input": {}}, "InvalidParameter"),
        ({"input": {"prompt": ""}}, "InvalidParameter"),
        ({"input": {"messages": [{"role": "wizard", "content": "x"}]}}, "InvalidParameter"),
    ],
)
async def test_wrong_input_is_refused(body: dict[str, Any], code: str) -> None:
    async with DashScopeFake() as fake, httpx.AsyncClient() as client:
        url = f"{fake.base_url}/apps/{APP_ID}/completion"
        answer = await client.post(url, json=body, headers={"Authorization": "Bearer k"})
        lost = await client.post(fake.base_url + "/nowhere", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert (lost.status_code, lost.content) == (404, b"")


async def test_wrong_role_in_a_stream_is_framed_under_a_json_content_type() -> None:
    async with DashScopeFake() as fake, httpx.AsyncClient() as client:
        url = f"{fake.base_url}/apps/{APP_ID}/completion"
        head = {"Authorization": "Bearer k", "X-DashScope-SSE": "enable"}
        body = {"input": {"messages": [{"role": "user", "content": ""}]}}
        answer = await client.post(url, json=body, headers=head)
    recorded = fixture("dashscope_error_400_sse_as_json.sse")
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/json")
    assert answer.text.split('"request_id"')[0] == recorded.body.decode().split('"request_id"')[0]


async def test_embeddings_of_both_addresses_are_the_texts_vectors() -> None:
    def embed(base_url: str) -> list[list[float]]:
        client = dashscope.Client(api_key=KEY, base_url=base_url, max_retries=0)
        try:
            answer = client.embeddings.create(model="text-embedding-v4", input=["一", "二"])
            return [one.embedding for one in answer.embeddings]
        finally:
            client.close()

    async with EmbeddingsFake() as fake:
        assert await asyncio.to_thread(embed, fake.dashscope_url) == [vector("一"), vector("二")]


def text_of(recorded: Fixture) -> str:
    """The answer's text, as the manifest or the recorded body tells it."""
    if recorded.expect is not None:
        return str(recorded.expect.get("text", ""))
    return str(json.loads(recorded.body)["output"]["text"])


@pytest.mark.parametrize(
    ("listen", "recorded"),
    [
        pytest.param(listen, recorded, id=f"{generation}-{recorded}")
        for generation, listen in (("classic", listen_classic), ("new", listen_new))
        for recorded in APPS
        if recorded.file not in UNREADABLE[generation]
    ],
)
async def test_recordings_hold_what_the_manifest_says(listen: Listen, recorded: Fixture) -> None:
    cumulative = "cumulative" in recorded.file or "workflow" in recorded.file
    async with ReplayFake(recorded) as fake:
        heard = await hear(listen, fake, streaming=recorded.kind == "sse")
    assert (heard.texts[-1] if cumulative else heard.text) == text_of(recorded)
    expect = recorded.expect or {}
    error = expect.get("error") or expect.get("code") or ""
    if recorded.content_type is None and listen is listen_classic:
        error = "Unknown"  # without a content type it does not look into the body
    assert heard.code == error
    assert heard.broken is recorded.is_truncated
