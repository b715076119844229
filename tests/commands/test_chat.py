"""`mogine chat` as a user runs it: in scripts, in turns on a real terminal, and when something is wrong."""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyte
import pytest

from mogine.commands.shell import Shell
from mogine.commands.talk import Choice, talk
from mogine.errors import RequestError, SettingsError, StoreError
from tests.conftest import Run, clean_environ
from tests.upstreams.doubao import KEY, DoubaoFake
from tests.upstreams.script import finish, hang, say, script, think, usage

ANSWER = script(think("先想一想。"), say("保修", "两年。"), usage(31, 58, reasoning=37))


@pytest.fixture
def doubao() -> Iterator[DoubaoFake]:
    """Ark on loopback, in a thread of its own: the command line blocks."""
    with DoubaoFake(ANSWER).in_thread() as fake:
        yield fake


def texts(fake: DoubaoFake, index: int = -1) -> list[tuple[str, str]]:
    """Role and text of what a request sent, but for the system prompt."""
    messages = fake.requests[index].json["messages"]
    return [(m["role"], m["content"]) for m in messages if m["role"] != "system"]


# --- one question -----------------------------------------------------------------------------------


def test_answer_is_plain_text_in_a_pipe(mogine: Run, doubao: DoubaoFake) -> None:
    done = mogine("chat", "保修多久？", "--provider", "doubao", "--no-kb", env=doubao.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "保修两年。\n", "")
    assert texts(doubao) == [("user", "保修多久？")]


def test_first_provider_with_a_key_is_asked_when_none_is_named(mogine: Run, doubao: DoubaoFake) -> None:
    assert mogine("chat", "q", "--no-kb", env=doubao.environ).stdout == "保修两年。\n"
    assert len(doubao.requests) == 1


def test_json_is_one_object_with_all_there_is_to_know(mogine: Run, doubao: DoubaoFake) -> None:
    done = mogine("chat", "q", "--json", "--no-kb", env=doubao.environ)
    assert json.loads(done.stdout) == {
        "answer": "保修两年。",
        "reasoning": "先想一想。",
        "citations": [],
        "usage": {
            "prompt_tokens": 31,
            "completion_tokens": 58,
            "reasoning_tokens": 37,
            "cached_tokens": 0,
            "estimated": False,
        },
        "provider": "doubao",
        "model": doubao.environ["DOUBAO_MODEL"],
        "finish_reason": "stop",
    }
    assert done.stderr == ""


@pytest.mark.parametrize("args", [("-",), ()])
def test_question_comes_from_standard_input(mogine: Run, doubao: DoubaoFake, args: tuple[str, ...]) -> None:
    done = mogine("chat", *args, "--no-kb", env=doubao.environ, input="\ufeff第一行\n第二行\n")
    assert done.returncode == 0
    assert texts(doubao) == [("user", "第一行\n第二行")]


def test_model_of_the_flag_is_asked(mogine: Run, doubao: DoubaoFake) -> None:
    other = next(model for model in doubao.models if model != doubao.environ["DOUBAO_MODEL"])
    assert mogine("chat", "q", "--model", other, "--no-kb", env=doubao.environ).returncode == 0
    assert doubao.requests[-1].json["model"] == other


def test_output_of_a_model_cannot_steer_the_terminal(mogine: Run, doubao: DoubaoFake) -> None:
    doubao.play(script(say("a\x1b]0;pwned\x07\r", "\nb\u202e", "\x9b2J\tc")))
    done = mogine("chat", "q", "--no-kb", env=doubao.environ)
    assert done.stdout == "a\\x1b]0;pwned\\x07\nb\\u202e\\x9b2J\tc\n"


def test_conversation_goes_on_and_is_readable_for_its_owner_alone(
    mogine: Run, doubao: DoubaoFake, home: Path
) -> None:
    mogine("chat", "保修多久？", "--no-kb", env=doubao.environ)
    done = mogine("chat", "--continue", "椅子呢？", "--no-kb", env=doubao.environ)
    assert done.returncode == 0
    turns = [("user", "保修多久？"), ("assistant", "保修两年。"), ("user", "椅子呢？")]
    assert texts(doubao) == turns
    assert stat.S_IMODE((home / "data" / "chat_last.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    mogine("chat", "neu", "--no-kb", env=doubao.environ)
    assert texts(doubao) == [("user", "neu")]


def test_direct_question_is_not_recorded(mogine: Run, doubao: DoubaoFake, home: Path) -> None:
    mogine("chat", "q", "--no-kb", env=doubao.environ)
    assert [path.name for path in (home / "data").iterdir()] == ["chat_last.json"]


def test_passages_become_footnotes(mogine: Run, home: Path, doubao: DoubaoFake) -> None:
    (home / "docs").mkdir()
    (home / "docs" / "warranty.md").write_text("# Warranty\n\nThe warranty of every chair is two years.\n")
    env = {**doubao.environ, "MOGINE_EMBEDDER": "none"}
    assert mogine("kb", "ingest", "docs", env=env).returncode == 0
    done = mogine("chat", "How long is the warranty?", "--provider", "extract", env=env)
    assert "> The warranty of every chair is two years. [1]" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("[1] Warranty (")
    mogine("chat", "How long is the warranty?", env=env)
    assert "two years" in texts(doubao)[-1][1]
    mogine("chat", "How long is the warranty?", "--no-kb", env=env)
    assert texts(doubao) == [("user", "How long is the warranty?")]


def test_home_without_a_knowledge_base_says_how_to_make_one(mogine: Run) -> None:
    done = mogine("chat", "Hello?")
    assert done.returncode == 0
    assert "mogine kb ingest" in done.stderr
    assert done.stdout.startswith("Nothing about this was found")


def test_damaged_knowledge_base_costs_the_citations_and_says_so(
    mogine: Run, doubao: DoubaoFake, home: Path
) -> None:
    (home / "data" / "kb").mkdir(parents=True)
    (home / "data" / "kb" / "current.json").write_text("{")
    done = mogine("chat", "q", env=doubao.environ)
    assert (done.returncode, done.stdout) == (0, "保修两年。\n")
    assert "answering without the knowledge base" in done.stderr


def test_ctrl_c_stops_a_streaming_answer_and_closes_the_vendor_s_connection(
    home: Path, doubao: DoubaoFake
) -> None:
    doubao.play(script(say("erste Hälfte"), hang()))
    command = [sys.executable, "-m", "mogine", "chat", "q", "--no-kb"]
    child = subprocess.Popen(
        command, cwd=home, env=clean_environ(doubao.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    assert os.read(child.stdout.fileno(), 100).decode() == "erste Hälfte"  # visible before the end
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out.decode(), err.decode()) == (130, "\n", "stopped\n")
    wait_for(lambda: doubao.requests[-1].disconnected_at is not None)


def wait_for(true: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- what can be wrong ------------------------------------------------------------------------------


def assert_refused(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("mogine: ") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("provider", "setting"),
    [("doubao", "DOUBAO_API_KEY"), ("dashscope", "DASHSCOPE_APP_ID"), ("openai", "OPENAI_BASE_URL")],
)
def test_provider_without_a_key_names_the_setting_and_the_way_without(
    mogine: Run, home: Path, provider: str, setting: str
) -> None:
    done = mogine("chat", "q", "--provider", provider)
    assert_refused(done, 2, setting, str(home / ".env"), "--provider extract")
    assert not (home / "data").exists()


def test_unknown_provider_is_refused_with_the_known_ones(mogine: Run) -> None:
    assert_refused(mogine("chat", "q", "--provider", "gpt\x1b"), 2, "gpt\\x1b", "dashscope, openai, extract")


def test_wrong_key_is_an_upstream_error(mogine: Run, doubao: DoubaoFake) -> None:
    env = {**doubao.environ, "DOUBAO_API_KEY": "test-key-wrong"}
    doubao.keys = frozenset({KEY})
    done = mogine("chat", "q", "--no-kb", env=env)
    assert_refused(done, 4, "401", "DOUBAO_API_KEY")
    assert "test-key-wrong" not in done.stderr


def test_retired_model_names_the_setting(mogine: Run, doubao: DoubaoFake) -> None:
    done = mogine("chat", "q", "--no-kb", env={**doubao.environ, "DOUBAO_MODEL": "retired"})
    assert_refused(done, 4, "404", "DOUBAO_MODEL")


def test_upstream_that_is_down_is_told(mogine: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/api/v3"
        done = mogine("chat", "q", "--no-kb", env={"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": address})
    assert_refused(done, 4, "DOUBAO_BASE_URL")


@pytest.mark.parametrize("text", ["", " \n "])
def test_empty_question_is_refused(mogine: Run, doubao: DoubaoFake, text: str) -> None:
    assert_refused(mogine("chat", text, env=doubao.environ), 2, "empty")
    assert_refused(mogine("chat", "-", env=doubao.environ, input=text), 2, "empty")
    assert doubao.requests == []


def test_question_that_is_too_long_or_no_text_is_refused(mogine: Run, doubao: DoubaoFake, home: Path) -> None:
    env = {**doubao.environ, "MOGINE_MAX_QUESTION_CHARS": "10"}
    with pytest.raises(RequestError, match="11 characters, more than MOGINE_MAX_QUESTION_CHARS"):
        talk(Shell(home, "a test", env), Choice("x" * 11))
    command = [sys.executable, "-m", "mogine", "chat", "-"]
    done = subprocess.run(command, cwd=home, env=clean_environ(env), input=b"\xff\xfe", capture_output=True)
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    done = subprocess.run([*command[:-1], b"\xff"], cwd=home, env=clean_environ(env), capture_output=True)
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    assert doubao.requests == []


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice("q", server="http://127.0.0.1:1", kb=False), "--no-kb"),
        (Choice("q", server="http://127.0.0.1:1", model="m"), "--model"),
        (Choice("q", server="ftp://x"), "http://127.0.0.1:8741"),
        (Choice("q", server="http://127.0.0.1:1", provider="gpt"), "there is no provider gpt"),
        (Choice("q", provider="extract", model="m"), "--model"),
        (Choice("q", go_on=True), "no conversation to continue"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(home: Path, choice: Choice, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        talk(Shell(home, "a test", {}), choice)


def test_damaged_conversation_names_its_file(home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "chat_last.json").write_text('{"messages": [{"role": "system", "text": "x"}]}')
    with pytest.raises(StoreError, match=r"chat_last\.json.*remove it"):
        talk(Shell(home, "a test", {}), Choice("q", go_on=True))


def test_folder_that_is_no_home_is_named_and_left_alone(mogine: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(mogine("chat", "q", cwd=empty), 2, str(empty), "mogine init")
    assert list(empty.iterdir()) == []


def test_key_in_the_environment_needs_no_home_and_makes_none(
    mogine: Run, doubao: DoubaoFake, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = mogine("chat", "q", "--no-kb", cwd=empty, env=doubao.environ)
    assert (done.returncode, done.stdout) == (0, "保修两年。\n")
    assert list(empty.iterdir()) == []


def test_data_folder_that_cannot_be_written_costs_the_memory_alone(
    mogine: Run, doubao: DoubaoFake, home: Path
) -> None:
    (home / "data").write_text("a file where the folder should be")
    done = mogine("chat", "q", "--no-kb", env=doubao.environ)
    assert (done.returncode, done.stdout) == (0, "保修两年。\n")
    assert "chat_last.json cannot be written" in done.stderr


# --- in turns ---------------------------------------------------------------------------------------


class Terminal:
    """`mogine chat` on a real terminal of 80 by 24, as an emulator shows it."""

    def __init__(self, home: Path, *args: str, env: Mapping[str, str]) -> None:
        self.screen = pyte.HistoryScreen(80, 24, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = bytearray()
        self._side, inner = pty.openpty()
        environ = clean_environ({**env, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"})
        environ = {k: v for k, v in environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        os.set_blocking(self._side, False)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "mogine", "chat", *args],
            cwd=home,
            env={**environ, "LINES": "24", "COLUMNS": "80"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(inner),
        )
        os.close(inner)

    @property
    def text(self) -> str:
        """What the user sees, with what has scrolled away."""
        past = ["".join(line[x].data for x in range(80)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self.screen.display])

    def type(self, keys: str) -> None:
        os.write(self._side, keys.encode())

    def wait(self, text: str, count: int = 1) -> None:
        """Until `text` stands on the screen."""
        deadline = time.monotonic() + 30
        while self.text.count(text) < count:
            assert time.monotonic() < deadline, f"waited for {text!r} in:\n{self.text}"
            self._read(0.05)

    def prompt(self) -> None:
        """Until an empty prompt stands there: before that, what is typed is not for the line editor."""
        deadline = time.monotonic() + 30
        while not self.text.rstrip().endswith("\n>"):
            assert time.monotonic() < deadline, f"waited for the prompt in:\n{self.text}"
            self._read(0.05)

    def leave(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + 30
        while self.child.poll() is None:
            assert time.monotonic() < deadline, self.text
            self._read(0.05)
        self._read(0)
        return self.child.returncode

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self._side)

    def _read(self, timeout_s: float) -> None:
        if not select.select([self._side], [], [], timeout_s)[0]:
            return
        try:
            data = os.read(self._side, 65536)
        except OSError:  # Linux tells so that the other side is closed
            return
        self.raw += data
        self._stream.feed(data)


def _take_terminal(inner: int) -> None:
    fcntl.ioctl(inner, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(home: Path, doubao: DoubaoFake) -> Iterator[Terminal]:
    terminal = Terminal(home, "--no-kb", env=doubao.environ)
    try:
        yield terminal
    finally:
        terminal.close()


def test_turns_build_on_each_other_and_markdown_is_shown(
    terminal: Terminal, doubao: DoubaoFake, home: Path
) -> None:
    terminal.wait("mogine · doubao")
    doubao.play(script(think("hm, Stühle"), say("**two**", " years\n\n- for chairs\n", "- for ta", "bles")))
    terminal.type("how long?\r")
    terminal.wait(" • for tables")
    assert "hm, Stühle\n\ntwo years\n\n • for chairs\n • for tables\n" in terminal.text
    assert terminal.text.count("two years") == 1
    doubao.play(script(say("and \x1b]0;pwned\x07 more")))
    terminal.type("and tables?\r")
    terminal.wait("and \\x1b]0;pwned\\x07 more")
    assert b"\x1b]0;" not in terminal.raw
    assert [text for _, text in texts(doubao)][0::2] == ["how long?", "and tables?"]
    terminal.prompt()
    terminal.type("\x04")
    assert terminal.leave() == 0
    history = home / "data" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+how long?\n" in history.read_text()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, doubao: DoubaoFake) -> None:
    terminal.wait("\n>")
    doubao.play(script(say("a first half\n\nand more"), hang()), script(say("whole")))
    terminal.type("one\r")
    terminal.wait("and more")
    terminal.type("\x03")
    terminal.wait("stopped")
    wait_for(lambda: doubao.requests[0].disconnected_at is not None)
    terminal.type("two\r")
    terminal.wait("whole")
    stopped_turn = ("assistant", "a first half\n\nand more")
    assert texts(doubao) == [("user", "one"), stopped_turn, ("user", "two")]
    terminal.type("half a line\x03")
    terminal.type("\x03")
    assert terminal.leave() == 130


def test_error_of_an_answer_is_told_and_the_chat_goes_on(terminal: Terminal, doubao: DoubaoFake) -> None:
    terminal.wait("\n>")
    doubao.models = ()
    terminal.type("one\r")
    terminal.wait("404 Not Found")
    doubao.models = (doubao.environ["DOUBAO_MODEL"],)
    terminal.type("two\r")
    terminal.wait("保修两年。")
    assert texts(doubao) == [("user", "two")]


def test_commands_of_the_prompt(terminal: Terminal, doubao: DoubaoFake) -> None:
    terminal.prompt()
    terminal.type("/help\r")
    terminal.wait("/provider NAME")
    terminal.prompt()
    terminal.type("/nonsense\r")
    terminal.wait("there is no /nonsense")
    terminal.prompt()
    terminal.type("/provider dashscope\r")
    terminal.wait("DASHSCOPE_API_KEY and DASHSCOPE_APP_ID must")
    terminal.prompt()
    terminal.type("one\r")
    terminal.wait("保修两年。")
    terminal.prompt()
    terminal.type("/new\r")
    terminal.wait("a new conversation")
    terminal.prompt()
    terminal.type("two")
    terminal.wait("two")  # now keys are read one by one, and Enter is not yet a line's end to the terminal
    terminal.type("\x1b\rlines\r")
    terminal.wait("保修两年。", count=2)
    assert texts(doubao) == [("user", "two\nlines")]
    terminal.prompt()
    terminal.type("/provider extract\r")
    terminal.wait("\nextract")
    terminal.prompt()
    terminal.type("three\r")
    terminal.wait("Nothing about this was found")
    assert len(doubao.requests) == 2
    terminal.prompt()
    terminal.type("/quit\r")
    assert terminal.leave() == 0


def test_long_code_that_leaves_the_screen_is_whole_in_the_end(terminal: Terminal, doubao: DoubaoFake) -> None:
    terminal.wait("\n>")
    lines = [f"line {number}" for number in range(60)]
    pieces = [f"{line}\n" for line in lines]
    doubao.play(script(say("```\n", *pieces, "```\n\nthe end"), finish("length"), pace_s=0.005))
    terminal.type("q\r")
    terminal.wait("cut at its greatest length")
    shown = [line.strip() for line in terminal.text.splitlines()]
    assert [line for line in shown if line.startswith("line ")] == lines
    assert "the end" in shown
