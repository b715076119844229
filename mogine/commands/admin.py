"""`mogine admin`: what opens the owner's side of the servers."""

import secrets
import socket
from dataclasses import replace
from typing import Annotated
from urllib.parse import urlsplit

import typer

from mogine.commands import envfile
from mogine.commands.shell import Shell, shell_of
from mogine.errors import SettingsError
from mogine.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The owner's way in.")

TOKEN_VARIABLE = "MOGINE_ADMIN_TOKEN"  # noqa: S105 - a setting's name
CONNECT_S = 0.3


@app.command()
def link(
    ctx: typer.Context,
    url: Annotated[
        str, typer.Option("--url", help="Where your browser reaches the dashboard, if not on this machine.")
    ] = "",
) -> None:
    """Print an address that opens the dashboard: once, within 30 minutes.

    Examples:

      mogine admin link

      mogine admin link --url https://www.example.com/~temp/mogine_agent/

      ssh -L 8742:127.0.0.1:8742 you@server       (then open the link of the server on your own machine)

    The browser stays signed in for 12 hours; a new admin token ends that at once.
    """
    from mogine.serve.admin_sessions import open_sessions

    settings = shell_of(ctx).existing()
    base = _base(url) if url else settings.server_url("analytics")
    sessions = open_sessions(settings)
    secret = sessions.new_link()
    typer.echo(f"{base}/dashboard/#link={secret}")
    typer.echo("good for one visit within 30 minutes", err=True)
    if sessions.is_alone:
        typer.echo("warning: Redis is away, so the link is good on this machine only", err=True)
    if not url and not _listens(settings.server_url("analytics")):
        typer.echo("warning: the analytics server does not run; `mogine serve all` starts it", err=True)


@app.command()
def token(
    ctx: typer.Context,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the old one, and all sessions, end at once.")
    ] = False,
) -> None:
    """Print the admin token, which is made when there is none yet.

    Examples:

      mogine admin token

      mogine admin token --rotate

      curl -H "Authorization: Bearer $(mogine admin token)" http://127.0.0.1:8742/api/analytics/statistics
    """
    from mogine.serve.access import admin_token

    shell = shell_of(ctx)
    settings = shell.existing()
    typer.echo(_rotate(shell, settings) if rotate else admin_token(settings))


@app.callback()
def admin() -> None:
    """The owner's way in."""


def _rotate(shell: Shell, settings: Settings) -> str:
    """A new token where the old one stands; running servers take it up within a second."""
    from mogine.serve.access import ADMIN_TOKEN_FILE, admin_token
    from mogine.serve.admin_sessions import end_all

    new = secrets.token_urlsafe(32)
    match settings.sources.get(TOKEN_VARIABLE):
        case "environment":
            raise SettingsError(
                f"{TOKEN_VARIABLE} is set in the process environment, which wins: change it there, restart"
            )
        case ".env":
            path = shell.home / ".env"
            envfile.write(path, envfile.with_value(envfile.read(path), TOKEN_VARIABLE, new))
            settings = replace(settings, access=replace(settings.access, admin_token=new))
        case _:
            settings.data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
            envfile.write(settings.data_path / ADMIN_TOKEN_FILE, new + "\n")
    end_all(settings)
    return admin_token(settings)


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingsError(
            f"--url {url!r}: write the address of your site, such as https://www.example.com/"
        )
    return url.rstrip("/").removesuffix("/dashboard")


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), CONNECT_S):
            return True
    except OSError:
        return False
