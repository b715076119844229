"""The whole loop with running servers: unanswered, seen, accepted, written, taken in, proved, lost again."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Run, clean_environ
from tests.waiting import wait_until

PORTS = ("MOGINE_PROXY_PORT", "MOGINE_KB_PORT", "MOGINE_ANALYTICS_PORT")
QUESTION = "可以用花呗分期付款吗？"
DOCUMENT = "# 花呗分期\n\n可以用花呗分期付款：满 600 元可分 3、6 或 12 期，在结算页选择花呗即可。\n"
RETURNS = "# 退货与退款\n\n收到退货后三个工作日内退款，原路退回。运费由我们承担。\n"


@pytest.fixture
def env() -> dict[str, str]:
    """Three free ports, as the environment names them."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {name: str(taken.getsockname()[1]) for name, taken in zip(PORTS, sockets, strict=True)}


@pytest.fixture
def serving(home: Path, env: dict[str, str], mogine: Run) -> Iterator[dict[str, str]]:
    """`mogine serve all` on a home with one document, ready to answer."""
    (home / "docs").mkdir()
    (home / "docs/returns.md").write_text(RETURNS, "utf-8")
    assert mogine("kb", "ingest", "./docs", env=env).returncode == 0
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "serve", "all"],
        cwd=home,
        env=clean_environ(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_ready(env["MOGINE_PROXY_PORT"]) and is_ready(env["MOGINE_KB_PORT"]))
        yield env
    finally:
        os.kill(child.pid, signal.SIGTERM)
        child.wait(30)


def is_ready(port: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(env: dict[str, str], question: str, visitor: str) -> dict[str, Any]:
    reply = httpx.post(
        f"http://127.0.0.1:{env['MOGINE_PROXY_PORT']}/api/chat",
        json={"question": question, "stream": False},
        headers={"X-Forwarded-For": visitor},
        trust_env=False,
        timeout=30,
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def listed(mogine: Run, env: dict[str, str], status: str = "todo") -> list[dict[str, Any]]:
    done = mogine("gaps", "list", "--status", status, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["gaps"])


def test_a_question_that_nobody_could_answer_is_answered_in_the_end(
    home: Path, serving: dict[str, str], mogine: Run
) -> None:
    assert ask(serving, QUESTION, "198.51.100.1")["answered"] != "yes"
    assert ask(serving, "能不能用花呗分期", "198.51.100.2")["answered"] != "yes"
    answered = ask(serving, "退货后几个工作日退款？", "198.51.100.3")
    assert answered["answered"] == "yes"
    httpx.post(
        f"http://127.0.0.1:{serving['MOGINE_PROXY_PORT']}/api/feedback",
        json={"request_id": answered["request_id"], "handoff": True},
        headers={"X-Forwarded-For": "198.51.100.3"},
        trust_env=False,
    ).raise_for_status()

    def both() -> bool:
        return [gap["visitors"] for gap in listed(mogine, serving)] == [2, 1]

    wait_until(both)
    gap, other = listed(mogine, serving)
    assert "花呗" in gap["question"] and gap["signals"]["no_passage"] == 2
    assert gap["nearest"]["source"] == "docs/returns.md"
    assert other["signals"] == {"handoff": 1}

    done = mogine("gaps", "accept", str(gap["id"]), "--expect", "docs/huabei.md", env=serving)
    assert done.returncode == 0, done.stderr
    (home / "docs/huabei.md").write_text(DOCUMENT, "utf-8")
    took = mogine("kb", "ingest", "./docs", env=serving)
    assert f"gap {gap['id']} closed" in took.stderr, took.stderr
    (closed,) = listed(mogine, serving, "closed")
    assert (closed["id"], closed["evidence"]["generation"], closed["evidence"]["rank"]) == (
        gap["id"],
        "g000002",
        1,
    )
    wait_until(lambda: ask(serving, QUESTION, "198.51.100.4")["answered"] == "yes")

    (home / "docs/huabei.md").unlink()
    took = mogine("kb", "ingest", "./docs", env=serving)
    assert f"gap {gap['id']} open again" in took.stderr, took.stderr
    again = next(g for g in listed(mogine, serving) if g["id"] == gap["id"])
    assert again["status"] == "open" and "g000003" in again["reason"]
