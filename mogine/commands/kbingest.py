"""`mogine kb ingest`: documents in, once or whenever they change, and what is told of it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
    from mogine.kb.embedders import Embedder
    from mogine.settings import Settings

SHOWN_SKIPPED = 40
SHOWN_NAMES = 3
INTERRUPTED = 130
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
    with _telling_of_ctrl_c(settings):
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


def take_in(order: Order, settings: "Settings", embedder: "Embedder | None" = None) -> "Summary":
    """Ingest into the home of `settings`, with a bar on the terminal; `embedder` is one that stays open."""
    from mogine.ingest.find import is_address
    from mogine.ingest.pipeline import SEEN_NAME, Gate, Progress, Summary, ingest
    from mogine.kb.embedders import open_embedder
    from mogine.kb.gate import load_tests
    from mogine.kb.generations import Generations

    urls = [path for path in order.paths if is_address(path)]
    tests = load_tests(tests_path(settings.home)) if order.gate != "off" else []
    summary = Summary()
    with ExitStack() as stack:
        model = embedder or stack.enter_context(closing(open_embedder(settings)))
        bar = stack.enter_context(_progress())
        web = stack.enter_context(closing(_open_web(urls, settings))) if urls else None
        steps = ingest(
            [Path(path).expanduser() for path in order.paths if path not in urls],
            Generations.of(settings),
            model,
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


@contextmanager
def _telling_of_ctrl_c(settings: "Settings") -> Iterator[None]:
    """Ends with exit code 130 and says what an interrupted run has left: nothing, but for the last moment."""
    from mogine.kb.generations import Generations

    before = Generations(settings.kb_path).current_name()
    try:
        yield
    except KeyboardInterrupt:
        now = Generations(settings.kb_path).current_name()
        console.err.print(
            "interrupted; the knowledge base is as it was, and the next run takes over what was embedded"
            if now == before
            else f"interrupted when all was done: generation {now} serves"
        )
        raise typer.Exit(INTERRUPTED) from None


def _watch(order: Order, settings: "Settings", *, as_json: bool) -> None:
    """Take in, look for changes every second, and once they have come to rest take in again; until Ctrl-C."""
    from mogine.ingest.find import is_address
    from mogine.kb.embedders import open_embedder

    paths = [Path(path).expanduser() for path in order.paths if not is_address(path)]
    if not paths:
        raise RequestError("--watch follows files and folders; no address tells when it changes")
    with closing(open_embedder(settings)) as embedder:
        watcher = _Watcher(order, settings, paths, embedder, as_json=as_json)
        try:
            while True:
                watcher.look()
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


class _Watcher:
    """What `--watch` knows from one look to the next."""

    def __init__(
        self, order: Order, settings: "Settings", paths: list[Path], embedder: "Embedder", *, as_json: bool
    ) -> None:
        self._order = order
        self._settings = settings
        self._paths = paths
        self._embedder = embedder
        self._as_json = as_json
        self._last = self._marks()
        self._done: frozenset[tuple[str, int, int]] | None = None
        self._problem = ""
        self._skipped: frozenset[object] = frozenset()

    def look(self) -> None:
        """Take in what has changed since the last time, and has come to rest."""
        try:
            now = self._marks()
            # Half-written files change again: only what stayed the same for a whole look is taken.
            if now != self._done and now == self._last:
                with _telling_of_ctrl_c(self._settings):
                    summary = take_in(self._order, self._settings, self._embedder)
                self._tell(summary)
                self._done = now
                self._order = replace(self._order, paths=tuple(str(path) for path in self._paths))
            self._last = now
        except (Locked, RequestError, UnreadableDocument) as error:
            if error.message != self._problem:
                console.err.print(f"mogine: {safe_line(error.message)}")
            self._problem = error.message

    def _marks(self) -> frozenset[tuple[str, int, int]]:
        from mogine.ingest.find import find

        marks = []
        for source, path in find(self._paths, self._settings.home, [self._settings.data_path]).files.items():
            with suppress(OSError):
                status = path.stat()
                marks.append((source, status.st_size, status.st_mtime_ns))
        return frozenset(marks)

    def _tell(self, summary: "Summary") -> None:
        """All of it the first time, then a line for each change."""
        if self._as_json or summary.is_held_back or self._done is None:
            if summary.changes_anything or not self._problem:
                _tell(summary, is_dry_run=False, as_json=self._as_json)
            if self._done is None and not self._as_json:
                names = ", ".join(safe_line(str(path), 100) for path in self._paths)
                console.err.print(f"watching {names}; Ctrl-C ends")
        else:
            self._tell_change(summary)
        self._problem = ""
        self._skipped = frozenset(summary.skipped)
        _settle_gaps(summary, self._settings)

    def _tell_change(self, summary: "Summary") -> None:
        at = time.strftime("%H:%M:%S")
        for entry in summary.skipped:
            if entry not in self._skipped:
                console.err.print(f"{at}  {safe_line(entry.source, 120)} {safe_line(entry.reason)}")
        if not summary.changes_anything:
            return
        parts = [
            f"{name} {_some(sources)}"
            for name in ("added", "changed", "removed")
            if (sources := getattr(summary, name))
        ]
        console.out.print(
            f"{at}  {'; '.join(parts)}  ({summary.documents_in_all} documents, "
            f"{summary.passages_in_all} passages, generation {summary.generation}, {summary.seconds:.1f} s)"
        )
        if summary.verdict:
            print_verdict(summary.verdict)


def _some(sources: tuple[str, ...]) -> str:
    """The first few of them."""
    shown = ", ".join(safe_line(source, 120) for source in sources[:SHOWN_NAMES])
    return f"{shown} and {len(sources) - SHOWN_NAMES} more" if len(sources) > SHOWN_NAMES else shown


class _Bar:
    """What moves on a terminal while documents are taken in; does nothing in a pipe."""

    def __init__(self, progress: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None, passages=0, rate="", left="")
        self._passages = 0
        self._clock = clock
        self._started = clock()
        self._first: int | None = None
        self._done = 0
        self._total = 0

    def move(self, done: int, total: int, source: str) -> None:
        if self._first is None:
            self._first = done
        self._done, self._total = done, total
        what = safe_line(source, 40) if source else "finishing"
        self._progress.update(self._task, completed=done, total=total, description=what)

    def embedded(self, count: int) -> None:
        """The time that is left is told from here on: reading alone goes fast and says nothing of it."""
        self._passages += count
        spent = max(0.1, self._clock() - self._started)
        through = self._done - (self._first or 0)
        left = f"{_minutes(spent / through * (self._total - self._done))} left" if through > 0 else ""
        self._progress.update(
            self._task, passages=self._passages, rate=f"{self._passages / spent:.0f}/s", left=left
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def _progress() -> Iterator[_Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passages]} passages {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
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
        entries = getattr(summary, name)
        is_told = name != "skipped" and 0 < len(entries) <= SHOWN_NAMES
        table.add_row(name, str(len(entries)), _some(entries) if is_told else "")
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
    if not summary.took_anything and len(summary.skipped) <= SHOWN_NAMES:
        return  # the error names each of them
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
