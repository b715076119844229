"""`mogine admin`: what opens the owner's side of the servers."""

import typer

from mogine.commands.shell import shell_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The owner's way in.")


@app.command()
def token(ctx: typer.Context) -> None:
    """Print the admin token, which is made when there is none yet.

    Examples:

      mogine admin token

      curl -H "Authorization: Bearer $(mogine admin token)" http://127.0.0.1:8742/api/analytics/statistics
    """
    from mogine.serve.access import admin_token

    typer.echo(admin_token(shell_of(ctx).existing()))


@app.callback()
def admin() -> None:
    """The owner's way in."""
