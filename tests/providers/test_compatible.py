"""The OpenAI-compatible dialect: every recorded answer in any split, requests, and answers composed in it."""

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
from mogine.errors import UpstreamBadResponse
from mogine.providers.compatible import CompatibleDialect, CompletionParser, OpenAIEncoder
from mogine.upstream import FrameDecoder
from tests.providers.outcome import Outcome, parse, question
from tests.upstreams.replay import Fixture, fixture, fixtures

STREAMS = [
    f
    for vendor in ("ark", "openai")
    for f in fixtures(vendor=vendor, kind="sse")
    if f.expect is not None and "text" in f.expect
]
SPOKEN = Usage(31, 58, reasoning_tokens=37)
CITED = Citations((Citation(1, "退货", "returns.md", "运费", "", "七天内可退。", 0.5),))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def usage_of(expected: dict[str, Any] | None) -> Usage | None:
    if expected is None:
        return None
    return Usage(
        expected["prompt_tokens"],
        expected["completion_tokens"],
        expected["completion_tokens_details"]["reasoning_tokens"],
        expected["prompt_tokens_details"]["cached_tokens"],
    )


def check(outcome: Outcome, fixture: Fixture) -> None:
    """`outcome` is what the manifest expects of `fixture`."""
    expect = fixture.expect or {}
    assert outcome.text == expect.get("text", "")
    assert outcome.reasoning == expect.get("reasoning", "")
    assert outcome.usage == usage_of(expect.get("usage"))
    assert (outcome.finish.reason if outcome.finish else None) == expect.get("finish_reason")
    assert (outcome.error.message if outcome.error else None) == expect.get("error")
    if "tool" in expect:
        calls = OpenAIEncoder("", "", 0).whole(outcome.events)["choices"][0]["message"]["tool_calls"]
        function = calls[0]["function"]
        assert function["name"] + function["arguments"] == expect["tool"]
    assert (b"data: [DONE]\n\n" in outcome.raw) == ("finish_reason" in expect)
    outcome.raw.decode("utf-8")


@pytest.mark.parametrize("fixture", STREAMS, ids=str)
def test_every_recorded_stream_is_understood(fixture: Fixture) -> None:
    check(parse(CompletionParser(), [fixture.body]), fixture)


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_of_the_bytes_gives_the_same_events(fixture: Fixture, cuts: list[int]) -> None:
    whole = parse(CompletionParser(), [fixture.body])
    pieces = parse(CompletionParser(), split(fixture.body, cuts))
    assert (pieces.events, pieces.raw) == (whole.events, whole.raw)


@pytest.mark.parametrize(
    "name", ["ark_stream_thinking.sse", "ark_stream_keepalive.sse", "openai_stream_usage.sse"]
)
def test_bytes_are_handed_on_untouched(name: str) -> None:
    assert parse(CompletionParser(), [fixture(name).body]).raw == fixture(name).body


def test_an_error_frame_is_never_handed_on() -> None:
    outcome = parse(CompletionParser(), [fixture("ark_stream_error_midway.sse").body])
    assert b"error" not in outcome.raw and "学期第".encode() in outcome.raw


def test_id_lines_are_taken_out_because_they_break_a_client_together_with_comments() -> None:
    body = fixture("openai_stream_id_line_trap.sse").body
    outcome = parse(CompletionParser(), [body])
    assert body.startswith(b"id: 1\n") and outcome.raw == body.removeprefix(b"id: 1\n")
    assert outcome.text == "反向代理替服务器接收请求。🙂"


def test_a_missing_done_is_supplied_after_a_finish_reason() -> None:
    body = fixture("openai_stream.sse").body.replace(b"data: [DONE]\n\n", b"")
    outcome = parse(CompletionParser(), [body])
    assert outcome.finish == Finish("stop", "mogine-doubao")
    assert outcome.raw == fixture("openai_stream.sse").body


def test_done_without_a_finish_reason_is_a_cut_answer() -> None:
    parser = CompletionParser()
    with pytest.raises(UpstreamBadResponse, match="finish reason"):
        for frame in FrameDecoder().feed(b"data: [DONE]\n\n"):
            parser.frame(frame)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("function_call", "tool_calls"), ("max_tokens", "length"), ("eos_token", "stop"), ("length", "length")],
)
def test_unusual_finish_reasons_are_translated(theirs: str, ours: str) -> None:
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": theirs}], "model": "m"}
    chunk = CompletionParser().whole(json.dumps(body).encode(), as_stream=False)
    assert chunk.events == (Delta("x"), Finish(ours, "m"))


@pytest.mark.parametrize("fixture", [f for f in fixtures(kind="json") if "_nonstream" in f.file], ids=str)
def test_every_recorded_whole_answer_is_understood(fixture: Fixture) -> None:
    if fixture.vendor == "dashscope":
        return
    body = json.loads(fixture.body)
    message = body["choices"][0]["message"]
    chunk = CompletionParser().whole(fixture.body, as_stream=False)
    outcome = Outcome()
    outcome.add(chunk)
    assert outcome.raw == fixture.body
    assert (outcome.text, outcome.reasoning) == (message["content"], message.get("reasoning_content", ""))
    assert outcome.usage == usage_of(body["usage"])
    assert outcome.finish == Finish(body["choices"][0]["finish_reason"], body["model"])
    assert outcome.fragments == message.get("tool_calls", [])


def test_a_whole_answer_where_a_stream_was_asked_for_is_composed_as_frames() -> None:
    body = fixture("openai_chat_nonstream.json").body
    chunk = CompletionParser().whole(body, as_stream=True)
    again = parse(CompletionParser(), [chunk.raw])
    assert again.text == "反向代理替服务器接收请求。🙂"
    assert again.finish == Finish("stop", "mogine-doubao")


@pytest.mark.parametrize(
    "data",
    [b"[1,2]", b'"x"', b"{", b"<html>", b"\xff\xfe", b"nul\x00l", b"[" * 100_000, b'{"a":' * 50_000],
    ids=["list", "text", "half", "html", "bytes", "nul", "deep list", "deep object"],
)
def test_what_is_no_json_object_is_a_bad_response(data: bytes) -> None:
    with pytest.raises(UpstreamBadResponse, match="no JSON object"):
        parse(CompletionParser(), [b"data: " + data + b"\n\n"])


def test_raw_bytes_that_are_not_utf8_are_a_bad_response() -> None:
    with pytest.raises(UpstreamBadResponse, match="UTF-8"):
        parse(CompletionParser(), [b": \xff\n\n"])


def test_lone_surrogates_become_replacement_signs() -> None:
    body = rb'data: {"choices":[{"delta":{"content":"a\ud800b\ud83d\ude42"}}]}' + b"\n\n"
    assert parse(CompletionParser(), [body]).text == "a\ufffdb🙂"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "delta", "usage", "content", "tool_calls", "model", "finish_reason"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_objects_of_any_shape_do_no_harm(value: Any) -> None:
    data = json.dumps({"choices": value, "usage": value, "model": value}).encode()
    outcome = parse(CompletionParser(), [b"data: " + data + b"\n\n"])
    assert all(isinstance(event, Delta | Reasoning | ToolCalls | Usage | Finish) for event in outcome.events)


# --- requests ---------------------------------------------------------------------------------------


def body_of(**fields: Any) -> dict[str, Any]:
    url, body = CompatibleDialect("http://vendor/api/v3").call(question(**fields), "model-1")
    assert url == "http://vendor/api/v3/chat/completions"
    parsed: dict[str, Any] = json.loads(body)
    return parsed


def test_a_plain_question_sends_nothing_that_was_not_chosen() -> None:
    assert body_of(text="退款 😀", stream=False) == {
        "model": "model-1",
        "messages": [{"role": "user", "content": "退款 😀"}],
        "stream": False,
    }


def test_a_stream_asks_for_its_usage() -> None:
    assert body_of()["stream_options"] == {"include_usage": True}


def test_every_chosen_field_is_sent() -> None:
    body = body_of(temperature=0.0, top_p=0.5, stop=("a", "b"), max_tokens=9, session_id="s")
    assert (body["temperature"], body["top_p"], body["stop"], body["max_tokens"]) == (0.0, 0.5, ["a", "b"], 9)
    assert "session_id" not in body


def test_pictures_are_parts_of_the_message() -> None:
    picture = ImagePart("data:image/png;base64,AA==")
    body = body_of(messages=(ChatMessage("system", "s"), ChatMessage("user", "what?", (picture,))))
    assert body["messages"][1]["content"] == [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]


def test_a_lone_surrogate_of_a_visitor_does_not_break_the_request() -> None:
    assert body_of(text="a\ud800b")["messages"][0]["content"] == "a?b"


# --- answers composed in this dialect ---------------------------------------------------------------

ANSWER: list[ChatEvent] = [
    Reasoning("先想清楚替谁转发。"),
    Delta("反向代理"),
    Delta("替服务器接收请求。🙂"),
    SPOKEN,
    Finish("stop", "doubao"),
]
HEAD = ("chatcmpl-mgn3f8a1c2d4e5b6978", "mogine-doubao", 1795337200)


@pytest.mark.parametrize(
    ("include_usage", "name"), [(False, "openai_stream.sse"), (True, "openai_stream_usage.sse")]
)
def test_a_composed_stream_is_byte_for_byte_what_clients_expect(include_usage: bool, name: str) -> None:
    encoder = OpenAIEncoder(*HEAD, include_usage=include_usage)
    assert b"".join(encoder.chunk(event) for event in ANSWER) + encoder.end() == fixture(name).body


def test_a_composed_whole_answer_is_what_clients_expect() -> None:
    assert OpenAIEncoder(*HEAD).whole(ANSWER) == json.loads(fixture("openai_chat_nonstream.json").body)


def test_a_cut_answer_never_looks_complete() -> None:
    encoder = OpenAIEncoder(*HEAD, include_usage=True)
    data = encoder.chunk(Delta("half")) + encoder.chunk(SPOKEN) + encoder.end()
    assert b"[DONE]" not in data and b'"finish_reason":"stop"' not in data


def test_unknown_usage_is_left_out() -> None:
    encoder = OpenAIEncoder(*HEAD, include_usage=True)
    data = encoder.chunk(Finish("stop")) + encoder.end()
    assert data.endswith(b'"usage":null}\n\ndata: [DONE]\n\n')


def test_an_error_is_the_envelope_as_a_last_event() -> None:
    envelope = {"error": {"message": "忙", "code": 429}}
    data = OpenAIEncoder(*HEAD).error(envelope)
    assert data == 'event: error\ndata: {"error":{"message":"忙","code":429}}\n\n'.encode()


def test_citations_travel_as_an_extra_field() -> None:
    encoder = OpenAIEncoder(*HEAD)
    payload = json.loads(encoder.chunk(CITED).split(b"data: ")[2])
    assert payload["choices"][0]["delta"] == {} and payload["citations"][0]["source"] == "returns.md"
    assert encoder.whole([CITED, *ANSWER])["citations"][0]["number"] == 1


def test_fragments_of_tool_calls_are_joined() -> None:
    fragments = parse(CompletionParser(), [fixture("ark_stream_tool_calls.sse").body]).events
    call = OpenAIEncoder(*HEAD).whole(fragments)["choices"][0]["message"]["tool_calls"]
    assert call == [
        {
            "id": "call_q7w2e9r4t5y6u1i8o3p0a2s4",
            "type": "function",
            "function": {"name": "lookup_timetable", "arguments": '{"week": 3, "campus": "东校区"}'},
        }
    ]


TEXT = st.text(max_size=20)
EVENTS = st.lists(
    st.builds(Delta, TEXT)
    | st.builds(Reasoning, TEXT)
    | st.builds(Usage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    max_size=12,
)


@given(EVENTS, st.sampled_from(["stop", "length", "content_filter"]))
def test_a_composed_stream_reads_back_as_the_same_answer(events: list[ChatEvent], reason: str) -> None:
    encoder = OpenAIEncoder("id", "m", 1, include_usage=True)
    finish = Finish(reason, "m")
    data = b"".join(encoder.chunk(event) for event in (*events, finish)) + encoder.end()
    sent, read = Outcome(events=[*events, finish]), parse(CompletionParser(), [data])
    assert (read.text, read.reasoning, read.usage) == (sent.text, sent.reasoning, sent.usage)
    assert read.finish == finish
