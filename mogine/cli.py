"""The front door: assembles the commands, finds the home, turns errors into one line and an exit code."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mogine.commands import (
    admin,
    analytics,
    backup,
    chat,
    check,
    config,
    demo,
    deploy,
    doctor,
    forget,
    gaps,
    home,
    kb,
    keys,
    migrate,
    serve,
)
from mogine.commands.console import safe
from mogine.commands.shell import Shell
from mogine.errors import MogineError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # its boxes cost more time than the rest of --help together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The AI assistant of your company website, on your own server.",
)
app.command(short_help="Make a home, with sample documents.")(home.init)
app.command(short_help="Show everything, with no key and no network.")(demo.demo)
app.command(short_help="Serve the site, one server or all three.")(serve.serve)
app.command(hidden=True)(serve.worker)
app.command(short_help="Chat with the assistant in the terminal.")(chat.chat)
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")
app.add_typer(kb.app, name="kb")
app.command(short_help="Show what was asked, answered and spent.")(analytics.stats)
app.command(short_help="List and follow recorded questions.")(analytics.queries)
app.command(short_help="Write the record as CSV, JSON or NDJSON.")(analytics.export)
app.add_typer(gaps.app, name="gaps")
app.command(short_help="Delete old rows for good; made for cron.")(analytics.cleanup)
app.command(short_help="Erase what was recorded of a visitor.")(forget.forget)
app.command(short_help="Look for trouble; made for cron.")(check.check)
app.command(short_help="Is all well, and if not, what to do.")(doctor.doctor)
app.command(short_help="Make the files for nginx, systemd, PM2 ...")(deploy.deploy)
app.command(short_help="Write the home into one file.")(backup.backup)
app.command(short_help="Put a backup into the home.")(backup.restore)
app.command(short_help="Move the record into PostgreSQL, or back.")(migrate.migrate)
app.add_typer(admin.app, name="admin")
app.command(short_help="Tell the versions, for a bug report.")(home.version)


@app.callback()
def front(
    ctx: typer.Context,
    home: Annotated[
        Path | None, typer.Option("--home", help="The mogine home; else MOGINE_HOME, else this folder.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More words on stderr.")] = False,
) -> None:
    """Take what all commands share."""
    configure_logging(verbose=verbose)
    if home is not None:
        ctx.obj = Shell(home.expanduser().resolve(), "named by --home", os.environ)
    elif named := os.environ.get("MOGINE_HOME"):
        ctx.obj = Shell(Path(named).expanduser().resolve(), "named by MOGINE_HOME", os.environ)
    else:
        ctx.obj = Shell(Path.cwd(), "the current folder", os.environ)


def configure_logging(*, verbose: bool) -> None:
    """Lines on stderr: warnings, and with `verbose` everything of ours."""
    form = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=form)
    logging.getLogger("mogine").setLevel(logging.DEBUG if verbose else logging.WARNING)


def main() -> None:
    """Run the command line; every MogineError becomes a line on stderr and its exit code."""
    try:
        app()
    except MogineError as error:
        typer.secho(f"mogine: {safe(error.message)}", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
