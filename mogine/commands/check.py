"""`mogine check`: one line for each thing that is wrong, for cron and monitoring."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mogine.commands.shell import shell_of

FOUND = 3


def check(
    ctx: typer.Context,
    max_errors: Annotated[
        int,
        typer.Option("--max-errors", help="Failed questions of the last day, in percent.", min=0, max=100),
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts instead of lines.")] = False,
) -> None:
    """Look for trouble: failing answers, silence, a full disk, rows that wait, old backups.

    Examples:

      mogine check

      mogine check --max-errors 5 --json

      */15 * * * *  mogine --home /srv/mogine check      (a line for cron)

    Says nothing and exits 0 when all is well; else one line for each finding, and exit code 3.
    """
    from mogine.analytics.checks import check as look
    from mogine.analytics.store import open_store

    settings = shell_of(ctx).existing()
    findings = look(open_store(settings), max_error_share=max_errors / 100)
    if as_json:
        typer.echo(
            json.dumps({"ok": not findings, "findings": [asdict(f) for f in findings]}, ensure_ascii=False)
        )
    for finding in () if as_json else findings:
        typer.echo(f"{finding.name}: {finding.message}")
    if findings:
        raise typer.Exit(FOUND)
    if not as_json and sys.stderr.isatty():
        typer.echo("all is well", err=True)
