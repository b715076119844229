"""systemd itself reads the units, and scores what they leave open."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mogine.deploy import systemd
from mogine.deploy.site import Site
from tests.deploy.sites import PLAIN, PREFIXED

EXECUTABLE = Path(sys.executable)
HERE = (
    replace(PLAIN, executable=EXECUTABLE),
    replace(PREFIXED, executable=EXECUTABLE),
    replace(
        PLAIN, executable=EXECUTABLE, home=Path("/srv/a 100% \"quoted\" 'home'; $HOME"), kb_calls_out=True
    ),
)


def write(site: Site, folder: Path) -> list[Path]:
    paths = []
    for name, text in systemd.render(site).items():
        (folder / name).write_text(text)
        paths.append(folder / name)
    return paths


@pytest.mark.parametrize("site", HERE)
def test_verify_has_nothing_to_say(site: Site, tmp_path: Path) -> None:
    units = write(site, tmp_path)
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_verify_would_tell_of_a_mistake(tmp_path: Path) -> None:
    (path, *_) = [path for path in write(HERE[0], tmp_path) if path.name == "mogine-kb.service"]
    path.write_text(path.read_text().replace("ProtectSystem=strict", "ProtectSystem=stirct"))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert "stirct" in done.stderr


@pytest.mark.parametrize("site", HERE)
def test_every_service_scores_below_two(site: Site, tmp_path: Path) -> None:
    """P44"""
    for path in write(site, tmp_path):
        if path.suffix == ".service":
            command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
            assert score, done.stdout + done.stderr
            assert float(score[1]) < 2.0, path.name


def test_a_home_among_users_is_let_in_and_no_other() -> None:
    unit = systemd.render(PREFIXED)["mogine-proxy.service"]
    assert "ProtectHome=tmpfs" in unit
    assert 'BindPaths="/home/li/my assistant"' in unit
    assert 'BindReadOnlyPaths="/home/li/venv"' in unit
    assert '"/usr"' not in unit


def test_only_a_server_that_calls_out_may_reach_the_world() -> None:
    units = systemd.render(replace(PLAIN, kb_calls_out=True))
    assert "IPAddressDeny" not in units["mogine-proxy.service"]
    assert "IPAddressDeny" not in units["mogine-kb.service"]
    assert "IPAddressDeny=any" in units["mogine-analytics.service"]
    assert "IPAddressDeny=any" in systemd.render(PLAIN)["mogine-kb.service"]


def test_a_server_gets_longer_to_stop_than_its_answers_may_run_on() -> None:
    unit = systemd.render(replace(PLAIN, shutdown_grace_s=200))["mogine-proxy.service"]
    assert "TimeoutStopSec=215" in unit
