"""The conversation of `mogine chat`: one question for a script, or turns with line editing."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mogine.commands.askers import Asker, open_direct
from mogine.commands.console import err, out, safe, safe_line
from mogine.commands.memory import Conversation, Memory, said
from mogine.commands.screen import Answer, PlainScreen, Screen, SilentScreen, TerminalScreen
from mogine.commands.shell import Shell
from mogine.errors import MogineError, RequestError, SettingsError
from mogine.settings import Settings

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

INTERRUPTED = 130
MAX_INPUT_BYTES = 4 * 1024 * 1024
HELP = """\
/new              begin a new conversation
/provider NAME    let another provider answer: doubao, dashscope, openai or extract
/quit             leave (so does Ctrl-D, and Ctrl-C at the empty prompt)
Alt-Enter makes a new line, Ctrl-C stops an answer, the arrow keys bring back earlier questions."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the command line asked for."""

    prompt: str | None = None
    provider: str | None = None
    model: str | None = None
    go_on: bool = False
    kb: bool = True
    as_json: bool = False
    server: str | None = None


def talk(shell: Shell, choice: Choice) -> int:
    """Run the chat; the exit code. Raises MogineError for what a script should hear about."""
    settings = _settings(shell, choice)
    memory = Memory(settings.data_path if shell.is_home else None)
    conversation = memory.load() if choice.go_on else Conversation()
    question = _question(choice.prompt, settings, as_json=choice.as_json)
    try:
        return asyncio.run(_run(settings, choice, memory, conversation, question))
    except KeyboardInterrupt:
        return INTERRUPTED


def _settings(shell: Shell, choice: Choice) -> Settings:
    """A chat needs a home, but for a server elsewhere or a key in the environment."""
    if choice.server is not None:
        if choice.model or not choice.kb:
            raise SettingsError(
                "with --server, the server chooses model and knowledge base: "
                "leave out --model and --no-kb, or leave out --server"
            )
        return shell.settings
    keyed = any(shell.settings.has_credentials(name) for name in ("doubao", "dashscope", "openai"))
    return shell.settings if keyed or choice.provider else shell.existing()


def _question(prompt: str | None, settings: Settings, *, as_json: bool) -> str | None:
    """The one question of a script, or None for turns. Raises RequestError and SettingsError."""
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise SettingsError('--json needs a question: mogine chat "How long is the warranty?" --json')
        return None
    text = _standard_input() if prompt in (None, "-") else str(prompt)
    return checked(text, settings.proxy.max_question_chars)


def checked(text: str, max_chars: int) -> str:
    """A question fit to be asked. Raises RequestError that says why it is not."""
    text = text.strip()
    if not text:
        raise RequestError("the question is empty")
    if len(text) > max_chars:
        raise RequestError(
            f"the question has {len(text)} characters, more than MOGINE_MAX_QUESTION_CHARS ({max_chars})",
            reason="question_too_long",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the question is no valid UTF-8 text") from error
    return text


def _standard_input() -> str:
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise RequestError("standard input is too large for a question", reason="question_too_long")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is no valid UTF-8 text (byte {error.start})") from error


async def _run(
    settings: Settings, choice: Choice, memory: Memory, conversation: Conversation, question: str | None
) -> int:
    async with _open_asker(settings, choice, conversation) as asker:
        chat = Chat(asker, _screen(as_json=choice.as_json), conversation, memory)
        if question is None:
            return await chat.turns(settings.proxy.max_question_chars)
        return await chat.once(question, as_json=choice.as_json)


@asynccontextmanager
async def _open_asker(settings: Settings, choice: Choice, conversation: Conversation) -> AsyncIterator[Asker]:
    if choice.server is not None:
        from mogine.commands.remote import open_server  # brings httpx, which costs as much as all the rest

        async with open_server(choice.server, choice.provider, conversation.session_id) as asker:
            yield asker
    else:
        provider = choice.provider or settings.provider_order[0]
        async with open_direct(settings, provider, choice.model, kb=choice.kb) as direct:
            yield direct


def _screen(*, as_json: bool) -> Screen:
    if as_json:
        return SilentScreen()
    return TerminalScreen(out) if out.is_terminal and not out.is_dumb_terminal else PlainScreen(out)


class Chat:
    """A conversation with one asker."""

    def __init__(self, asker: Asker, screen: Screen, conversation: Conversation, memory: Memory) -> None:
        self._asker = asker
        self._screen = screen
        self._conversation = conversation
        self._memory = memory

    async def once(self, question: str, *, as_json: bool) -> int:
        """One question; its answer on stdout. Raises MogineError."""
        self._tell_notes()
        answer, whole = await self.ask(question)
        if not whole:
            return INTERRUPTED
        if as_json:
            sys.stdout.write(json.dumps(answer.to_dict(), ensure_ascii=False, indent=2) + "\n")
        return 0

    async def turns(self, max_question_chars: int) -> int:
        """Questions from the prompt until the user leaves; no error of an answer ends it."""
        session = _prompt(self._memory.history_path())
        tell(f"mogine · {safe_line(self._asker.label)} · /help", "dim")
        self._tell_notes()
        if said(self._conversation.messages):
            tell(f"going on after {said(self._conversation.messages)} questions", "dim")
        while True:
            try:
                line = (await session.prompt_async("> ")).strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                return INTERRUPTED
            if line in ("/quit", "/exit"):
                return 0
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    await self.ask(checked(_valid(line), max_question_chars))
            except MogineError as error:
                tell(safe(error.message), "red")
            err.print()

    async def ask(self, question: str) -> tuple[Answer, bool]:
        """Shows the answer as it comes and remembers the turn; False when Ctrl-C stopped it."""
        answer = Answer()
        task = asyncio.ensure_future(self._receive(question, answer))
        with _interrupts(task.cancel):
            self._screen.begin()
            try:
                await task
                whole = True
            except asyncio.CancelledError:
                if not task.cancelled():
                    raise  # not the answer was stopped, but this program
                whole = False
            finally:
                self._screen.end(answer)
                self._tell_notes()
        if not whole:
            tell("stopped", "dim")
        if answer.text:
            self._remember(question, answer.text)
        if answer.finish_reason == "length":
            tell("the answer was cut at its greatest length (MOGINE_MAX_OUTPUT_TOKENS)", "yellow")
        return answer, whole

    async def _receive(self, question: str, answer: Answer) -> None:
        async with aclosing(self._asker.ask(self._conversation.asking(question))) as events:
            async for event in events:
                answer.see(event)
                self._screen.show(event)

    def _remember(self, question: str, answer: str) -> None:
        self._conversation.add(question, answer)
        self._conversation.session_id = self._asker.session_id
        try:
            self._memory.save(self._conversation)
        except MogineError as error:
            tell(f"warning: {safe(error.message)}", "yellow")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/new":
            self._conversation.clear()
            self._asker.forget()
            tell("a new conversation", "dim")
        elif name == "/provider" and argument:
            self._asker.choose(argument.strip())
            tell(safe_line(self._asker.label), "dim")
        elif name == "/provider":
            tell(safe_line(self._asker.label), "dim")
        elif name == "/help":
            tell(HELP, "dim")
        else:
            raise SettingsError(f"there is no {safe_line(name, 40)}; /help lists what there is")

    def _tell_notes(self) -> None:
        for note in self._asker.notes:
            tell(f"note: {safe(note)}", "yellow")
        self._asker.notes.clear()


def tell(text: str, style: str) -> None:
    """Words beside the answer, on stderr; wrapped between words where a person reads them."""
    err.print(text, style=style, soft_wrap=not err.is_terminal)


def _valid(line: str) -> str:
    """Bytes that were no UTF-8 reach us as lone surrogates; no vendor takes those."""
    return line.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _interrupts(stop: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `stop`; a second one, while that is still going on, ends the program as usual."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _prompt(history_path: Path | None) -> "PromptSession[str]":
    """Line editing with history: Enter sends, Alt-Enter makes a line, Ctrl-C clears the line or leaves."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=FileHistory(str(history_path)) if history_path else InMemoryHistory(),
        key_bindings=keys,
        output=create_output(always_prefer_tty=True),
        prompt_continuation="  ",
    )
