"""`mogine migrate`: killed at any moment, beside servers that record, and never telling the password."""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from benchmarks.analytics.rows import rows
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import END_OF_TIME, sum_up
from tests.analytics.rows import row
from tests.analytics.test_both import figures, rounded
from tests.conftest import Run, clean_environ
from tests.servers import Spawn
from tests.upstreams.postgres import PASSWORD, Database

NOW = datetime.now(UTC)


@pytest.fixture
def source(home: Path) -> Iterator[AnalyticsStore]:
    (home / "data").mkdir(mode=0o700)
    store = AnalyticsStore(home / "data/analytics.db")
    yield store
    store.close()


@pytest.fixture
def target(tmp_path: Path, postgres: Database) -> Iterator[AnalyticsStore]:
    store = AnalyticsStore(tmp_path / "analytics.db", postgres.url)
    yield store
    store.close()


def test_there_and_back_on_the_command_line(
    mogine: Run, source: AnalyticsStore, target: AnalyticsStore, postgres: Database, home: Path
) -> None:
    source.insert([row(timedelta(days=n), at=NOW) for n in range(20)])
    told = mogine("migrate", "--to", postgres.url, "--dry-run")
    assert told.returncode == 0 and "20 would be moved" in told.stderr
    assert not target.summary().rows
    done = mogine("migrate", "--to", "-", input=postgres.url + "\n")
    assert done.returncode == 0 and "moved 20 rows" in done.stderr and "questions" in done.stdout
    source.insert([row(at=NOW, question="来晚了")])
    env = {"MOGINE_DATABASE_URL": postgres.url}
    found = mogine("doctor", env=env)
    assert "1 questions in data/analytics.db are not in PostgreSQL" in found.stdout
    wrong = mogine("migrate", "--to", postgres.url, env=env)
    assert wrong.returncode == 2 and "--from" in wrong.stderr
    late = mogine("migrate", "--from", "data/analytics.db", "--to", postgres.url, "--json", env=env)
    assert late.returncode == 0
    told_json = json.loads(late.stdout)
    assert told_json["equal"] and (told_json["rows"], told_json["late"]) == (0, 1)
    assert "not in PostgreSQL" not in mogine("doctor", env=env).stdout
    back = mogine("migrate", "--to", "sqlite:///data/back.db", env=env)
    assert back.returncode == 0 and "moved 21 rows" in back.stderr
    there = AnalyticsStore(home / "data/back.db")
    assert [r.id for r in there.iterate()] == [r.id for r in source.iterate()]
    for every in (told, done, found, wrong, late, back):
        assert PASSWORD not in every.stdout + every.stderr and "Traceback" not in every.stderr


@pytest.mark.parametrize("to", ["mysql://h/db", "postgresql://h", "sqlite:///", "data/"])
def test_a_wrong_target_is_told_with_the_form_it_should_have(mogine: Run, home: Path, to: str) -> None:
    done = mogine("migrate", "--to", to)
    assert done.returncode == 2 and "--to" in done.stderr and "postgresql://user" in done.stderr


def test_records_that_differ_end_with_one(mogine: Run, source: AnalyticsStore, postgres: Database) -> None:
    source.insert([row(timedelta(days=n), at=NOW) for n in range(5)])
    assert mogine("migrate", "--to", postgres.url).returncode == 0
    postgres.query("DELETE FROM texts")
    done = mogine("migrate", "--to", postgres.url)
    assert done.returncode == 1 and "DIFFERS" in done.stdout and "the records differ" in done.stderr


def progress(postgres: Database) -> int:
    """Grows with every transaction of a move."""
    if postgres.query("SELECT to_regclass('moved')") == [(None,)]:
        return -1
    return int(str(postgres.query("SELECT count(*) + sum(copied) FROM moved")[0][0] or 0))


def test_killed_again_and_again_it_comes_to_the_same(
    source: AnalyticsStore, target: AnalyticsStore, postgres: Database, home: Path
) -> None:
    rng = random.Random(5)
    every = list(rows(6_000, 60, NOW))
    source.insert(every[:5_000])
    sum_up(source, before=END_OF_TIME, sleep=lambda s: None)
    source.insert(every[5_000:])
    command = [sys.executable, "-m", "mogine", "migrate", "--to", postgres.url]
    killed = 0
    for _ in range(20):
        child = subprocess.Popen(
            command, cwd=home, env=clean_environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = progress(postgres)
        while child.poll() is None and progress(postgres) == before:
            time.sleep(0.002)
        time.sleep(rng.random() / 20)
        child.kill()
        if child.wait() == 0:
            break
        killed += 1
    assert killed > 1
    done = subprocess.run(command, cwd=home, env=clean_environ(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rounded(figures(target)) == rounded(figures(source))
    assert [r.id for r in target.iterate()] == [r.id for r in source.iterate()]


async def test_a_server_records_meanwhile(
    spawn: Spawn, home: Path, tmp_path: Path, postgres: Database
) -> None:
    """Asked all the time, moved, started anew elsewhere, moved again: every answer is there once."""
    server = await spawn("proxy")
    path = server.home / "data/analytics.db"
    asked = 0

    async def ask(session: aiohttp.ClientSession, url: str, times: int) -> None:
        nonlocal asked
        for _ in range(times):
            async with session.post(f"{url}/api/chat", json={"question": f"如何退款 {asked}"}) as answer:
                assert answer.status == 200
                await answer.read()
            asked += 1

    async def migrate(*more: str) -> str:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mogine", "--home", str(server.home), "migrate",
            "--to", postgres.url, *more,
            env=clean_environ(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await child.communicate()
        assert child.returncode == 0, out + err
        return err.decode()

    async with aiohttp.ClientSession() as session:
        await ask(session, server.url(), 10)
        await asyncio.gather(migrate(), ask(session, server.url(), 30))
        server.send(signal.SIGTERM)
        assert await server.ended() == 0
        second = await spawn("proxy", {"MOGINE_DATABASE_URL": postgres.url})
        await ask(session, second.url(), 10)
        await asyncio.gather(migrate("--from", str(path)), ask(session, second.url(), 10))
        second.send(signal.SIGTERM)
        assert await second.ended() == 0
    with contextlib.closing(AnalyticsStore(tmp_path / "analytics.db", postgres.url)) as target:
        questions = [record.question for record in target.iterate()]
        assert sorted(questions) == sorted(f"如何退款 {n}" for n in range(asked))
        sum_up(target, before=END_OF_TIME)
        assert target.summary().rows == asked == 60
