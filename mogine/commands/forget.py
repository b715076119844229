"""`mogine forget`: erase what was recorded of one visitor, or what holds a text, and prove it."""

import json
from typing import Annotated

import typer

from mogine.commands.shell import shell_of
from mogine.errors import SettingsError


def forget(
    ctx: typer.Context,
    visitor: Annotated[
        str,
        typer.Option(help="A visitor's hash or the id of a session, as `mogine queries --json` has them."),
    ] = "",
    contains: Annotated[str, typer.Option(help="A text; `-` reads it from standard input.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The receipt as JSON.")] = False,
) -> None:
    """Erase questions, answers and comments for good, and write a receipt.

    Examples:

      mogine forget --visitor 3f9c2a71b0d4e655

      echo "Zhang San, Suzhou" | mogine forget --contains -

    Every trace goes from the rows, the search index and the spool; numbers stay in the statistics. Then every
    byte of the data folder is read: exit code 1 if a trace is left, with the files that hold it.
    """
    from mogine.analytics.forget import Wish
    from mogine.analytics.forget import forget as erase
    from mogine.analytics.store import open_store

    if bool(visitor) is bool(contains):
        raise SettingsError("say either --visitor ID or --contains TEXT")
    if contains == "-":
        contains = typer.get_text_stream("stdin").read().strip()
    wish = Wish("visitor", visitor) if visitor else Wish("contains", contains)
    settings = shell_of(ctx).existing()
    receipt, path = erase(open_store(settings), wish)
    if as_json:
        typer.echo(json.dumps({**receipt.to_dict(), "receipt": str(path)}))
    else:
        typer.echo(
            f"erased {receipt.rows:,} questions, {receipt.spooled:,} more in the spool; "
            f"read {receipt.files_scanned:,} files ({receipt.bytes_scanned:,} bytes)"
        )
        typer.echo(f"receipt: {path}", err=True)
        if settings.analytics.database_url:
            typer.echo(
                "the rows are gone from PostgreSQL; what its own journal, replicas and dumps still hold of "
                "them is not read here",
                err=True,
            )
    for name in receipt.remains:
        typer.echo(
            f"a trace is left in data/{name}: delete that file, or stop what writes it and run again",
            err=True,
        )
    if receipt.remains:
        raise typer.Exit(1)
