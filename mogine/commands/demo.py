"""`mogine demo`: everything at once, offline, on the documents of an invented company."""

import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.kbingest import Order, take_in
from mogine.commands.serve import prepare_home
from mogine.commands.shell import Shell, shell_of
from mogine.commands.template import make_home
from mogine.errors import SettingsError
from mogine.settings import Settings, load_settings

if TYPE_CHECKING:
    from mogine.serve.runner import Running

# What is added to --port-base: the standard ports are those of 8700.
PORT_OFFSETS = {"kb": 39, "proxy": 41, "analytics": 42}


def demo(
    ctx: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where the demo's home is kept; else your cache folder."),
    ] = None,
    port_base: Annotated[
        int, typer.Option(min=1024, max=65000, help="The three ports are this number plus 39, 41 and 42.")
    ] = 8700,
) -> None:
    """Show everything on the documents of an invented company, with no key and no network.

    Examples:

      mogine demo

      mogine demo --port-base 9700

      mogine demo --dir ./demo-home

    Keys of your environment are not used. A second run is quicker: the documents have been read.
    """
    from mogine.serve import logs, runner

    home = folder.expanduser().resolve() if folder else _cache_home(shell_of(ctx))
    for _ in make_home(home, samples=True):
        pass
    settings = _on_ports(load_settings({}, home), port_base)
    prepare_home(settings)
    _require_free_ports(settings)
    typer.echo("reading the sample documents", err=True)
    summary = take_in(Order((str(home / "docs"),)), settings)
    typer.echo(f"{summary.documents_in_all} documents, {summary.passages_in_all} passages", err=True)
    logs.configure(settings)

    async def announce(running: "Running") -> None:
        typer.echo(_words(running))

    runner.run(settings, tuple(PORT_OFFSETS), announce=announce)
    typer.echo(f"the demo has stopped; its files are in {home}", err=True)


def _cache_home(shell: Shell) -> Path:
    """The demo's home in the user's cache folder, or a new temporary one where that cannot be written."""
    cache = Path(shell.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mogine" / "demo"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="mogine-demo-"))
    return cache


def _on_ports(settings: Settings, base: int) -> Settings:
    sections = {
        name: replace(getattr(settings, name), port=base + offset) for name, offset in PORT_OFFSETS.items()
    }
    return replace(settings, **sections)


def _require_free_ports(settings: Settings) -> None:
    """Better told before the documents are read than after; `runner` looks again when it starts."""
    from mogine.serve.runner import bind

    for name in PORT_OFFSETS:
        port = getattr(settings, name).port
        try:
            for sock in bind(settings.host, port, ""):
                sock.close()
        except SettingsError as error:
            raise SettingsError(
                f"port {port} cannot be used on {settings.host}: is mogine running already? "
                "Stop what runs there, or take other ports: `mogine demo --port-base 9700`"
            ) from error


def _words(running: "Running") -> str:
    """The addresses, and what to try."""
    proxy = running.url("proxy")
    program = f"{_program()} --home {shlex.quote(str(running.settings.home))}"
    question = """'{"question": "How long is the warranty of the S800?"}'"""
    return f"""
mogine is running on the sample documents of an invented company, without a key and without a network.

  chat page       {proxy}/chat/
  proxy           {proxy}
  knowledge base  {running.url("kb")}
  dashboard       {running.url("analytics")}/dashboard/

Four things to try:

  1. Open {proxy}/chat/ and ask: 退款多久到账？
  2. curl -N {proxy}/api/chat -H 'Content-Type: application/json' -d {question}
  3. {program} stats --days 30
  4. {program} admin link --url {running.url("analytics")}
     and open what it prints: the dashboard

Answers are quoted from the documents; with a key, a model puts them into words. Ctrl-C stops.
"""


def _program() -> str:
    """How this program can be called again from the same shell."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m mogine"
    return "mogine" if shutil.which("mogine") else shlex.quote(str(started))
