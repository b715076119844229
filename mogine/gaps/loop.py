"""What could not be answered: questions gathered by meaning into gaps, each closed by a test that passes.

A gap is open until its owner says which document shall answer it (`accept`, which writes a test), or that
none will (`ignore`). It closes when its test passes in a generation that is younger than its last unanswered
question, and opens again when the test fails, or when the question goes unanswered once more.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from mogine.analytics import unanswered
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore, first_seq, open_store
from mogine.analytics.tables import set_state, state
from mogine.analytics.unanswered import Asked, Evidence, Gap, GapStatus, Member, Nearest, Step
from mogine.errors import MogineError, RequestError
from mogine.gaps.meaning import Clusters, Meaning, Models
from mogine.kb.embedders import Embedder, open_embedder
from mogine.kb.gate import (
    DEFAULT_TOP_K,
    TESTS_NAME,
    KbTest,
    Outcome,
    add_test,
    load_tests,
    run_tests,
    test_from,
    why_failed,
)
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.manifest import Generation
from mogine.kb.passages import MAX_QUERY_CHARS
from mogine.settings import Settings

LOOK_BACK = timedelta(days=30)
REPHRASED_WITHIN_MS = 120_000
# Rows come when their answer ends: what began a moment ago may still be missing.
UNSETTLED_MS = 600_000
# A server may answer from the old generation for a moment after the new one was made.
SWITCHING = timedelta(seconds=5)
MAX_NEW_WORDINGS = 2_000
MAX_PAIRS = 2_000
MAX_ROWS = 100_000
BATCH = 5_000
NEAREST_FOR = 100
EXCERPT_CHARS = 240
STALE_MS = 300_000
LOCK_NAME = "gaps"


@dataclass(frozen=True, slots=True)
class Change:
    """A gap that has closed, or is open again, and why."""

    id: int
    status: GapStatus
    question: str
    detail: str


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What a look at the record brought: questions that found a gap, and how many wait for the next look.

    `problem` says why not all could be done, "" when it was.
    """

    gathered: int = 0
    waiting: int = 0
    changes: tuple[Change, ...] = ()
    generation: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Detail:
    """A gap with its newest questions and how it came to its status."""

    gap: Gap
    questions: tuple[Member, ...]
    history: tuple[Step, ...]


class Gaps:
    """The gaps of one home. Everything that is said of them is in the record's file; see unanswered.py."""

    def __init__(
        self,
        store: AnalyticsStore,
        generations: Generations,
        tests_path: Path,
        make_embedder: Callable[[], Embedder],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._generations = generations
        self._tests_path = tests_path
        self._make_embedder = make_embedder
        self._clock = clock

    # --- reading -------------------------------------------------------------------------------------

    def listed(
        self, statuses: Iterable[str] = unanswered.STATUSES, *, deadline_s: float | None = None
    ) -> tuple[list[Gap], dict[str, int]]:
        """Gaps of these statuses, the weightiest first, and how many there are of each status."""
        with self._store.reader(deadline_s) as reader:
            found = unanswered.load_gaps(reader, self._clock(), statuses=statuses)
            return found, unanswered.count_by_status(reader)

    def detail(self, id: int) -> Detail:
        """Raises NotFound."""
        with self._store.reader() as reader:
            return Detail(
                unanswered.find_gap(reader, id, self._clock()),
                tuple(unanswered.members(reader, id)),
                tuple(unanswered.history(reader, id)),
            )

    def is_stale(self) -> bool:
        """Whether `refresh` would find something: cheap, for servers that are asked often."""
        with self._store.reader() as reader:
            known = state(reader.connection)
            stamp = self._stamp(reader.all("SELECT max(seq) FROM queries")[0][0] or 0)
        now_ms = self._clock().timestamp() * 1000
        return known["gaps_stamp"] != stamp or now_ms - known["gaps_at_ms"] > STALE_MS

    # --- what the owner decides ----------------------------------------------------------------------

    def accept(
        self, id: int, *, expect: str, contains: str = "", question: str = "", top_k: int = DEFAULT_TOP_K
    ) -> KbTest:
        """Writes the test that will close the gap. Raises NotFound, RequestError, SettingsError."""
        gap = self.detail(id).gap
        fields = {
            "question": question or gap.question[:MAX_QUERY_CHARS],
            "document": expect,
            "contains": contains,
            "top_k": top_k,
        }
        test = test_from(fields)
        add_test(self._tests_path, test)
        wanted = " with ".join(
            part for part in (test.document, f'"{test.contains}"' if contains else "") if part
        )
        with self._store.transaction() as writer:
            unanswered.note_evidence(writer, id, Evidence())
            unanswered.set_status(
                writer, id, "accepted", self._clock(), detail=f"waits for {wanted}", test=test.to_dict()
            )
        return test

    def ignore(self, id: int, reason: str) -> None:
        """No document will answer this. Raises NotFound, RequestError without a reason."""
        reason = " ".join(reason.split())
        if not reason or len(reason) > unanswered.MAX_REASON_CHARS:
            raise RequestError(
                f"say in 1 to {unanswered.MAX_REASON_CHARS} characters why it is ignored", param="reason"
            )
        with self._store.transaction() as writer:
            unanswered.set_status(writer, id, "ignored", self._clock(), detail=reason, reason=reason)

    def reopen(self, id: int) -> None:
        """Open again, without its test: that one stays in the file, and closes nothing. Raises NotFound."""
        with self._store.transaction() as writer:
            unanswered.note_evidence(writer, id, Evidence())
            unanswered.set_status(writer, id, "open", self._clock(), detail="by hand", test={})

    # --- what comes of itself ------------------------------------------------------------------------

    def settle(self, outcomes: Sequence[Outcome]) -> tuple[Change, ...]:
        """Closes and opens gaps by what their tests have just come to in the generation that serves."""
        generation = self._generations.current()
        if generation is None:
            return ()
        self._store.prepare()
        with self._store.transaction() as writer:
            for gap in self._tested():
                if mine := _outcomes_of(gap, outcomes):
                    unanswered.note_evidence(writer, gap.id, _evidence(mine, generation))
        return self._move()

    def refresh(self) -> Refreshed:
        """Gathers what went unanswered since the last look, and asks the tests of a new generation.

        What needs a model that is away is left for the next look, and told. Raises StoreError, Locked.
        """
        if not self._store.exists():
            return Refreshed()
        with self._store.lock(LOCK_NAME, wait=True):
            self._store.prepare()
            with self._store.reader() as reader:
                newest = reader.all("SELECT max(seq) FROM queries")[0][0] or 0
            found = Refreshed()
            with closing(Models(self._make_embedder)) as models:
                try:
                    self._mark_rephrased(models)
                    found = self._gather(models)
                    found = replace(found, generation=self._look_up(models))
                except MogineError as error:
                    found = replace(found, problem=error.message)
            changes = self._move()
            if not (found.problem or found.waiting):
                with self._store.transaction() as writer:
                    now_ms = int(self._clock().timestamp() * 1000)
                    set_state(writer, gaps_stamp=self._stamp(newest), gaps_at_ms=now_ms)
        return replace(found, changes=changes)

    def _stamp(self, newest: int) -> int:
        return zlib.crc32(f"{newest}:{self._generations.current_name()}".encode())

    # --- questions put again -------------------------------------------------------------------------

    def _mark_rephrased(self, models: "Models") -> None:
        """Who asks nearly the same within two minutes was not answered the first time."""
        now = self._clock()
        with self._store.reader() as reader:
            upto = unanswered.rephrased_upto(reader)
            if not reader.all("SELECT 1 FROM queries WHERE seq > ? LIMIT 1", (upto,)):
                return
        after = max(upto, first_seq(now - LOOK_BACK)) - (UNSETTLED_MS << SEQ_BITS)
        last: dict[str, Asked] = {}
        pairs: list[tuple[Asked, Asked]] = []
        rows = 0
        while rows < MAX_ROWS and len(pairs) < MAX_PAIRS:
            with self._store.reader() as reader:
                batch = unanswered.chat_questions(reader, after, BATCH)
            for asked in batch:
                before = last.get(asked.visitor)
                if before and asked.started_ms - before.ended_ms <= REPHRASED_WITHIN_MS:
                    pairs.append((before, asked))
                last[asked.visitor] = asked
            rows += len(batch)
            if len(batch) < BATCH:
                break
            after = batch[-1].seq
        seqs = [
            first.seq
            for first, alike in zip((a for a, _ in pairs), self._alike(pairs, models), strict=True)
            if alike
        ]
        settled = first_seq(now - timedelta(milliseconds=UNSETTLED_MS))
        reached = batch[-1].seq if batch else after
        unanswered.mark_rephrased(self._store, seqs, min(settled, reached))

    def _alike(self, pairs: Sequence[tuple[Asked, Asked]], models: "Models") -> Iterator[bool]:
        """Whether the second question of each pair asks the same as the first, which left it open.

        After an answer that cited its source the two must be nearly the same: what follows upon a good
        answer is mostly the next question about the same thing.
        """
        words = list(dict.fromkeys(_plain(asked.question) for pair in pairs for asked in pair))
        if not words:
            return
        meaning = models.meaning
        vectors = dict(zip(words, meaning.embed(words), strict=True))
        for first, second in pairs:
            a, b = _plain(first.question), _plain(second.question)
            is_answered = first.answered == "yes"
            if a == b:
                yield not is_answered
                continue
            line = (1 + meaning.threshold) / 2 if is_answered else meaning.threshold
            yield float(vectors[a] @ vectors[b]) >= line

    # --- gathering -----------------------------------------------------------------------------------

    def _gather(self, models: "Models") -> Refreshed:
        """Every unanswered question finds the gap that is nearest to it, or opens one."""
        now = self._clock()
        with self._store.reader() as reader:
            rows = unanswered.without_gap(reader, now - LOOK_BACK, MAX_ROWS)
        wordings: dict[str, list[tuple[int, str]]] = {}
        for seq, question in rows:
            wordings.setdefault(_plain(question), []).append((seq, question))
        chosen = dict(list(wordings.items())[:MAX_NEW_WORDINGS])
        gathered = sum(map(len, chosen.values()))
        if not chosen:
            return Refreshed()
        clusters = self._clusters(models.meaning)
        vectors = models.meaning.embed(list(chosen))
        for start in range(0, len(chosen), 100):
            with self._store.transaction() as writer:
                for (_, asked), vector in list(zip(chosen.items(), vectors, strict=True))[
                    start : start + 100
                ]:
                    seqs = [seq for seq, _ in asked]
                    total = vector * len(seqs)
                    place = clusters.nearest(vector)
                    if place is None:
                        words = asked[-1][1]
                        id = unanswered.open_gap(writer, words, clusters.embedder, total.tobytes(), now)
                        clusters.add(id, total)
                    else:
                        id, total = clusters.grow(place, total)
                    unanswered.assign(writer, seqs, id, total.tobytes())
        with self._store.transaction() as writer:
            unanswered.reword(writer)
        return Refreshed(gathered, len(rows) - gathered)

    def _clusters(self, meaning: Meaning) -> "Clusters":
        """What there is of gaps; told by another embedder than now, they are embedded anew."""
        with self._store.reader() as reader:
            gaps = unanswered.load_gaps(reader, self._clock())
        old = [gap for gap in gaps if gap.embedder != meaning.name]
        if old:
            fresh = meaning.embed([_plain(gap.question) for gap in old])
            vectors = {gap.id: row.tobytes() for gap, row in zip(old, fresh, strict=True)}
            with self._store.transaction() as writer:
                unanswered.embed_anew(writer, vectors, meaning.name)
            gaps = [replace(gap, vector=vectors.get(gap.id, gap.vector)) for gap in gaps]
        clusters = Clusters(meaning.name, meaning.threshold)
        for gap in gaps:
            clusters.add(gap.id, np.frombuffer(gap.vector, dtype=np.float32))
        return clusters

    # --- the generation that serves ------------------------------------------------------------------

    def _look_up(self, models: "Models") -> str:
        """Asks the current generation what it has for gaps, where that is not known; its name."""
        generation = self._generations.current()
        if generation is None:
            return ""
        gaps, _ = self.listed(("open", "accepted"))
        unknown = [gap for gap in gaps if gap.nearest.generation != generation.name][:NEAREST_FOR]
        untested = [gap for gap in self._tested() if gap.evidence.generation != generation.name]
        if not unknown and not untested:
            return generation.name
        with models.knowledge(generation) as knowledge:
            nearest = {gap.id: _nearest(knowledge, gap.question) for gap in unknown}
            cases = self._cases(untested)
            outcomes = run_tests(knowledge, list(dict.fromkeys(t for tests in cases.values() for t in tests)))
        known = {outcome.test: outcome for outcome in outcomes}
        with self._store.transaction() as writer:
            for id, passage in nearest.items():
                unanswered.note_nearest(writer, id, passage)
            for id, tests in cases.items():
                evidence = _evidence([known[test] for test in tests], generation)
                unanswered.note_evidence(writer, id, evidence)
        return generation.name

    def _tested(self) -> list[Gap]:
        gaps, _ = self.listed(("open", "accepted", "closed"))
        return [gap for gap in gaps if gap.test]

    def _cases(self, gaps: Sequence[Gap]) -> dict[int, list[KbTest]]:
        """Each gap's tests as the file has them now; a case that was taken out of it counts on as it was."""
        written = load_tests(self._tests_path) if gaps else []
        return {gap.id: _tests_of(gap, written) for gap in gaps}

    def _move(self) -> tuple[Change, ...]:
        """Closes what is proved, and opens what is not any more."""
        changes = []
        now = self._clock()
        with self._store.transaction() as writer:
            for gap in self._tested():
                evidence = gap.evidence
                if not evidence.generation:
                    continue
                is_younger = gap.last_at <= datetime.fromisoformat(evidence.at) + SWITCHING
                if evidence.passed and is_younger and gap.status != "closed":
                    detail = f"found at rank {evidence.rank} in {evidence.generation}"
                    unanswered.set_status(writer, gap.id, "closed", now, detail=detail)
                    changes.append(Change(gap.id, "closed", gap.question, detail))
                elif gap.status == "closed" and not (evidence.passed and is_younger):
                    detail = (
                        "the question went unanswered again"
                        if evidence.passed
                        else f"its test fails in {evidence.generation}: {evidence.why}"
                    )
                    unanswered.set_status(writer, gap.id, "open", now, detail=detail, reason=detail)
                    changes.append(Change(gap.id, "open", gap.question, detail))
        return tuple(changes)


def _tests_of(gap: Gap, written: Iterable[KbTest]) -> list[KbTest]:
    own = test_from(gap.test)
    every = list(written)
    if own in every:
        return [own]
    return [test for test in every if test.question == own.question] or [own]


def _outcomes_of(gap: Gap, outcomes: Sequence[Outcome]) -> list[Outcome]:
    wanted = _tests_of(gap, [outcome.test for outcome in outcomes])
    return [outcome for outcome in outcomes if outcome.test in wanted]


def _evidence(outcomes: Sequence[Outcome], generation: Generation) -> Evidence:
    failed = next((outcome for outcome in outcomes if not outcome.passed), None)
    ranks = [outcome.rank for outcome in outcomes if outcome.rank is not None]
    return Evidence(
        generation.name,
        max(ranks, default=None),
        failed is None,
        why_failed(failed) if failed else "",
        generation.manifest.created_at,
    )


def _nearest(knowledge: KnowledgeBase, question: str) -> Nearest:
    hits = knowledge.search(question[:MAX_QUERY_CHARS], 1)
    if not hits:
        return Nearest(generation=knowledge.name)
    passage = hits[0].passage
    return Nearest(
        passage.source,
        passage.title,
        passage.heading,
        passage.text[:EXCERPT_CHARS],
        passage.url,
        round(hits[0].score, 4),
        knowledge.name,
    )


def _plain(question: str) -> str:
    return " ".join(question.lower().split())


def open_gaps(settings: Settings) -> Gaps:
    """The gaps of a home."""
    return Gaps(
        open_store(settings),
        Generations.of(settings),
        settings.home / TESTS_NAME,
        lambda: open_embedder(settings),
    )
