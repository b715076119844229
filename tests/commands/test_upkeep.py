"""`mogine forget`, `check` and `admin token`, run as a user runs them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mogine.analytics.records import QueryRecord, Selection, new_id
from mogine.analytics.store import AnalyticsStore
from tests.conftest import Run

SECRET = "王小明住在苏州"


def record(home: Path, count: int = 1, **fields: object) -> AnalyticsStore:
    """A record of `count` questions of the last hour."""
    (home / "data").mkdir(mode=0o700, exist_ok=True)
    store = AnalyticsStore(home / "data/analytics.db")
    at = datetime.now(UTC) - timedelta(hours=1)
    rows = [
        QueryRecord(
            **{
                "id": new_id(),
                "started_at": at + timedelta(seconds=n),
                "kind": "chat",
                "provider": "extract",
                "status": "ok",
                "visitor": "a" * 16,
                "question": "退款多久到账？",
                **fields,
            }  # type: ignore[arg-type]
        )
        for n in range(count)
    ]
    store.insert(rows)
    store.close()
    return AnalyticsStore(home / "data/analytics.db")


def test_forget_erases_a_text_from_every_file_and_leaves_the_rest(mogine: Run, home: Path) -> None:
    record(home)
    store = record(home, question=f"{SECRET}，怎么退款？", answer="好的", visitor="b" * 16)
    done = mogine("forget", "--contains", "-", "--json", input=SECRET)
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["rows"] == 1 and receipt["remains"] == []
    assert SECRET not in Path(receipt["receipt"]).read_text()
    assert [row.question for row in store.page(Selection()).records] == ["退款多久到账？"]
    for path in (home / "data").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_forget_erases_a_visitor(mogine: Run, home: Path) -> None:
    record(home, 3)
    store = record(home, 2, visitor="b" * 16)
    assert mogine("forget", "--visitor", "b" * 16).stdout.startswith("erased 2 questions")
    assert {row.visitor for row in store.page(Selection()).records} == {"a" * 16}


def test_forget_names_what_it_could_not_erase(mogine: Run, home: Path) -> None:
    record(home, question=SECRET)
    (home / "data/note.txt").write_text(f"for myself: {SECRET}")
    done = mogine("forget", "--contains", SECRET)
    assert done.returncode == 1
    assert "data/note.txt" in done.stderr


def test_forget_wants_to_know_whom(mogine: Run, home: Path) -> None:
    record(home)
    done = mogine("forget")
    assert done.returncode == 2 and "--visitor" in done.stderr
    both = mogine("forget", "--visitor", "b", "--contains", "c")
    assert both.returncode == 2


def test_check_is_silent_when_all_is_well(mogine: Run, home: Path) -> None:
    record(home, 20)
    done = mogine("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_check_names_failing_answers(mogine: Run, home: Path) -> None:
    record(home, 15)
    record(home, 15, status="error", error_type="upstream_error")
    done = mogine("check")
    assert done.returncode == 3
    assert done.stdout.startswith("errors: 15 of 30 questions")
    assert mogine("check", "--max-errors", "60").returncode == 0
    found = json.loads(mogine("check", "--json").stdout)
    assert found["ok"] is False and [f["name"] for f in found["findings"]] == ["errors"]


def test_admin_token_is_printed_and_stays_the_same(mogine: Run, home: Path) -> None:
    token = mogine("admin", "token").stdout.strip()
    assert len(token) >= 43
    assert mogine("admin", "token").stdout.strip() == token
    assert (home / "data/admin_token").read_text().strip() == token


def test_folder_that_is_no_home_is_named(mogine: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for args in (("forget", "--visitor", "b" * 16), ("check",), ("admin", "token")):
        done = mogine(*args, cwd=empty)
        assert done.returncode == 2 and str(empty) in done.stderr
        assert list(empty.iterdir()) == []
