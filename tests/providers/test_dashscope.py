"""DashScope's dialect: every recorded answer in any split, requests, and answers composed in it."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.chat import (
    ChatEvent,
    ChatMessage,
    Citation,
    Citations,
    Delta,
    Finish,
    ImagePart,
    Reasoning,
    ToolCalls,
    Usage,
)
from mogine.errors import RequestError, UpstreamBadResponse
from mogine.providers.dashscope import ApplicationParser, DashScopeDialect, DashScopeEncoder, _MarkFilter
from tests.providers.conftest import Ask
from tests.providers.outcome import Outcome, ask, parse, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.replay import Fixture, fixture, fixtures
from tests.upstreams.script import cite, no_usage, say, script, think, usage

STREAMS = [f for f in fixtures(vendor="dashscope", kind="sse") if f.status == 200]
SESSION = "7c1e5b0f9a2d4c6e8b3f1a5d7e9c0b24"
REQUEST = "3b6f2a91-5c4d-9e70-8a1b-2f7c6d5e4b3a"
MODEL = "qwen3.7-plus"


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def check(outcome: Outcome, fixture: Fixture) -> None:
    """`outcome` is what the manifest expects of `fixture`; citation marks are taken down to their number."""
    expect = fixture.expect or {}
    assert outcome.text == expect.get("text", "").replace("<ref>", "").replace("</ref>", "")
    assert outcome.reasoning == expect.get("reasoning", "")
    models = expect.get("usage", {}).get("models")
    assert outcome.usage == (Usage(models[0]["input_tokens"], models[0]["output_tokens"]) if models else None)
    assert (outcome.finish.reason if outcome.finish else None) == expect.get("finish_reason")
    if outcome.finish:
        assert outcome.finish == Finish("stop", MODEL, expect["session_id"])
    assert len(outcome.citations) == expect.get("refs", 0)
    if "error" in expect:
        assert outcome.error is not None
        assert (outcome.error.message, outcome.error.upstream_status) == (
            expect["error"],
            expect["error_status"],
        )
    else:
        assert outcome.error is None


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("fixture", STREAMS, ids=str)
def test_every_recorded_stream_is_understood_whatever_was_asked_for(
    fixture: Fixture, incremental: bool
) -> None:
    check(parse(ApplicationParser(incremental=incremental), [fixture.body]), fixture)


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_of_the_bytes_gives_the_same_events(fixture: Fixture, cuts: list[int]) -> None:
    whole = parse(ApplicationParser(), [fixture.body])
    pieces = parse(ApplicationParser(), split(fixture.body, cuts))
    assert (pieces.events, pieces.raw) == (whole.events, whole.raw)


@pytest.mark.parametrize(
    "name",
    ["dashscope_stream_incremental.sse", "dashscope_stream_cumulative.sse", "dashscope_stream_thoughts.sse"],
)
def test_bytes_are_handed_on_untouched(name: str) -> None:
    assert parse(ApplicationParser(), [fixture(name).body]).raw == fixture(name).body


@pytest.mark.parametrize("fixture", [f for f in STREAMS if "error" in (f.expect or {})], ids=str)
def test_an_error_frame_is_never_handed_on(fixture: Fixture) -> None:
    raw = parse(ApplicationParser(), [fixture.body]).raw
    assert b"event:error" not in raw and b'"code"' not in raw


def test_an_error_event_without_a_code_is_an_error_too() -> None:
    outcome = parse(ApplicationParser(), [b"event:error\n:HTTP_STATUS/500\ndata:{}\n\n"])
    assert outcome.error is not None and outcome.error.upstream_status == 500


def test_references_become_citations() -> None:
    outcome = parse(ApplicationParser(), [fixture("dashscope_stream_citations.sse").body])
    assert outcome.citations[0] == Citation(
        number=1,
        title="图书馆",
        source="开放时间",
        heading="",
        url="",
        excerpt="周一至周五 8:00–22:00；周末 9:00–18:00；法定节假日另行通知。",
        score=0.0,
    )
    assert [len(e.items) for e in outcome.events if isinstance(e, Citations)] == [1, 2]
    assert "8 点开门[1]，" in outcome.text


# --- whole answers ----------------------------------------------------------------------------------


def whole(name: str, *, as_stream: bool = False) -> Outcome:
    outcome = Outcome()
    outcome.add(ApplicationParser().whole(fixture(name).body, as_stream=as_stream))
    return outcome


def test_a_whole_answer_is_understood() -> None:
    outcome = whole("dashscope_nonstream.json")
    assert outcome.text == "图书馆周一至周五 8:00–22:00 开放，周末 9:00–18:00。"
    assert (outcome.usage, outcome.finish) == (Usage(214, 27), Finish("stop", MODEL, SESSION))
    assert outcome.raw == fixture("dashscope_nonstream.json").body


def test_only_reasoning_steps_are_reasoning() -> None:
    outcome = whole("dashscope_nonstream_thoughts.json")
    assert outcome.reasoning == "资料里已有开放时间，直接回答并标注出处。"
    assert outcome.text == "图书馆工作日 8 点开门[1]，闭馆前 30 分钟停止入馆[2]。"
    assert [citation.number for citation in outcome.citations] == [1, 2]


def test_the_tokens_of_several_models_are_summed() -> None:
    outcome = whole("dashscope_nonstream_multi_model.json")
    assert outcome.usage == Usage(412 + 988, 18 + 64)
    assert outcome.finish == Finish("stop", MODEL, SESSION)


def test_a_workflow_may_tell_no_usage() -> None:
    outcome = whole("dashscope_nonstream_workflow.json")
    assert (outcome.text, outcome.usage) == ("已为你生成报名确认单。", None)


def test_a_whole_answer_where_a_stream_was_asked_for_is_composed_as_frames() -> None:
    again = parse(ApplicationParser(), [whole("dashscope_nonstream.json", as_stream=True).raw])
    assert again.text == "图书馆周一至周五 8:00–22:00 开放，周末 9:00–18:00。"
    assert (again.usage, again.finish) == (Usage(214, 27), Finish("stop", MODEL, SESSION))


def test_a_whole_answer_without_a_finish_reason_is_cut() -> None:
    with pytest.raises(UpstreamBadResponse, match="cut"):
        ApplicationParser().whole(b'{"output":{"text":"x","finish_reason":"null"}}', as_stream=False)


# --- pieces or everything so far --------------------------------------------------------------------


def frame(text: str, reason: str = "null", **output: Any) -> bytes:
    body = {"output": {"finish_reason": reason, "text": text, **output}}
    return b"data:" + json.dumps(body).encode() + b"\n\n"


def said(frames: list[bytes], *, incremental: bool) -> str:
    return parse(ApplicationParser(incremental=incremental), frames).text


# Each piece begins with a sign of its own, so that none looks like all of the text before it.
PIECES = st.lists(st.text("天地玄黄abc ", max_size=6), max_size=8).map(
    lambda texts: [chr(0x5000 + number) + text for number, text in enumerate(texts)]
)


@given(PIECES, st.booleans())
def test_cumulative_frames_read_as_the_text_whatever_was_asked_for(
    pieces: list[str], incremental: bool
) -> None:
    frames = [*map(frame, itertools.accumulate(pieces)), frame("".join(pieces), "stop")]
    assert said(frames, incremental=incremental) == "".join(pieces)


@given(PIECES, st.booleans())
def test_pieces_read_as_their_sum_whatever_was_asked_for(pieces: list[str], incremental: bool) -> None:
    assert said([*map(frame, pieces), frame("", "stop")], incremental=incremental) == "".join(pieces)


@given(st.lists(st.text("a甲", max_size=3), max_size=8), st.lists(st.integers(0, 99), max_size=12))
def test_citation_marks_in_any_split_become_numbers(texts: list[str], cuts: list[int]) -> None:
    marked = "<ref>[1]</ref>".join(texts)
    places = sorted({0, len(marked), *(cut % (len(marked) + 1) for cut in cuts)})
    marks = _MarkFilter()
    stripped = "".join(marks.strip(marked[a:b], last=False) for a, b in itertools.pairwise(places))
    assert stripped + marks.strip("", last=True) == "[1]".join(texts)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["哈", "哈", "哈", "！"], "哈哈哈！"),
        (["1", "10", "元"], "110元"),
        (["好", "好的", "，"], "好好的，"),
        (["a", "aa"], "aaa"),
    ],
)
def test_pieces_that_look_cumulative_are_held_back_until_it_is_clear(pieces: list[str], text: str) -> None:
    assert said([*map(frame, pieces)], incremental=True) == text


def test_a_workflow_that_ends_with_its_whole_text_says_it_once() -> None:
    frames = [frame("报名"), frame("已受理"), frame("报名已受理。", "stop")]
    assert said(frames, incremental=True) == "报名已受理。"


def test_a_mark_that_is_none_is_text() -> None:
    assert (
        said([frame("a <"), frame("b> <re"), frame("f <ref>[1]", "stop")], incremental=True)
        == "a <b> <ref [1]"
    )


def test_a_mark_begun_at_the_end_of_a_cut_stream_is_not_lost() -> None:
    assert said([frame("甲"), frame("乙<re")], incremental=True) == "甲乙<re"


def node(kind: str, content: str) -> bytes:
    message = {"node_type": kind, "message": {"content": content}}
    return frame("", workflow_message=message)


def test_nodes_of_a_workflow_speak_in_pieces() -> None:
    frames = [
        node("Start", '{"user":{}}'),
        node("LLM", '{"result":"","reasoningContent":"想"}'),
        node("LLM", '{"result":"甲","reasoningContent":""}'),
        node("LLM", "{乙}"),
        node("End", "丙"),
        frame("甲{乙}丙", "stop"),
    ]
    outcome = parse(ApplicationParser(), frames)
    assert (outcome.text, outcome.reasoning) == ("甲{乙}丙", "想")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["models", "message", "content", "thought", "index_id", "input_tokens"]),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_objects_of_any_shape_do_no_harm(value: Any) -> None:
    names = ("text", "thoughts", "doc_references", "workflow_message", "session_id", "finish_reason")
    data = json.dumps({"output": dict.fromkeys(names, value), "usage": value}).encode()
    outcome = parse(ApplicationParser(), [b"data:" + data + b"\n\n"])
    assert outcome.error is None


# --- requests ---------------------------------------------------------------------------------------


def sent(**fields: Any) -> dict[str, Any]:
    url, body = DashScopeDialect("http://vendor/api/v1", "a/b c").call(question(**fields), "")
    assert url == "http://vendor/api/v1/apps/a%2Fb%20c/completion"
    parsed: dict[str, Any] = json.loads(body)
    return parsed


def test_a_question_alone_is_a_prompt() -> None:
    assert sent(text="几点开门") == {
        "input": {"prompt": "几点开门"},
        "parameters": {"incremental_output": True, "has_thoughts": True},
        "debug": {},
    }


def test_what_a_native_visitor_did_not_ask_for_is_not_asked_for() -> None:
    assert sent(incremental=False, thoughts=False)["parameters"] == {}
    assert sent(stream=False, thoughts=False, temperature=0.5)["parameters"] == {"temperature": 0.5}


def test_a_session_is_continued_by_its_id_alone() -> None:
    turns = (ChatMessage("user", "一"), ChatMessage("assistant", "二"), ChatMessage("user", "三"))
    assert sent(messages=turns, session_id="s1")["input"] == {"prompt": "三", "session_id": "s1"}


def test_turns_without_a_session_and_instructions_are_sent_as_messages() -> None:
    turns = (ChatMessage("system", "s"), ChatMessage("user", "q"))
    expected = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert sent(messages=turns, session_id="s1")["input"] == {"messages": expected}


def test_pictures_are_refused() -> None:
    turn = ChatMessage("user", "what?", (ImagePart("data:image/png;base64,AA=="),))
    with pytest.raises(RequestError, match="takes no pictures"):
        sent(messages=(turn,))


async def test_the_vendor_understands_our_stream_requests(app: Ask) -> None:
    play = script(think("想"), say("甲<ref>[1]</ref>", "乙"), cite(1, doc_name="文档"), usage(7, 5))
    async with DashScopeFake(play, session_id=SESSION) as fake:
        outcome = await ask(app(fake))
    assert outcome.error is None
    assert (outcome.text, outcome.reasoning, outcome.usage) == ("甲[1]乙", "想", Usage(7, 5))
    assert outcome.finish == Finish("stop", MODEL, SESSION)
    assert outcome.citations[0].source == "文档"
    assert fake.requests[0].headers["X-DashScope-SSE"] == "enable"
    assert fake.requests[0].bearer == "test-key-dashscope"


async def test_the_vendor_understands_our_cumulative_and_whole_requests(app: Ask) -> None:
    async with DashScopeFake(script(say("甲", "乙"), no_usage())) as fake:
        cumulative = await ask(app(fake), question(incremental=False))
        once = await ask(app(fake), question(stream=False))
    assert (cumulative.text, once.text, once.chunks) == ("甲乙", "甲乙", 1)
    assert "X-DashScope-SSE" not in fake.requests[1].headers


# --- answers composed in this dialect ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "incremental"),
    [
        ("dashscope_stream_incremental.sse", True),
        ("dashscope_stream_cumulative.sse", False),
        ("dashscope_stream_thoughts.sse", True),
        ("dashscope_stream_thoughts_cumulative.sse", False),
    ],
)
def test_composed_frames_are_byte_for_byte_the_vendors(name: str, incremental: bool) -> None:
    events = parse(ApplicationParser(incremental=incremental), [fixture(name).body]).events
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=incremental)
    assert b"".join(encoder.chunk(event) for event in events) + encoder.end() == fixture(name).body


def test_a_composed_whole_answer_is_the_vendors() -> None:
    body = fixture("dashscope_nonstream.json").body
    events = ApplicationParser().whole(body, as_stream=False).events
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=True)
    assert encoder.whole(events) == json.loads(body)


def test_thoughts_that_were_not_asked_for_are_left_out() -> None:
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=True, thoughts=False)
    events: list[ChatEvent] = [Reasoning("想"), ToolCalls(({},)), Delta("甲"), Finish("stop")]
    assert [encoder.chunk(event)[:5] for event in events] == [b"", b"", b"id:1\n", b"id:2\n"]
    assert "thoughts" not in encoder.whole(events)["output"]


def test_citations_ride_on_every_later_frame() -> None:
    cited = Citations((Citation(2, "退货", "returns.md", "", "https://x/r", "七天", 0.5),))
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=True)
    assert encoder.chunk(cited) == b""
    outcome = parse(ApplicationParser(), [encoder.chunk(Delta("甲")), encoder.chunk(Finish("stop"))])
    assert outcome.citations == (Citation(2, "退货", "returns.md", "", "https://x/r", "七天", 0.0),)
    assert encoder.whole([cited, Delta("x")])["output"]["doc_references"][0]["index_id"] == "2"


def test_an_error_frame_serves_the_vendors_clients_and_ours() -> None:
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=True)
    encoder.chunk(Delta("x"))
    error = {"message": "忙", "code": 429, "reason": "upstream_busy", "request_id": "r1", "type": "t"}
    data = encoder.error({"error": error})
    head, _, payload = data.partition(b"data:")
    assert head == b"id:2\nevent:error\n:HTTP_STATUS/429\n"
    assert json.loads(payload) == {
        "code": "upstream_busy",
        "message": "忙",
        "request_id": "r1",
        "error": error,
    }


TEXT = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)
EVENTS = st.lists(
    st.builds(Delta, TEXT)
    | st.builds(Reasoning, TEXT)
    | st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    max_size=12,
)


@given(EVENTS)
def test_a_composed_cumulative_stream_reads_back_as_the_same_answer(events: list[ChatEvent]) -> None:
    encoder = DashScopeEncoder(SESSION, REQUEST, MODEL, incremental=False)
    finish = Finish("stop", MODEL, SESSION)
    data = b"".join(encoder.chunk(event) for event in (*events, finish))
    read, meant = parse(ApplicationParser(incremental=False), [data]), Outcome(events=[*events, finish])
    assert (read.text, read.reasoning, read.usage) == (meant.text, meant.reasoning, meant.usage)
    assert read.finish is not None and read.finish.session_id == SESSION
