"""`mogine kb ingest`: documents in, once or whenever they change, and what is told of it."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mogine.commands import console
from mogine.commands.console import safe_json, safe_line
from mogine.commands.gaps import print_changes
from mogine.commands.kbtests import FOUND_SOMETHING, print_verdict, verdict_dict
from mogine.commands.knowledge import tests_path
from mogine.commands.shell import shell_of
from mogine.errors import Forbidden, Locked, MogineError, RequestError, UnreadableDocument

if TYPE_CHECKING:
    from mogine.ingest.pipeline import Summary
    from mogine.ingest.web import Web
    from mogine.settings import Settings

SHOWN_SKIPPED = 40
WATCH_S = 1.0


class GateMode(StrEnum):
    """What the tests of kb-tests.jsonl may do to an ingest."""

    STRICT = "strict"
    WARN = "warn"
    OFF = "off"


def ingest(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH|URL...", help="Files, folders with all below, pages, sitemaps."),
    ],
    gate: Annotated[
        GateMode,
        typer.Option(
            help="When a test of kb-tests.jsonl gets worse: keep the old documents, tell, or do not ask."
        ),
    ] = GateMode.WARN,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would change, change nothing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, and take in every change of the files.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, max=32, help="Documents read at once; 0: one a core.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of words.")
    ] = False,
) -> None:
    """Take documents in: Markdown, text, HTML, CSV, PDF, DOCX, XLSX and PPTX, from disk or from the web.

    Examples:

      mogine kb ingest ./docs

      mogine kb ingest handbook.pdf faq.csv --json

      mogine kb ingest https://www.example.com/sitemap.xml

      mogine kb ingest ./docs --gate strict --dry-run

    What has not changed is skipped, and documents that are gone from the given folders are taken out. Servers
    that run take up the change by themselves. Ctrl-C leaves everything as it was. Exit code 3 when the gate
    kept the old documents.
    """
    order = Order(tuple(paths), gate.value, jobs, dry_run)
    settings = shell_of(ctx).settings
    if watch:
        if dry_run:
            raise RequestError("--watch and --dry-run do not go together")
        _watch(order, settings, as_json=as_json)
        return
    summary = take_in(order, settings)
    _tell(summary, is_dry_run=dry_run, as_json=as_json)
    _settle_gaps(summary, settings)
    if summary.is_held_back:
        raise typer.Exit(FOUND_SOMETHING)
    if not summary.took_anything:
        raise UnreadableDocument(_why_nothing(summary))


@dataclass(frozen=True, slots=True)
class Order:
    """What `ingest` was asked to do."""

    paths: tuple[str, ...]
    gate: Literal["strict", "warn", "off"] = "warn"
    jobs: int = 0
    is_dry_run: bool = False


def take_in(order: Order, settings: "Settings") -> "Summary":
    """Ingest into the home of `settings`, with a bar on the terminal."""
    from mogine.ingest.find import is_address
    from mogine.ingest.pipeline import SEEN_NAME, Gate, Progress, Summary, ingest
    from mogine.kb.embedders import open_embedder
    from mogine.kb.gate import load_tests
    from mogine.kb.generations import Generations

    urls = [path for path in order.paths if is_address(path)]
    tests = load_tests(tests_path(settings.home)) if order.gate != "off" else []
    summary = Summary()
    with ExitStack() as stack:
        bar = stack.enter_context(_progress())
        web = stack.enter_context(closing(_open_web(urls, settings))) if urls else None
        steps = ingest(
            [Path(path).expanduser() for path in order.paths if path not in urls],
            Generations(settings.kb_path),
            open_embedder(settings),
            base=settings.home,
            own=[settings.data_path],
            urls=urls,
            web=web,
            gate=Gate(tuple(tests), order.gate),
            jobs=order.jobs or min(4, os.cpu_count() or 1),
            is_dry_run=order.is_dry_run,
            seen_path=settings.kb_path / SEEN_NAME,
            on_embedded=bar.embedded,
        )
        for step in steps:
            if isinstance(step, Progress):
                bar.move(step.done, step.total, step.source)
            else:
                summary = step
    return summary


def _open_web(urls: list[str], settings: "Settings") -> "Web":
    """For fetching `urls`. Raises Forbidden for one that is never fetched."""
    from mogine.ingest.web import Web

    web = Web(hosts=settings.kb.ingest_hosts)
    for url in urls:
        try:
            web.checked(url)
        except Forbidden as error:
            web.close()
            raise Forbidden(f"{safe_line(url, 200)} {error.message}", reason=error.reason) from error
    return web


def _watch(order: Order, settings: "Settings", *, as_json: bool) -> None:
    """Take in, look for changes every second, and once they have come to rest take in again; until Ctrl-C."""
    from mogine.ingest.find import find, is_address

    paths = [Path(path).expanduser() for path in order.paths if not is_address(path)]
    if not paths:
        raise RequestError("--watch follows files and folders; no address tells when it changes")

    def look() -> frozenset[tuple[str, int, int]]:
        marks = []
        for source, path in find(paths, settings.home, [settings.data_path]).files.items():
            with suppress(OSError):
                status = path.stat()
                marks.append((source, status.st_size, status.st_mtime_ns))
        return frozenset(marks)

    done: frozenset[tuple[str, int, int]] | None = None
    last = look()
    problem = ""
    while True:
        try:
            now = look()
            # Half-written files change again: only what stayed the same for a whole look is taken.
            if now != done and now == last:
                summary = take_in(order, settings)
                done = now
                order = replace(order, paths=tuple(str(path) for path in paths))
                if summary.changes_anything or not problem:
                    _tell(summary, is_dry_run=False, as_json=as_json)
                    _settle_gaps(summary, settings)
                problem = ""
            last = now
        except (Locked, RequestError, UnreadableDocument) as error:
            if error.message != problem:
                console.err.print(f"mogine: {safe_line(error.message)}")
            problem = error.message
        time.sleep(WATCH_S)


class _Bar:
    """What moves on a terminal while documents are taken in; does nothing in a pipe."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None, passages=0, rate="")
        self._passages = 0
        self._started = time.monotonic()

    def move(self, done: int, total: int, source: str) -> None:
        what = safe_line(source, 40) if source else "finishing"
        self._progress.update(self._task, completed=done, total=total, description=what)

    def embedded(self, count: int) -> None:
        self._passages += count
        rate = self._passages / max(0.1, time.monotonic() - self._started)
        self._progress.update(self._task, passages=self._passages, rate=f"{rate:.0f}/s")


@contextmanager
def _progress() -> Iterator[_Bar]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passages]} passages {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console.err, transient=True, disable=not console.err.is_terminal
    ) as progress:
        yield _Bar(progress)


def _tell(summary: "Summary", *, is_dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(safe_json({**_summary_dict(summary), "dry_run": is_dry_run}))
        return
    _print_summary(summary, is_dry_run=is_dry_run)
    if summary.verdict:
        print_verdict(summary.verdict)
    if summary.is_held_back:
        console.err.print(
            f"generation {summary.generation or '(none)'} serves on, because the gate is strict and a test "
            "got worse; `--gate warn` takes the documents in all the same"
        )


def _settle_gaps(summary: "Summary", settings: "Settings") -> None:
    """Gaps whose tests pass in the new generation close; those whose tests fail now are open again."""
    if summary.verdict is None or summary.is_held_back:
        return
    if not (settings.analytics_path.exists() or settings.analytics.database_url):
        return
    from mogine.gaps.loop import open_gaps

    try:
        outcomes = [change.after for change in summary.verdict.changes]
        print_changes(open_gaps(settings).settle(outcomes))
    except MogineError as error:
        # The documents serve; the next look at the gaps finds the same.
        console.err.print(f"warning: gaps were not looked at: {safe_line(error.message)}")


def _print_plan(summary: "Summary") -> None:
    for name in ("added", "changed", "removed"):
        for source in getattr(summary, name):
            console.out.print(f"would be {name}: {safe_line(source)}")
    console.out.print(f"{len(summary.unchanged)} unchanged, {summary.passages} passages would be written")


def _print_counts(summary: "Summary") -> None:
    from rich.table import Table

    if summary.is_held_back:
        console.out.print("nothing was changed; this is what was to be:")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("added", "changed", "unchanged", "removed", "skipped"):
        table.add_row(name, str(len(getattr(summary, name))))
    console.out.print(table)
    if not summary.is_held_back:
        console.out.print(
            f"{summary.documents_in_all} documents, {summary.passages_in_all} passages in generation "
            f"{summary.generation}; {summary.passages} passages written in {summary.seconds:.1f} s"
        )


def _print_summary(summary: "Summary", *, is_dry_run: bool) -> None:
    from rich.table import Table

    if is_dry_run:
        _print_plan(summary)
    elif summary.took_anything:
        _print_counts(summary)
    if summary.re_embedded:
        console.err.print("the embedder has changed, so every passage was embedded again")
    if summary.skipped or summary.notes:
        table = Table("file", "why", title="not taken, or not all of it", title_justify="left", box=None)
        entries = (*summary.notes, *summary.skipped)
        for entry in entries[:SHOWN_SKIPPED]:
            table.add_row(safe_line(entry.source, 120), safe_line(entry.reason))
        console.err.print(table)
        for reason, count in Counter(entry.reason for entry in entries[SHOWN_SKIPPED:]).most_common():
            console.err.print(f"  and {count} more: {safe_line(reason)}")


def _why_nothing(summary: "Summary") -> str:
    reasons = Counter(entry.reason for entry in summary.skipped)
    told = "; ".join(
        f"{next(e.source for e in summary.skipped if e.reason == reason)} {reason}"
        + (f" (and {count - 1} more like it)" if count > 1 else "")
        for reason, count in reasons.most_common(3)
    )
    return safe_line(f"nothing was taken in: {told or 'no file was named'}", 1000)


def _summary_dict(summary: "Summary") -> dict[str, Any]:
    return {
        "generation": summary.generation,
        "added": summary.added,
        "changed": summary.changed,
        "unchanged": summary.unchanged,
        "removed": summary.removed,
        "skipped": [{"source": e.source, "reason": e.reason} for e in summary.skipped],
        "notes": [{"source": e.source, "note": e.reason} for e in summary.notes],
        "passages": summary.passages,
        "documents_in_all": summary.documents_in_all,
        "passages_in_all": summary.passages_in_all,
        "re_embedded": summary.re_embedded,
        "seconds": round(summary.seconds, 3),
        "held_back": summary.is_held_back,
        "tests": verdict_dict(summary.verdict) if summary.verdict else None,
    }
