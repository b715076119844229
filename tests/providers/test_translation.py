"""From one vendor's dialect into the other's, streams and whole answers: a pure function of what was sent."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from mogine.providers.compatible import CompletionParser, OpenAIEncoder
from mogine.providers.dashscope import ApplicationParser, DashScopeEncoder
from tests.providers.outcome import Outcome, parse
from tests.upstreams.replay import Fixture, fixtures

APPLICATIONS = [f for f in fixtures(vendor="dashscope", kind="sse") if f.status == 200]
COMPLETIONS = [f for v in ("ark", "openai") for f in fixtures(vendor=v, kind="sse") if f.status == 200]
CUTS = st.lists(st.integers(0, 100_000), max_size=40)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def to_openai(pieces: list[bytes], *, incremental: bool) -> tuple[Outcome, bytes]:
    """An application's stream, and the same as completions."""
    read = parse(ApplicationParser(incremental=incremental), pieces)
    encoder = OpenAIEncoder("id", "m", 1, include_usage=True)
    return read, b"".join(map(encoder.chunk, read.events)) + encoder.end()


def to_dashscope(pieces: list[bytes], *, incremental: bool) -> tuple[Outcome, bytes]:
    """A stream of completions, and the same as an application's."""
    read = parse(CompletionParser(), pieces)
    encoder = DashScopeEncoder("s" * 32, "r", "m", incremental=incremental)
    return read, b"".join(map(encoder.chunk, read.events))


@given(st.sampled_from(APPLICATIONS), CUTS, CUTS, st.booleans())
def test_an_applications_stream_in_any_split_is_one_stream_of_completions(
    fixture: Fixture, cuts: list[int], more: list[int], incremental: bool
) -> None:
    _, whole = to_openai([fixture.body], incremental=incremental)
    read, data = to_openai(split(fixture.body, cuts), incremental=incremental)
    assert data == whole
    back = parse(CompletionParser(), split(data, more))
    assert (back.text, back.reasoning) == (read.text, read.reasoning)
    if read.finish is None:
        assert back.finish is None, "a cut answer never looks complete"
        return
    assert back.finish is not None and back.finish.reason == read.finish.reason
    assert back.usage == read.usage and data.endswith(b"data: [DONE]\n\n")


@given(st.sampled_from(COMPLETIONS), CUTS, CUTS, st.booleans())
def test_a_stream_of_completions_in_any_split_is_one_applications_stream(
    fixture: Fixture, cuts: list[int], more: list[int], incremental: bool
) -> None:
    _, whole = to_dashscope([fixture.body], incremental=incremental)
    read, data = to_dashscope(split(fixture.body, cuts), incremental=incremental)
    assert data == whole
    back = parse(ApplicationParser(incremental=incremental), split(data, more))
    assert (back.text, back.reasoning) == (read.text, read.reasoning)
    assert (back.finish is None) == (read.finish is None)


@given(st.sampled_from(APPLICATIONS), CUTS)
def test_a_whole_answer_says_what_the_stream_says(fixture: Fixture, cuts: list[int]) -> None:
    read = parse(ApplicationParser(), split(fixture.body, cuts))
    if read.finish is None:
        return
    completion = OpenAIEncoder("id", "m", 1).whole(read.events)
    message = completion["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content", "")) == (read.text, read.reasoning)
    assert completion["choices"][0]["finish_reason"] == read.finish.reason
    application = DashScopeEncoder("s" * 32, "r", "m", incremental=False).whole(read.events)
    assert application["output"]["text"] == read.text
    assert json.dumps([completion, application])
