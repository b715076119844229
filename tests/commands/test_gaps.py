"""`mogine gaps` and `mogine export gaps`: what a person and a script read of them."""

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row
from tests.conftest import Run

NO_MODEL = {"MOGINE_EMBEDDER": "none"}


@pytest.fixture
def asked(home: Path) -> Path:
    """A home in which two questions went unanswered, one of them twice."""
    (home / "data").mkdir()
    gap: dict[str, Any] = {"answered": "no", "signals": ("no_passage",), "citations": ()}
    rows = [
        row(timedelta(minutes=5), at=datetime.now(UTC), question="可以用花呗分期吗", visitor="a", **gap),
        row(timedelta(minutes=6), at=datetime.now(UTC), question="可以用花呗分期吗？", visitor="b", **gap),
        row(
            timedelta(minutes=7), at=datetime.now(UTC), question="are you \x1b[31mhiring?", visitor="c", **gap
        ),
    ]
    AnalyticsStore(home / "data/analytics.db").insert(rows, busy_ms=5000)
    return home


def test_list_is_one_line_a_gap_in_a_pipe(mogine: Run, asked: Path) -> None:
    done = mogine("gaps", env=NO_MODEL)
    assert done.returncode == 0, done.stderr
    first, second = (line.split("\t") for line in done.stdout.splitlines())
    assert (first[1:4], first[5], first[8]) == (["open", "2", "2"], "no_passage:2", "可以用花呗分期吗")
    assert second[8] == "are you \\x1b[31mhiring?", "nothing of a visitor steers the terminal"
    assert mogine("gaps", "list", "-n", "1", env=NO_MODEL).stdout.count("\n") == 1


def test_accept_writes_a_test_and_tells_what_to_do(mogine: Run, asked: Path) -> None:
    docs = asked / "docs"
    docs.mkdir()
    (docs / "returns.md").write_text("# 退款\n\n三个工作日到账。\n", "utf-8")
    assert mogine("kb", "ingest", "./docs", env=NO_MODEL).returncode == 0
    id = mogine("gaps", env=NO_MODEL).stdout.split("\t")[0]
    done = mogine("gaps", "accept", id, "--expect", "./docs/huabei.md", env=NO_MODEL)
    assert done.returncode == 0, done.stderr
    assert f"gap {id} waits for docs/huabei.md: 可以用花呗分期吗" in done.stdout
    assert "mogine kb ingest" in done.stderr
    test = json.loads((asked / "kb-tests.jsonl").read_text("utf-8"))
    assert test == {"question": "可以用花呗分期吗", "document": "docs/huabei.md", "top_k": 3}
    (docs / "huabei.md").write_text("# 花呗\n\n可以用花呗分期，三期免息。\n", "utf-8")
    took = mogine("kb", "ingest", "./docs", env=NO_MODEL)
    assert f"gap {id} closed: 可以用花呗分期吗 (found at rank 1 in g000002)" in took.stderr
    shown = mogine("gaps", "show", id, env=NO_MODEL).stdout
    assert "closed" in shown and "found at rank 1 in generation g000002" in shown
    found = json.loads(mogine("gaps", "show", id, "--json", env=NO_MODEL).stdout)
    assert found["evidence"]["rank"] == 1 and len(found["questions"]) == 2
    (docs / "huabei.md").unlink()
    took = mogine("kb", "ingest", "./docs", env=NO_MODEL)
    assert f"gap {id} open again" in took.stderr and "g000003" in took.stderr


def test_a_held_back_generation_closes_nothing(mogine: Run, asked: Path) -> None:
    docs = asked / "docs"
    docs.mkdir()
    (docs / "hours.md").write_text("# Hours\n\nOpen at nine.\n")
    mogine("kb", "ingest", "./docs", env=NO_MODEL)
    mogine("kb", "test", "add", "when do you open", "-d", "docs/hours.md")
    id = mogine("gaps", env=NO_MODEL).stdout.split("\t")[0]
    mogine("gaps", "accept", id, "-e", "docs/huabei.md", env=NO_MODEL)
    (docs / "hours.md").unlink()
    (docs / "huabei.md").write_text("# 花呗\n\n可以用花呗分期，三期免息。\n", "utf-8")
    took = mogine("kb", "ingest", "./docs", "--gate", "strict", env=NO_MODEL)
    assert took.returncode == 3 and "gap" not in took.stderr
    assert json.loads(mogine("gaps", "show", id, "--json", env=NO_MODEL).stdout)["status"] == "accepted"


def test_ignored_gaps_leave_the_list_with_their_reason(mogine: Run, asked: Path) -> None:
    id = mogine("gaps", env=NO_MODEL).stdout.split("\t")[0]
    assert mogine("gaps", "ignore", id).returncode == 2, "a reason is wanted"
    assert mogine("gaps", "ignore", id, "--reason", "not ours", env=NO_MODEL).returncode == 0
    assert mogine("gaps", env=NO_MODEL).stdout.count("\n") == 1
    told = json.loads(mogine("gaps", "list", "--status", "ignored", "--json", env=NO_MODEL).stdout)
    assert [(gap["id"], gap["reason"]) for gap in told["gaps"]] == [(int(id), "not ours")]
    assert told["counts"] == {"open": 1, "accepted": 0, "closed": 0, "ignored": 1}
    assert mogine("gaps", "reopen", id, env=NO_MODEL).returncode == 0
    assert mogine("gaps", env=NO_MODEL).stdout.count("\n") == 2


def test_unknown_gap_is_told(mogine: Run, asked: Path) -> None:
    for args in (
        ("show", "99"),
        ("accept", "99", "-e", "a.md"),
        ("ignore", "99", "-r", "x"),
        ("reopen", "99"),
    ):
        done = mogine("gaps", *args, env=NO_MODEL)
        assert done.returncode == 1 and "there is no gap 99" in done.stderr


def test_a_home_without_questions_has_no_gaps(mogine: Run, home: Path) -> None:
    done = mogine("gaps", env=NO_MODEL)
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads(mogine("gaps", "--json", env=NO_MODEL).stdout)["gaps"] == []
    assert not (home / "data/analytics.db").exists()


def test_export_of_gaps_is_a_table(mogine: Run, asked: Path) -> None:
    done = mogine("export", "gaps", env=NO_MODEL)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(r["question"], r["visitors"], r["status"]) for r in rows] == [
        ("可以用花呗分期吗", "2", "open"),
        ("are you \x1b[31mhiring?", "1", "open"),
    ]
    lines = mogine("export", "gaps", "--format", "ndjson", env=NO_MODEL).stdout.splitlines()
    assert json.loads(lines[0])["signals"] == {"no_passage": 2}
