"""An answer on its way to a person or a script: Markdown on a terminal, plain text in a pipe, JSON."""

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from mogine.answer import AnswerEvent, Answering
from mogine.chat import Citation, Citations, Delta, Finish, Reasoning, Usage
from mogine.commands.console import safe, safe_line

REFRESH_S = 1 / 15
DIM = Style(dim=True)


@dataclass
class Answer:
    """What has come of one answer; fed with its events."""

    text: str = ""
    reasoning: str = ""
    citations: tuple[Citation, ...] = ()
    usage: Usage | None = None
    provider: str = ""
    model: str = ""
    finish_reason: str = ""

    def see(self, event: AnswerEvent) -> None:
        match event:
            case Delta(text):
                self.text += text
            case Reasoning(text):
                self.reasoning += text
            case Citations(items):
                self.citations = items
            case Usage():
                self.usage = event
            case Answering(provider, model):
                self.provider, self.model = provider or self.provider, model or self.model
            case Finish(reason, model):
                self.finish_reason, self.model = reason, model or self.model

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "answer": self.text,
            "reasoning": self.reasoning,
            "citations": [asdict(citation) for citation in self.citations],
            "usage": asdict(self.usage) if self.usage else None,
            "provider": self.provider,
            "model": self.model,
            "finish_reason": self.finish_reason,
        }


class Screen(Protocol):
    """Shows one answer after the other."""

    def begin(self) -> None: ...

    def show(self, event: AnswerEvent) -> None: ...

    def end(self, answer: Answer) -> None:
        """The answer is over, whole or not; gives the terminal back."""
        ...


class SilentScreen:
    """For `--json`, which prints the whole at the end."""

    def begin(self) -> None: ...

    def show(self, event: AnswerEvent) -> None: ...

    def end(self, answer: Answer) -> None: ...


class PlainScreen:
    """Text as it comes, then the footnotes: for pipes and files."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._pieces = _Pieces()
        self._at_line_start = True

    def begin(self) -> None:
        self._at_line_start = True

    def show(self, event: AnswerEvent) -> None:
        if isinstance(event, Delta):
            self._write(self._pieces.take(event.text))

    def end(self, answer: Answer) -> None:
        self._write(self._pieces.rest())
        if not self._at_line_start:
            self._out.print()
        if answer.text and answer.citations:
            self._out.print()
            for line in footnotes(answer.citations):
                self._out.print(line)

    def _write(self, text: str) -> None:
        if text:
            self._out.file.write(text)  # as it is: rich would turn tabs into spaces
            self._out.file.flush()
            self._at_line_start = text.endswith("\n")


class TerminalScreen:
    """Markdown that grows without flicker: finished blocks are printed for good, the last one stays live."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pieces = _Pieces()
        self._pending = ""
        self._printed = False
        self._thinking = False
        self._at_line_start = True

    def begin(self) -> None:
        self._pending = ""
        self._printed = self._thinking = False
        self._at_line_start = True
        self._open().update(Text("…", style=DIM), refresh=True)

    def show(self, event: AnswerEvent) -> None:
        match event:
            case Reasoning(text) if text:
                self._think(safe(text))
            case Delta(text) if text:
                self._end_thinking()
                self._pending += self._pieces.take(text)
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._draw)

    def end(self, answer: Answer) -> None:
        self._end_thinking()
        self._settle()
        if answer.text and answer.citations:
            self._console.print()
            for line in footnotes(answer.citations):
                self._console.print(Text(line, style=DIM), soft_wrap=True)

    def _think(self, text: str) -> None:
        if not self._thinking:
            self._settle()
            self._thinking = True
        self._console.print(Text(text, style=DIM), end="", soft_wrap=True)
        self._at_line_start = text.endswith("\n")

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._console.print("" if self._at_line_start else "\n")

    def _open(self) -> Live:
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                vertical_overflow="visible",
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self._live

    def _draw(self) -> None:
        self._timer = None
        live = self._open()
        finished, self._pending = split_finished(self._pending)
        # In one write, so that nothing flickers: what is finished moves up, the rest is drawn below it.
        with self._console:
            live.update(Tail(SafeMarkdown(self._pending), self._console.height - 2), refresh=True)
            if finished:
                self._print_block(finished)

    def _settle(self) -> None:
        """Prints what is still live for good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()
            self._live = None
        self._pending += self._pieces.rest()
        if self._pending.strip():
            self._print_block(self._pending)
        self._pending = ""

    def _print_block(self, text: str) -> None:
        if self._printed:
            self._console.print()
        self._console.print(SafeMarkdown(text))
        self._printed = True


class SafeMarkdown:
    """Markdown of a model: link targets are shown, and an entity such as `&#x202e;` steers nothing either."""

    def __init__(self, text: str) -> None:
        self._markdown = Markdown(text, hyperlinks=False, code_theme="ansi_dark")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._markdown, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)


class Tail:
    """The last lines of something taller than the terminal: above them the cursor could not go back."""

    def __init__(self, content: SafeMarkdown, height: int) -> None:
        self._content = content
        self._height = max(1, height)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines = console.render_lines(self._content, options, pad=False)
        for number, line in enumerate(lines[-self._height :]):
            if number:
                yield Segment.line()
            yield from line


def split_finished(text: str) -> tuple[str, str]:
    """Markdown blocks that no further text can change, and the rest.

    Only whole lines are looked at: the beginning of a line may still become anything.
    """
    whole = text[: text.rfind("\n") + 1]
    if not whole.strip():
        return "", text
    tokens = _PARSER.parse(whole)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: starts[-1]]).strip("\n"), "\n".join(lines[starts[-1] :])


_PARSER = MarkdownIt().enable("strikethrough").enable("table")


def footnotes(citations: tuple[Citation, ...]) -> Iterator[str]:
    """`[1] Title > heading (source) https://...`, one line each."""
    for citation in citations:
        name = " > ".join(part for part in (citation.title, citation.heading) if part) or citation.source
        source = f" ({citation.source})" if citation.source and citation.source != name else ""
        url = f" {citation.url}" if citation.url else ""
        yield f"[{citation.number}] {safe_line(name, 120)}{safe_line(source, 120)}{safe_line(url, 300)}"


class _Pieces:
    """Pieces of a text made safe; a carriage return at the end of one waits for what follows it."""

    def __init__(self) -> None:
        self._held = ""

    def take(self, piece: str) -> str:
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        return safe(text.removesuffix("\r"))

    def rest(self) -> str:
        held, self._held = self._held, ""
        return safe(held)
