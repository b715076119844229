"""`mogine backup` and `restore`, as a person and cron run them."""

import json
from pathlib import Path

from tests.conftest import Run
from tests.servers import DEFAULTS, Spawn


def test_there_and_back_with_a_look_in_between(mogine: Run, home: Path, tmp_path: Path) -> None:
    (home / "site.toml").write_text('[company]\nname = "松涧"\n')
    file = tmp_path / "b.tar.gz"
    told = mogine("backup", str(file), "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["file"] == str(file)
    looked = mogine("restore", str(file), "--check")
    assert looked.returncode == 0 and "is whole" in looked.stderr
    there = tmp_path / "there"
    done = mogine("--home", str(there), "restore", str(file))
    assert done.returncode == 0, done.stderr
    assert "keys set" in done.stderr, "who has no keys is told"
    assert (there / "site.toml").read_text() == (home / "site.toml").read_text()


def test_from_cron_it_says_nothing_and_keeps_only_the_newest(mogine: Run, home: Path) -> None:
    folder = home / "data/backups"
    folder.mkdir(parents=True)
    (folder / "mogine-20200101T000000Z.tar.gz").touch()
    done = mogine("backup", "--keep", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (only,) = folder.iterdir()
    assert only.name > "mogine-2021"


async def test_restore_waits_for_the_servers_to_be_stopped(spawn: Spawn, mogine: Run) -> None:
    child = await spawn("analytics")
    assert mogine("backup", "b.tar.gz").returncode == 0
    env = {**DEFAULTS, "MOGINE_ANALYTICS_PORT": str(child.port("analytics"))}
    refused = mogine("restore", "b.tar.gz", env=env)
    assert refused.returncode == 2
    assert "stop mogine first" in refused.stderr and child.url("analytics") in refused.stderr
    assert mogine("restore", "b.tar.gz", "--force", env=env).returncode == 0


def test_a_damaged_file_is_told_in_one_line(mogine: Run, home: Path) -> None:
    (home / "b.tar.gz").write_text("hello")
    done = mogine("restore", "b.tar.gz")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "b.tar.gz" in done.stderr


def test_keep_and_a_file_of_ones_own_do_not_go_together(mogine: Run) -> None:
    done = mogine("backup", "x.tar.gz", "--keep", "3")
    assert done.returncode == 2 and "--keep" in done.stderr
