"""Changing one line of an `.env`."""

import os
from pathlib import Path

import pytest

from mogine.commands import envfile
from mogine.errors import SettingsError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "KEY=new\n"),
        ("# a\nOTHER=1\n", "# a\nOTHER=1\nKEY=new\n"),
        ("OTHER=1", "OTHER=1\nKEY=new\n"),
        ("# a\nKEY=old\n# b\nOTHER=1\n", "# a\nKEY=new\n# b\nOTHER=1\n"),
        ("export KEY = old\nOTHER=1\n", "KEY=new\nOTHER=1\n"),
        ("KEY=one\nOTHER=1\nKEY=two\n", "OTHER=1\nKEY=new\n"),
        ("# Key of it\n# KEY=\nOTHER=1\n", "# Key of it\nKEY=new\nOTHER=1\n"),
        ("# KEY_MODEL=x\nMY_KEY=1\n", "# KEY_MODEL=x\nMY_KEY=1\nKEY=new\n"),
        ("A=1\r\nKEY=old\r\nB=2\r\n", "A=1\r\nKEY=new\r\nB=2\r\n"),
    ],
)
def test_one_line_changes_and_all_else_stays(before: str, after: str) -> None:
    assert envfile.with_value(before, "KEY", "new") == after


def test_the_file_is_private_and_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("old")
    path.chmod(0o644)
    with path.open() as reader:
        envfile.write(path, "new")
        assert reader.read() == "old", "whoever reads it meanwhile has the old one whole"
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert os.listdir(tmp_path) == [".env"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / ".env").symlink_to("real")
    envfile.write(tmp_path / ".env", "new")
    assert (tmp_path / ".env").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match="cannot be written"):
        envfile.write(tmp_path / ".env", "new")
    assert os.listdir(tmp_path) == [".env"]


def test_what_is_no_settings_file_is_not_read(tmp_path: Path) -> None:
    assert envfile.read(tmp_path / ".env") == ""
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        envfile.read(tmp_path / ".env")
