"""`mogine keys` as an owner uses it, with a vendor on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import say, script, usage

OLD, NEW, OTHER = "test-key-old-0000000001", "test-key-new-0000000002", "test-key-else-000000003"


@pytest.fixture
def ark() -> Iterator[DoubaoFake]:
    fake = DoubaoFake(script(say("h"), usage(1, 1)), keys=(OLD, NEW, OTHER))
    with fake.in_thread():
        yield fake


def env_of(home: Path) -> str:
    return (home / ".env").read_text()


def write(home: Path, fake: DoubaoFake, keys: str) -> None:
    text = f"# mine\nDOUBAO_MODEL={MODEL}\nDOUBAO_BASE_URL={fake.base_url}\nDOUBAO_API_KEY={keys}\n# end\n"
    (home / ".env").write_text(text)


def test_a_key_is_read_from_stdin_and_written_alone(mogine: Run, home: Path) -> None:
    (home / ".env").write_text("# mine\n# DOUBAO_API_KEY=\nMOGINE_LOG_FORMAT=json\n")
    done = mogine("keys", "set", "doubao", input=f" {NEW}\n")
    assert done.returncode == 0, done.stderr
    assert env_of(home) == f"# mine\nDOUBAO_API_KEY={NEW}\nMOGINE_LOG_FORMAT=json\n"
    assert (home / ".env").stat().st_mode & 0o777 == 0o600
    assert NEW not in done.stdout + done.stderr
    several = mogine("keys", "set", "doubao", input=f"{OLD}\n{NEW}\n")
    assert several.returncode == 0 and f"DOUBAO_API_KEY={OLD},{NEW}\n" in env_of(home)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no key came"), ("schlüssel", "plain ASCII"), ('"quoted"', "none of"), ("a#b", "none of")],
)
def test_what_is_no_key_is_not_written(text: str, words: str, mogine: Run, home: Path) -> None:
    done = mogine("keys", "set", "doubao", input=text)
    assert done.returncode == 2 and words in done.stderr and env_of(home) == ""


def test_a_key_is_never_an_argument(mogine: Run) -> None:
    assert mogine("keys", "set", "doubao", NEW).returncode == 2


def test_a_key_of_the_environment_is_not_shadowed(mogine: Run, home: Path) -> None:
    done = mogine("keys", "set", "doubao", input=NEW, env={"DOUBAO_API_KEY": OLD})
    assert done.returncode == 2 and "process environment" in done.stderr and env_of(home) == ""


def test_keys_are_tried_with_one_token(mogine: Run, home: Path, ark: DoubaoFake) -> None:
    write(home, ark, f"{OLD},test-key-wrong-00000009")
    done = mogine("keys", "test", "doubao")
    assert done.returncode == 4
    assert "...0001: taken" in done.stdout and "...0009: API proxy error" in done.stdout
    assert OLD not in done.stdout + done.stderr
    assert [request.json["max_tokens"] for request in ark.requests] == [1, 1]
    write(home, ark, OLD)
    assert mogine("keys", "test", "doubao").returncode == 0


def test_a_rotation_puts_the_new_key_in_the_first_ones_place(
    mogine: Run, home: Path, ark: DoubaoFake
) -> None:
    write(home, ark, f"{OLD},{OTHER}")
    before = env_of(home)
    done = mogine("keys", "rotate", "doubao", "--overlap", "0", input=NEW)
    assert done.returncode == 0, done.stderr
    assert env_of(home) == before.replace(f"{OLD},{OTHER}", f"{NEW},{OTHER}")
    assert [request.bearer for request in ark.requests] == [NEW]
    assert NEW not in done.stdout + done.stderr
    kept = mogine("keys", "rotate", "doubao", "--keep-old", input=OLD)
    assert kept.returncode == 0 and f"={OLD},{NEW},{OTHER}\n" in env_of(home)


def test_a_new_key_that_the_vendor_refuses_changes_nothing(mogine: Run, home: Path, ark: DoubaoFake) -> None:
    """F26."""
    write(home, ark, OLD)
    before = env_of(home)
    done = mogine("keys", "rotate", "doubao", input="test-key-wrong-00000009")
    assert done.returncode == 4 and "nothing was changed" in done.stderr
    assert env_of(home) == before
    assert mogine("keys", "rotate", "doubao", input=OLD).returncode == 2


def test_what_is_missing_for_a_trial_is_named(mogine: Run) -> None:
    done = mogine("keys", "rotate", "dashscope", input=NEW)
    assert done.returncode == 2 and "DASHSCOPE_APP_ID" in done.stderr
    assert "keys set" in mogine("keys", "test", "doubao").stderr
