"""`mogine admin`: the one-time link and a new token."""

from pathlib import Path

from mogine.serve.admin_sessions import open_sessions
from mogine.settings import load_settings
from tests.conftest import Run


def test_link_is_an_address_that_opens_the_dashboard_once(mogine: Run, home: Path) -> None:
    done = mogine("admin", "link", env={"MOGINE_ANALYTICS_PORT": "1"})
    assert done.returncode == 0
    address, _, secret = done.stdout.strip().partition("#link=")
    assert address == "http://127.0.0.1:1/dashboard/"
    assert "30 minutes" in done.stderr and "mogine serve all" in done.stderr
    sessions = open_sessions(load_settings({}, home))
    assert sessions.find(sessions.redeem(secret).value)


def test_link_takes_the_public_address(mogine: Run) -> None:
    for url in ("https://www.example.com/~temp/mogine_agent/", "https://www.example.com/~temp/mogine_agent"):
        done = mogine("admin", "link", "--url", url)
        assert done.stdout.startswith("https://www.example.com/~temp/mogine_agent/dashboard/#link=")
    refused = mogine("admin", "link", "--url", "www.example.com")
    assert refused.returncode == 2 and "--url" in refused.stderr and refused.stdout == ""


def test_rotation_makes_a_new_token_where_the_old_one_stood(mogine: Run, home: Path) -> None:
    old = mogine("admin", "token").stdout.strip()
    new = mogine("admin", "token", "--rotate").stdout.strip()
    assert new != old and mogine("admin", "token").stdout.strip() == new
    assert (home / "data/admin_token").stat().st_mode & 0o777 == 0o600
    (home / ".env").write_text(f"# mine\nMOGINE_ADMIN_TOKEN={'a' * 40}\n")
    newer = mogine("admin", "token", "--rotate").stdout.strip()
    assert newer not in (old, new, "a" * 40)
    assert (home / ".env").read_text() == f"# mine\nMOGINE_ADMIN_TOKEN={newer}\n"


def test_rotation_of_a_token_from_the_environment_is_refused(mogine: Run) -> None:
    done = mogine("admin", "token", "--rotate", env={"MOGINE_ADMIN_TOKEN": "a" * 40})
    assert done.returncode == 2 and "environment" in done.stderr
