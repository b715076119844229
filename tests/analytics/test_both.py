"""The same rows in SQLite and in PostgreSQL: every figure, page, filter, search, export and gap is equal."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from mogine.analytics import search, unanswered
from mogine.analytics.checks import check
from mogine.analytics.export import FORMATS
from mogine.analytics.forget import Wish, forget
from mogine.analytics.lines import render_rows
from mogine.analytics.records import (
    ANSWERED,
    KINDS,
    RATINGS,
    STATUSES,
    QueryRecord,
    Selection,
    Window,
    new_id,
    signals_of,
)
from mogine.analytics.reports import REPORTS, statistics
from mogine.analytics.retention import cleanup
from mogine.analytics.spending import Spending
from mogine.analytics.store import AnalyticsStore, Asker
from mogine.analytics.upkeep import END_OF_TIME, index_once, rebuild, sum_up
from tests.analytics.rows import cite, row
from tests.upstreams.postgres import Database

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
DAY = timedelta(days=1)
ZONES = ("UTC", "Asia/Kathmandu", "America/New_York")
WORDS = (
    "退款",
    "发票",
    "怎么",
    "保修期",
    "refund",
    "Invoice",
    "24",
    "\U0001f600",
    "O'Brien",
    "100%",
    "a\\b",
    "多少钱？",
)
TROUBLE = ("", "\0", "\ud800", "=1+1", "'; DROP TABLE queries; --", "\x1b[31m", "很" * 3000, "?", "$1", "{}")


@dataclass
class Pair:
    """The same record twice; `postgres` has a data folder of its own."""

    sqlite: AnalyticsStore
    postgres: AnalyticsStore

    def __iter__(self) -> Iterator[AnalyticsStore]:
        return iter((self.sqlite, self.postgres))


@pytest.fixture
def pair(tmp_path: Path, postgres: Database) -> Iterator[Pair]:
    stores = []
    for name, url in (("sqlite", ""), ("postgres", postgres.url)):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        stores.append(AnalyticsStore(folder / "analytics.db", url, clock=lambda: NOW))
    yield Pair(*stores)
    for store in stores:
        store.close()


def any_text(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(TROUBLE) + rng.choice(WORDS)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def some(rng: random.Random, *values: Any) -> Any:
    return rng.choice(values)


def any_row(rng: random.Random, n: int) -> QueryRecord:
    at = NOW - timedelta(minutes=rng.randrange(60 * 24 * 70), milliseconds=rng.randrange(60_000))
    return QueryRecord(
        started_at=at,
        id=new_id(at) if n % 50 else f"odd'id-{n}",
        kind=some(rng, *KINDS, "chat", "chat"),
        session=some(rng, "", "s1", f"s{n // 4}"),
        visitor=some(rng, "", f"v{n // 3}", "v1"),
        page_url=some(rng, "", "https://example.com/", f"https://example.com/{n % 30}", "/" + any_text(rng)),
        provider=some(rng, "doubao", "dashscope", "openai", "extract"),
        model=some(rng, "", "doubao-1-5", "m'x", "模型"),
        status=some(rng, *STATUSES, "ok", "ok", "ok"),
        error_type=some(rng, "", "", "rate_limited", "upstream_timeout"),
        question=any_text(rng),
        answer=some(rng, "", any_text(rng) * 3),
        answered=some(rng, *ANSWERED),
        citations=tuple(
            cite(f"docs/{rng.randrange(9)}.md", number=number, score=rng.random())
            for number in rng.choices(range(1, 6), k=rng.randrange(4))
        ),
        top_score=some(rng, None, 0.0, rng.random(), float("nan")),
        prompt_tokens=some(rng, None, 0, rng.randrange(5000), 2**60),
        completion_tokens=some(rng, None, rng.randrange(500)),
        reasoning_tokens=some(rng, None, rng.randrange(500)),
        tokens_estimated=rng.random() < 0.2,
        cost_cny=some(rng, None, 0.0, rng.random() / 7, 1e-9),
        first_token_ms=some(rng, None, rng.randrange(9000)),
        duration_ms=some(rng, None, rng.randrange(60_000)),
        bot=rng.random() < 0.1,
        signals=signals_of(rng.randrange(32)) if rng.random() < 0.2 else (),
        search_ms=some(rng, None, rng.randrange(300)),
    )  # fmt: skip


def fill(pair: Pair, rows: int = 400, *, seed: int = 7) -> list[QueryRecord]:
    """Rows of ten weeks, some summed, some late, some rated, some still as they came; in both alike."""
    rng = random.Random(seed)
    made = sorted((any_row(rng, n) for n in range(rows)), key=lambda record: record.started_at)
    made.append(any_row(rng, rows).__class__(**{**vars_of(made[0]), "id": "twin"}))  # of the same millisecond
    late = made[::9]
    others = [record for record in made if record not in late]
    thumbs = [(record.id, rng.choice(RATINGS), any_text(rng)) for record in rng.sample(made, 60)]
    for store in pair:
        for start in range(0, len(others), 90):
            store.insert(others[start : start + 90])
        sum_up(store, before=NOW - 2 * DAY, sleep=lambda s: None)
        assert store.insert([*late, others[0], others[1]]) == len(late), "what is known is not stored again"
        sum_up(store, before=NOW - DAY, sleep=lambda s: None)
        store.insert(late)
        for id, rating, words in thumbs:
            assert store.give_feedback(
                id, rating, reason="wrong", comment=words, handoff=rating == "down", at=NOW
            )
        store.note_loss(3, "no room left in memory")
    return made


def vars_of(record: QueryRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in QueryRecord.__slots__}


def figures(store: AnalyticsStore) -> list[Any]:
    """Every number there is, of several windows and zones."""
    found: list[Any] = []
    for zone in ZONES:
        for days in (1, 30, 90):
            window = Window.last_days(days, NOW, ZoneInfo(zone))
            for by in REPORTS if (zone, days) == ("UTC", 30) else ("day",):
                found.append(statistics(store, window, by=by).to_dict())
    return found


def rounded(found: Any) -> Any:
    """Sums of fractions may differ behind the twelfth digit, by the order in which they are added."""
    if isinstance(found, float):
        return float(f"{found:.9g}")
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    return [rounded(value) for value in found] if isinstance(found, (list, tuple)) else found


def both(pair: Pair, look: Any) -> Any:
    """What `look` sees in the one, which must be what it sees in the other."""
    one, other = rounded(look(pair.sqlite)), rounded(look(pair.postgres))
    assert one == other
    return one


def test_every_figure_of_every_report_is_equal(pair: Pair) -> None:
    fill(pair)
    before = both(pair, figures)
    assert before[0]["totals"] != before[-1]["totals"]
    for store in pair:
        sum_up(store, before=END_OF_TIME, sleep=lambda s: None)
    assert both(pair, figures) == before, "summed or not"
    for store in pair:
        rebuild(store, now=NOW, sleep=lambda s: None)
    both(pair, figures)
    summary = both(pair, vars_of_summary)
    assert summary["rows"] == 401 and summary["lost"] == 3
    moments = [NOW - 30 * DAY, NOW - DAY]
    both(pair, lambda store: list(Spending(store, timedelta(minutes=6)).since(moments, ["twin"], NOW).since))
    both(pair, lambda store: [(f.name, f.message) for f in check(store, now=NOW, free_bytes=2**40)])


def vars_of_summary(store: AnalyticsStore) -> dict[str, Any]:
    summary = store.summary()
    return {"rows": summary.rows, "last": summary.last_write_at, "lost": summary.lost}


SELECTIONS = (
    Selection(),
    *(Selection(kind=kind) for kind in KINDS),
    *(Selection(status=status) for status in STATUSES),
    *(Selection(answered=answered) for answered in ANSWERED),
    *(Selection(feedback=feedback) for feedback in (*RATINGS, "any")),
    Selection(provider="doubao", model="m'x"),
    Selection(visitor="v1"),
    Selection(session="s1"),
    Selection(visitor="v1", session="s1"),
    Selection(unanswered=True),
    Selection(bot="yes"),
    Selection(bot="no", since=NOW - 10 * DAY, until=NOW - 2 * DAY),
    Selection(provider="\0?'"),
    *(Selection(search=words) for words in ("退款", "保修", "款", "ref", "refund 发票", "100%")),
    *(Selection(search=words) for words in ("O'Brien", "a\\b", "24", "没有")),
    Selection(search="退款", status="ok", since=NOW - 20 * DAY),
)  # fmt: skip


def test_pages_filters_searches_and_exports_are_equal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SEGMENT_ROWS", 64)
    monkeypatch.setattr(search, "BITMAP_BYTES", 8)
    made = fill(pair, 400)
    for store in pair:
        while index_once(store, now=NOW, sleep=lambda s: None):
            pass

    def pages(store: AnalyticsStore) -> list[Any]:
        found: list[Any] = []
        for selection in SELECTIONS:
            cursor = ""
            while True:
                page = store.page(selection, limit=60, before=cursor)
                found.append([vars_of(record) for record in page.records])
                if not (cursor := page.next):
                    break
            found.append(store.count(selection))
            found.append([record.id for record in store.iterate(selection, batch=50)])
        found.append([vars_of_feedback(given) for given in store.iterate_feedback(batch=7)])
        return found

    found = both(pair, pages)
    assert len(found[0]) == 60 and len(made) == 401
    for selection in (Selection(), Selection(search="退款"), Selection(status="error")):
        for form in FORMATS:
            one, other = (b"".join(p.data for p in render_rows(s, selection, form, bom=True)) for s in pair)
            assert one == other and one
            counts = [sum(p.rows for p in render_rows(s, selection, form)) for s in pair]
            assert counts[0] == counts[1] == pair.sqlite.count(selection)


def vars_of_feedback(given: Any) -> dict[str, Any]:
    return {name: getattr(given, name) for name in given.__slots__}


def test_gaps_are_equal(pair: Pair) -> None:
    fill(pair, 300)

    def gather(store: AnalyticsStore) -> list[Any]:
        with store.reader() as reader:
            rows = unanswered.without_gap(reader, NOW - 60 * DAY, 1000)
            asked = unanswered.chat_questions(reader, 0, 1000)
        assert rows and asked
        unanswered.mark_rephrased(store, [seq for seq, _ in rows[:5]], rows[-1][0])
        with store.transaction() as writer:
            one = unanswered.open_gap(writer, "one", "none", b"\0\1\xff", NOW)
            two = unanswered.open_gap(writer, "two", "none", b"", NOW)
            unanswered.assign(writer, [seq for seq, _ in rows[::2]], one, b"\x80" * 8)
            unanswered.assign(writer, [*(seq for seq, _ in rows[1::2]), 12345], two, b"")
            unanswered.note_nearest(
                writer, one, unanswered.Nearest(source="docs/a.md", generation="g1", score=0.5)
            )
            unanswered.set_status(writer, one, "ignored", NOW, detail="by hand", reason="no matter")
            unanswered.set_status(writer, one, "open", NOW, detail="by hand", test={"question": "退款"})
            unanswered.reword(writer)
        with store.reader() as reader:
            gaps = unanswered.load_gaps(reader, NOW)
            return [
                [asked_of(one) for one in asked],
                [gap.to_dict() | {"vector": gap.vector} for gap in gaps],
                unanswered.count_by_status(reader),
                [[step.status, step.detail] for step in unanswered.history(reader, one)],
                [[m.id, m.question, m.signals] for m in unanswered.members(reader, two)],
            ]  # fmt: skip

    found = both(pair, gather)
    assert {gap["question"] for gap in found[1]} != {"one", "two"}
    for store in pair:
        cleanup(store, 1, now=NOW, force=True, sleep=lambda s: None)
    both(pair, gaps_left)


def asked_of(one: unanswered.Asked) -> list[Any]:
    return [one.seq, one.visitor, one.question, one.answered, one.ended_ms]


def gaps_left(store: AnalyticsStore) -> list[Any]:
    with store.reader() as reader:
        return [gap.to_dict() for gap in unanswered.load_gaps(reader, NOW)]


def test_cleanup_and_forget_leave_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SEGMENT_ROWS", 64)
    monkeypatch.setattr(search, "BITMAP_BYTES", 8)
    fill(pair, 400)
    for store in pair:
        index_once(store, now=NOW, sleep=lambda s: None)
    before = both(pair, lambda store: statistics(store, Window.last_days(90, NOW, ZoneInfo("UTC"))).to_dict())
    would = both(pair, lambda store: cleanup(store, 30, now=NOW, force=True, dry_run=True).rows)
    done = both(pair, lambda store: cleanup(store, 30, now=NOW, force=True, sleep=lambda s: None).rows)
    assert would == done > 50
    after = both(pair, lambda store: statistics(store, Window.last_days(90, NOW, ZoneInfo("UTC"))).to_dict())
    assert after["totals"] == before["totals"], "numbers stay"
    forgotten = (Wish("contains", "refund"), Wish("visitor", "v1"), Wish("contains", "docs/3.md"))
    for wish in forgotten:
        both(pair, lambda store, wish=wish: [(r := forget(store, wish, now=NOW)[0]).rows, r.sums_renamed])
    for words in ("refund", "退款", "发票"):
        found = both(pair, lambda store, words=words: store.count(Selection(search=words)))
        assert (found == 0) is (words == "refund")
    both(pair, figures)
    both(pair, vars_of_summary)
    both(pair, lambda store: [vars_of(record) for record in store.iterate()])


def test_who_may_rate_is_equal(pair: Pair) -> None:
    at = NOW - timedelta(hours=1)
    old = NOW - 2 * DAY
    for store in pair:
        store.insert(
            [row(id="a", at=at, visitor="v", session="s"), row(id="b", at=old, visitor="v", session="")]
        )
    askers = (Asker("v"), Asker("w"), Asker("w", "s"), Asker("", ""))
    given = both(
        pair,
        lambda store: [
            store.give_feedback(id, "up", at=NOW, asker=asker)
            for id in ("a", "b", "c", "\0")
            for asker in askers
        ],
    )
    assert given[:4] == [True, False, True, False] and not any(given[4:])
