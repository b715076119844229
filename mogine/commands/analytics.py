"""`mogine stats`, `queries`, `export` and `cleanup`: the record of questions on the command line."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from zoneinfo import ZoneInfo

import typer

from mogine.commands.shell import shell_of
from mogine.errors import SettingsError
from mogine.settings import Settings

if TYPE_CHECKING:
    from mogine.analytics.records import QueryRecord, Selection
    from mogine.analytics.reports import Statistics, Table
    from mogine.analytics.sqllines import Piece
    from mogine.analytics.store import AnalyticsStore

WATCH_EVERY_S = 2.0
FOLLOW_EVERY_S = 0.5
FOLLOW_BACK = timedelta(minutes=15)  # longer than any answer takes, so late ends are seen too
BARS = "▁▂▃▄▅▆▇█"
PIPE_WIDTH = 200
ROOMY_WIDTH = 96


class By(StrEnum):
    day = "day"
    hour = "hour"
    provider = "provider"
    model = "model"
    status = "status"
    error = "error"
    source = "source"
    page = "page"


class What(StrEnum):
    queries = "queries"
    stats = "stats"
    feedback = "feedback"
    gaps = "gaps"


class Format(StrEnum):
    csv = "csv"
    json = "json"
    ndjson = "ndjson"


Json = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of a table.")]


# --- stats ---------------------------------------------------------------------------------------


def stats(
    ctx: typer.Context,
    days: Annotated[int, typer.Option(help="How many whole days, today included.", min=1, max=3660)] = 30,
    by: Annotated[By, typer.Option(help="What the table has a row for.")] = By.day,
    compare: Annotated[bool, typer.Option("--compare", help="Beside the period before.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every few seconds.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First sum up all recorded rows anew.")] = False,
    as_json: Json = False,
) -> None:
    """Show what was asked, answered and spent.

    Examples:

      mogine stats

      mogine stats --days 7 --by provider --compare

      mogine stats --json | jq .totals

    The sums stay when `mogine cleanup` deletes rows. docs/analytics.md says what each number means.
    """
    from mogine.commands.console import safe_json

    settings = shell_of(ctx).existing()
    if rebuild:
        _rebuild(settings)
    if watch:
        _watch(settings, days, by, compare=compare, as_json=as_json)
    found = _look(settings, days, by)
    if as_json:
        typer.echo(safe_json(found.to_dict()))
    elif not found.totals["questions"] and not found.previous["questions"]:
        typer.echo(
            f"No questions in the last {days} days in {settings.home}. "
            "Start `mogine serve all`, ask something, and look again.",
            err=True,
        )
    else:
        _show_statistics(found, compare=compare)


def _look(settings: Settings, days: int, by: By) -> "Statistics":
    from mogine.analytics.records import Window
    from mogine.analytics.reports import statistics

    zone = ZoneInfo(settings.analytics.timezone)
    return statistics(_store(settings), Window.last_days(days, datetime.now(UTC), zone), by=by)


def _rebuild(settings: Settings) -> None:
    from mogine.analytics.upkeep import rebuild

    store = _store(settings)
    rows = rebuild(store) if store.exists() else 0
    typer.echo(f"summed {rows:,} recorded questions anew", err=True)


def _watch(settings: Settings, days: int, by: By, *, compare: bool, as_json: bool) -> NoReturn:
    """Until Ctrl-C: on a terminal the screen is drawn anew, in a pipe JSON lines follow each other."""
    from mogine.commands.console import out

    try:
        while True:
            found = _look(settings, days, by)
            if as_json:
                typer.echo(json.dumps(found.to_dict(), ensure_ascii=True))
            else:
                if out.is_terminal:
                    out.clear()
                _show_statistics(found, compare=compare)
            time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _show_statistics(found: "Statistics", *, compare: bool) -> None:
    zone = found.window.timezone
    first = found.window.since.astimezone(zone).date()
    last = (found.window.until - timedelta(seconds=1)).astimezone(zone).date()
    typer.echo(f"{first} to {last} ({zone})\n")
    totals, before = found.totals, found.previous
    rows = [
        (name, show(totals[key]), show(before[key]), _change(totals[key], before[key], show))
        for name, key, show in _TOTALS
        if totals[key] not in (None, 0) or (compare and before[key]) or key == "questions"
    ]
    heads = ("", "now", "before", "change") if compare else ("", "")
    _print_table(heads, [row[: len(heads)] for row in rows])
    waits = [
        (name, *(_ms(found.latency[key][p]) for p in ("p50", "p95", "p99")))
        for name, key in (("first token", "first_token_ms"), ("whole answer", "duration_ms"))
        if found.latency[key]["p50"] is not None
    ]
    if waits:
        _print_table(("waiting", "p50", "p95", "p99"), waits)
    _print_series(found.by, found.series)
    if found.by == "day":
        _print_top("question", found.top_questions)
        _print_top("source", found.top_sources)


def _print_series(by: str, series: "Table") -> None:
    from mogine.commands.console import out

    rows = series.to_dicts()
    most = max((row["questions"] for row in rows), default=0)
    if by in ("day", "hour"):
        typer.echo(f"questions by {by}: {_sparkline([row['questions'] for row in rows])}  (most: {most})\n")
        rows = [row for row in rows if row["questions"]]
    if not rows:
        typer.echo(f"nothing to show by {by}\n")
        return
    columns: list[tuple[str, Callable[[dict[str, Any]], str], bool]] = [
        (by, lambda row: str(row[by]) or "-", True),
        ("asked", lambda row: _count(row["questions"]), True),
        ("", lambda row: _bar(row["questions"], most), not out.is_terminal or out.width >= ROOMY_WIDTH),
        # Each visitor counts in the hour of the first question, which nobody would read out of a table.
        (
            "visitors",
            lambda row: _count(row["visitors"]),
            by != "hour" and any(row.get("visitors") for row in rows),
        ),
        ("answered", lambda row: _percent(row["answered_share"]), True),
        ("errors", lambda row: _count(row["errors"]), any(row["errors"] for row in rows)),
        (
            "up/down",
            lambda row: f"{row['thumbs_up']}/{row['thumbs_down']}",
            any(row["thumbs_up"] or row["thumbs_down"] for row in rows),
        ),
        ("tokens", lambda row: _count(row["prompt_tokens"] + row["completion_tokens"]), True),
        ("cost", lambda row: _cny(row["cost_cny"]), any(row["cost_cny"] for row in rows)),
        ("first", lambda row: _ms(row["first_token_ms_mean"]), True),
    ]
    bars = (0, 2) if columns[2][2] else (0,)
    kept = [(head, show) for head, show, is_wanted in columns if is_wanted]
    _print_table([head for head, _ in kept], [[show(row) for _, show in kept] for row in rows], left=bars)


def _print_top(name: str, table: "Table") -> None:
    rows = [(str(row["questions"]), str(row[name])) for row in table.to_dicts()[:10]]
    if rows:
        _print_table(("times", f"most frequent {name}s"), rows, left=(1,))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cny(value: float) -> str:
    return f"¥{value:,.4f}" if 0 < value < 1 else f"¥{value:,.2f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


def _count(value: int) -> str:
    return f"{value:,}"


_TOTALS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("questions", "questions", _count),
    ("visitors (per day)", "visitors", _count),
    ("of crawlers, besides", "bots", _count),
    ("answered", "answered_share", _percent),
    ("errors", "errors", _count),
    ("stopped by the visitor", "aborted", _count),
    ("refused", "refused", _count),
    ("thumbs up", "thumbs_up", _count),
    ("thumbs down", "thumbs_down", _count),
    ("tokens in", "prompt_tokens", _count),
    ("tokens out", "completion_tokens", _count),
    ("cost", "cost_cny", _cny),
)


def _change(now: float | None, before: float | None, show: Callable[[Any], str]) -> str:
    if show is _percent:
        return "-" if now is None or before is None else f"{100 * (now - before):+.1f} pt"
    return f"{(now or 0) / before - 1:+.0%}" if before else "-"


def _sparkline(values: Sequence[int]) -> str:
    most = max(values, default=0)
    return "".join(BARS[-(-v * (len(BARS) - 1) // most)] if most else BARS[0] for v in values)


def _bar(value: int, most: int) -> str:
    return "█" * max(1, round(8 * value / most)) if value else ""


# --- queries -------------------------------------------------------------------------------------


def queries(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as questions come.")] = False,
    status: Annotated[str, typer.Option(help="Only ok, error, aborted or refused.")] = "",
    search: Annotated[str, typer.Option(help="Only with this text in question or answer.")] = "",
    unanswered: Annotated[bool, typer.Option("--unanswered", help="Only what went unanswered.")] = False,
    number: Annotated[int, typer.Option("-n", "--number", help="How many.", min=1, max=100_000)] = 100,
    as_json: Json = False,
) -> None:
    """List recorded questions, newest first; with --follow, newest last.

    Examples:

      mogine queries -n 20

      mogine queries --follow --status error

      mogine queries --search 退款 --json
    """
    from mogine.analytics.records import STATUSES, Selection
    from mogine.analytics.store import MAX_SEARCH_CHARS

    settings = shell_of(ctx).existing()
    if status and status not in STATUSES:
        raise SettingsError(f"--status {status!r}: there are {', '.join(STATUSES)}")
    if len(search) > MAX_SEARCH_CHARS:
        raise SettingsError(f"--search takes at most {MAX_SEARCH_CHARS} characters")
    store = _store(settings)
    show = _json_line if as_json else _line_printer(ZoneInfo(settings.analytics.timezone))
    selection = Selection(status=status, search=search, unanswered=unanswered)
    known = _recent(store, selection) if follow else {}
    records = store.page(selection, limit=number).records
    if not records and not follow and not as_json:
        typer.echo(f"No questions recorded in {settings.home} that fit.", err=True)
    for record in reversed(records) if follow else records:
        typer.echo(show(record))
    if follow:
        try:
            known |= {record.id: record.started_at for record in records}
            for record in _news(store, selection, known):
                typer.echo(show(record))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _recent(store: "AnalyticsStore", selection: "Selection") -> dict[str, datetime]:
    """Ids of the rows of the last minutes: those that need not be told as news."""
    since = datetime.now(UTC) - FOLLOW_BACK
    return {record.id: record.started_at for record in store.iterate(replace(selection, since=since))}


def _news(
    store: "AnalyticsStore", selection: "Selection", seen: dict[str, datetime]
) -> Iterator["QueryRecord"]:
    """Rows as they come. A long answer ends after shorter ones that began later, so the last minutes
    are looked at again each time."""
    while True:
        since = datetime.now(UTC) - FOLLOW_BACK
        seen = {id: at for id, at in seen.items() if at >= since}
        for record in store.iterate(replace(selection, since=since)):
            if record.id not in seen:
                seen[record.id] = record.started_at
                yield record
        time.sleep(FOLLOW_EVERY_S)


def _json_line(record: "QueryRecord") -> str:
    from mogine.analytics.export import to_dict
    from mogine.commands.console import safe_json

    # On one line; line breaks within texts are escaped already.
    return " ".join(line.strip() for line in safe_json(to_dict(record)).split("\n"))


def _line_printer(zone: ZoneInfo) -> Callable[["QueryRecord"], str]:
    from mogine.commands.console import safe_line

    def line(record: "QueryRecord") -> str:
        at = f"{record.started_at.astimezone(zone):%Y-%m-%d %H:%M:%S}"
        outcome = f"{record.status} {record.error_type}".strip()
        words = f"{at}  {safe_line(outcome, 40):<12} {safe_line(record.provider, 20):<10}"
        return f"{words} {_ms(record.duration_ms):>8}  {safe_line(record.question, 300) or '-'}"

    return line


# --- export --------------------------------------------------------------------------------------


def export(
    ctx: typer.Context,
    what: Annotated[What, typer.Argument(help="Rows, daily numbers, thumbs or gaps.")] = What.queries,
    format: Annotated[Format, typer.Option(help="The kind of file.")] = Format.csv,
    days: Annotated[
        int | None, typer.Option(help="Only the last whole days; everything otherwise.", min=1, max=3660)
    ] = None,
    excel: Annotated[bool, typer.Option("--excel", help="CSV that Excel reads as UTF-8.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file; standard output otherwise.")
    ] = None,
) -> None:
    """Write the record as CSV, JSON or NDJSON, any size.

    Examples:

      mogine export --days 30 --excel -o questions.csv

      mogine export stats --format json

      mogine export feedback --format ndjson | jq .comment
    """
    from mogine.analytics.export import feedback_to_dict, render
    from mogine.analytics.lines import render_rows
    from mogine.analytics.records import Selection, Window
    from mogine.analytics.reports import statistics

    settings = shell_of(ctx).existing()
    store = _store(settings)
    zone = ZoneInfo(settings.analytics.timezone)
    window = Window.last_days(days or 30, datetime.now(UTC), zone)
    since = window.since if days else None
    pieces: Iterable[str | bytes]
    match what:
        case What.queries:
            selection = Selection(since=since)
            rows = render_rows(store, selection, format, bom=excel, helped=True)
            pieces = _counted(rows, lambda: store.count(selection))
        case What.stats:
            pieces = render(statistics(store, window).series.to_dicts(), format, bom=excel)
        case What.feedback:
            given = (feedback_to_dict(row) for row in store.iterate_feedback(since))
            pieces = render(given, format, bom=excel)
        case What.gaps:
            pieces = render(_gap_rows(settings), format, bom=excel)
    if output is None or str(output) == "-":
        sys.stdout.buffer.writelines(map(_bytes, pieces))
        sys.stdout.buffer.flush()
        return
    _write_file(output, pieces)
    typer.echo(f"written: {output} ({output.stat().st_size:,} bytes)", err=True)


def _gap_rows(settings: Settings) -> list[dict[str, Any]]:
    """Every gap, one level deep, so that it fits into a table."""
    from mogine.gaps.loop import open_gaps

    room = open_gaps(settings)
    refreshed = room.refresh()
    if refreshed.problem:
        typer.echo(f"warning: not all could be looked at: {refreshed.problem}", err=True)
    rows = []
    for gap in (gap.to_dict() for gap in room.listed()[0]):
        nearest, test, evidence = (gap.pop(name) or {} for name in ("nearest", "test", "evidence"))
        rows.append(
            {
                **gap,
                "nearest_source": nearest.get("source", ""),
                "nearest_heading": nearest.get("heading", ""),
                "nearest_score": nearest.get("score"),
                "expect": test.get("document") or test.get("contains", ""),
                "passed": evidence.get("passed"),
                "rank": evidence.get("rank"),
                "generation": evidence.get("generation", ""),
            }
        )
    return rows


def _bytes(piece: str | bytes) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _write_file(path: Path, pieces: Iterable[str | bytes]) -> None:
    """All or nothing: a run that fails leaves what was there before. Questions are nobody else's business."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(map(_bytes, pieces))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror or error}") from error


def _counted(pieces: Iterator["Piece"], count: Callable[[], int]) -> Iterator[bytes]:
    """The bytes of `pieces`, with a bar on stderr when somebody is looking at it."""
    if not sys.stderr.isatty():
        yield from (piece.data for piece in pieces)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mogine.commands.console import err

    columns = ("exporting", BarColumn(), MofNCompleteColumn(), "left", TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=count())
        for piece in pieces:
            yield piece.data
            progress.advance(task, piece.rows)


# --- cleanup -------------------------------------------------------------------------------------


def cleanup(
    ctx: typer.Context,
    older_than: Annotated[
        str, typer.Option(help="Age such as 90d or 12w; MOGINE_RETENTION_DAYS otherwise.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also when the clock looks wrong.")] = False,
    as_json: Json = False,
) -> None:
    """Delete old rows for good, and give their space back to the disk; silent for cron when there are none.

    Examples:

      mogine cleanup --dry-run

      mogine cleanup --older-than 90d

      17 3 * * *  mogine --home /srv/mogine cleanup      (a line for cron)
    """
    from mogine.analytics.retention import cleanup as clean_up

    settings = shell_of(ctx).existing()
    days = _age_days(older_than) if older_than else settings.analytics.retention_days
    done = clean_up(_store(settings), days, dry_run=dry_run, force=force)
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    elif dry_run:
        size = _size(done.bytes_estimated)
        typer.echo(f"would delete {done.rows:,} questions older than {days} days (about {size})")
    elif done.rows:
        freed = f"{_size(done.bytes_freed)} freed"
        if settings.analytics.database_url and not done.bytes_freed:
            freed = "their room in PostgreSQL is free for new ones"
        typer.echo(f"deleted {done.rows:,} questions older than {days} days, {freed}")
        if not done.erased:
            typer.echo(
                "deleted text stays in the journal until a running reader ends; run again later", err=True
            )
    elif sys.stderr.isatty():
        typer.echo(f"nothing is older than {days} days", err=True)


def _age_days(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,5})([dw]?)", text.strip().lower())
    days = int(match[1]) * (7 if match[2] == "w" else 1) if match else 0
    if not 1 <= days <= 3660:
        raise SettingsError(f"--older-than {text!r}: expected an age such as 90d or 12w, up to 3660 days")
    return days


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


# --- what all of them need -----------------------------------------------------------------------


def _store(settings: Settings) -> "AnalyticsStore":
    from mogine.analytics.store import open_store

    return open_store(settings)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> None:
    """Columns in line, numbers to the right; no lines, colours or blank ends in a pipe."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from mogine.commands.console import out, safe_line

    table = RichTable(box=None, padding=(0, 2, 0, 0), show_header=any(heads), header_style="bold")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(safe_line(value, 120)) for value in row))
    if out.is_terminal:
        out.print(table)
        out.print()
        return
    plain = StringIO()
    Console(file=plain, width=PIPE_WIDTH, color_system=None).print(table)
    typer.echo("\n".join(line.rstrip() for line in plain.getvalue().splitlines()) + "\n")
