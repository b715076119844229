"""What is PostgreSQL's own: tables made once, locks of the whole site, a server away, no secret told."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from mogine.analytics import sqllines
from mogine.analytics.postgres import statements, translate
from mogine.analytics.recorder import Recorder
from mogine.analytics.records import Selection, Window
from mogine.analytics.reports import open_numbers
from mogine.analytics.schema import STEPS
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import END_OF_TIME, sum_up
from mogine.errors import Locked, MogineError, SettingsError, StoreError, Unavailable
from tests.analytics.rows import NOON, row
from tests.conftest import ROOT, clean_environ
from tests.upstreams.postgres import PASSWORD, Database, PostgresServer
from tests.waiting import until

NEXT = (*STEPS, ("900_next", "CREATE TABLE following (seq INTEGER PRIMARY KEY, number REAL, data BLOB)"))
MINUTE = timedelta(minutes=1)

Open = Callable[..., AnalyticsStore]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Open]:
    """A record in `database` as one more machine has it, with a data folder of its own."""
    opened: list[AnalyticsStore] = []

    def open_it(database: Database, steps: tuple[tuple[str, str], ...] = STEPS) -> AnalyticsStore:
        data = tmp_path / f"machine-{len(opened)}/data"
        data.mkdir(parents=True)
        opened.append(AnalyticsStore(data / "analytics.db", database.url, steps=steps))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


def together(*calls: Callable[[], object]) -> None:
    """All at once, in threads; the first error is raised."""
    errors: list[BaseException] = []

    def safely(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# --- tables --------------------------------------------------------------------------------------


def test_machines_that_start_at_once_make_the_tables_once(machine: Open, postgres: Database) -> None:
    stores = [machine(postgres) for _ in range(4)]
    assert not stores[0].exists(), "looking makes nothing"
    together(*(store.prepare for store in stores))
    found = postgres.query("SELECT name FROM mogine_migrations ORDER BY id")
    assert [name for (name,) in found] == [name for name, _ in STEPS], "the same steps as in SQLite"
    assert all(store.exists() for store in stores)


def test_a_newer_record_is_refused_and_left_alone(machine: Open, postgres: Database) -> None:
    machine(postgres, NEXT).insert([row()])
    old = machine(postgres)
    for call in (old.prepare, old.summary, lambda: old.insert([row()])):
        with pytest.raises(StoreError, match="newer mogine"):
            call()
    assert postgres.query("SELECT count(*) FROM queries") == [(1,)]


def test_an_older_record_is_upgraded_by_who_writes_and_not_by_who_reads(
    machine: Open, postgres: Database
) -> None:
    machine(postgres).insert([row()])
    newer = machine(postgres, NEXT)
    with pytest.raises(StoreError, match="older mogine"):
        newer.summary()
    newer.prepare()
    assert newer.summary().rows == 1
    types = postgres.query(
        "SELECT data_type FROM information_schema.columns WHERE table_name = 'following' "
        "ORDER BY ordinal_position"
    )
    assert [kind for (kind,) in types] == ["bigint", "double precision", "bytea"]


def test_an_upgrade_that_fails_changes_nothing(machine: Open, postgres: Database) -> None:
    machine(postgres).insert([row()])
    broken = machine(postgres, (*NEXT, ("901_broken", "CREATE TABLE queries (a INTEGER)")))
    with pytest.raises(Exception, match="already exists"):
        broken.prepare()
    assert machine(postgres).summary().rows == 1
    assert postgres.query("SELECT to_regclass('following')") == [(None,)]


def test_a_database_of_another_program_is_left_alone(machine: Open, postgres: Database) -> None:
    postgres.query("CREATE TABLE queries (a INT)")
    store = machine(postgres)
    for call in (store.prepare, store.summary):
        with pytest.raises(StoreError, match="of its own"):
            call()


def test_a_database_that_cannot_hold_chinese_is_refused(machine: Open, postgres: Database) -> None:
    postgres.query(f"CREATE DATABASE {postgres.name}_latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    latin = Database(postgres.server, f"{postgres.name}_latin")
    with pytest.raises(StoreError, match=r"LATIN1.*UTF8"):
        machine(latin).prepare()
    postgres.query(f"DROP DATABASE {latin.name} WITH (FORCE)")


def test_a_user_who_may_make_no_tables_is_told_so(machine: Open, postgres: Database) -> None:
    reader = f"reader_{postgres.name}"
    postgres.query(f"CREATE USER {reader} PASSWORD '{PASSWORD}'")
    database = Database(postgres.server, postgres.name)
    url = database.url.replace("mogine:", f"{reader}:")
    store = AnalyticsStore(machine(postgres).path, url)
    with pytest.raises(StoreError, match="own the database"):
        store.prepare()
    postgres.query(f"DROP USER {reader}")


def test_tables_that_are_gone_are_made_again(machine: Open, postgres: Database) -> None:
    store = machine(postgres)
    store.insert([row()])
    postgres.query("DROP SCHEMA public CASCADE")
    postgres.query("CREATE SCHEMA public")
    with pytest.raises(StoreError, match="gone"):
        store.summary()
    store.close()
    assert store.insert([row()]) == 1 and store.summary().rows == 1


# --- who writes ----------------------------------------------------------------------------------


def test_rows_are_added_beside_each_other_and_sums_are_made_alone(machine: Open, postgres: Database) -> None:
    one, two = machine(postgres), machine(postgres)
    one.prepare()
    with one.transaction(shared=True):
        assert two.insert([row()], busy_ms=50) == 1, "who adds rows waits for nobody who does too"
        with pytest.raises(Locked, match="in use"), two.transaction(50):
            pass
    with one.transaction(), pytest.raises(Locked, match="in use"):
        two.insert([row()], busy_ms=50)
    assert two.insert([row()]) == 1


def test_the_same_rows_from_several_machines_count_once(machine: Open, postgres: Database) -> None:
    rows = [row(MINUTE * n, id=f"id-{n}") for n in range(300)]
    twins = [row(id=f"twin-{n}", at=rows[0].started_at) for n in range(40)]
    stores = [machine(postgres) for _ in range(3)]
    stores[0].prepare()
    new: list[int] = []

    def bring(store: AnalyticsStore, backwards: bool) -> None:
        given = [*rows, *twins][:: -1 if backwards else 1]
        for start in range(0, len(given), 50):
            new.append(store.insert(given[start : start + 50], busy_ms=20_000))

    together(*(lambda s=s, n=n: bring(s, n % 2 == 1) for n, s in enumerate(stores)))
    assert sum(new) == 340 == stores[0].summary().rows
    sum_up(stores[1], before=END_OF_TIME, sleep=lambda s: None)
    assert stores[2].summary().rows == 340


def test_while_rows_come_from_all_sides_sums_miss_none(machine: Open, postgres: Database) -> None:
    stores = [machine(postgres) for _ in range(3)]
    stores[0].prepare()
    ended = threading.Event()

    def bring(store: AnalyticsStore) -> None:
        for n in range(40):
            store.insert([row(timedelta(milliseconds=13 * n)) for _ in range(5)], busy_ms=20_000)

    def add_up() -> None:
        while not ended.is_set():
            sum_up(stores[2], before=END_OF_TIME, wait=True, sleep=lambda s: None)

    adding = threading.Thread(target=add_up)
    adding.start()
    together(*(lambda s=s: bring(s) for s in stores[:2]))
    ended.set()
    adding.join()
    sum_up(stores[0], before=END_OF_TIME, sleep=lambda s: None)
    (counted,) = postgres.query(
        "SELECT sum(questions)::int FROM rollups WHERE dimension = 'all' AND level = 3"
    )
    assert counted == (400,) and stores[1].summary().rows == 400


def test_a_lock_is_that_of_all_machines_and_ends_with_who_holds_it(machine: Open, postgres: Database) -> None:
    one, two = machine(postgres), machine(postgres)
    with one.lock("cleanup"):
        with pytest.raises(Locked, match="another run"), two.lock("cleanup"):
            pass
        with two.lock("sums"):
            pass
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom mogine.analytics.store import AnalyticsStore\n"
        "with AnalyticsStore(Path('/nowhere/data/a.db'), sys.stdin.readline()).lock('cleanup'):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=clean_environ(), cwd=ROOT,
    ) as other:  # fmt: skip
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(postgres.url)
        other.stdin.close()
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Locked), two.lock("cleanup"):
            pass
        other.kill()
    with two.lock("cleanup", wait=True):
        pass


def test_deleted_rows_leave_room_for_new_ones(machine: Open, postgres: Database) -> None:
    store = machine(postgres)
    store.insert([row(question=f"{n} " * 50) for n in range(200)])
    with store.reader() as reader:
        seqs = [seq for (seq,) in reader.all("SELECT seq FROM queries")]
    store.delete_rows(seqs)
    store.sweep()
    assert postgres.query("SELECT count(*) FROM texts") == [(0,)]
    assert postgres.query("SELECT pg_relation_size('texts')") == [(0,)], "an empty end is given back"


def test_what_is_gathered_for_one_reading_is_not_in_the_way_of_the_next(
    machine: Open, postgres: Database
) -> None:
    store = machine(postgres)
    store.insert([row(MINUTE * n, page_url=f"https://example.com/{n}") for n in range(300)])
    size = "SELECT pg_relation_size('fresh')"
    for _ in range(3):
        with open_numbers(store, Window.last_days(2, NOON, ZoneInfo("UTC"))) as numbers:
            assert numbers.all("SELECT count(*) FROM fresh")[0][0] > 300
    with store.reader() as reader:
        assert reader.one(size)[0] == 0, "nothing vacuums temporary tables"
    sum_up(store, before=END_OF_TIME, sleep=lambda s: None)
    with store.transaction() as writer:
        assert writer.execute(size).fetchone()[0] == 0


def test_an_export_is_planned_once_for_all_its_batches(machine: Open, postgres: Database) -> None:
    store = machine(postgres)
    store.insert([row(MINUTE * n) for n in range(40)])
    hand = sqllines.Hand(store, "csv", in_spans=True)
    try:
        pieces = [hand.read(*keys).finish() for keys in store.batches(Selection(), 8)]
        with hand._reader.look() as reader:
            plans = reader.all("SELECT generic_plans, custom_plans FROM pg_prepared_statements")
    finally:
        hand.close()
    assert [piece.rows for piece in pieces] == [8] * 5
    # The first batch has no lower bound but -1, which the driver sends as a smaller kind of number.
    assert sorted(map(tuple, plans)) == [(1, 0), (4, 0)]


# --- a server that is away -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["paused", "stopped"])
async def test_a_server_that_is_away_costs_no_answer_and_no_row(
    machine: Open, own_postgres: Database, how: str
) -> None:
    """P43, F28"""
    store = machine(own_postgres)
    server = own_postgres.server
    async with Recorder(store) as recorder:
        for n in range(30):
            recorder.record(row(MINUTE * n))
        await until(lambda: recorder.stats().stored == 30)
        server.pause() if how == "paused" else server.stop()
        began = time.monotonic()
        for n in range(40):
            recorder.record(row(MINUTE * n, question="meanwhile"))
        assert time.monotonic() - began < 2, "no answer waits"
        await until(lambda: recorder.stats().spooled == 40 and recorder.stats().degraded)
        with pytest.raises(Unavailable, match="cannot be used just now"):
            await asyncio.to_thread(store.summary)
        assert time.monotonic() - began < 30, "who reads is told, and does not wait for ever"
        server.resume() if how == "paused" else server.start()
        await until(lambda: not recorder.stats().degraded and recorder.stats().spooled == 0)
        recorder.record(row(question="afterwards"))
        await until(lambda: recorder.stats().waiting == 0)
    assert store.summary().rows == 71 and store.summary().lost == 0
    assert recorder.stats().dropped == 0


@contextlib.asynccontextmanager
async def falling_silent(store: AnalyticsStore, server: PostgresServer) -> AsyncIterator[Recorder]:
    """A recorder whose server has taken one row and says nothing from then on."""
    async with Recorder(store) as recorder:
        recorder.record(row(question="before"))
        await until(lambda: recorder.stats().stored == 1)
        server.pause()
        yield recorder


async def test_rows_reach_the_spool_while_a_silent_server_is_waited_for(
    machine: Open, own_postgres: Database
) -> None:
    """P25: it is given up after 3 s, tried again ever after, and no row waits for that."""
    store = machine(own_postgres)
    spool = Spool(store.path.parent / "spool")
    async with falling_silent(store, own_postgres.server) as recorder:
        began, waited, rows = time.monotonic(), [], 0
        while time.monotonic() - began < 9:  # two trials and more
            recorder.record(row(MINUTE * rows, question="meanwhile"))
            rows += 1
            recorded = time.monotonic()
            await until(lambda: spool.count() >= rows)  # noqa: B023
            waited.append(time.monotonic() - recorded)
            await asyncio.sleep(0.05)
        assert max(waited) < 1
        assert recorder.stats().degraded and recorder.stats().spooled == rows
        own_postgres.server.resume()
        await until(lambda: not recorder.stats().degraded and recorder.stats().spooled == 0)
    assert own_postgres.query("SELECT count(*), count(DISTINCT id) FROM queries") == [(rows + 1, rows + 1)]
    assert recorder.stats().dropped == 0 and spool.count() == 0


async def test_an_end_does_not_wait_for_a_silent_server_and_loses_nothing(
    machine: Open, own_postgres: Database
) -> None:
    """P25"""
    store = machine(own_postgres)
    spool = Spool(store.path.parent / "spool")
    async with falling_silent(store, own_postgres.server) as recorder:
        for n in range(40):
            recorder.record(row(MINUTE * n, question="meanwhile"))
        began = time.monotonic()
    assert time.monotonic() - began < 2.9, "a trial takes 3 s"
    assert spool.count() == 40
    own_postgres.server.resume()
    async with Recorder(store) as recorder:
        await until(lambda: spool.count() == 0)
    assert own_postgres.query("SELECT count(*), count(DISTINCT id) FROM queries") == [(41, 41)]


async def test_a_start_without_the_server_spools_until_it_is_there(
    machine: Open, own_postgres: Database
) -> None:
    own_postgres.server.stop()
    store = machine(own_postgres)
    async with Recorder(store) as recorder:
        recorder.record(row())
        await until(lambda: recorder.stats().spooled == 1)
        own_postgres.server.start()
        await until(lambda: recorder.stats().stored == 1)
    assert store.summary().rows == 1


def test_connections_that_the_server_ended_are_replaced_unnoticed(machine: Open, postgres: Database) -> None:
    store = machine(postgres)
    store.insert([row()])
    assert store.summary().rows == 1
    postgres.server.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mogine'"
    )
    time.sleep(0.1)
    assert store.insert([row()]) == 1 and store.summary().rows == 2


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace(PASSWORD, "secret-but-wrong"),
        lambda url: url.replace("mogine:", "nobody-known:"),
        lambda url: url.rpartition("/")[0] + "/nothing-of-this-name",
        lambda url: f"postgresql://mogine:{PASSWORD}@127.0.0.1:1/db",
        lambda url: f"postgresql://mogine:{PASSWORD}@host.invalid/db",
        lambda url: url + "?sslmode=verify-full",
        lambda url: url + "?nonsense=1",
        lambda url: url.replace(PASSWORD, PASSWORD + "%zz"),
    ],
)
def test_no_error_tells_the_password_the_user_or_the_host(
    tmp_path: Path, postgres: Database, change: Callable[[str], str]
) -> None:
    with pytest.raises(MogineError) as caught:
        AnalyticsStore(tmp_path / "data/analytics.db", change(postgres.url)).summary()
    for secret in (
        PASSWORD,
        "secret-but-wrong",
        "nobody-known",
        "nothing-of-this-name",
        "127.0.0.1",
        "host.inv",
    ):
        assert secret not in caught.value.message
    told = "".join(traceback.format_exception(caught.value))
    assert (
        f"{PASSWORD}@" not in told
        and f"{PASSWORD}%" not in told
        and "MOGINE_DATABASE_URL" in caught.value.message
    )


def test_without_its_package_the_remedy_is_told(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['psycopg'] = None\nfrom pathlib import Path\n"
        "from mogine.analytics.store import AnalyticsStore\nAnalyticsStore(Path('a.db'))\n"
        "try:\n    AnalyticsStore(Path('a.db'), 'postgresql://h/d')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=clean_environ(), cwd=ROOT
    )
    assert done.stdout.startswith(SettingsError.__name__) and "pip install 'mogine[postgres]'" in done.stdout


def test_statements_are_put_into_other_words_and_values_numbered() -> None:
    assert translate("SELECT a FROM t WHERE a IN (SELECT value FROM json_each(?)) AND b = ?") == (
        "SELECT a FROM t WHERE a = ANY($1) AND b = $2"
    )
    assert translate("a NOT IN (SELECT value FROM json_each(?))") == "a <> ALL($1)"
    (table,) = statements("CREATE TABLE t (seq INTEGER PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;\n")
    assert table == "CREATE TABLE t (seq BIGINT PRIMARY KEY, at DOUBLE PRECISION NOT NULL)"
