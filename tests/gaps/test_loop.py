"""From questions that went unanswered to gaps that are closed by a test, and opened again by what happens."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mogine.analytics.export import to_dict
from mogine.analytics.forget import Wish, forget
from mogine.analytics.records import QueryRecord, Selection
from mogine.analytics.retention import cleanup
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.unanswered import Gap
from mogine.errors import NotFound, RequestError, UpstreamUnreachable
from mogine.gaps.loop import Gaps
from mogine.kb.embedders import Embedder, NoEmbedder, open_embedder
from mogine.kb.gate import Outcome, load_tests
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage
from mogine.settings import load_settings
from tests.analytics.rows import row
from tests.kb.conftest import CharacterEmbedder, make_document, take_in

SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
RETURNS = make_document("docs/returns.md", "Refunds take 14 days.", title="Returns")
HUABEI = make_document("docs/huabei.md", "可以用花呗分期付款，三期免息。", title="花呗")


class Home:
    """A record and documents, and a clock that a test can set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = AnalyticsStore(path / "data" / "analytics.db")
        self.generations = Generations(path / "data" / "kb")
        self.tests_path = path / "kb-tests.jsonl"
        self.now = datetime.now(UTC)  # generations are dated by the real clock
        self.embedder: Callable[[], Embedder] = CharacterEmbedder
        self.gaps = Gaps(
            self.store, self.generations, self.tests_path, lambda: self.embedder(), clock=lambda: self.now
        )

    def ask(self, question: str, ago: timedelta = MINUTE, **changes: Any) -> QueryRecord:
        """An unanswered question, unless told otherwise."""
        values = {"answered": "no", "signals": ("no_passage",), "citations": (), "top_score": None, **changes}
        record = row(ago, at=self.now, question=question, **values)
        self.store.insert([record], busy_ms=5000)
        return record

    def take_in(self, *documents: tuple[Document, list[Passage]]) -> str:
        return take_in(self.generations, CharacterEmbedder(), *documents)

    def take_out(self, source: str) -> str:
        with self.generations.begin(CharacterEmbedder()) as draft:
            draft.remove(source)
            return draft.commit()

    def listed(self) -> list[Gap]:
        self.gaps.refresh()
        return self.gaps.listed()[0]

    def only(self) -> Gap:
        (gap,) = self.listed()
        return gap

    def signals(self, record: QueryRecord) -> tuple[str, ...]:
        return next(r.signals for r in self.store.iterate(Selection()) if r.id == record.id)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "data").mkdir()
    return Home(tmp_path)


# --- gathering -----------------------------------------------------------------------------------


def test_questions_of_one_meaning_are_one_gap_and_keep_their_signals(home: Home) -> None:
    home.ask("可以用花呗分期付款吗", 3 * MINUTE, visitor="a")
    home.ask("能不能用花呗分期付款", 20 * MINUTE, visitor="b", signals=("no_passage", "declined"))
    home.ask("能不能用花呗分期付款", 30 * MINUTE, visitor="c", signals=("thumbs_down",))
    home.ask("上海有门店吗", 40 * MINUTE, visitor="d")
    first, second = home.listed()
    assert (first.question, first.visitors, first.asked) == ("能不能用花呗分期付款", 3, 3)
    assert {k: n for k, n in first.signals.items() if n} == {"no_passage": 2, "declined": 1, "thumbs_down": 1}
    assert (second.question, second.asked, second.status) == ("上海有门店吗", 1, "open")
    assert home.listed() == [first, second], "a second look finds nothing new"


def test_answered_questions_and_crawlers_are_no_gap(home: Home) -> None:
    home.ask("退款多久到账", signals=())
    home.ask("上海有门店吗", bot=True)
    home.ask("什么是净水", kind="llm")
    home.ask("太久以前", 40 * DAY)
    home.ask("   ")
    home.ask("hmac:0123456789abcdef")
    assert home.listed() == []


def test_gaps_are_ranked_by_visitors_and_by_how_recent_they_are(home: Home) -> None:
    for number in range(3):
        home.ask("上海有门店吗", 29 * DAY, visitor=f"old{number}")
    home.ask("你们还招人吗", MINUTE, visitor="new")
    home.ask("怎么开发票", MINUTE, visitor="x")
    home.ask("怎么开发票", MINUTE, visitor="y")
    assert [gap.question for gap in home.listed()] == ["怎么开发票", "你们还招人吗", "上海有门店吗"]


def test_without_a_model_words_gather_the_questions(home: Home) -> None:
    home.embedder = NoEmbedder
    home.ask("退款多久到账？", visitor="a")
    home.ask("退款几天到账", 9 * MINUTE, visitor="b")
    home.ask("are you hiring?", visitor="c")
    assert sorted(gap.asked for gap in home.listed()) == [1, 2]


def test_another_embedder_finds_the_gaps_of_the_old_one(home: Home) -> None:
    home.ask("可以用花呗分期付款吗", visitor="a")
    before = home.only()
    home.embedder = lambda: CharacterEmbedder("others", 32)
    home.ask("可以用花呗分期付款吗？", visitor="b")
    after = home.only()
    assert (after.id, after.asked, after.embedder) == (before.id, 2, "others")


def test_an_embedder_that_is_away_is_told_and_costs_no_question(home: Home) -> None:
    class Away(CharacterEmbedder):
        def embed_questions(self, texts: Any) -> Any:
            raise UpstreamUnreachable("the embeddings endpoint does not answer")

    home.ask("可以用花呗分期付款吗")
    home.embedder = Away
    assert home.gaps.refresh().problem == "the embeddings endpoint does not answer"
    home.embedder = CharacterEmbedder
    assert home.only().asked == 1


def test_no_model_is_loaded_where_there_is_nothing_new(home: Home) -> None:
    home.ask("上海有门店吗")
    home.take_in(RETURNS)
    home.gaps.refresh()

    def fail() -> Embedder:
        raise AssertionError("a model was loaded")

    home.embedder = fail
    assert home.gaps.refresh().problem == ""
    assert not home.gaps.is_stale()
    home.ask("上海有门店吗", 30 * SECOND)
    assert home.gaps.is_stale()


def test_a_home_without_a_record_has_no_gaps(home: Home) -> None:
    assert home.listed() == []
    assert not home.store.exists()


# --- questions put again -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "after", "visitor", "is_again"),
    [
        ("退款几天能到账", 30 * SECOND, "v1", True),
        ("退款多久到账", 119 * SECOND, "v1", True),
        ("退款几天能到账", 121 * SECOND, "v1", False),
        ("退款几天能到账", 30 * SECOND, "v2", False),
        ("上海有门店吗", 30 * SECOND, "v1", False),
    ],
)
def test_the_same_visitor_asking_the_same_within_two_minutes_was_not_answered(
    home: Home, second: str, after: timedelta, visitor: str, is_again: bool
) -> None:
    first = home.ask("退款多久到账", 60 * MINUTE, answered="unknown", signals=(), duration_ms=10_000)
    later = home.ask(second, 60 * MINUTE - 10 * SECOND - after, signals=(), visitor=visitor)
    home.gaps.refresh()
    assert home.signals(first) == (("rephrased",) if is_again else ())
    assert home.signals(later) == ()


def test_after_an_answer_with_its_source_a_similar_question_is_the_next_one(home: Home) -> None:
    home.embedder = lambda: open_embedder(load_settings({}, home.path))
    first = home.ask("S800 的保修期多久", 9 * MINUTE, answered="yes", signals=())
    home.ask("S800 的保修怎么申请", 8 * MINUTE, answered="yes", signals=())
    again = home.ask("退款多久能到账", 7 * MINUTE, answered="yes", signals=())
    home.ask("退款多久能到账呢", 6 * MINUTE, answered="yes", signals=())
    home.gaps.refresh()
    assert home.signals(first) == ()
    assert home.signals(again) == ("rephrased",)


def test_a_question_put_again_is_found_also_when_the_look_came_in_between(home: Home) -> None:
    first = home.ask("退款多久到账", 2 * MINUTE, answered="unknown", signals=())
    home.gaps.refresh()
    home.ask("退款几天能到账", MINUTE, answered="unknown", signals=())
    home.gaps.refresh()
    assert home.signals(first) == ("rephrased",)
    assert home.only().question == "退款多久到账"


# --- from open to closed, and back ---------------------------------------------------------------


def closed_gap(home: Home) -> Gap:
    """A gap that was accepted and closed by the document."""
    home.take_in(RETURNS)
    home.ask("可以用花呗分期付款吗", 10 * MINUTE)
    home.gaps.accept(home.only().id, expect="docs/huabei.md")
    home.take_in(HUABEI)
    return home.only()


def test_nearest_passage_and_its_score_are_those_of_the_generation_that_serves(home: Home) -> None:
    home.ask("how long do refunds take")
    assert home.only().nearest.generation == ""
    name = home.take_in(RETURNS)
    nearest = home.only().nearest
    assert (nearest.source, nearest.title, nearest.generation) == ("docs/returns.md", "Returns", name)
    assert nearest.score is not None and 0 < nearest.score <= 1


def test_accepted_gap_waits_and_closes_with_generation_and_rank(home: Home) -> None:
    home.take_in(RETURNS)
    home.ask("可以用花呗分期付款吗", 10 * MINUTE)
    id = home.only().id
    home.gaps.accept(id, expect="docs/huabei.md")
    (test,) = load_tests(home.tests_path)
    assert (test.question, test.document) == ("可以用花呗分期付款吗", "docs/huabei.md")
    waiting = home.only()
    assert (waiting.status, waiting.evidence.passed) == ("accepted", False)
    assert "not among the first" in waiting.evidence.why
    name = home.take_in(HUABEI)
    (change,) = home.gaps.refresh().changes
    assert (change.id, change.status, change.detail) == (id, "closed", f"found at rank 1 in {name}")
    gap = home.only()
    assert (gap.status, gap.evidence.generation, gap.evidence.rank) == ("closed", name, 1)
    assert [step.status for step in home.gaps.detail(id).history] == ["accepted", "closed"]


def test_closed_gap_opens_again_when_its_test_fails(home: Home) -> None:
    gap = closed_gap(home)
    name = home.take_out("docs/huabei.md")
    (change,) = home.gaps.refresh().changes
    assert (change.id, change.status) == (gap.id, "open") and name in change.detail
    assert home.only().reason == change.detail
    home.take_in(HUABEI)
    assert home.only().status == "closed", "the document is back, and proves itself again"


def test_closed_gap_opens_again_when_the_question_goes_unanswered_once_more(home: Home) -> None:
    closed_gap(home)
    home.now += DAY
    home.ask("可以用花呗分期付款吗？", MINUTE, visitor="b", signals=("thumbs_down",))
    gap = home.only()
    assert (gap.status, gap.reason, gap.asked) == ("open", "the question went unanswered again", 2)
    assert home.only().status == "open", "the test passes all the time, and proves nothing now"


def test_what_was_asked_before_the_documents_changed_opens_nothing(home: Home) -> None:
    gap = closed_gap(home)
    home.ask("能不能用花呗分期付款", 5 * MINUTE, visitor="late")  # its thumb down came only now
    assert (home.only().status, home.only().asked) == ("closed", 2)
    assert home.only().id == gap.id


def test_rollback_to_documents_without_the_answer_opens_the_gap(home: Home) -> None:
    closed_gap(home)
    home.generations.rollback()
    assert home.only().status == "open"


def test_a_test_that_passes_already_does_not_close_a_gap(home: Home) -> None:
    home.take_in(HUABEI)
    home.ask("可以用花呗分期付款吗", -MINUTE, signals=("thumbs_down",))  # after the documents were made
    home.gaps.accept(home.only().id, expect="docs/huabei.md")
    gap = home.only()
    assert (gap.status, gap.evidence.passed) == ("accepted", True)


def test_an_edited_test_counts_as_it_stands_in_the_file(home: Home) -> None:
    home.take_in(RETURNS)
    home.ask("可以用花呗分期付款吗", 10 * MINUTE)
    home.gaps.accept(home.only().id, expect="docs/wrong.md")
    line = json.loads(home.tests_path.read_text("utf-8"))
    home.tests_path.write_text(json.dumps({**line, "document": "huabei.md"}) + "\n", "utf-8")
    home.take_in(HUABEI)
    assert home.only().status == "closed"


def test_settle_takes_the_outcomes_of_an_ingest(home: Home) -> None:
    home.take_in(RETURNS)
    home.ask("可以用花呗分期付款吗", 10 * MINUTE)
    test = home.gaps.accept(home.only().id, expect="docs/huabei.md")
    home.take_in(HUABEI)
    (change,) = home.gaps.settle([Outcome(test, 2, "docs/huabei.md")])
    assert (change.status, home.gaps.listed()[0][0].evidence.rank) == ("closed", 2)


def test_ignored_gap_keeps_its_reason_and_takes_questions_like_it(home: Home) -> None:
    home.ask("今天天气怎么样", visitor="a")
    id = home.only().id
    with pytest.raises(RequestError):
        home.gaps.ignore(id, "  ")
    home.gaps.ignore(id, "not about us")
    home.ask("今天天气怎么样？", visitor="b")
    gap = home.only()
    assert (gap.status, gap.reason, gap.asked) == ("ignored", "not about us", 2)
    home.gaps.reopen(id)
    assert (home.only().status, home.only().reason) == ("open", "")


def test_reopened_gap_stays_open_though_its_test_passes(home: Home) -> None:
    gap = closed_gap(home)
    home.gaps.reopen(gap.id)
    assert home.only().status == "open"
    assert len(load_tests(home.tests_path)) == 1, "the test goes on guarding the documents"


def test_a_gap_that_is_not_there_is_told(home: Home) -> None:
    home.ask("上海有门店吗")
    home.gaps.refresh()
    for act in (
        lambda: home.gaps.detail(99),
        lambda: home.gaps.accept(99, expect="a.md"),
        lambda: home.gaps.ignore(99, "no"),
        lambda: home.gaps.reopen(99),
    ):
        with pytest.raises(NotFound, match="gap 99"):
            act()


# --- what is deleted is gone from gaps too -------------------------------------------------------


def test_forgotten_words_leave_the_gaps(home: Home) -> None:
    home.ask("张三的订单在哪里", 5 * MINUTE, visitor="a")
    home.ask("上海有门店吗", 5 * MINUTE, visitor="a")
    home.gaps.refresh()
    receipt, _ = forget(home.store, Wish("contains", "张三"), now=home.now, sleep=lambda s: None)
    assert (receipt.rows, receipt.remains) == (1, ())
    assert [gap.question for gap in home.listed()] == ["上海有门店吗"]


def test_a_test_that_quotes_forgotten_words_is_told(home: Home) -> None:
    home.ask("张三的订单在哪里", 5 * MINUTE)
    home.gaps.accept(home.only().id, expect="docs/orders.md")
    receipt, _ = forget(home.store, Wish("contains", "张三"), now=home.now, sleep=lambda s: None)
    assert receipt.remains == ("../kb-tests.jsonl",)


def test_a_gap_lives_as_long_as_its_questions(home: Home) -> None:
    home.ask("上海有门店吗", 20 * DAY)
    home.ask("你们还招人吗", DAY)
    assert len(home.listed()) == 2
    cleanup(home.store, 10, now=home.now, force=True, sleep=lambda s: None)
    assert [gap.question for gap in home.listed()] == ["你们还招人吗"]


def test_signals_come_back_with_the_row(home: Home) -> None:
    record = home.ask("上海有门店吗", signals=("no_passage", "handoff"))
    assert home.signals(record) == ("no_passage", "handoff")
    assert to_dict(next(home.store.iterate()))["signals"] == ["no_passage", "handoff"]
    home.ask("已经回答", signals=())
    found = home.store.page(Selection(unanswered=True)).records
    assert [r.id for r in found] == [record.id]
