"""`mogine kb` as a person and a script run it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mogine.ingest.pipeline import Summary, ingest
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.conftest import Run, clean_environ

WORDS_ONLY = {"MOGINE_EMBEDDER": "none"}


@pytest.fixture
def docs(home: Path) -> Path:
    docs = home / "docs"
    docs.mkdir()
    (docs / "returns.md").write_text(
        "# 退货政策\n\n## 退款\n\n七天内可以退款。\n\n## 运费\n\n运费由顾客承担。\n"
    )
    (docs / "faq.csv").write_text("question,answer\nHow long is the warranty?,Two years.\n")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    return docs


@pytest.fixture
def filled(home: Path, docs: Path) -> Path:
    *_, summary = ingest([docs], Generations(home / "data" / "kb"), NoEmbedder(), base=home)
    assert isinstance(summary, Summary) and len(summary.added) == 2
    return docs


def test_ingest_tells_what_it_took_and_what_not(mogine: Run, docs: Path) -> None:
    done = mogine("kb", "ingest", "./docs", env=WORDS_ONLY)
    assert done.returncode == 0, done.stderr
    assert "added      2" in done.stdout and "2 documents, 3 passages in generation g000001" in done.stdout
    assert "docs/photo.png" in done.stderr and "is of a kind that is not read" in done.stderr
    again = mogine("kb", "ingest", "./docs", env=WORDS_ONLY)
    assert "unchanged  2" in again.stdout and "g000001" in again.stdout


def test_ingest_as_json(mogine: Run, docs: Path) -> None:
    done = mogine("kb", "ingest", "./docs", "--json", env=WORDS_ONLY)
    told = json.loads(done.stdout)
    assert told["added"] == ["docs/faq.csv", "docs/returns.md"]
    assert [entry["source"] for entry in told["skipped"]] == ["docs/photo.png"]
    assert (told["generation"], told["passages"], told["documents_in_all"]) == ("g000001", 3, 2)


def test_a_folder_without_readable_documents_is_a_failure_that_says_why(mogine: Run, home: Path) -> None:
    (home / "pictures").mkdir()
    (home / "pictures" / "a.png").write_bytes(b"\x89PNG")
    done = mogine("kb", "ingest", "pictures", env=WORDS_ONLY)
    assert done.returncode == 1
    assert "nothing was taken in" in done.stderr and "holds no document" in done.stderr
    assert not (home / "data").exists()


def test_only_unreadable_documents_are_a_failure_that_says_why(mogine: Run, home: Path) -> None:
    (home / "broken.pdf").write_bytes(b"%PDF-1.7 torn")
    done = mogine("kb", "ingest", "broken.pdf", env=WORDS_ONLY)
    assert done.returncode == 1
    assert "broken.pdf is damaged" in done.stderr


def test_a_path_that_is_not_there_is_named(mogine: Run) -> None:
    done = mogine("kb", "ingest", "nowhere", env=WORDS_ONLY)
    assert done.returncode == 2
    assert "nowhere" in done.stderr


def test_a_second_writer_is_told_to_wait(mogine: Run, home: Path, docs: Path) -> None:
    with Generations(home / "data" / "kb").begin(NoEmbedder()):
        done = mogine("kb", "ingest", "docs", env=WORDS_ONLY)
    assert done.returncode == 5
    assert "another run" in done.stderr


def test_search_shows_passages_and_where_they_stand(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "search", "退款", env=WORDS_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1. 退货政策 > 退款\n")
    assert "docs/returns.md" in done.stdout and "七天内可以退款。" in done.stdout


def test_search_as_json_has_the_shape_of_the_server(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "search", "warranty", "--json", "--mode", "keyword", "--top-k", "1")
    told = json.loads(done.stdout)
    assert (told["query"], told["mode"], told["generation"]) == ("warranty", "keyword", "g000001")
    (result,) = told["results"]
    assert result.keys() == {"id", "text", "title", "heading", "source", "url", "page", "score", "rank"}
    assert result["text"] == "question: How long is the warranty?\nanswer: Two years."
    assert (result["rank"], result["source"]) == (1, "docs/faq.csv")
    assert 0 < result["score"] <= 1


def test_search_that_finds_nothing_says_so(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "search", "zzz", env=WORDS_ONLY)
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing found" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("",), 2), (("q", "--top-k", "0"), 2), (("q", "--mode", "magic"), 2), (("q", "--mode", "vector"), 2)],
)
def test_search_refuses_what_makes_no_sense(
    mogine: Run, filled: Path, arguments: tuple[str, ...], code: int
) -> None:
    assert mogine("kb", "search", *arguments, env=WORDS_ONLY).returncode == code


def test_search_through_a_server_that_is_not_there_says_so(mogine: Run) -> None:
    done = mogine("kb", "search", "q", "--server", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "does not answer" in done.stderr


def test_list_is_lines_in_a_pipe_and_json_for_scripts(mogine: Run, filled: Path) -> None:
    lines = [line.split("\t") for line in mogine("kb", "list").stdout.splitlines()]
    assert [line[4] for line in lines] == ["docs/faq.csv", "docs/returns.md"]
    told = json.loads(mogine("kb", "list", "--json").stdout)
    assert [d["title"] for d in told["documents"]] == ["faq", "退货政策"]
    assert [d["id"] for d in told["documents"]] == [line[0] for line in lines]


@pytest.mark.parametrize("name", ["docs/returns.md", "./docs/returns.md", "id"])
def test_show_prints_the_passages_as_they_were_cut(mogine: Run, filled: Path, name: str) -> None:
    if name == "id":
        name = json.loads(mogine("kb", "list", "--json").stdout)["documents"][1]["id"]
    done = mogine("kb", "show", name)
    assert done.stdout == (
        "退货政策  (docs/returns.md)\n\n[0]  退款  (8 characters)\n七天内可以退款。\n\n"
        "[1]  运费  (8 characters)\n运费由顾客承担。\n"
    )
    told = json.loads(mogine("kb", "show", name, "--json").stdout)
    assert [(p["heading"], p["text"]) for p in told["passages"]] == [
        ("退款", "七天内可以退款。"), ("运费", "运费由顾客承担。"),
    ]  # fmt: skip


def test_a_document_that_is_not_there_is_an_error_with_the_nearest_name(mogine: Run, filled: Path) -> None:
    for command in ("show", "remove"):
        done = mogine("kb", command, "docs/return.md", env=WORDS_ONLY)
        assert done.returncode == 1
        assert "did you mean docs/returns.md?" in done.stderr


def test_removed_documents_are_found_no_more(mogine: Run, filled: Path) -> None:
    done = mogine("kb", "remove", "docs/faq.csv", env=WORDS_ONLY)
    assert (done.returncode, done.stdout) == (0, "removed docs/faq.csv\n")
    assert "docs/faq.csv" not in mogine("kb", "list").stdout
    assert mogine("kb", "search", "warranty", env=WORDS_ONLY).stdout == ""


@pytest.mark.parametrize("command", [("list",), ("search", "q"), ("show", "x"), ("remove", "x")])
def test_reading_commands_name_the_folder_that_is_no_home_and_create_nothing(
    mogine: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    done = mogine("kb", *command, cwd=nowhere)
    assert done.returncode == 2
    assert str(nowhere) in done.stderr
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("command", [("list",), ("search", "q"), ("show", "x"), ("remove", "x")])
def test_an_empty_knowledge_base_says_how_to_fill_it(mogine: Run, command: tuple[str, ...]) -> None:
    done = mogine("kb", *command, env=WORDS_ONLY)
    assert done.returncode == 1
    assert "mogine kb ingest" in done.stderr


def test_control_characters_of_documents_do_not_reach_the_terminal(mogine: Run, home: Path) -> None:
    (home / "a\x1b]0;x\x07.md").write_text("safe \u202e text \x1b[31m")
    assert mogine("kb", "ingest", ".", env=WORDS_ONLY).returncode == 0
    for command in (("list",), ("search", "safe"), ("search", "safe", "--json")):
        done = mogine("kb", *command, env=WORDS_ONLY)
        assert done.returncode == 0, done.stderr
        assert not {"\x1b", "\u202e", "\x07"} & set(done.stdout + done.stderr)


def test_ctrl_c_leaves_everything_as_it_was(home: Path) -> None:
    docs = home / "docs"
    docs.mkdir()
    for n in range(400):
        (docs / f"{n}.md").write_text(f"document {n}")
    child = subprocess.Popen(
        [sys.executable, "-m", "mogine", "kb", "ingest", "docs"],
        cwd=home,
        env=clean_environ(WORDS_ONLY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    lock = home / "data" / "kb" / "lock"
    while child.poll() is None and not (lock.exists() and lock.read_bytes()):
        os.sched_yield()
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert b"Traceback" not in err and out == b""
    assert b"interrupted; the knowledge base is as it was" in err
    assert Generations(home / "data" / "kb").current() is None
    assert [path.name for path in (home / "data" / "kb" / "generations").iterdir()] == []


def test_a_file_name_that_only_one_document_has_names_it(mogine: Run, home: Path) -> None:
    docs = home / "docs"
    for folder in ("a", "b"):
        (docs / folder).mkdir(parents=True)
        (docs / folder / "same.md").write_text(f"in {folder}")
    (docs / "a" / "own.md").write_text("only here")
    assert mogine("kb", "ingest", "docs", env=WORDS_ONLY).returncode == 0
    assert "only here" in mogine("kb", "show", "own.md", env=WORDS_ONLY).stdout
    done = mogine("kb", "show", "same.md", env=WORDS_ONLY)
    assert done.returncode == 1 and "did you mean docs/" in done.stderr


def test_an_error_names_each_file_once_and_safely(mogine: Run, home: Path) -> None:
    (home / "evil\x1b[31m.pdf").write_bytes(b"no PDF")
    done = mogine("kb", "ingest", "evil\x1b[31m.pdf", env=WORDS_ONLY)
    assert done.returncode == 1
    assert done.stderr.count("its bytes are no PDF") == 1
    assert "\x1b" not in done.stderr and r"evil\x1b[31m.pdf" in done.stderr
    shown = mogine("kb", "show", "\x1b[31m", env=WORDS_ONLY)
    assert "\x1b" not in shown.stderr
