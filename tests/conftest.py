"""What every test may use: a home of its own, settings on it, and the command line as a user runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import pytest

from mogine.settings import Settings, load_settings

pytest_plugins = [
    "tests.fronts.nginx",
    "tests.fronts.pm2",
    "tests.servers",
    "tests.upstreams.chroma",
    "tests.upstreams.llama",
    "tests.upstreams.postgres",
    "tests.upstreams.redis",
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).parent.parent

# No test is timed: on a busy machine any example may take its time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: then no
# test could interrupt a program.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def clean_environ(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without any of our settings, plus `extra`."""
    ours = ("MOGINE_", "DOUBAO_", "DASHSCOPE_", "OPENAI_", "OTEL_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120", **(extra or {})}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty mogine home: an `.env` and nothing else."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".env").touch(mode=0o600)
    return home


@pytest.fixture
def settings(home: Path) -> Settings:
    """The default settings of that home, on free ports and with generous limits."""
    free = {"MOGINE_PROXY_PORT": "0", "MOGINE_KB_PORT": "0", "MOGINE_ANALYTICS_PORT": "0"}
    return load_settings({**free, "MOGINE_RATE_LIMIT": "100000/minute"}, home)


@pytest.fixture
def mogine(home: Path) -> Run:
    """Runs `mogine ARGS` as a child process in the home; stdout and stderr come back as text."""

    def run(
        *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, input: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "mogine", *args],
            cwd=cwd or home,
            env=clean_environ(env),
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
