"""What models, visitors and documents write cannot steer the terminal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.commands.console import safe, safe_json, safe_line

STEERING = [
    *map(chr, (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "\ud800",
    "\udfff",
]


@pytest.mark.parametrize("character", STEERING, ids=[f"U+{ord(c):04X}" for c in STEERING])
def test_character_that_could_steer_a_terminal_is_shown_escaped(character: str) -> None:
    assert safe(f"a{character}b") == f"a{character!r}b".replace("'", "")


@given(st.text(alphabet=st.characters()))
def test_safe_text_encodes_and_holds_no_steering_character(text: str) -> None:
    shown = safe(text)
    shown.encode("utf-8")
    assert not set(shown) & set(STEERING)


@given(st.text(alphabet=st.characters()))
def test_safe_json_holds_no_steering_character_and_loses_nothing(text: str) -> None:
    shown = safe_json({"退款": text})
    assert not set(shown) & set(STEERING)
    assert json.loads(shown) == {"退款": text}
    assert "退款" in shown


def test_ordinary_text_stays_as_it_is() -> None:
    text = "退款 refund\n\tétude 👩‍💻 عربي [bold] \\x1b"
    assert safe(text) == text


def test_windows_line_ends_become_plain_ones() -> None:
    assert safe("a\r\nb") == "a\nb"


def test_one_line_stays_one_line_and_is_cut() -> None:
    assert safe_line("a\nb\tc\u2028d") == "a\\nb\\tc\\u2028d"
    assert safe_line("x" * 600) == "x" * 499 + "…"
    assert len(safe_line("\x1b" * 600)) == 500
    assert safe_line("x" * 500) == "x" * 500
