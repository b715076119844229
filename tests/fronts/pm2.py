"""A PM2 of its own, with its daemon and its logs in a folder of its own: a pytest plugin with `pm2`."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environ

BINARY = ROOT / ".tools/node_modules/.bin/pm2"


class Pm2:
    """What a person does with PM2 in a shell."""

    def __init__(self, folder: Path) -> None:
        assert BINARY.exists(), "PM2 is not installed; run scripts/test-system"
        self._folder = folder
        self.environ: Mapping[str, str] = {}

    def __call__(self, *args: str) -> str:
        """`pm2 ARGS`; what it says."""
        environ = {**clean_environ(self.environ), "PM2_HOME": str(self._folder), "PM2_DISCRETE_MODE": "true"}
        done = subprocess.run([BINARY, *args], env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def apps(self) -> dict[str, Any]:
        """Each app by name: `pid`, `status`, `restarts`."""
        listed = self("jlist")
        found = json.loads(listed[listed.index("[") :])
        return {
            app["name"]: {
                "pid": app["pid"],
                "status": app["pm2_env"]["status"],
                "restarts": app["pm2_env"]["restart_time"],
            }
            for app in found
        }


Supervised = Callable[..., Pm2]


@pytest.fixture
def pm2(tmp_path: Path) -> Iterator[Pm2]:
    """`pm2("start", file)`; all that it has started ends with the test."""
    one = Pm2(tmp_path / "pm2")
    try:
        yield one
    finally:
        if os.path.exists(tmp_path / "pm2"):
            one("kill")
