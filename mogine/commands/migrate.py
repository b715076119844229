"""`mogine migrate`: the record of questions into another database, and back."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.shell import shell_of
from mogine.errors import SettingsError

if TYPE_CHECKING:
    from mogine.analytics.compare import Line
    from mogine.analytics.move import Outcome, Told
    from mogine.analytics.store import AnalyticsStore
    from mogine.settings import Settings


def migrate(
    ctx: typer.Context,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URL",
            help="postgresql://user@host/database, or a file for SQLite; - takes it from stdin.",
        ),
    ],
    source: Annotated[
        str,
        typer.Option("--from", metavar="URL", help="The record to move; else that of the settings."),
    ] = "",
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Though there are rows already, which this same site has recorded there."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Move the record of questions into PostgreSQL, or back into a file, while the site goes on.

    Examples:

      mogine migrate --to postgresql://mogine@db.example.com/mogine --dry-run

      mogine migrate --to postgresql://mogine@db.example.com/mogine

      mogine migrate --from data/analytics.db --to postgresql://mogine@db.example.com/mogine

      mogine migrate --to data/back.db      (from PostgreSQL into a file)

      mogine migrate --to - < secret-address

    Run it once while the servers run; set MOGINE_DATABASE_URL and start them anew; run it again with --from
    for what came in between. It may be killed and repeated at any time: nothing is lost, and nothing counted
    twice. What is moved also stays where it was. The password belongs into ~/.pgpass, into PGPASSWORD, or
    behind `--to -`. Ends with 1 when the records differ.
    """
    settings = shell_of(ctx).existing()
    address = sys.stdin.readline().strip() if to == "-" else to
    if address == (source or settings.analytics.database_url):
        raise SettingsError(
            "--to names where the record is already; say with --from what is to be moved there"
        )
    with (
        _opened(settings, source, "--from", settings.analytics.database_url) as old,
        _opened(settings, address, "--to") as new,
    ):
        if dry_run:
            _tell_plan(old, new, join=join, as_json=as_json)
            return
        from mogine.analytics.move import move

        with _bar() as told:
            outcome = move(old, new, join=join, told=told)
    _tell(outcome, old.name, new.name, as_json=as_json)
    if not outcome.is_equal:
        raise typer.Exit(1)


@contextlib.contextmanager
def _opened(settings: "Settings", text: str, option: str, default: str = "") -> Iterator["AnalyticsStore"]:
    """The record that an option names."""
    from mogine.analytics.store import AnalyticsStore

    address = text or default
    path = settings.analytics_path
    if re.match(r"postgres(ql)?://", address):
        store = AnalyticsStore(path, _checked(address, option))
    elif not address and option == "--from":
        store = AnalyticsStore(path)
    else:
        store = AnalyticsStore(_file(address, option))
        if option == "--from" and not store.exists():
            raise SettingsError(f"--from {address}: there is no such file")
    try:
        yield store
    finally:
        store.close()


def _checked(address: str, option: str) -> str:
    from mogine.settings import database_url

    try:
        return database_url(address)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}") from None


def _file(text: str, option: str) -> Path:
    """A path, or sqlite:///relative, or sqlite:////absolute."""
    path = text.removeprefix("sqlite:///")
    if not path or "://" in path or path.endswith("/"):
        raise SettingsError(
            f"{option} takes postgresql://user@host:5432/database, or for SQLite the path of a file, "
            "also as sqlite:///path"
        )
    return Path(path).expanduser().absolute()


@contextlib.contextmanager
def _bar() -> Iterator["Told"]:
    """Rows, rate and what is left, for who looks at a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mogine.commands.console import err

    columns = (
        "moving",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None, rate="")
        began = time.monotonic()

        def told(done: int, total: int) -> None:
            rate = f"{done / max(0.1, time.monotonic() - began):,.0f} rows/s"
            progress.update(task, completed=done, total=total, rate=rate)

        yield told


def _tell_plan(old: "AnalyticsStore", new: "AnalyticsStore", *, join: bool, as_json: bool) -> None:
    from mogine.analytics.move import plan

    found = plan(old, new, join=join)
    if found.problem:
        raise SettingsError(found.problem)
    left = max(0, found.source - found.moved)
    if as_json:
        typer.echo(
            json.dumps({"dry_run": True, "rows": found.source, "left": left, "target_rows": found.target})
        )
        return
    typer.echo(
        f"{old.name}: {found.source:,} rows, of which {left:,} would be moved; "
        f"{new.name} has {found.target:,} rows. Nothing was written",
        err=True,
    )


def _tell(outcome: "Outcome", old: str, new: str, *, as_json: bool) -> None:
    if as_json:
        lines = (*outcome.tables, *outcome.months)
        typer.echo(
            json.dumps(
                {
                    "rows": outcome.rows,
                    "late": outcome.late,
                    "feedback": outcome.feedback,
                    "deleted": outcome.deleted,
                    "seconds": round(outcome.seconds, 3),
                    "equal": outcome.is_equal,
                    "compared": [
                        dict(
                            zip(
                                ("name", "source", "target", "own", "deleted", "differs"),
                                (line.name, *line.numbers, line.differs),
                                strict=True,
                            )
                        )
                        for line in lines
                    ],
                    "notes": outcome.notes,
                }
            )
        )
    else:
        typer.echo(f"{'':24}{'source':>16}{'target':>16}{'own there':>14}{'deleted there':>16}")
        for line in (*outcome.tables, *outcome.months):
            typer.echo(_line(line))
    for note in outcome.notes:
        typer.echo(note, err=True)
    rate = outcome.rows / max(0.001, outcome.seconds)
    typer.echo(
        f"moved {outcome.rows + outcome.late:,} rows from {old} to {new} in {outcome.seconds:,.1f} s "
        f"({rate:,.0f} rows/s), {outcome.feedback:,} changes of feedback, {outcome.deleted:,} deletions",
        err=True,
    )
    if not outcome.is_equal:
        typer.echo(
            "the records differ, see above: run it again. If that does not help, leave the settings as they "
            f"are; {old} has lost nothing",
            err=True,
        )


def _line(line: "Line") -> str:
    source, target, own, gone = (_number(number) for number in line.numbers)
    own, gone = ("" if text == "0" else text for text in (own, gone))
    return f"{line.name:24}{source:>16}{target:>16}{own:>14}{gone:>16}{'  DIFFERS' * line.differs}".rstrip()


def _number(number: float) -> str:
    return f"{number:,.2f}" if isinstance(number, float) and number != int(number) else f"{int(number):,}"
