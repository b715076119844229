"""A record moved between SQLite and PostgreSQL while both are in use: nothing is lost, nothing is doubled.

Beside both records the tests keep a third, in which everything happens once: the target must come to be the
same.
"""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mogine.analytics import move as moving
from mogine.analytics.forget import Wish, forget
from mogine.analytics.move import Outcome, move, plan, uncopied
from mogine.analytics.records import Selection
from mogine.analytics.retention import cleanup
from mogine.analytics.schema import STEPS
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.unanswered import assign, history, load_gaps, members, open_gap, set_status
from mogine.analytics.upkeep import END_OF_TIME, index_once, rebuild, sum_up
from mogine.errors import Locked, SettingsError, StoreError
from tests.analytics.rows import row
from tests.analytics.test_both import DAY, NOW, Pair, any_row, figures, fill, rounded, vars_of_summary
from tests.upstreams.postgres import Database

Open = Callable[[str], AnalyticsStore]


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    """A record in a file of that name."""
    opened: list[AnalyticsStore] = []

    def open_it(name: str) -> AnalyticsStore:
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        opened.append(AnalyticsStore(folder / "analytics.db", clock=lambda: NOW))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def away(tmp_path: Path, postgres: Database) -> Iterator[AnalyticsStore]:
    """A record in PostgreSQL."""
    (tmp_path / "away").mkdir()
    store = AnalyticsStore(tmp_path / "away/analytics.db", postgres.url, clock=lambda: NOW)
    yield store
    store.close()


def quietly(source: AnalyticsStore, target: AnalyticsStore, **more: Any) -> Outcome:
    return move(source, target, sleep=lambda s: None, **more)


def everything(store: AnalyticsStore) -> Any:
    """Every number and every row, with what was thought of it."""
    given = sorted((f.id, f.rating, f.comment, f.handoff) for f in store.iterate_feedback())
    rows = [repr(record) for record in store.iterate()]
    return rounded([figures(store), rows, given]), rounded(vars_of_summary(store))


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Says where two things differ, which are large."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for n, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{n}]")
    else:
        assert one == other, where


def lived_in(store: AnalyticsStore, other: AnalyticsStore) -> None:
    """Ten weeks of rows in both, of which the first are deleted and one visitor is forgotten."""
    fill(Pair(store, other))
    for each in (store, other):
        cleanup(each, 40, now=NOW, force=True, sleep=lambda s: None)
        forget(each, Wish("visitor", "v1"), now=NOW, sleep=lambda s: None)
        forget(each, Wish("contains", "Invoice"), now=NOW, sleep=lambda s: None)


def test_every_figure_is_as_before_there_and_back(open_file: Open, away: AnalyticsStore) -> None:
    source = open_file("source")
    lived_in(source, open_file("other"))
    before = everything(source)
    done = quietly(source, away)
    assert done.is_equal and done.rows == source.summary().rows and not done.notes
    assert everything(away) == before == everything(source)
    again = quietly(source, away)
    assert again.is_equal and (again.rows, again.late, again.feedback, again.deleted) == (0, 0, 0, 0)
    assert everything(away) == before
    back = open_file("back")
    assert quietly(away, back).is_equal
    assert everything(back) == before
    for store in (source, away, back):
        rebuild(store, now=NOW, sleep=lambda s: None)
    assert everything(away)[1] == everything(back)[1] == everything(source)[1]
    assert rounded(figures(away)) == rounded(figures(source)) == rounded(figures(back))


def test_searches_find_the_same(
    open_file: Open, away: AnalyticsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mogine.analytics.search.SEGMENT_ROWS", 64)
    monkeypatch.setattr("mogine.analytics.search.BITMAP_BYTES", 8)
    source = open_file("source")
    fill(Pair(source, open_file("other")))
    away.insert([row(hours * timedelta(hours=1), at=NOW, question="如何退款") for hours in range(200)])
    for store in (source, away):
        while index_once(store, now=NOW, sleep=lambda s: None):
            pass
    done = quietly(source, away, join=True)
    assert done.is_equal, [line for line in done.tables + done.months if line.differs]

    def found(store: AnalyticsStore) -> set[str]:
        return {record.id for record in store.iterate(Selection(search="退款"))}

    own = found(away) - found(source)
    assert len(own) == 200 and found(away) >= found(source)
    while index_once(away, now=NOW, sleep=lambda s: None):
        pass
    assert found(away) == found(source) | own


class Killed(BaseException):
    """As if the process had ended here."""


@dataclass
class Life:
    """A source, a target that visitors may be led to already, and a record in which all of it happens."""

    source: AnalyticsStore
    target: AnalyticsStore
    truth: AnalyticsStore
    rng: random.Random
    ids: list[str] = field(default_factory=list)
    at_target: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    clock: int = 0
    is_begun: bool = False

    def record(self, where: AnalyticsStore, rows: int = 12) -> None:
        made = [any_row(self.rng, 10_000 + len(self.ids) + n) for n in range(rows)]
        # Who came first depends on when it was summed: each comes once.
        made = [replace(r, visitor=r.visitor and r.id, session=r.session and r.id) for r in made]
        where.insert(made)
        self.truth.insert(made)
        self.ids += [r.id for r in made]
        if where is self.target:
            self.at_target |= {r.id for r in made}

    def rate(self, where: AnalyticsStore) -> None:
        self.clock += 1
        there = {record.id for record in where.iterate()} & set(self.ids) - self.gone
        for id in self.rng.sample(sorted(there), min(5, len(there))):
            rating, at = self.rng.choice(("up", "down")), NOW + timedelta(seconds=self.clock)
            for store in (where, self.truth):
                assert store.give_feedback(
                    id, rating, comment=f"c{self.clock}", handoff=rating == "down", at=at
                )

    def erase(self, where: AnalyticsStore) -> None:
        """Rows that a run has seen, or that the target recorded."""
        there = {record.id for record in where.iterate()} - self.gone
        known = there & (self.seen if where is self.source else there)
        picked = self.rng.sample(sorted(known), min(4, len(known)))
        for store in (where, self.truth):
            sum_up(store, before=END_OF_TIME, sleep=lambda s: None)
            with store.reader() as reader:
                seqs = [reader.one("SELECT seq FROM queries WHERE id = ?", (id,))[0] for id in picked]
            for seq in seqs:
                store.delete_rows([seq])
        self.gone |= set(picked)

    def sum_up(self, where: AnalyticsStore) -> None:
        sum_up(where, before=NOW - self.rng.randrange(60) * DAY, sleep=lambda s: None)

    def run(self) -> None:
        """A run that is killed somewhere, or not."""
        steps = self.rng.randrange(30)

        def told(done: int, total: int) -> None:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Killed

        there = {record.id for record in self.source.iterate()}
        with contextlib.suppress(Killed):
            quietly(self.source, self.target, join=True, told=told)
            self.seen |= there


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("way", ["there", "back"])
def test_whatever_happens_meanwhile_the_target_is_as_if_it_had_happened_there(
    open_file: Open, away: AnalyticsStore, monkeypatch: pytest.MonkeyPatch, seed: int, way: str
) -> None:
    monkeypatch.setattr(moving, "GROUP_ROWS", 12)
    monkeypatch.setattr(moving, "PART_ROWS", 5)
    here = open_file("here")
    source, target = (here, away) if way == "there" else (away, here)
    life = Life(source, target, open_file("truth"), random.Random(seed))
    lived_in(source, life.truth)
    life.ids = [record.id for record in source.iterate()]
    quietly(source, target) if seed % 2 else life.run()
    life.seen = set(life.ids) if seed % 2 else life.seen
    for _ in range(25):
        step = life.rng.choice((life.record, life.record, life.rate, life.rate, life.erase, life.sum_up))
        step(life.rng.choice((source, source, target)))
        if life.rng.random() < 0.4:
            life.run()
    done = quietly(source, target, join=True)
    assert done.is_equal and not done.notes, [line for line in done.tables + done.months if line.differs]
    for store in (target, life.truth):
        sum_up(store, before=END_OF_TIME, sleep=lambda s: None)
    one = everything(target)
    assert_same(one, everything(life.truth))
    again = quietly(source, target)
    assert again.is_equal and not (again.rows or again.late or again.feedback or again.deleted)
    assert everything(target) == one


# --- whom it takes, and whom not ---------------------------------------------------------------------


def test_gaps_come_along_until_somebody_decides_on_them_there(open_file: Open, away: AnalyticsStore) -> None:
    source = open_file("source")
    source.insert([row(n * DAY, at=NOW, signals=("declined",), question=f"有优惠吗 {n}") for n in range(4)])

    def gap(store: AnalyticsStore, number: int) -> None:
        with store.transaction() as writer:
            (seq,) = writer.execute(
                "SELECT q.seq FROM queries q JOIN texts t ON t.seq = q.seq WHERE t.question = ?",
                (f"有优惠吗 {number}",),
            ).fetchone()
            id = open_gap(writer, f"有优惠吗 {number}", "e5", b"\0\1", NOW)
            assign(writer, [seq], id, b"\0\1")
            set_status(writer, id, "ignored", NOW, detail="not ours")

    def gaps(store: AnalyticsStore) -> list[Any]:
        with store.reader() as reader:
            found = load_gaps(reader, NOW)
            return [(g, history(reader, g.id), members(reader, g.id)) for g in found]

    gap(source, 0)
    assert quietly(source, away).is_equal and gaps(away) == gaps(source)
    gap(source, 1)
    assert quietly(source, away).is_equal and gaps(away) == gaps(source) and len(gaps(away)) == 2
    gap(away, 2)
    assert quietly(source, away).is_equal and len(gaps(away)) == 3
    gap(source, 3)
    done = quietly(source, away)
    assert done.is_equal and "those of the latter stay" in done.notes[0]
    assert len(gaps(away)) == 3 and not quietly(source, away).notes


def test_the_record_of_another_site_is_left_alone(open_file: Open, away: AnalyticsStore) -> None:
    source, other = open_file("source"), open_file("other")
    source.insert([row(n * DAY, at=NOW) for n in range(5)])
    other.insert([row(n * DAY, at=NOW) for n in range(3)])
    with pytest.raises(SettingsError, match="--join"):
        quietly(other, source)
    quietly(other, away)
    with pytest.raises(SettingsError, match="from another record"):
        quietly(source, away)
    with pytest.raises(SettingsError, match="from another record"):
        quietly(source, away, join=True)
    assert away.summary().rows == 3 and source.summary().rows == 5
    with pytest.raises(SettingsError, match="empty"):
        quietly(open_file("nothing"), away)
    copy = open_file("copy")
    quietly(source, open_file("elsewhere"))
    assert source.checkpoint()
    shutil.copy(source.path, copy.path)
    with pytest.raises(SettingsError, match="same record"):
        quietly(source, copy)


def test_a_second_run_beside_the_first_is_refused(open_file: Open, away: AnalyticsStore) -> None:
    source = open_file("source")
    source.insert([row(at=NOW)])
    with away.lock("move"), pytest.raises(Locked):
        quietly(source, away)
    assert quietly(source, away).is_equal


def test_a_record_of_another_version_is_told_and_not_touched(tmp_path: Path, away: AnalyticsStore) -> None:
    old = AnalyticsStore(tmp_path / "old.db", steps=STEPS[:-1])
    old.insert([row(at=NOW)])
    old.close()
    with pytest.raises(StoreError, match="start `mogine serve` once"):
        quietly(AnalyticsStore(tmp_path / "old.db"), away)
    new = AnalyticsStore(tmp_path / "new.db", steps=(*STEPS, ("999_later", "CREATE TABLE later (n INTEGER)")))
    new.insert([row(at=NOW)])
    new.close()
    with pytest.raises(StoreError, match="newer mogine"):
        quietly(AnalyticsStore(tmp_path / "new.db"), away)
    source = AnalyticsStore(tmp_path / "source.db")
    source.insert([row(at=NOW)])
    with pytest.raises(StoreError, match="newer mogine"):
        quietly(source, AnalyticsStore(tmp_path / "new.db"))
    assert not away.summary().rows


def test_sums_are_not_made_anew_before_all_rows_are_there(
    open_file: Open, away: AnalyticsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "GROUP_ROWS", 2)
    source = open_file("source")
    source.insert([row(n * DAY, at=NOW) for n in range(9)])

    def killed(done: int, total: int) -> None:
        assert total == 9
        raise Killed

    with contextlib.suppress(Killed):
        quietly(source, away, told=killed)
    assert 0 < plan(source, away).moved < 9 and uncopied(source, away) == 9 - plan(source, away).moved
    assert away.summary().rows == plan(source, away).moved
    assert rounded(figures(away)[1]["totals"]["questions"]) == 9, "the sums are whole from the beginning"
    with pytest.raises(StoreError, match="mogine migrate"):
        rebuild(away, now=NOW)
    quietly(source, away)
    assert rebuild(away, now=NOW) == 9 and not uncopied(source, away)


def test_what_differs_is_told(open_file: Open, away: AnalyticsStore, postgres: Database) -> None:
    source = open_file("source")
    source.insert([row(n * DAY, at=NOW, visitor=f"v{n}") for n in range(9)])
    assert quietly(source, away).is_equal
    for damage, name in (
        (
            "UPDATE texts SET answer = answer || 'x' WHERE seq = (SELECT max(seq) FROM texts)",
            "texts: contents",
        ),
        ("DELETE FROM citations WHERE seq = (SELECT max(seq) FROM citations)", "citations"),
        ("DELETE FROM queries WHERE seq = (SELECT max(seq) FROM queries)", "queries"),
        ("UPDATE rollups SET questions = questions + 1 WHERE level = 2", "2026-03 questions"),
    ):
        postgres.query(damage)
        done = quietly(source, away)
        assert name in [line.name for line in (*done.tables, *done.months) if line.differs]


def test_what_came_and_went_between_two_runs_is_told(open_file: Open, away: AnalyticsStore) -> None:
    source = open_file("source")
    source.insert([row(at=NOW)])
    quietly(source, away)
    source.insert([row(DAY, at=NOW, visitor="v9", session="")])
    forget(source, Wish("visitor", "v9"), now=NOW, sleep=lambda s: None)
    assert "1 questions were recorded and erased" in quietly(source, away).notes[0]
