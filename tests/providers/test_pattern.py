"""Frames known without parsing say what parsing would have said, and all others are parsed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.chat import Chunk, Delta
from mogine.providers.compatible import CompletionParser
from mogine.providers.pattern import MAX_TRIES, Pattern
from mogine.upstream import Frame


def frame(text: str, *, ascii_only: bool = False, **more: object) -> bytes:
    choice = {"delta": {"content": text, "role": "assistant"}, "index": 0}
    payload = {"choices": [choice], "created": 1, "id": "021", "model": "doubao", "usage": None, **more}
    return f"data: {json.dumps(payload, ensure_ascii=ascii_only)}\n\n".encode("utf-8", "surrogatepass")


def read(block: bytes) -> str | None:
    return CompletionParser().text_alone(block)


def learned(text: str = "好") -> Pattern:
    pattern = Pattern()
    pattern.learn(frame(text), text, read)
    return pattern


@given(text=st.text(), other=st.text(min_size=1, max_size=4))
def test_what_it_reads_is_what_the_parser_reads(text: str, other: str) -> None:
    pattern = learned()
    block = frame(text.encode("utf-8", "replace").decode())
    found = pattern.text_of(block)
    assert found is None or found == read(block)
    two = block + frame(other.encode("utf-8", "replace").decode())
    if (both := pattern.text_of(two)) is not None:
        assert both == (read(block) or "") + (read(two[len(block) :]) or "")


@given(place=st.integers(min_value=0), byte=st.integers(min_value=0, max_value=255))
def test_a_byte_that_differs_is_noticed(place: int, byte: int) -> None:
    """Whatever it is that changes, outside of the text or within."""
    block = bytearray(frame("你好，世界"))
    block[place % len(block)] = byte
    found = learned().text_of(bytes(block))
    if found is not None:
        chunk = CompletionParser().frame(Frame(bytes(block), bytes(block[6:-2]), "", None, False))
        assert chunk == Chunk(bytes(block), (Delta(found),))


def test_usual_frames_are_known() -> None:
    pattern = learned()
    assert pattern.text_of(frame("你好")) == "你好"
    assert pattern.text_of(frame("a") + frame("b") + frame("c")) == "abc"


@pytest.mark.parametrize(
    "block",
    [
        frame('a "quoted" word'),
        frame("a\\b"),
        frame("line\nbreak"),
        frame("tab\t"),
        frame("sep\u2028arator"),
        frame("你", ascii_only=True),
        frame("a", finish_reason="stop"),
        frame("a", usage={"prompt_tokens": 1}),
        frame("a", error={"code": "x"}),
        frame(""),
        frame("a")[:-1],
        frame("a")[1:],
        frame("a") + b": comment\n\n",
        frame("a") + frame("b")[:-4],
        frame("a").replace(b"a", b"\xff"),
        frame("a").replace(b"a", b"\x00"),
        b"data: [DONE]\n\n",
        b"",
    ],
)
def test_all_others_are_parsed(block: bytes) -> None:
    assert learned().text_of(block) is None


def test_nothing_is_known_before_a_frame_was_parsed() -> None:
    assert Pattern().text_of(b"") is None
    assert Pattern().text_of(frame("a")) is None


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (frame("doubao"), "doubao"),  # it stands there twice: as the model, too
        (frame("a", note={"content": "x"}), "x"),  # some other text of the frame
        (frame('"'), '"'),
        (frame("你", ascii_only=True), "你"),
        (frame("a", choices=[{"delta": {"content": "a"}, "finish_reason": "stop"}]), "a"),
        (frame("index"), "index"),
    ],
)
def test_a_frame_that_does_not_do_is_no_pattern(block: bytes, text: str) -> None:
    pattern = Pattern()
    pattern.learn(block, text, read)
    assert pattern.text_of(block) is None


def test_it_does_not_try_for_ever() -> None:
    pattern = Pattern()
    for _ in range(MAX_TRIES):
        assert pattern.wants_more
        pattern.learn(frame("index"), "index", read)
    assert not pattern.wants_more
