"""A hostile document costs a child process, never the parent, and is told apart from the next one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mogine.errors import TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest.worker import Limits, Parser
from tests.ingest.files import SENTENCE, docx, pdf, scan, xlsx

CHILDREN = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    with Parser() as parser:
        yield parser


def children() -> list[int]:
    return [int(word) for word in CHILDREN.read_text().split()]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.md", SENTENCE.encode()),
        ("a.html", f"<p>{SENTENCE}".encode()),
        ("a.docx", docx(("Normal", SENTENCE))),
        ("a.xlsx", xlsx({"a": [[SENTENCE, "x"], [1, 2]]})),
        ("a.pdf", pdf([[(SENTENCE, 11)]])),
    ],
)
def test_every_kind_is_read_within_the_limits(parser: Parser, name: str, data: bytes) -> None:
    assert SENTENCE in parser.parse(name, data).text


def test_notes_and_page_ends_come_through(parser: Parser) -> None:
    parsed = parser.parse("a.pdf", pdf([[(SENTENCE, 11)], []]))
    assert parsed.notes == ("pages without text (scanned?): 2",)
    assert parsed.text.count("\f") == 2


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("a.pdf", scan(), UnreadableDocument),
        ("a.png", b"\x89PNG" + bytes(99), UnsupportedMedia),
        ("a.txt", b"word " * 2_000_001, TooLarge),
    ],
)
def test_refusals_come_back_as_their_own_class(
    parser: Parser, name: str, data: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        parser.parse(name, data)


def test_names_are_only_data(parser: Parser) -> None:
    for name in ("../../etc/passwd.md", "$(reboot).md", "\udcff\udcfe.md", "a\nb.md"):
        assert parser.parse(name, b"text").text == "text"


def test_one_child_serves_a_run_and_none_is_left() -> None:
    before = set(children())
    with Parser() as parser:
        parser.parse("a.md", b"one")
        first = set(children()) - before
        parser.parse("b.md", b"two")
        assert set(children()) - before == first
        assert len(first) == 1
    assert set(children()) == before


def test_a_document_that_computes_too_long_is_given_up_and_the_next_is_read() -> None:
    """P34"""
    # Every `<!--` looks for its end to the end of the text.
    endless = b"<!--" * 2_000_000
    with Parser(Limits(cpu_s=1)) as parser:
        with pytest.raises(UnreadableDocument, match="more than 1 seconds of computing"):
            parser.parse("a.md", endless)
        assert parser.parse("b.md", b"fine").text == "fine"


def test_a_document_that_takes_too_long_is_given_up() -> None:
    with Parser(Limits(wall_s=0.3)) as parser, pytest.raises(UnreadableDocument, match=r"longer than 0\.3"):
        parser.parse("a.md", b"<!--" * 2_000_000)


def test_a_document_that_needs_too_much_memory_is_given_up_and_the_next_is_read() -> None:
    """P34"""
    with Parser(Limits(memory_bytes=150 * 1024**2)) as parser:
        with pytest.raises(UnreadableDocument, match="memory"):
            parser.parse("a.txt", "退".encode() * 12_000_000)
        assert parser.parse("b.md", b"fine").text == "fine"


def test_a_child_that_is_killed_costs_its_document_only() -> None:
    with Parser() as parser:
        parser.parse("a.md", b"start")
        child = children()[-1]
        threading.Timer(0.05, os.kill, (child, signal.SIGKILL)).start()
        with pytest.raises(UnreadableDocument, match="broke off"):
            parser.parse("a.md", b"<!--" * 2_000_000)
        assert parser.parse("b.md", b"fine").text == "fine"


def test_a_child_that_died_between_documents_is_replaced() -> None:
    with Parser() as parser:
        parser.parse("a.md", b"start")
        os.kill(children()[-1], signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and "Z" not in _state(children()[-1]):
            time.sleep(0.01)
        assert parser.parse("b.md", b"fine").text == "fine"


def test_the_child_gets_neither_environment_nor_folder() -> None:
    with Parser() as parser:
        parser.parse("a.md", b"start")
        child = children()[-1]
        assert Path(f"/proc/{child}/environ").read_bytes() == b""
        assert Path(f"/proc/{child}/cwd").resolve() == Path("/")
        limits = Path(f"/proc/{child}/limits").read_text()
        assert f"Max address space         {512 * 1024**2}" in limits
        assert "Max open files            64" in limits


def test_parsers_may_neither_call_out_nor_write_nor_start_programs(tmp_path: Path) -> None:
    """P34, P35: What the child forbids itself, tried in a process of its own."""
    code = f"""
import socket, subprocess, os
from mogine.ingest.worker import Limits, _confine
_confine(Limits())
def tried(what):
    try:
        what()
    except OSError as error:
        return "a parser tried" in str(error)
    return False
print(
    tried(lambda: socket.create_connection(("127.0.0.1", 9))),
    tried(lambda: open({str(tmp_path / "x")!r}, "w")),
    tried(lambda: subprocess.run(["true"])),
    tried(lambda: os.system("true")),
    tried(os.fork),
    open("/etc/hostname").read() is not None,
)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.split() == ["True"] * 6, done.stderr


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
