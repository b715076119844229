"""Files for other programs change only when somebody means them to: each is held against a golden one."""

from pathlib import Path

import pytest

from tests.deploy.sites import GOLDEN, rendered

RENDERED = dict(rendered())


@pytest.mark.parametrize("name", RENDERED)
def test_the_file_is_the_golden_one(name: str) -> None:
    golden = (GOLDEN / name).read_text("utf-8")
    assert RENDERED[name] == golden, "if this was meant: python -m tests.deploy.sites"


def test_there_is_no_golden_file_that_nothing_makes() -> None:
    there = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    assert there == set(RENDERED)


def test_no_file_names_a_place_of_the_machine_on_which_it_was_made() -> None:
    assert not [name for name, text in RENDERED.items() if str(Path.cwd()) in text]
