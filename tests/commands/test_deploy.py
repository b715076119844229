"""`mogine deploy`: files from the home's settings, shown, written or compared."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Run

HOSTED = {"MOGINE_ALLOWED_HOSTS": "www.example.com", "MOGINE_BASE_PATH": "/x/"}


def test_one_file_on_stdout_is_that_file_and_nothing_else(mogine: Run, home: Path) -> None:
    done = mogine("deploy", "nginx", env={**HOSTED, "MOGINE_PROXY_PORT": "9001"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# mogine:") and done.stdout.endswith("}\n")
    assert "server_name www.example.com;" in done.stdout
    assert "location ^~ /x/ {" in done.stdout
    assert "server 127.0.0.1:9001;" in done.stdout
    assert "MOGINE_" not in done.stderr, "nothing is missing"


def test_several_files_on_stdout_are_told_apart(mogine: Run) -> None:
    done = mogine("deploy", "systemd")
    names = re.findall(r"^# ==> (\S+) <==$", done.stdout, re.M)
    assert len(names) == 10 and "mogine-proxy.service" in names


def test_flags_win_and_settings_that_must_follow_are_named(mogine: Run) -> None:
    done = mogine(
        "deploy", "nginx", "--domain", "a.example.com", "--prefix", "/~temp/mogine_agent/", env=HOSTED
    )
    assert "server_name a.example.com;" in done.stdout
    assert "MOGINE_ALLOWED_HOSTS=www.example.com,a.example.com" in done.stderr
    assert "MOGINE_BASE_PATH=/~temp/mogine_agent/" in done.stderr
    assert "mogine doctor --public https://a.example.com/~temp/mogine_agent/" in done.stderr


def test_without_a_name_nginx_has_nothing_to_serve(mogine: Run) -> None:
    done = mogine("deploy", "nginx")
    assert done.returncode == 2
    assert "--domain" in done.stderr and "MOGINE_ALLOWED_HOSTS" in done.stderr


@pytest.mark.parametrize("prefix", ["x", "/a b/", "/../"])
def test_a_prefix_that_is_none_is_refused(mogine: Run, prefix: str) -> None:
    done = mogine("deploy", "nginx", "--domain", "a.example.com", "--prefix", prefix)
    assert done.returncode == 2
    assert "prefix" in done.stderr and "Traceback" not in done.stderr


def test_written_files_are_compared_and_written_again_only_when_they_changed(
    mogine: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "etc"
    first = mogine("deploy", "pm2", "--write", str(folder))
    assert first.returncode == 0 and "made" in first.stderr and first.stdout == ""
    path = folder / "ecosystem.config.js"
    assert path.stat().st_mode & 0o777 == 0o644
    written_at = path.stat().st_mtime_ns
    assert "same" in mogine("deploy", "pm2", "--write", str(folder)).stderr
    assert path.stat().st_mtime_ns == written_at

    same = mogine("deploy", "pm2", "--write", str(folder), "--diff")
    assert (same.returncode, same.stdout) == (0, "")
    other = mogine("deploy", "pm2", "--logs", "/www/wwwlogs", "--write", str(folder), "--diff")
    assert other.returncode == 3
    assert '+      "out_file": "/www/wwwlogs/mogine_kb_app.log",' in other.stdout
    assert path.stat().st_mtime_ns == written_at, "a comparison writes nothing"


def test_a_folder_that_cannot_be_written_is_named(mogine: Run) -> None:
    done = mogine("deploy", "cron", "--write", "/proc/mogine")
    assert done.returncode == 2
    assert "/proc/mogine" in done.stderr and "Traceback" not in done.stderr


def test_the_folder_of_logs_is_a_setting(mogine: Run) -> None:
    assert (
        '"/www/wwwlogs/mogine_*_access.log"'
        in mogine("deploy", "logrotate", env={"MOGINE_LOG_DIR": "/www/wwwlogs/"}).stdout
    )
    wrong = mogine("deploy", "logrotate", env={"MOGINE_LOG_DIR": "logs"})
    assert wrong.returncode == 2 and "MOGINE_LOG_DIR" in wrong.stderr


def test_servers_never_run_as_root_unless_told_to(mogine: Run) -> None:
    assert "User=root" not in mogine("deploy", "systemd").stdout
    assert "User=root" in mogine("deploy", "systemd", "--user", "root").stdout


def test_bodies_may_be_as_large_as_the_settings_say(mogine: Run) -> None:
    plain = mogine("deploy", "nginx", env=HOSTED).stdout
    images = mogine("deploy", "nginx", env={**HOSTED, "MOGINE_ALLOW_IMAGES": "true"}).stdout
    assert "client_max_body_size 262144;" in plain
    assert f"client_max_body_size {256 * 1024 + 4 * 1024**2 * 4 // 3 + 1024};" in images


def test_there_is_no_home_to_deploy_in_an_empty_folder(mogine: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = mogine("deploy", "pm2", cwd=empty)
    assert done.returncode == 2 and str(empty) in done.stderr


def test_servers_on_other_machines_are_named_once_or_several_times(mogine: Run) -> None:
    one = mogine(
        *(
            "deploy",
            "nginx",
            "--upstreams",
            "10.0.0.1:8741, 10.0.0.2:8741",
            "--kb-upstreams",
            "[fd00::1]:8739",
        ),
        *("--analytics-upstream", "10.0.0.3:8742"),
        env=HOSTED,
    )
    two = mogine(
        *("deploy", "nginx", "--upstreams", "10.0.0.1:8741", "--upstreams", "10.0.0.2:8741"),
        *("--kb-upstreams", "[fd00::1]:8739", "--analytics-upstream", "10.0.0.3:8742"),
        env=HOSTED,
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    servers = re.findall(r"^    server (\S+) max_fails", one.stdout, re.M)
    assert Counter(servers) == {
        "10.0.0.1:8741": 2,  # once more for connections that carry nothing but questions
        "10.0.0.2:8741": 2,
        "[fd00::1]:8739": 1,
        "10.0.0.3:8742": 1,
    }
    assert "127.0.0.1" not in one.stdout
    assert "MOGINE_ROLLING_RESTART=true" in one.stderr and "MOGINE_TRUSTED_PROXIES" in one.stderr


def test_what_is_no_server_is_named_with_what_to_write(mogine: Run) -> None:
    done = mogine("deploy", "nginx", "--upstreams", "fd00::1:8741,10.0.0.1:8741,10.0.0.1:8741", env=HOSTED)
    assert (done.returncode, done.stdout) == (2, "")
    assert "[fd00::1]:8741" in done.stderr and "name each once" in done.stderr


def test_an_empty_list_of_servers_is_refused(mogine: Run) -> None:
    done = mogine("deploy", "nginx", "--upstreams", " , ", env=HOSTED)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--upstreams" in done.stderr


def test_only_nginx_asks_other_machines(mogine: Run) -> None:
    done = mogine("deploy", "systemd", "--upstreams", "10.0.0.1:8741")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nginx" in done.stderr


@pytest.mark.parametrize(
    ("host", "closed"), [("127.0.0.1", 5), ("localhost", 5), ("::1", 5), ("10.0.0.1", 0), ("0.0.0.0", 0)]
)
def test_units_let_in_who_may_ask(mogine: Run, host: str, closed: int) -> None:
    """Servers on an address of the network are asked by other machines."""
    done = mogine("deploy", "systemd", env={"MOGINE_HOST": host})
    assert done.stdout.count("IPAddressDeny=any") == closed
