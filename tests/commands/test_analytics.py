"""stats, queries, export and cleanup as a user runs them."""

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row
from tests.conftest import Run, clean_environ

COMMANDS = ["stats", "queries", "export", "cleanup"]


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def store(home: Path) -> AnalyticsStore:
    (home / "data").mkdir()
    return AnalyticsStore(home / "data" / "analytics.db")


def fill(store: AnalyticsStore) -> None:
    store.insert(
        [
            row(at=now(), question="如何退款？"),
            row(timedelta(seconds=1), at=now(), question="如何退款？", provider="extract", feedback="up"),
            row(timedelta(seconds=2), at=now(), question="\x1b]0;owned\x07\x1b[31mred\u202e", status="error",
                error_type="upstream_error", answered="no"),
            row(timedelta(days=30), at=now()),
        ]
    )  # fmt: skip
    store.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_starts_with_examples(mogine: Run, command: str) -> None:
    done = mogine(command, "--help")
    assert done.returncode == 0
    assert done.stdout.index("Examples:") < done.stdout.index("--help")
    assert f"mogine {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_home_is_named_and_left_empty(mogine: Run, tmp_path: Path, command: str) -> None:
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    done = mogine(command, cwd=empty)
    assert done.returncode == 2
    assert str(empty) in done.stderr and "mogine init" in done.stderr
    assert done.stdout == ""
    assert list(empty.iterdir()) == []


def test_no_question_yet_is_no_error_and_makes_no_file(mogine: Run, home: Path) -> None:
    for args in (["stats"], ["queries"], ["cleanup"], ["cleanup", "--dry-run"]):
        assert mogine(*args).returncode == 0
    done = mogine("stats")
    assert done.stdout == "" and "No questions in the last 30 days" in done.stderr
    assert json.loads(mogine("stats", "--json").stdout)["totals"]["questions"] == 0
    assert mogine("queries", "--json").stdout == ""
    assert json.loads(mogine("export", "--format", "json").stdout) == []
    assert [f.name for f in home.iterdir()] == [".env"]


def test_stats_in_a_pipe_are_plain_and_whole(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    done = mogine("stats", "--compare")
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]
    questions = next(line for line in done.stdout.splitlines() if line.startswith("questions"))
    assert questions.split() == ["questions", "3", "1", "+200%"]
    assert "█" in done.stdout
    assert "如何退款？" in done.stdout and "docs/refund.md" in done.stdout
    assert "\\x1b" in done.stdout and "\\u202e" in done.stdout


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("day", f"{now():%Y-}"),
        ("hour", "hour"),
        ("provider", "extract"),
        ("model", "doubao-1-5"),
        ("status", "error"),
        ("source", "docs/refund.md"),
        ("page", "https://example.com/shop"),
    ],
)
def test_stats_by(mogine: Run, store: AnalyticsStore, by: str, expected: str) -> None:
    fill(store)
    done = mogine("stats", "--by", by)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_stats_as_json_are_those_of_the_api(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    done = mogine("stats", "--days", "7", "--by", "provider", "--json")
    body = json.loads(done.stdout)
    assert body["totals"]["questions"] == 3
    assert [(g["provider"], g["questions"]) for g in body["series"]] == [("doubao", 2), ("extract", 1)]
    assert body["definitions"]
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout


@pytest.mark.parametrize("days", ["0", "1000000000", "1e9"])
def test_impossible_days_are_refused(mogine: Run, days: str) -> None:
    for command in ("stats", "export"):
        done = mogine(command, "--days", days)
        assert done.returncode == 2
        assert "--days" in done.stderr and "Traceback" not in done.stderr


def test_queries_are_listed_newest_first_and_harmless(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    done = mogine("queries", "-n", "3")
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "如何退款？" in lines[0] and "extract" in lines[1]
    assert "\x1b" not in done.stdout and "\\x1b" in lines[2] and "upstream_error" in lines[2]


def test_queries_are_filtered_and_told_as_json(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    rows = [json.loads(line) for line in mogine("queries", "--status", "error", "--json").stdout.splitlines()]
    assert [r["question"] for r in rows] == ["\x1b]0;owned\x07\x1b[31mred\u202e"]
    assert len(mogine("queries", "--search", "退款").stdout.splitlines()) == 4  # the answer has it, too
    assert mogine("queries", "--search", "%%").stdout == ""


@pytest.mark.parametrize("args", [["--status", "wrong"], ["--search", "x" * 101], ["-n", "0"]])
def test_wrong_filters_are_refused(mogine: Run, args: list[str]) -> None:
    done = mogine("queries", *args)
    assert done.returncode == 2 and args[0].strip("-") in done.stderr


def test_watching_shows_what_comes_and_ends_with_ctrl_c(home: Path, store: AnalyticsStore) -> None:
    fill(store)
    with subprocess.Popen(
        [sys.executable, "-m", "mogine", "stats", "--watch", "--json"],
        cwd=home,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        first = json.loads(child.stdout.readline())["totals"]["questions"]
        store.insert([row(at=now(), question="new question")], busy_ms=5000)
        while json.loads(child.stdout.readline())["totals"]["questions"] != first + 1:
            pass
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr.read() == ""


def test_following_shows_what_comes_and_ends_with_ctrl_c(home: Path, store: AnalyticsStore) -> None:
    fill(store)
    with subprocess.Popen(
        [sys.executable, "-m", "mogine", "queries", "--follow", "-n", "1"],
        cwd=home,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert "如何退款？" in child.stdout.readline()
        # A long answer: begun before the row that is known, ended after it.
        store.insert([row(timedelta(minutes=3), at=now(), question="begun earlier")])
        assert "begun earlier" in child.stdout.readline()
        store.insert([row(at=now(), question="and now")])
        assert "and now" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert "Traceback" not in child.stderr.read()


def test_export_to_standard_output_is_nothing_but_the_file(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    done = mogine("export")
    assert done.stderr == ""
    read = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(read) == 4 and read[-1]["question"] == "如何退款？"
    assert len(mogine("export", "--days", "7", "--format", "ndjson").stdout.splitlines()) == 3


def test_export_to_a_file_is_private_and_for_excel(mogine: Run, store: AnalyticsStore, home: Path) -> None:
    fill(store)
    done = mogine("export", "--excel", "-o", "out.csv")
    assert done.returncode == 0 and done.stdout == "" and "out.csv" in done.stderr
    target = home / "out.csv"
    assert target.read_bytes().startswith(b'\xef\xbb\xbf"id"')
    assert target.stat().st_mode & 0o777 == 0o600
    assert [f.name for f in home.iterdir() if f.name.endswith(".part")] == []


def test_an_export_that_fails_leaves_the_old_file(mogine: Run, store: AnalyticsStore, home: Path) -> None:
    store.path.write_bytes(b"no database" * 500)
    (home / "out.csv").write_text("yesterday's")
    done = mogine("export", "-o", "out.csv")
    assert done.returncode == 1 and "data/analytics.db is damaged" in done.stderr
    assert (home / "out.csv").read_text() == "yesterday's"
    assert sorted(f.name for f in home.iterdir()) == [".env", "data", "out.csv"]


def test_export_where_nothing_can_be_written_is_told(mogine: Run, store: AnalyticsStore) -> None:
    done = mogine("export", "-o", "no/such/folder/out.csv")
    assert done.returncode == 2 and "no/such/folder/out.csv cannot be written" in done.stderr


def test_export_of_stats_and_of_feedback(mogine: Run, store: AnalyticsStore) -> None:
    fill(store)
    (thumb,) = [r for r in store.iterate() if r.feedback]
    store.give_feedback(thumb.id, "down", reason="wrong", comment="=1+1")
    store.close()
    days = json.loads(mogine("export", "stats", "--days", "3", "--format", "json").stdout)
    assert [day["questions"] for day in days] == [0, 0, 3]
    (given,) = csv.DictReader(io.StringIO(mogine("export", "feedback").stdout))
    assert (given["id"], given["rating"], given["comment"]) == (thumb.id, "down", "'=1+1")


def old(store: AnalyticsStore) -> None:
    store.insert([row(timedelta(days=n), at=now()) for n in (0, 100, 200)])
    store.close()


def on_a_terminal(home: Path, *args: str) -> str:
    """What `mogine ARGS` shows there."""
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mogine", *args],
            cwd=home, env=clean_environ(), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
        return os.read(ours, 4096).decode()
    finally:
        os.close(theirs)
        os.close(ours)


def test_cleanup_tells_what_it_deleted_and_cron_nothing_when_nothing_was(
    mogine: Run, home: Path, store: AnalyticsStore
) -> None:
    old(store)
    done = mogine("cleanup", "--older-than", "90d", "--dry-run")
    assert (done.returncode, done.stdout[:24]) == (0, "would delete 2 questions")
    done = mogine("cleanup")
    assert done.returncode == 0
    assert done.stdout.startswith("deleted 1 questions older than 180 days, ")
    again = mogine("cleanup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert on_a_terminal(home, "cleanup") == "nothing is older than 180 days\r\n"
    body = json.loads(mogine("cleanup", "--older-than", "13w", "--json").stdout)
    assert (body["rows"], body["older_than_days"], body["dry_run"]) == (1, 91, False)
    assert store.summary().rows == 1


def test_cleanup_keeps_to_the_setting(mogine: Run, store: AnalyticsStore) -> None:
    old(store)
    assert "older than 50 days" in mogine("cleanup", env={"MOGINE_RETENTION_DAYS": "50"}).stdout
    assert store.summary().rows == 1


def test_cleanup_beside_another_run_ends_with_5(mogine: Run, store: AnalyticsStore) -> None:
    old(store)
    with store.lock("cleanup"):
        done = mogine("cleanup")
    assert done.returncode == 5 and "another run" in done.stderr
    assert store.summary().rows == 3


def test_cleanup_with_a_clock_that_cannot_be_right_asks_for_force(mogine: Run, store: AnalyticsStore) -> None:
    store.insert([row(timedelta(days=200), at=now())])
    done = mogine("cleanup")
    assert done.returncode != 0 and "--force" in done.stderr
    assert store.summary().rows == 1
    assert mogine("cleanup", "--force").returncode == 0
    assert store.summary().rows == 0


@pytest.mark.parametrize("age", ["0d", "-1d", "90y", "99999d"])
def test_wrong_ages_are_refused(mogine: Run, store: AnalyticsStore, age: str) -> None:
    old(store)
    done = mogine("cleanup", f"--older-than={age}")
    assert done.returncode == 2 and "90d" in done.stderr
    assert store.summary().rows == 3


def test_a_newer_record_is_refused_by_every_command(mogine: Run, store: AnalyticsStore) -> None:
    old(store)
    connection = sqlite3.connect(store.path)
    connection.execute(
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('analytics', 'z', '')"
    )
    connection.commit()
    connection.close()
    for command in COMMANDS:
        done = mogine(command)
        assert done.returncode == 1 and "newer mogine" in done.stderr


def test_a_read_only_file_can_be_read(mogine: Run, store: AnalyticsStore, home: Path) -> None:
    fill(store)
    os.chmod(store.path, 0o400)
    assert mogine("stats").returncode == 0
