"""What `forget` erases: everything recorded of one visitor, or that holds a text; and the proof of it."""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mogine.analytics import rollups
from mogine.analytics.export import to_dict
from mogine.analytics.records import QueryRecord
from mogine.analytics.retention import tidy
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore
from mogine.analytics.upkeep import END_OF_TIME, sum_up
from mogine.errors import SettingsError, StoreError

MIN_CHARS = 2
MAX_CHARS = 200
SCAN_BYTES = 4 * 1024**2
FIND_ROWS = 2_000
ERASE_ROWS = 200
# Whatever else the data folder holds of visitors is scanned; the knowledge base holds the owner's documents.
NOT_SCANNED = ("kb",)
RECEIPTS = "receipts"


@dataclass(frozen=True, slots=True)
class Wish:
    """Whose traces, or which text, must go. A visitor is told by the hash or by the id of a session."""

    kind: Literal["visitor", "contains"]
    text: str

    def __post_init__(self) -> None:
        if not MIN_CHARS <= len(self.text.strip()) <= MAX_CHARS or self.text != self.text.strip():
            raise SettingsError(
                f"--{self.kind} takes {MIN_CHARS} to {MAX_CHARS} characters without blanks around them; "
                "a shorter text would take too much with it"
            )

    def fits(self, record: QueryRecord) -> bool:
        """Whether a row is meant."""
        if self.kind == "visitor":
            return self.text in (record.visitor, record.session)
        return self.in_words(json.dumps(to_dict(record), ensure_ascii=False)) or self.in_words(
            record.question
        )

    def in_words(self, words: str) -> bool:
        """Whether the text stands in `words`; case does not count."""
        return self.text.lower() in words.lower()

    def traces(self) -> tuple[bytes, ...]:
        """How it would look in a file: as UTF-8, and escaped as JSON has it."""
        forms = {self.text, self.text.lower(), self.text.upper()}
        plain = {form.encode("utf-8", "replace") for form in forms}
        return tuple(sorted(plain | {json.dumps(form)[1:-1].encode() for form in forms}))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was done; `digest` tells what was asked for without saying it, `remains` which files still
    hold a trace."""

    kind: str
    digest: str
    at: datetime
    rows: int
    spooled: int
    sums_renamed: int
    bytes_freed: int
    files_scanned: int
    bytes_scanned: int
    remains: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the file and `--json` tell it."""
        return {**asdict(self), "at": self.at.isoformat()}


def forget(
    store: AnalyticsStore,
    wish: Wish,
    *,
    now: datetime | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Receipt, Path]:
    """Erases what `wish` names from rows, index, spool and sums, then reads every byte of the data folder.

    Numbers stay in the sums; no word does. Raises Locked while `cleanup` or another `forget` runs.
    """
    folder = store.path.parent
    rows = renamed = freed = 0
    folder.mkdir(mode=0o700, exist_ok=True)
    with (
        store.lock("cleanup"),
        store.lock("index", wait=True),
    ):
        spooled = Spool(folder / "spool").erase(wish.fits)
        if store.exists():
            store.prepare()
            sum_up(store, before=END_OF_TIME, wait=True, sleep=sleep)
            store.checkpoint()
            size = store.size_bytes()
            for seqs in _find(store, wish):
                rows += store.delete_rows(seqs)
                sleep(0.01)
            renamed = _rename_values(store, wish)
            _, freed = tidy(store, size, sleep)
            store.close()
        scanned, size_scanned, remains = scan(folder, wish.traces())
        # Words of visitors that the owner made a test of; not a file of ours to change.
        if contains(tests := folder.parent / "kb-tests.jsonl", wish.traces()):
            remains.append(f"../{tests.name}")
    at = now or datetime.now(UTC)
    digest = hashlib.sha256(f"{wish.kind}:{wish.text}".encode("utf-8", "replace")).hexdigest()
    receipt = Receipt(
        wish.kind, digest, at, rows, spooled, renamed, freed, scanned, size_scanned, tuple(remains)
    )
    return receipt, _write(folder / RECEIPTS, receipt)


def _find(store: AnalyticsStore, wish: Wish) -> Iterator[Sequence[int]]:
    """Keys of the rows that are meant, a few at a time."""
    if wish.kind == "visitor":
        # Two questions: either may use its index.
        condition = "q.visitor = ? OR q.session = ?"
    else:
        columns = ("t.question", "t.answer", "q.page_url", "q.session", "q.visitor", "f.comment", "f.reason")
        condition = " OR ".join(f"instr(lower({column}), lower(?)) > 0" for column in columns)
        condition += (
            " OR EXISTS (SELECT 1 FROM citations c WHERE c.seq = q.seq AND "
            "instr(lower(c.title || ' ' || c.source || ' ' || c.heading || ' ' || c.url), lower(?)) > 0)"
        )
    after = -1
    while True:
        with store.reader() as reader:
            last = reader.one(
                "SELECT max(seq) FROM (SELECT seq FROM queries WHERE seq > ? ORDER BY seq LIMIT ?) AS part",
                (after, FIND_ROWS),
            )[0]
            if last is None:
                return
            found = reader.all(
                "SELECT q.seq FROM queries q LEFT JOIN texts t ON t.seq = q.seq "  # noqa: S608
                "LEFT JOIN feedback f ON f.seq = q.seq "
                f"WHERE q.seq > ? AND q.seq <= ? AND ({condition})",
                (after, last, *[wish.text] * condition.count("?")),
            )
        seqs = [row[0] for row in found]
        for start in range(0, len(seqs), ERASE_ROWS):
            yield seqs[start : start + ERASE_ROWS]
        after = last


def _rename_values(store: AnalyticsStore, wish: Wish) -> int:
    """Takes the text out of the names under which numbers are kept."""
    if wish.kind == "visitor":
        return 0
    renamed = 0
    with store.transaction() as writer:
        for dimension in ("page", "source", "model", "error"):
            values = writer.execute(
                "SELECT DISTINCT value FROM rollups WHERE dimension = ? "
                "AND instr(lower(value), lower(?)) > 0",
                (dimension, wish.text),
            ).fetchall()
            for (value,) in values:
                renamed += rollups.rename_value(writer, dimension, value, "(forgotten)")
        # A gap has the words of other questions now; what else is noted of it may hold the text.
        for column in ("test", "nearest", "evidence", "reason"):
            writer.execute(
                f"UPDATE gaps SET {column} = '' WHERE instr(lower({column}), lower(?)) > 0 "  # noqa: S608
                f"OR instr({column}, ?) > 0",
                (wish.text, json.dumps(wish.text)[1:-1]),
            )
        writer.execute("DELETE FROM gap_events WHERE instr(lower(detail), lower(?)) > 0", (wish.text,))
        writer.execute(
            "DELETE FROM sources WHERE instr(lower(source || ' ' || title), lower(?)) > 0", (wish.text,)
        )
    return renamed


def scan(folder: Path, traces: Sequence[bytes]) -> tuple[int, int, list[str]]:
    """Reads every file of the data folder: how many, how many bytes, and which hold one of `traces`."""
    files = size = 0
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in NOT_SCANNED or path.is_symlink() or not path.is_file():
            continue
        files += 1
        read, hit = _read(path, traces)
        size += read
        if hit:
            found.append(str(name))
    return files, size, found


def contains(path: Path, traces: Sequence[bytes]) -> bool:
    """Whether a file holds one of `traces`; an absent one does not."""
    return _read(path, traces)[1]


def _read(path: Path, traces: Sequence[bytes]) -> tuple[int, bool]:
    """How many bytes a file has, and whether one of `traces` is among them."""
    overlap = max(map(len, traces)) - 1
    size, hit, kept = 0, False, b""
    try:
        with path.open("rb") as file:
            while block := file.read(SCAN_BYTES):
                size += len(block)
                hit = hit or any(trace in kept + block for trace in traces)
                kept = block[-overlap:] if overlap else b""
    except FileNotFoundError:
        return 0, False  # the spool, or a journal, was taken up meanwhile
    except OSError as error:
        raise StoreError(f"{path.name} cannot be read: {error.strerror or error}") from error
    return size, hit


def _write(folder: Path, receipt: Receipt) -> Path:
    path = folder / f"forget-{receipt.at:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(3)}.json"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(receipt.to_dict(), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise StoreError(f"the receipt cannot be written: {error.strerror or error}") from error
    return path
