"""Whether the record tells of trouble: what `mogine check` says to cron and to monitoring."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mogine.analytics.records import epoch_ms
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore, first_seq
from mogine.errors import MogineError

DAY = timedelta(days=1)
WEEK_DAYS = 7
SPOOL_AGE = timedelta(minutes=10)
BACKUP_AGE = timedelta(days=8)
MIN_FREE_BYTES = 1024**3
MIN_FREE_SHARE = 0.03
# Of a handful of questions one that fails is no rate.
MIN_QUESTIONS = 10
BACKUPS = "backups"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a person should look at; `name` is stable, `message` says what and what to do."""

    name: str
    message: str


def check(
    store: AnalyticsStore,
    *,
    max_error_share: float = 0.2,
    now: datetime | None = None,
    free_bytes: int | None = None,
) -> list[Finding]:
    """Everything that is wrong; nothing when all is well."""
    now = now or datetime.now(UTC)
    return [
        *_answers(store, now, max_error_share),
        *_spool(store.path.parent / "spool", now),
        *_disk(store.path.parent, free_bytes),
        *_backups(store.path.parent / BACKUPS, now),
    ]


def _answers(store: AnalyticsStore, now: datetime, max_error_share: float) -> Iterator[Finding]:
    day, week = (first_seq(now - days * DAY) for days in (1, 1 + WEEK_DAYS))
    try:
        with store.reader() as reader:
            questions, ok, errors, refused = reader.one(
                "SELECT count(*), count(*) FILTER (WHERE status = 'ok'), "
                "count(*) FILTER (WHERE status = 'error'), count(*) FILTER (WHERE status = 'refused') "
                "FROM queries WHERE seq >= ? AND bot = 0",
                (day,),
            )
            before = reader.one("SELECT count(*) FROM queries WHERE seq >= ? AND seq < ?", (week, day))[0]
            lost = reader.one(
                "SELECT coalesce(sum(rows), 0) FROM losses WHERE at_ms >= ?", (epoch_ms(now - DAY),)
            )[0]
    except MogineError as error:
        yield Finding("database", error.message)
        return
    if questions >= MIN_QUESTIONS and errors / questions > max_error_share:
        yield Finding(
            "errors",
            f"{errors:,} of {questions:,} questions of the last day failed ({errors / questions:.0%}, "
            f"allowed are {max_error_share:.0%}); `mogine queries --status error` lists them",
        )
    if questions >= MIN_QUESTIONS and not ok:
        yield Finding(
            "answers",
            f"none of {questions:,} questions of the last day was answered ({errors:,} failed, "
            f"{refused:,} were refused); `mogine queries` lists them",
        )
    if not questions and before >= WEEK_DAYS * MIN_QUESTIONS:
        yield Finding(
            "silence",
            f"no question in the last day, but {before:,} in the week before; is the chat on the site, "
            "and the server running?",
        )
    if lost:
        yield Finding("lost", f"{lost:,} questions of the last day could not be kept; was the disk full?")


def _spool(folder: Path, now: datetime) -> Iterator[Finding]:
    spool = Spool(folder)
    oldest = [path.stat().st_mtime for path in spool.files() if path.exists()]
    if oldest and now.timestamp() - min(oldest) > SPOOL_AGE.total_seconds():
        since = f"{datetime.fromtimestamp(min(oldest), UTC):%Y-%m-%d %H:%M}"
        yield Finding(
            "spool",
            f"{spool.count():,} questions wait in data/spool since {since} UTC; the log "
            "of `mogine serve` says why the database does not take them",
        )


def _disk(folder: Path, free_bytes: int | None) -> Iterator[Finding]:
    where = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(where)
    free = usage.free if free_bytes is None else free_bytes
    if free < MIN_FREE_BYTES or free < usage.total * MIN_FREE_SHARE:
        yield Finding(
            "disk",
            f"only {free / 1024**3:.1f} GiB are free on the disk of the data folder; "
            "`mogine cleanup` and `mogine kb compact` make room",
        )


def _backups(folder: Path, now: datetime) -> Iterator[Finding]:
    """Who never made a backup is not reminded; who did wants to know when they stop."""
    if not folder.is_dir():
        return
    made = [path.stat().st_mtime for path in folder.iterdir() if path.is_file()]
    if made and now.timestamp() - max(made) > BACKUP_AGE.total_seconds():
        days = (now.timestamp() - max(made)) / 86400
        yield Finding("backup", f"the newest backup in data/{BACKUPS} is {days:.0f} days old")
