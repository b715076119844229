"""Questions that went unanswered, and the gaps that they fall into, as the record keeps both.

What a gap is about, and when it is closed, is decided above (mogine/gaps.py); here it is read and written.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from mogine.analytics.engine import Connection, Reader, Row
from mogine.analytics.records import (
    SIGNALS,
    Signal,
    epoch_ms,
    from_epoch_ms,
    signal_bits,
    signals_of,
    time_text,
)
from mogine.analytics.schema import SEQ_BITS
from mogine.analytics.store import AnalyticsStore, first_seq
from mogine.analytics.tables import LISTED, Listing, set_state, state
from mogine.errors import NotFound

GapStatus = Literal["open", "accepted", "closed", "ignored"]
STATUSES: tuple[GapStatus, ...] = get_args(GapStatus)
HALF_LIFE = timedelta(days=14)  # a visitor of two weeks ago counts half as much as one of today
MAX_SHOWN_QUESTIONS = 50
MAX_REASON_CHARS = 300

_COUNTS = ", ".join(f"sum(q.signals >> {place} & 1)" for place in range(len(SIGNALS)))


@dataclass(frozen=True, slots=True)
class Asked:
    """One recorded question; `seq` is its key in the record."""

    seq: int
    visitor: str
    question: str
    answered: str
    ended_ms: int

    @property
    def started_ms(self) -> int:
        return self.seq >> SEQ_BITS


@dataclass(frozen=True, slots=True)
class Nearest:
    """The passage that comes closest to a gap's question, in which generation, and how close."""

    source: str = ""
    title: str = ""
    heading: str = ""
    text: str = ""
    url: str = ""
    score: float | None = None
    generation: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a gap's test last came to: the rank at which the expected passage was found, None when it was not.

    `why` says in words what was missing.
    """

    generation: str = ""
    rank: int | None = None
    passed: bool = False
    why: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """Questions of one meaning that went unanswered. `weight` ranks them: visitors, the recent ones more.

    `test` is the case that `accept` wrote, as its line has it; `reason` why it is ignored, or open again.
    """

    id: int
    status: GapStatus
    question: str
    visitors: int
    asked: int
    signals: Mapping[Signal, int]
    first_at: datetime
    last_at: datetime
    opened_at: datetime
    weight: float
    embedder: str = ""
    vector: bytes = b""
    test: Mapping[str, Any] = field(default_factory=dict)
    nearest: Nearest = Nearest()
    evidence: Evidence = Evidence()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As the API, `--json` and `mogine export gaps` tell it."""
        return {
            "id": self.id,
            "status": self.status,
            "question": self.question,
            "visitors": self.visitors,
            "asked": self.asked,
            "signals": {name: count for name, count in self.signals.items() if count},
            "first_at": time_text(self.first_at),
            "last_at": time_text(self.last_at),
            "opened_at": time_text(self.opened_at),
            "weight": round(self.weight, 3),
            "nearest": _as_dict(self.nearest) if self.nearest.generation else None,
            "test": dict(self.test) or None,
            "evidence": _as_dict(self.evidence) if self.evidence.generation else None,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a gap's status."""

    at: datetime
    status: GapStatus
    detail: str


@dataclass(frozen=True, slots=True)
class Member:
    """One question of a gap."""

    id: str
    at: datetime
    question: str
    signals: tuple[Signal, ...]
    top_score: float | None


# --- questions -----------------------------------------------------------------------------------


def chat_questions(reader: Reader, after: int, limit: int) -> list[Asked]:
    """Questions to the assistant behind the key `after`, in order of time."""
    rows = reader.all(
        "SELECT q.seq, q.visitor, t.question, q.answered, q.started_ms + coalesce(q.duration_ms, 0) "
        "FROM queries q JOIN texts t ON t.seq = q.seq WHERE q.seq > ? AND q.kind = 'chat' AND q.bot = 0 "
        "AND q.visitor <> '' AND q.status IN ('ok', 'aborted') ORDER BY q.seq LIMIT ?",
        (after, limit),
    )
    return [Asked(*row) for row in rows]


def mark_rephrased(store: AnalyticsStore, seqs: Sequence[int], upto: int) -> None:
    """Notes that these questions were put again in other words, and that it was looked for up to `upto`."""
    with store.transaction() as writer:
        writer.execute(
            f"UPDATE queries SET signals = signals | ? WHERE seq {LISTED}",  # noqa: S608
            (signal_bits(["rephrased"]), Listing(seqs)),
        )
        set_state(writer, rephrased_upto=max(upto, state(writer).get("rephrased_upto", 0)))


def rephrased_upto(reader: Reader) -> int:
    """Up to which key it was looked for questions put again."""
    return state(reader.connection).get("rephrased_upto", 0)


def without_gap(reader: Reader, since: datetime, limit: int) -> list[tuple[int, str]]:
    """Key and words of unanswered questions that belong to no gap yet, oldest first."""
    rows = reader.all(
        "SELECT q.seq, trim(t.question) FROM queries q JOIN texts t ON t.seq = q.seq "
        "WHERE q.bot = 0 AND q.signals <> 0 AND q.seq >= ? AND q.kind = 'chat' AND trim(t.question) <> '' "
        "AND t.question NOT LIKE 'hmac:%' AND NOT EXISTS (SELECT 1 FROM gap_questions g WHERE g.seq = q.seq) "
        "ORDER BY q.seq LIMIT ?",
        (first_seq(since), limit),
    )
    return [(seq, question) for seq, question in rows]


# --- gaps ----------------------------------------------------------------------------------------


def load_gaps(
    reader: Reader, now: datetime, *, statuses: Iterable[str] = STATUSES, id: int | None = None
) -> list[Gap]:
    """Gaps with their numbers, the weightiest first."""
    condition = "g.id = ?" if id is not None else f"g.status {LISTED}"
    rows = reader.all(
        "SELECT g.id, g.status, g.question, g.embedder, g.vector, g.test, g.nearest, g.evidence, "  # noqa: S608
        "g.reason, g.opened_ms, n.* FROM gaps g JOIN (SELECT m.gap, count(*) AS asked, "
        "count(DISTINCT CASE q.visitor WHEN '' THEN q.id ELSE q.visitor END) AS visitors, "
        f"min(q.seq) AS first, max(q.seq) AS last, {_COUNTS} FROM gap_questions m "
        f"JOIN queries q ON q.seq = m.seq GROUP BY m.gap) n ON n.gap = g.id WHERE {condition}",
        (id if id is not None else Listing(list(statuses)),),
    )
    return sorted((_gap(row, now) for row in rows), key=lambda gap: (-gap.weight, -gap.id))


def find_gap(reader: Reader, id: int, now: datetime) -> Gap:
    """Raises NotFound."""
    found = load_gaps(reader, now, id=id)
    if not found:
        raise NotFound(f"there is no gap {id}; `mogine gaps` lists them")
    return found[0]


def count_by_status(reader: Reader) -> dict[str, int]:
    """How many gaps there are of each status."""
    rows = reader.all("SELECT status, count(*) FROM gaps GROUP BY status")
    return {**dict.fromkeys(STATUSES, 0), **{status: count for status, count in rows}}


def history(reader: Reader, id: int) -> list[Step]:
    """How a gap came to its status, oldest first."""
    rows = reader.all("SELECT at_ms, status, detail FROM gap_events WHERE gap = ? ORDER BY rowid", (id,))
    return [Step(from_epoch_ms(at_ms), status, detail) for at_ms, status, detail in rows]


def members(reader: Reader, id: int, limit: int = MAX_SHOWN_QUESTIONS) -> list[Member]:
    """The newest questions of a gap."""
    rows = reader.all(
        "SELECT q.id, q.started_ms, t.question, q.signals, q.top_score FROM gap_questions m "
        "JOIN queries q ON q.seq = m.seq LEFT JOIN texts t ON t.seq = m.seq WHERE m.gap = ? "
        "ORDER BY m.seq DESC LIMIT ?",
        (id, limit),
    )
    return [
        Member(id_, from_epoch_ms(at), question or "", signals_of(bits), score)
        for id_, at, question, bits, score in rows
    ]


def open_gap(writer: Connection, question: str, embedder: str, vector: bytes, at: datetime) -> int:
    """A new gap; its number."""
    id = writer.execute(
        "INSERT INTO gaps (status, question, embedder, vector, test, nearest, evidence, reason, opened_ms) "
        "VALUES ('open', ?, ?, ?, '', '', '', '', ?) RETURNING id",
        (question, embedder, vector, epoch_ms(at)),
    ).fetchone()[0]
    return int(id)


def assign(writer: Connection, seqs: Sequence[int], id: int, vector: bytes) -> None:
    """Lets questions belong to a gap whose vector is `vector` with them; those deleted meanwhile do not."""
    writer.execute(
        "INSERT INTO gap_questions (seq, gap) SELECT seq, ? FROM queries "  # noqa: S608
        f"WHERE seq {LISTED} ON CONFLICT DO NOTHING",
        (id, Listing(seqs)),
    )
    writer.execute("UPDATE gaps SET vector = ? WHERE id = ?", (vector, id))


def embed_anew(writer: Connection, vectors: Mapping[int, bytes], embedder: str) -> None:
    """Gaps told by another embedder than before."""
    writer.executemany(
        "UPDATE gaps SET vector = ?, embedder = ? WHERE id = ?",
        [(vector, embedder, id) for id, vector in vectors.items()],
    )


def note_nearest(writer: Connection, id: int, nearest: Nearest) -> None:
    """The passage that is closest now."""
    writer.execute("UPDATE gaps SET nearest = ? WHERE id = ?", (json.dumps(_as_dict(nearest)), id))


def note_evidence(writer: Connection, id: int, evidence: Evidence) -> None:
    """What the test came to."""
    writer.execute("UPDATE gaps SET evidence = ? WHERE id = ?", (json.dumps(_as_dict(evidence)), id))


def set_status(
    writer: Connection,
    id: int,
    status: GapStatus,
    at: datetime,
    *,
    detail: str,
    reason: str = "",
    test: Mapping[str, Any] | None = None,
) -> None:
    """Moves a gap to another status; `test` None leaves its case alone. Raises NotFound."""
    moved = writer.execute(
        "UPDATE gaps SET status = ?, reason = ?, test = coalesce(?, test) WHERE id = ?",
        (
            status,
            reason[:MAX_REASON_CHARS],
            None if test is None else json.dumps(dict(test), ensure_ascii=False) if test else "",
            id,
        ),
    ).rowcount
    if not moved:
        raise NotFound(f"there is no gap {id}; `mogine gaps` lists them")
    writer.execute(
        "INSERT INTO gap_events (gap, at_ms, status, detail) VALUES (?, ?, ?, ?)",
        (id, epoch_ms(at), status, detail),
    )


def reword(writer: Connection) -> None:
    """Every gap is called by what its questions ask most often; one that has lost all of them is gone."""
    writer.execute("DELETE FROM gaps WHERE NOT EXISTS (SELECT 1 FROM gap_questions m WHERE m.gap = gaps.id)")
    writer.execute("DELETE FROM gap_events WHERE gap NOT IN (SELECT id FROM gaps)")
    writer.execute(
        "UPDATE gaps SET question = w.question FROM (SELECT gap, question, row_number() OVER "
        "(PARTITION BY gap ORDER BY times DESC, seq DESC) AS place FROM ("
        "SELECT m.gap, m.seq, trim(t.question) AS question, count(*) OVER same AS times, row_number() OVER "
        "(PARTITION BY m.gap, lower(trim(t.question)) ORDER BY m.seq DESC) AS newest FROM gap_questions m "
        "JOIN texts t ON t.seq = m.seq WINDOW same AS (PARTITION BY m.gap, lower(trim(t.question)))"
        ") wording WHERE newest = 1) w "
        "WHERE gaps.id = w.gap AND w.place = 1 AND gaps.question <> w.question"
    )


def drop_deleted(store: AnalyticsStore) -> None:
    """After rows were deleted: gaps forget them too, to the word."""
    with store.transaction() as writer:
        reword(writer)


def _gap(row: Row, now: datetime) -> Gap:
    first, last = from_epoch_ms(row["first"] >> SEQ_BITS), from_epoch_ms(row["last"] >> SEQ_BITS)
    age = max(timedelta(), now - last) / HALF_LIFE
    counts = tuple(row)[-len(SIGNALS) :]
    return Gap(
        id=row["id"],
        status=row["status"],
        question=row["question"],
        visitors=row["visitors"],
        asked=row["asked"],
        signals=dict(zip(SIGNALS, counts, strict=True)),
        first_at=first,
        last_at=last,
        opened_at=from_epoch_ms(row["opened_ms"]),
        weight=row["visitors"] * 0.5**age,
        embedder=row["embedder"],
        vector=row["vector"],
        test=json.loads(row["test"] or "{}"),
        nearest=Nearest(**json.loads(row["nearest"] or "{}")),
        evidence=Evidence(**json.loads(row["evidence"] or "{}")),
        reason=row["reason"],
    )


def _as_dict(value: Nearest | Evidence) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}
