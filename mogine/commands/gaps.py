"""`mogine gaps`: what visitors asked and the documents did not answer, until a test proves that they do."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from mogine.commands import console
from mogine.commands.console import safe_json, safe_line
from mogine.commands.shell import Shell, shell_of

if TYPE_CHECKING:
    from mogine.analytics.unanswered import Gap
    from mogine.gaps.loop import Change, Gaps, Refreshed

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

SHOWN = 20
WANTED = ("open", "accepted")
SHOWN_QUESTIONS = 10
# As a person says it; the API has the words of mogine/analytics/records.py.
SIGNAL_WORDS = {
    "no_passage": "no passage",
    "declined": "not in the documents",
    "thumbs_down": "thumbs down",
    "rephrased": "asked again",
    "handoff": "wanted a person",
}
STATUS_COLOURS = {"open": "yellow", "accepted": "cyan", "closed": "green", "ignored": "bright_black"}

Json = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of words.")]
Id = Annotated[int, typer.Argument(metavar="ID", help="The number that the list shows.", show_default=False)]


class Status(StrEnum):
    """Which gaps are listed."""

    todo = "todo"
    open = "open"
    accepted = "accepted"
    closed = "closed"
    ignored = "ignored"
    all = "all"


Which = Annotated[Status, typer.Option("--status", help="todo: open and accepted ones.")]
Most = Annotated[int, typer.Option("-n", "--number", help="At most how many.", min=1, max=10_000)]


@app.callback()
def gaps(
    ctx: typer.Context, status: Which = Status.todo, number: Most = SHOWN, as_json: Json = False
) -> None:
    """List what visitors asked and the documents did not answer, the most wanted first.

    Examples:

      mogine gaps

      mogine gaps show 12

      mogine gaps accept 12 --expect docs/instalments.md   (then write it, and mogine kb ingest ./docs)

      mogine gaps ignore 13 --reason "not our business"

      mogine gaps list --status closed --json

    A gap closes by itself when the new documents answer it, and opens again when they do not any more.
    """
    if not ctx.invoked_subcommand:
        list_(ctx, status, number, as_json)


@app.command("list")
def list_(
    ctx: typer.Context, status: Which = Status.todo, number: Most = SHOWN, as_json: Json = False
) -> None:
    """List gaps, the most wanted first: by visitors, those of today more than those of last month.

    Examples:

      mogine gaps list

      mogine gaps list --status all -n 100 --json | jq '.gaps[].question'
    """
    room = _open(shell_of(ctx))
    refreshed = room.refresh()
    wanted = {"todo": WANTED, "all": ("open", "accepted", "closed", "ignored")}
    found, counts = room.listed(wanted.get(status.value, (status.value,)))
    if as_json:
        body = {"gaps": [gap.to_dict() for gap in found[:number]], "counts": counts, **_told(refreshed)}
        typer.echo(safe_json(body))
        return
    _tell(refreshed)
    if not console.out.is_terminal:
        for gap in found[:number]:
            typer.echo("\t".join(_cells(gap)))
        return
    _print_head(counts, refreshed.generation)
    zone = _zone(ctx)
    for gap in found[:number]:
        _print_gap(gap, zone)
    if len(found) > number:
        console.err.print(f"and {len(found) - number} more: -n {len(found)}")
    _print_next(found, status)


@app.command()
def show(ctx: typer.Context, id: Id, as_json: Json = False) -> None:
    """Show a gap: who asked what and when, what comes nearest, and how it came to its status.

    Examples:

      mogine gaps show 12
    """
    room = _open(shell_of(ctx))
    refreshed = room.refresh()
    detail = room.detail(id)
    if as_json:
        questions = [
            {
                "id": q.id,
                "at": q.at.isoformat(),
                "question": q.question,
                "signals": list(q.signals),
                "top_score": q.top_score,
            }
            for q in detail.questions
        ]
        steps = [{"at": s.at.isoformat(), "status": s.status, "detail": s.detail} for s in detail.history]
        typer.echo(safe_json({**detail.gap.to_dict(), "questions": questions, "history": steps}))
        return
    _tell(refreshed)
    zone = _zone(ctx)
    _print_gap(detail.gap, zone)
    if detail.gap.nearest.text and detail.gap.status in WANTED:
        typer.echo(f"     {safe_line(detail.gap.nearest.text, 300)}\n")
    for question in detail.questions[:SHOWN_QUESTIONS]:
        why = ", ".join(SIGNAL_WORDS[signal] for signal in question.signals)
        at = f"{question.at.astimezone(zone):%Y-%m-%d %H:%M}"
        typer.echo(f"     {at}  {safe_line(question.question, 200)}  ({why})")
    if detail.gap.asked > SHOWN_QUESTIONS:
        typer.echo(f"     and {detail.gap.asked - SHOWN_QUESTIONS:,} more")
    if detail.history:
        typer.echo("")
    for step in detail.history:
        typer.echo(
            f"     {step.at.astimezone(zone):%Y-%m-%d %H:%M}  {step.status}: {safe_line(step.detail, 300)}"
        )


@app.command()
def accept(
    ctx: typer.Context,
    id: Id,
    expect: Annotated[
        str, typer.Option("--expect", "-e", help="The document that shall answer it; it need not exist yet.")
    ],
    contains: Annotated[str, typer.Option("--contains", "-c", help="Text that the passage must hold.")] = "",
    question: Annotated[
        str, typer.Option("--question", "-q", help="Ask it in these words, not in those of the list.")
    ] = "",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=50, help="Among the first how many.")] = 3,
) -> None:
    """Say which document shall answer a gap: writes a test into kb-tests.jsonl that must pass.

    Examples:

      mogine gaps accept 12 --expect docs/instalments.md

      mogine gaps accept 12 -e docs/payment.md -c 花呗 -q 可以用花呗分期吗

    Then write the document and run `mogine kb ingest ./docs`: it asks the test, and the gap closes.
    """
    shell = shell_of(ctx)
    room = _open(shell)
    document = _source(expect, shell.home)
    test = room.accept(id, expect=document, contains=contains, question=question, top_k=top_k)
    refreshed = room.refresh()
    _tell(replace(refreshed, changes=tuple(c for c in refreshed.changes if c.id != id)))
    gap = room.detail(id).gap
    typer.echo(f"gap {id} waits for {safe_line(document, 200)}: {safe_line(test.question, 200)}")
    if gap.status == "closed":
        typer.echo(f"it is closed at once: {safe_line(gap.evidence.why or _found(gap), 300)}")
    elif gap.evidence.passed:
        typer.echo(
            f"warning: {_found(gap)}, and the question went unanswered all the same: read that document as a "
            "visitor would. The gap closes with a newer generation that passes",
            err=True,
        )
    else:
        if gap.evidence.why:
            typer.echo(f"now: {safe_line(gap.evidence.why, 300)}")
        typer.echo("next: write the document, then `mogine kb ingest ./docs`", err=True)


@app.command()
def ignore(
    ctx: typer.Context,
    id: Id,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; whoever looks next will want to know.")],
) -> None:
    """Put a gap aside, with a reason: questions like it are not shown any more.

    Examples:

      mogine gaps ignore 13 --reason "about another company"
    """
    room = _open(shell_of(ctx))
    room.ignore(id, reason)
    typer.echo(f"gap {id} is ignored: {safe_line(reason, 300)}")


@app.command()
def reopen(ctx: typer.Context, id: Id) -> None:
    """Open a gap again that was accepted, closed or ignored; its test stays in kb-tests.jsonl.

    Examples:

      mogine gaps reopen 13
    """
    room = _open(shell_of(ctx))
    room.reopen(id)
    typer.echo(f"gap {id} is open")


def print_changes(changes: "tuple[Change, ...]") -> None:
    """Gaps that have closed, or are open again, each on a line of stderr."""
    for change in changes:
        word = "closed" if change.status == "closed" else "open again"
        question, detail = safe_line(change.question, 80), safe_line(change.detail, 200)
        console.err.print(f"gap {change.id} {word}: {question} ({detail})")


# --- words and lines ---------------------------------------------------------------------------------


def _open(shell: Shell) -> "Gaps":
    from mogine.gaps.loop import open_gaps

    return open_gaps(shell.existing())


def _zone(ctx: typer.Context) -> ZoneInfo:
    return ZoneInfo(shell_of(ctx).settings.analytics.timezone)


def _source(expect: str, home: Path) -> str:
    """A path as the knowledge base names it: as seen from the home."""
    path = Path(expect).expanduser()
    if path.is_absolute() or expect.startswith(("./", "../")):
        return os.path.relpath(path.resolve(), home.resolve())
    return expect


def _told(refreshed: "Refreshed") -> dict[str, Any]:
    return {
        "generation": refreshed.generation,
        "waiting": refreshed.waiting,
        "problem": refreshed.problem or None,
        "changes": [
            {"id": c.id, "status": c.status, "question": c.question, "detail": c.detail}
            for c in refreshed.changes
        ],
    }


def _tell(refreshed: "Refreshed") -> None:
    print_changes(refreshed.changes)
    if refreshed.problem:
        console.err.print(f"warning: not all could be looked at: {safe_line(refreshed.problem, 300)}")
    if refreshed.waiting:
        console.err.print(f"{refreshed.waiting:,} more questions wait for the next look: run this again")


def _print_head(counts: dict[str, int], generation: str) -> None:
    from rich.text import Text

    head = Text()
    for status, count in counts.items():
        head.append(f"{count} {status}", style=STATUS_COLOURS[status] if count else "bright_black")
        head.append("  ")
    console.out.print(head.append(f"documents: {generation or 'none yet'}", style="bright_black"))
    console.out.print()


def _print_gap(gap: "Gap", zone: ZoneInfo) -> None:
    from rich.text import Text

    first = Text(f"{gap.id:>4}", style="bold")
    first.append(f" {safe_line(gap.question, 300)}", style="bold")
    if gap.status != "open" or gap.reason:
        first.append(
            f"  {gap.status if gap.status != 'open' else 'open again'}", style=STATUS_COLOURS[gap.status]
        )
    console.out.print(first)
    why = ", ".join(
        SIGNAL_WORDS[name] + (f" ({count:,})" if gap.asked > 1 else "")
        for name, count in gap.signals.items()
        if count
    )
    asked = (
        f"{_times(gap.visitors, 'visitor')}, {_times(gap.asked, 'question')}, last {_ago(gap.last_at, zone)}"
    )
    console.out.print(Text(f"     {asked}; {why}"))
    if gap.evidence.passed:
        console.out.print(Text(f"     {safe_line(_found(gap), 300)}", style="green"))
    elif gap.test:
        wanted = str(gap.test.get("document") or gap.test.get("contains"))
        now = f"; now: {gap.evidence.why}" if gap.evidence.why and not gap.reason else ""
        console.out.print(Text(f"     waits for {safe_line(wanted + now, 300)}", style="cyan"))
    if gap.reason:
        console.out.print(Text(f"     {safe_line(gap.reason, 300)}"))
    if gap.status in WANTED and gap.nearest.generation:
        console.out.print(Text(f"     nearest: {safe_line(_nearest(gap), 200)}", style="bright_black"))
    console.out.print()


def _found(gap: "Gap") -> str:
    return f"found at rank {gap.evidence.rank} in generation {gap.evidence.generation}"


def _nearest(gap: "Gap") -> str:
    nearest = gap.nearest
    if nearest.score is None:
        return "no passage at all"
    title = " > ".join(part for part in (nearest.title, nearest.heading) if part)
    return f"{nearest.score:.2f}  {nearest.source or nearest.url}  {title}".rstrip()


def _print_next(found: "list[Gap]", status: Status) -> None:
    if not found:
        words = {"todo": "nothing waits: no question went unanswered", "all": "no gaps yet"}
        console.err.print(words.get(status.value, f"no gap is {status.value}"))
    elif first := next((gap for gap in found if gap.status == "open"), None):
        console.err.print(
            f"next: `mogine gaps show {first.id}`, then "
            f"`mogine gaps accept {first.id} --expect docs/FILE.md` or `ignore {first.id} --reason WHY`"
        )


def _cells(gap: "Gap") -> tuple[str, ...]:
    """One line of a pipe: nothing cut, no words around the numbers."""
    score = "" if gap.nearest.score is None else f"{gap.nearest.score:.4f}"
    signals = ",".join(f"{name}:{count}" for name, count in gap.signals.items() if count)
    cells = (
        *(
            str(gap.id),
            gap.status,
            str(gap.visitors),
            str(gap.asked),
            gap.last_at.isoformat(timespec="seconds"),
        ),
        *(signals, score, gap.nearest.source, gap.question),
    )
    return tuple(safe_line(cell, 10_000) for cell in cells)


def _times(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _ago(at: datetime, zone: ZoneInfo) -> str:
    age = datetime.now(UTC) - at
    if age < timedelta(minutes=2):
        return "just now"
    if age < timedelta(hours=2):
        return f"{age // timedelta(minutes=1)} minutes ago"
    if age < timedelta(days=2):
        return f"{age // timedelta(hours=1)} hours ago"
    return f"{at.astimezone(zone):%Y-%m-%d}"
