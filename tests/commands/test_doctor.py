"""`mogine doctor` on the command line: lines for people, JSON for programs, an exit code for both."""

import json
from pathlib import Path

from tests.conftest import Run

QUICK = {
    "MOGINE_EMBEDDER": "none",
    "MOGINE_PROXY_PORT": "1",
    "MOGINE_KB_PORT": "1",
    "MOGINE_ANALYTICS_PORT": "1",
}


def test_warnings_leave_the_exit_code_at_0_unless_asked(mogine: Run) -> None:
    done = mogine("doctor", env=QUICK)
    assert done.returncode == 0, done.stdout
    assert "warning keys" in done.stdout and "→ `mogine keys set doubao`" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("0 errors")
    assert mogine("doctor", "--strict", env=QUICK).returncode == 3


def test_an_error_is_exit_code_3_and_all_of_it_is_json(mogine: Run, home: Path) -> None:
    (home / ".env").chmod(0o644)
    done = mogine("doctor", "--json", env=QUICK)
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert told["counts"]["error"] == 1
    (line,) = [line for line in told["lines"] if line["status"] == "error"]
    assert (line["name"], line["fix"]) == ("files", f"chmod 600 {home / '.env'}")


def test_settings_that_are_wrong_are_a_finding_and_not_the_end(mogine: Run) -> None:
    done = mogine("doctor", env={"MOGINE_PROXY_PORT": "x"})
    assert done.returncode == 3
    assert "error   settings" in done.stdout and "MOGINE_PROXY_PORT" in done.stdout


def test_a_folder_that_is_no_home_is_told(mogine: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = mogine("doctor", cwd=empty)
    assert done.returncode == 2 and "mogine init" in done.stderr


def test_a_public_address_needs_no_home(mogine: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = mogine("doctor", "--public", "https://localhost:1/x", cwd=empty)
    assert done.returncode == 3
    assert "nobody speaks TLS at localhost, port 1" in done.stdout


def test_what_is_no_address_is_a_wrong_use(mogine: Run) -> None:
    assert mogine("doctor", "--public", "www.example.com").returncode == 2
    assert mogine("doctor", "--public", "https://x/", "--ca", "/nowhere.pem").returncode == 2
