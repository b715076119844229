"""`mogine kb test|generations|rollback|verify|compact` and the options of `ingest`, as people run them."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mogine.ingest.pipeline import ingest
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.conftest import Run, clean_environ
from tests.ingest.site import Site, serving
from tests.waiting import wait_until

WORDS_ONLY = {"MOGINE_EMBEDDER": "none"}


@pytest.fixture
def filled(home: Path) -> Path:
    docs = home / "docs"
    docs.mkdir()
    (docs / "returns.md").write_text("# 退货政策\n\n七天内可以退款。\n")
    (docs / "hours.md").write_text("# Hours\n\nWe open at nine.\n")
    take_in(home)
    return docs


def take_in(home: Path) -> None:
    list(ingest([home / "docs"], Generations(home / "data" / "kb"), NoEmbedder(), base=home))


# --- tests ---------------------------------------------------------------------------------------


def test_tests_are_added_and_run(mogine: Run, home: Path, filled: Path) -> None:
    for args in (("怎么退款", "-d", "docs/returns.md"), ("when open", "--contains", "nine", "-k", "1")):
        assert mogine("kb", "test", "add", *args, env=WORDS_ONLY).returncode == 0
    done = mogine("kb", "test", "--junit", "out.xml", env=WORDS_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[:4] == ["ok", "1", "3", "怎么退款"]
    assert "2 passed, 0 failed, generation g000001" in done.stderr
    assert ET.parse(home / "out.xml").getroot().get("tests") == "2"  # noqa: S314 - our own file
    told = json.loads(mogine("kb", "test", "--json", env=WORDS_ONLY).stdout)
    assert (told["passed"], told["failed"]) == (2, 0)
    assert told["results"][1] == {
        "question": "when open", "contains": "nine", "top_k": 1, "passed": True, "rank": 1,
        "first": "docs/hours.md",
    }  # fmt: skip


def test_a_test_that_expects_nothing_or_what_is_not_there_is_told(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "test", "add", "when open")
    assert done.returncode == 2 and "--document, --contains, or both" in done.stderr
    done = mogine("kb", "test", "add", "when open", "-d", "nope.md")
    assert done.returncode == 0 and "there is no document nope.md" in done.stderr
    done = mogine("kb", "test", "add", "when open", "-d", "hours.md")
    assert "there is no document" not in done.stderr


def test_a_failing_test_is_exit_code_3(mogine: Run, filled: Path) -> None:
    mogine("kb", "test", "add", "when open", "-c", "ten")
    done = mogine("kb", "test", "--junit", "out.xml", env=WORDS_ONLY)
    assert done.returncode == 3
    assert done.stdout.startswith("FAILED\t-\t3\twhen open")


def test_without_tests_the_remedy_is_told(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "test", env=WORDS_ONLY)
    assert done.returncode == 1
    assert "mogine kb test add" in done.stderr


def test_a_broken_test_file_stops_an_ingest_before_anything_is_done(
    mogine: Run, home: Path, filled: Path
) -> None:
    (home / "kb-tests.jsonl").write_text("{")
    done = mogine("kb", "ingest", "docs", env=WORDS_ONLY)
    assert done.returncode == 2 and "line 1 is no JSON" in done.stderr
    assert mogine("kb", "ingest", "docs", "--gate", "off", env=WORDS_ONLY).returncode == 0
    assert mogine("kb", "test", "add", " ", "-c", "x").returncode == 2


def test_gate_decides_and_tells_which_questions_moved(mogine: Run, filled: Path) -> None:
    mogine("kb", "test", "add", "退款", "-c", "七天")
    (filled / "returns.md").write_text("# 退货政策\n\n不可以退款。\n")
    done = mogine("kb", "ingest", "docs", "--gate", "strict", env=WORDS_ONLY)
    assert done.returncode == 3
    assert "WORSE  rank 1 -> -  退款" in done.stderr and "g000001 serves on" in done.stderr
    told = json.loads(mogine("kb", "ingest", "docs", "--gate", "strict", "--json", env=WORDS_ONLY).stdout)
    assert (told["held_back"], told["generation"], told["tests"]["worse"]) == (True, "g000001", ["退款"])
    done = mogine("kb", "ingest", "docs", env=WORDS_ONLY)
    assert done.returncode == 0
    assert "0 of 1 pass, 1 got worse" in done.stderr and "generation g000002" in done.stdout


def test_removing_asks_the_tests_too(mogine: Run, home: Path, filled: Path) -> None:
    mogine("kb", "test", "add", "when open", "-d", "docs/hours.md", env=WORDS_ONLY)
    kept = mogine("kb", "remove", "docs/hours.md", "--gate", "strict", env=WORDS_ONLY)
    assert kept.returncode == 3
    assert "WORSE  rank 1 -> -  when open" in kept.stderr
    assert "docs/hours.md" in mogine("kb", "list").stdout
    gone = mogine("kb", "remove", "docs/hours.md", "--json", env=WORDS_ONLY)
    told = json.loads(gone.stdout)
    assert (gone.returncode, told["removed"], told["held_back"]) == (0, ["docs/hours.md"], False)
    assert told["tests"]["worse"] == ["when open"]


# --- generations ---------------------------------------------------------------------------------


def test_generations_are_listed_and_gone_back_to(mogine: Run, home: Path, filled: Path) -> None:
    (filled / "new.md").write_text("new")
    take_in(home)
    listed = mogine("kb", "generations").stdout.splitlines()
    assert [line.split("\t")[:2] for line in listed] == [["g000002", "serves"], ["g000001", ""]]
    rows = json.loads(mogine("kb", "generations", "--json").stdout)["generations"]
    assert [(row["name"], row["serves"], row["documents"]) for row in rows] == [
        ("g000002", True, 3), ("g000001", False, 2),
    ]  # fmt: skip
    done = mogine("kb", "rollback")
    assert done.returncode == 0 and "g000001 serves now: 2 documents" in done.stdout
    assert mogine("kb", "rollback").returncode == 1
    assert json.loads(mogine("kb", "rollback", "g000002", "--json").stdout)["generation"] == "g000002"
    assert "g9" in mogine("kb", "rollback", "g9").stderr


def test_verify_tells_what_is_damaged(mogine: Run, home: Path, filled: Path) -> None:
    done = mogine("kb", "verify")
    assert (done.returncode, done.stdout) == (0, "generation g000001 is whole: 2 documents, 2 passages\n")
    path = home / "data" / "kb" / "generations" / "g000001" / "texts.db"
    data = bytearray(path.read_bytes())
    data[-10] ^= 0xFF
    path.write_bytes(data)
    done = mogine("kb", "verify", "g000001", "--full", "--json")
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert {"part": "files", "detail": "texts.db is not as it was written"} in told["findings"]
    assert "kb rollback" in mogine("kb", "search", "退款", env=WORDS_ONLY).stderr


def test_compact_leaves_nothing_of_what_was_removed(mogine: Run, home: Path, filled: Path) -> None:
    data = home / "data" / "kb"
    (filled / "secret.md").write_text("thesecretword stands here")
    take_in(home)
    (data / "vectors.db").write_bytes(b"thesecretword")
    (filled / "secret.md").unlink()
    take_in(home)
    done = mogine("kb", "compact", "--forget", "--json", env=WORDS_ONLY)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["generation"], told["forgotten"]) == ("g000004", ["g000002", "g000003"])
    files = [path for path in data.rglob("*") if path.is_file()]
    assert not [path for path in files if b"thesecretword" in path.read_bytes()]
    assert mogine("kb", "verify").returncode == 0


@pytest.mark.parametrize(
    "command", [("generations",), ("rollback",), ("verify",), ("compact",), ("test",), ("test", "add", "q")]
)
def test_no_command_makes_a_home_by_accident(mogine: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    done = mogine("kb", *command, cwd=nowhere)
    assert done.returncode == 2 and str(nowhere) in done.stderr
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("command", ["rollback", "verify", "compact"])
def test_an_empty_base_says_how_to_fill_it(mogine: Run, command: str) -> None:
    done = mogine("kb", command, env=WORDS_ONLY)
    assert done.returncode == 1 and "mogine kb ingest" in done.stderr


# --- ingest --------------------------------------------------------------------------------------


def test_dry_run_tells_and_changes_nothing(mogine: Run, filled: Path) -> None:
    (filled / "new.md").write_text("new")
    (filled / "hours.md").unlink()
    done = mogine("kb", "ingest", "docs", "--dry-run", env=WORDS_ONLY)
    assert (done.returncode, done.stdout) == (
        0,
        "would be added: docs/new.md\nwould be removed: docs/hours.md\n"
        "1 unchanged, 1 passages would be written\n",
    )
    assert json.loads(mogine("kb", "ingest", "docs", "--dry-run", "--json", env=WORDS_ONLY).stdout)["dry_run"]
    assert "g000001" in mogine("kb", "generations").stdout


def test_pages_of_the_own_site_are_taken_in(mogine: Run, home: Path) -> None:
    with serving(Site({"/hours": "<title>Hours</title><p>We open at nine."})) as site:
        url = f"http://127.0.0.1:{site.port}/hours"
        done = mogine("kb", "ingest", url, env={**WORDS_ONLY, "MOGINE_INGEST_HOSTS": "127.0.0.1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(mogine("kb", "search", "nine", "--json", env=WORDS_ONLY).stdout)["results"]
    assert (found[0]["url"], found[0]["title"]) == (url, "Hours")


@pytest.mark.parametrize(
    ("url", "code", "told"),
    [
        ("http://127.0.0.1:1/", 2, "http://127.0.0.1:1/ is not https"),
        ("file:///etc/passwd", 2, "is no web address"),
        ("https://127.0.0.1/", 1, "private network"),
        ("https://2130706433/", 1, "private network"),
        ("https://localhost/", 1, "private network"),
    ],
)
def test_addresses_that_are_not_public_are_refused(
    mogine: Run, home: Path, url: str, code: int, told: str
) -> None:
    done = mogine("kb", "ingest", url, env=WORDS_ONLY)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr


def test_watch_takes_in_what_changes_until_ctrl_c(home: Path, filled: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "kb", "ingest", "docs", "--watch", "--json"],
        cwd=home,
        env=clean_environ(WORDS_ONLY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    generations = Generations(home / "data" / "kb")
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "{\n", "the first run is told"
        (filled / "new.md").write_text("new")
        wait_until(lambda: generations.current_name() == "g000002")
        (filled / "new.md").unlink()
        wait_until(lambda: generations.current_name() == "g000003")
    finally:
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    # What had just been done may be told, if Ctrl-C came before it was.
    assert err in ("", "interrupted when all was done: generation g000003 serves\n")
    assert set(generations.sources()) == {"docs/returns.md", "docs/hours.md"}


def test_watch_tells_each_change_in_a_line(home: Path, filled: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "kb", "ingest", "docs", "--watch"],
        cwd=home,
        env=clean_environ(WORDS_ONLY),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    generations = Generations(home / "data" / "kb")
    try:
        assert child.stdout is not None
        while "watching docs; Ctrl-C ends" not in child.stdout.readline():
            assert child.poll() is None
        (filled / "new.md").write_text("new")
        (filled / "broken.pdf").write_bytes(b"no PDF")
        assert "docs/broken.pdf is named .pdf but its bytes are no PDF" in child.stdout.readline()
        assert "added docs/new.md  (3 documents, 3 passages, generation g000002" in child.stdout.readline()
        (filled / "new.md").write_text("newer")
        (filled / "hours.md").unlink()
        assert "changed docs/new.md; removed docs/hours.md  (2 docu" in child.stdout.readline()
    finally:
        os.killpg(child.pid, signal.SIGINT)
        rest, _ = child.communicate(timeout=30)
    assert (child.returncode, rest) == (130, "")
    assert generations.current_name() == "g000003"


def test_watch_follows_files_alone(mogine: Run) -> None:
    assert mogine("kb", "ingest", "https://www.example.com/", "--watch").returncode == 2
    assert mogine("kb", "ingest", ".", "--watch", "--dry-run").returncode == 2
