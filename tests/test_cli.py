"""The front door: which home is taken, and how errors end a command."""

import json
from pathlib import Path

from tests.conftest import Run


def test_home_comes_from_flag_then_variable_then_folder(mogine: Run, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    third = tmp_path / "third"

    def seen(*args: str, **env: str) -> str:
        return str(json.loads(mogine(*args, "config", "show", "--json", env=env).stdout)["home"])

    assert seen() == str(home)
    assert seen(MOGINE_HOME=str(other)) == str(other)
    assert seen("--home", str(third), MOGINE_HOME=str(other)) == str(third)


def test_config_show_tells_value_and_source_and_hides_secrets(mogine: Run, home: Path) -> None:
    (home / ".env").write_text("DOUBAO_API_KEY=test-key-doubao\nMOGINE_KB_PORT=1002\n")
    shown = mogine("config", "show")
    assert shown.returncode == 0
    assert "test-key" not in shown.stdout + shown.stderr
    lines = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert lines["DOUBAO_API_KEY"].endswith("set  (.env)")
    assert lines["DASHSCOPE_API_KEY"].endswith("unset  (default)")
    assert lines["MOGINE_KB_PORT"].endswith("1002  (.env)")


def test_wrong_setting_ends_with_one_message_and_exit_code_2(mogine: Run) -> None:
    done = mogine("config", "show", env={"MOGINE_KB_PORT": "kitchen", "MOGINE_RATE_LIMIT": "0/minute"})
    assert done.returncode == 2 and done.stdout == ""
    assert "MOGINE_KB_PORT" in done.stderr and "MOGINE_RATE_LIMIT" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_name_in_the_environment_is_warned_about_once(mogine: Run) -> None:
    done = mogine("config", "show", env={"MOGINE_KB_PROT": "1"})
    assert done.returncode == 0
    assert done.stderr.count("did you mean MOGINE_KB_PORT?") == 1


def test_unknown_command_is_a_usage_error(mogine: Run) -> None:
    done = mogine("frobnicate")
    assert done.returncode == 2 and "frobnicate" in done.stderr
