"""`mogine demo`: everything at once, offline, in a folder of its own."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import Run, clean_environ

OFFSETS = (39, 41, 42)


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A loopback port taken by somebody else."""
    with socket.create_server(("127.0.0.1", port)) as taken:
        yield taken


def free_base() -> int:
    """A port base whose three ports are free."""
    for base in random.sample(range(20000, 30000), 100):
        with ExitStack() as stack:
            try:
                for offset in OFFSETS:
                    stack.enter_context(listening(base + offset))
            except OSError:
                continue
            return base
    raise RuntimeError("no three free ports")


@contextmanager
def running_demo(*args: str, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The demo as a child process, and what it printed once it serves."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "demo", *args],
        env=clean_environ({"PYTHONUNBUFFERED": "1", **environ}),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    try:
        told = ""
        while "Ctrl-C stops" not in told and (line := child.stdout.readline()):
            told += line
        yield child, told
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_demo_serves_answers_records_and_stops(mogine: Run, tmp_path: Path) -> None:
    home = tmp_path / "demo"
    base = free_base()
    with running_demo("--dir", str(home), "--port-base", str(base)) as (child, told):
        proxy = f"http://127.0.0.1:{base + 41}"
        assert f"{proxy}/chat/" in told
        assert len(re.findall(r"^  [1234]\. ", told, re.M)) == 4, told
        opened = re.search(r" (admin link --url \S+)", told)
        assert opened is not None
        link = mogine("--home", str(home), *opened[1].split()).stdout.strip()
        assert link.startswith(f"http://127.0.0.1:{base + 42}/dashboard/#link=")
        assert httpx.get(link).status_code == 200
        page = httpx.get(f"{proxy}/chat/")
        assert page.status_code == 200 and "<html" in page.text
        for question, cited in (
            ("退款多久到账？", "returns.zh.md"),
            ("How long is the warranty?", "warranty.docx"),
        ):
            answer = httpx.post(f"{proxy}/api/chat", json={"question": question}, timeout=30)
            assert cited in answer.text and "event: done" in answer.text
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
    stats = mogine("--home", str(home), "stats", "--days", "30")
    assert stats.returncode == 0 and re.search(r"questions\s+2\b", stats.stdout)


def test_demo_keeps_to_its_cache_folder_and_uses_no_key_of_the_environment(tmp_path: Path) -> None:
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    base = free_base()
    before = os.getcwd()
    os.chdir(here)
    try:
        environ = {"XDG_CACHE_HOME": str(cache), "DOUBAO_API_KEY": "test-key-doubao"}
        with running_demo("--port-base", str(base), **environ) as (_, told):
            assert "without a key" in told
            config = httpx.get(f"http://127.0.0.1:{base + 41}/api/chat/config").json()
            assert config["providers"] == ["extract"]
    finally:
        os.chdir(before)
    assert list(here.iterdir()) == []
    assert (cache / "mogine" / "demo" / "data" / "kb" / "current.json").exists()


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_port_in_use_is_told_before_any_work(mogine: Run, tmp_path: Path, offset: int) -> None:
    base = free_base()
    with listening(base + offset):
        done = mogine("demo", "--dir", str(tmp_path / "demo"), "--port-base", str(base))
    assert done.returncode == 2
    assert f"port {base + offset} " in done.stderr and "--port-base" in done.stderr
    assert not (tmp_path / "demo" / "data" / "kb" / "current.json").exists()
