"""An answer on a terminal: what is drawn while it grows equals what it is in the end."""

import asyncio
import io

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mogine.chat import Citation, Citations, Delta, Reasoning
from mogine.commands.screen import Answer, PlainScreen, TerminalScreen, footnotes, split_finished

DOCUMENT = """根据**退货政策**，七天内可退 [1]。

## 步骤

1. 登录
2. 申请
   - 质量问题

| 情形 | 期限 |
|---|---|
| 质量 | 15 天 |

> 定制商品除外。

```json
{"a": 1}
```

最后一段 with a [link](https://e.example/x)
"""


def console(width: int = 60) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    terminal = Console(
        file=written, force_terminal=True, width=width, height=10, markup=False, emoji=False, _environ={}
    )
    return terminal, written


def displayed(text: str, width: int = 60) -> list[str]:
    """The lines that a terminal shows in the end, with what scrolled away."""
    screen = pyte.HistoryScreen(width, 10, history=1000)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    past = ["".join(line[x].data for x in range(width)).rstrip() for line in screen.history.top]
    return "\n".join([*past, *(line.rstrip() for line in screen.display)]).rstrip().splitlines()


async def shown(pieces: list[str], pause_s: float) -> list[str]:
    terminal, written = console()
    screen, answer = TerminalScreen(terminal), Answer()
    screen.begin()
    for piece in pieces:
        answer.see(Delta(piece))
        screen.show(Delta(piece))
        await asyncio.sleep(pause_s)
    screen.end(answer)
    return displayed(written.getvalue())


@pytest.mark.parametrize("size", [1, 7, 40])
async def test_any_pieces_give_the_same_screen_in_the_end(size: int) -> None:
    whole = await shown([DOCUMENT], 0)
    pieces = [DOCUMENT[at : at + size] for at in range(0, len(DOCUMENT), size)]
    grown = await shown(pieces, 0.01 if size > 1 else 0.002)
    # Blocks are set apart by one blank line, however many of them were printed at once.
    assert [line for line in grown if line] == [line for line in whole if line]
    assert sum("最后一段" in line for line in grown) == 1
    assert any("link (https://e.example/x)" in line for line in grown)


@given(st.text(alphabet="ab #-*`>|1.\n\t[](", max_size=60), st.integers(0, 60))
def test_splitting_loses_no_text(text: str, at: int) -> None:
    finished, rest = split_finished(text[:at])
    assert (finished + rest).replace("\n", "") == text[:at].replace("\n", "")
    assert text[:at].endswith(rest)


def test_only_blocks_that_cannot_change_are_finished() -> None:
    assert split_finished("one") == ("", "one")
    assert split_finished("one\n\n") == ("", "one\n\n")
    assert split_finished("one\n\n- t") == ("", "one\n\n- t")
    assert split_finished("one\n\n- two\n") == ("one", "- two\n")
    assert split_finished("- a\n\n- b\n\n- c\n") == ("", "- a\n\n- b\n\n- c\n")
    assert split_finished("```\na\n\nb\n") == ("", "```\na\n\nb\n")
    assert split_finished("```\na\n```\n\nb\nc") == ("```\na\n```", "b\nc")


async def test_entities_and_sequences_of_a_model_are_shown_not_obeyed() -> None:
    terminal, written = console()
    screen, answer = TerminalScreen(terminal), Answer()
    screen.begin()
    hostile = (
        "a &#x202e;b &#27;[2J \x1b]8;;https://evil.example\x07text\x1b]8;;\x07 `\x9b31m` [x](javascript:1)"
    )
    for event in (Reasoning("\x1b[2Jhm"), Delta(hostile)):
        answer.see(event)
        screen.show(event)
    screen.end(answer)
    output = written.getvalue()
    for sequence in ("\x1b[2J", "\x1b]", "\x9b", "\u202e", "\x07"):
        assert sequence not in output
    text = "".join(displayed(output))
    assert "\\x1b[2Jhm" in text
    assert "\\u202eb" in text
    assert "javascript:1" in text  # a link's target is never hidden


async def test_thoughts_after_the_answer_began_do_not_disturb_it() -> None:
    terminal, written = console()
    screen, answer = TerminalScreen(terminal), Answer()
    screen.begin()
    for event in (Reasoning("first"), Delta("one"), Reasoning("second"), Delta("two")):
        answer.see(event)
        screen.show(event)
    screen.end(answer)
    assert displayed(written.getvalue()) == ["first", "", "one", "second", "", "", "two"]


CITATION = Citation(1, "退换货\x1b[2J", "returns.md", "七天\n无理由", "https://e.example/r", "…", 0.9)


def test_plain_text_ends_with_its_footnotes() -> None:
    written = io.StringIO()
    screen, answer = PlainScreen(Console(file=written, soft_wrap=True, markup=False)), Answer()
    screen.begin()
    for event in (Citations((CITATION,)), Delta("x" * 300 + "\r"), Delta("\n[b]tab\there[/b]\r")):
        answer.see(event)
        screen.show(event)
    screen.end(answer)
    assert written.getvalue() == (
        "x" * 300 + "\n[b]tab\there[/b]\\r\n\n"
        "[1] 退换货\\x1b[2J > 七天\\n无理由 (returns.md) https://e.example/r\n"
    )


def test_footnote_without_a_title_names_its_source() -> None:
    assert list(footnotes((Citation(2, "", "a.pdf", "", "", "e", 0.1),))) == ["[2] a.pdf"]


def test_answer_without_words_has_no_footnotes() -> None:
    written = io.StringIO()
    screen, answer = PlainScreen(Console(file=written)), Answer()
    answer.see(Citations((CITATION,)))
    screen.end(answer)
    assert written.getvalue() == ""
