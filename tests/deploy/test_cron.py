"""cron and logrotate themselves read what is made for them."""

import getpass
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mogine.deploy import cron, logrotate
from tests.deploy.sites import PLAIN, PREFIXED


@pytest.mark.parametrize("site", [PLAIN, PREFIXED])
def test_cron_takes_the_crontab(site: object, tmp_path: Path) -> None:
    assert site in (PLAIN, PREFIXED)
    path = tmp_path / "crontab"
    path.write_text(cron.render(PLAIN if site is PLAIN else PREFIXED)["mogine.crontab"])
    done = subprocess.run(["crontab", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cron_would_tell_of_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "crontab"
    path.write_text(cron.render(PLAIN)["mogine.crontab"].replace("40 3", "40 33"))
    assert subprocess.run(["crontab", "-n", path], capture_output=True).returncode != 0


def test_a_shell_reads_the_home_as_it_is_named() -> None:
    """As cron hands it on: up to the first bare %, with each escaped one made bare."""
    home = Path('/srv/it\'s 100% "mine"; $HOME')
    text = cron.render(replace(PLAIN, home=home))["mogine.crontab"]
    commands = [line.split(" ", 5)[5] for line in text.splitlines() if line[:1].isdigit() or line[:1] == "*"]
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.replace("\\%", "%"))
        assert words[:3] == ["/opt/mogine/bin/mogine", "--home", str(home)]


def test_logrotate_takes_the_file_and_sees_the_logs(tmp_path: Path) -> None:
    logs = tmp_path / "www logs"
    logs.mkdir(mode=0o755)
    for name in ("mogine_proxy_access.log", "mogine_kb_error.log", "mogine_proxy_app.log", "other.log"):
        (logs / name).write_text("a line\n")
    path = tmp_path / "mogine"
    path.write_text(logrotate.render(replace(PLAIN, log_dir=logs, user=getpass.getuser()))["mogine"])
    path.chmod(0o644)
    command = ["logrotate", "-d", "-s", str(tmp_path / "state"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/sbin:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.replace("kb_error.log", "").replace("*_error.log", "")
    for name in ("mogine_proxy_access.log", "mogine_kb_error.log", "mogine_proxy_app.log"):
        assert f"considering log {logs}/{name}" in done.stderr
    assert "other.log" not in done.stderr


def test_logs_are_kept_no_longer_than_questions() -> None:
    assert "rotate 7\n" in logrotate.render(replace(PLAIN, retention_days=7))["mogine"]
    assert "rotate 30\n" in logrotate.render(replace(PLAIN, retention_days=365))["mogine"]
