"""Every command of the record with MOGINE_DATABASE_URL, and that none of them tells its password."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore
from tests.analytics.rows import row
from tests.conftest import Run
from tests.upstreams.postgres import PASSWORD, Database

NOW = datetime.now(UTC)
# Where it is noon or a little later now, so that the hours before are of the same day.
NOON = f"Etc/GMT{NOW.hour - 12:+d}"
DAY = timedelta(days=1)

Told = Callable[..., str]


@pytest.fixture
def database(postgres: Database, home: Path) -> Database:
    """The record of the home is in there."""
    with (home / ".env").open("a") as file:
        file.write(f"MOGINE_DATABASE_URL={postgres.url}\nMOGINE_EMBEDDER=none\n")
        file.write(f"MOGINE_DAILY_BUDGET_CNY=1\nMOGINE_TIMEZONE={NOON}\n")
    return postgres


@pytest.fixture
def store(home: Path, database: Database) -> Iterator[AnalyticsStore]:
    (home / "data").mkdir(mode=0o700)
    store = AnalyticsStore(home / "data/analytics.db", database.url)
    yield store
    store.close()


@pytest.fixture
def run(mogine: Run, database: Database) -> Told:
    """`mogine ARGS`, which must end well and never tell the password."""

    def checked(*args: str, code: int = 0, input: str | None = None) -> str:
        done = mogine(*args, input=input)
        assert PASSWORD not in done.stdout + done.stderr
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return checked


def test_a_record_that_is_empty_reads_as_empty(run: Told, database: Database, home: Path) -> None:
    assert "questions" in run("stats", "--json")
    assert run("export", "--format", "ndjson") == ""
    assert run("cleanup") == ""
    run("check")
    assert not (home / "data/analytics.db").exists()


def test_every_command_works_with_postgresql(run: Told, store: AnalyticsStore, home: Path) -> None:
    store.insert([row(timedelta(hours=n), at=NOW, question=f"如何退款 {n}") for n in range(5)])
    store.insert([row(80 * DAY, at=NOW, question="很久以前"), row(70 * DAY, at=NOW)])
    store.insert(
        [row(timedelta(hours=7), at=NOW, signals=("no_passage",), answered="no", question="有优惠吗")]
    )
    assert json.loads(run("stats", "--days", "30", "--json"))["totals"]["questions"] == 6
    assert "如何退款 3" in run("queries", "--search", "退款", "-n", "10")
    assert len(run("export", "--format", "csv", "--days", "30").splitlines()) >= 7
    assert "有优惠吗" in run("gaps")
    assert "would delete 2 questions" in run("cleanup", "--older-than", "60d", "--dry-run")
    with store.lock("cleanup"):
        assert "another run" in run("cleanup", "--older-than", "60d", code=5)
    assert "deleted 2 questions" in run("cleanup", "--older-than", "60d")
    assert run("cleanup", "--older-than", "60d") == "", "silent in cron when there is nothing to do"
    told = run("forget", "--contains", "退款 3")
    assert "erased 1 questions" in told and "PostgreSQL" in told
    assert store.summary().rows == 5
    run("check")
    found = run("doctor")
    assert "questions in PostgreSQL: 5" in found and "daily: 0.06 of 1.00 CNY spent" in found
    assert "MOGINE_DATABASE_URL" in run("config", "show")
    assert "pg_dump" in run("backup", str(home / "backup.tar.gz"))
    assert not (home / "data/analytics.db").exists()


def test_a_server_that_is_away_is_told_and_where_the_rows_are(mogine: Run, home: Path) -> None:
    url = f"postgresql://mogine:{PASSWORD}@127.0.0.1:1/db"
    for args in (("stats",), ("queries",), ("cleanup",), ("export",), ("forget", "--contains", "退款")):
        done = mogine(*args, env={"MOGINE_DATABASE_URL": url})
        assert done.returncode == 1 and "MOGINE_DATABASE_URL" in done.stderr
        assert PASSWORD not in done.stderr and "Traceback" not in done.stderr
    done = mogine("doctor", env={"MOGINE_DATABASE_URL": url})
    assert done.returncode == 3 and "data/spool" in done.stdout
    assert mogine("check", env={"MOGINE_DATABASE_URL": url}).returncode == 3


@pytest.mark.parametrize(
    "url",
    [
        "mysql://h/db",
        "postgresql://h",
        "postgresql://u:p@ss:w@h/db/more",
        "postgresql://u:secret#1@h/db",
        "h/db",
    ],
)
def test_a_wrong_address_is_told_with_the_form_it_should_have(mogine: Run, url: str) -> None:
    done = mogine("stats", env={"MOGINE_DATABASE_URL": url})
    assert done.returncode == 2
    assert "MOGINE_DATABASE_URL" in done.stderr and "postgresql://user:password@host" in done.stderr
    assert "secret#1" not in done.stderr and "p@ss" not in done.stderr
