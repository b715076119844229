"""`mogine doctor`: is all well, and if not, what to do."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.console import safe, safe_line
from mogine.commands.shell import Shell, shell_of
from mogine.errors import SettingsError

if TYPE_CHECKING:
    from mogine.doctor.line import Line

FOUND = 3
WIDTH = 16
COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "error": typer.colors.RED}


def doctor(
    ctx: typer.Context,
    public: Annotated[
        str, typer.Option("--public", metavar="URL", help="Look at the site from outside, at this address.")
    ] = "",
    online: Annotated[
        bool, typer.Option("--online", help="Ask each vendor for one token with each key.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts instead of lines.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 3 for warnings, too.")] = False,
    source: Annotated[
        str, typer.Option("--from", metavar="ADDRESS", help="With --public: call from this address of ours.")
    ] = "",
    ca: Annotated[
        Path | None, typer.Option("--ca", metavar="FILE", help="With --public: trust this certificate, too.")
    ] = None,
    patience: Annotated[
        int,
        typer.Option("--patience", min=1, max=60, help="With --public: seconds a silent stream must last."),
    ] = 20,
    min_free: Annotated[
        float, typer.Option("--min-free", metavar="GIB", min=0, help="Less free disk than this is an error.")
    ] = 1.0,
) -> None:
    """Look at everything that commonly goes wrong, and say what to do about it.

    Examples:

      mogine doctor

      mogine doctor --online

      mogine doctor --public https://www.example.com/~temp/mogine_agent/

      mogine doctor --json

    Run --public from a machine that is not the server: it measures whether streams are held back, visitors
    told apart, the certificate good, the owner's side closed. Exit code 3 when there is an error.
    """
    shell = shell_of(ctx)
    lines = _outside(shell, public, source, ca, patience) if public else _inside(shell, online, min_free)
    found: list[Line] = []
    for line in lines:
        found.append(line)
        if not as_json:
            _print(line)
    count = {status: sum(line.status == status for line in found) for status in COLOURS}
    if as_json:
        typer.echo(
            json.dumps({"counts": count, "lines": [asdict(line) for line in found]}, ensure_ascii=False)
        )
    else:
        typer.echo(f"{count['ok']} ok, {count['warning']} warnings, {count['error']} errors", err=True)
    if count["error"] or (strict and count["warning"]):
        raise typer.Exit(FOUND)


def _inside(shell: Shell, online: bool, min_free_gib: float) -> Iterator["Line"]:
    from mogine.doctor import home, vendors
    from mogine.doctor.line import error

    if not shell.is_home:
        shell.existing()
    try:
        settings = shell.settings
    except SettingsError as problem:
        yield error("settings", problem.message, f"correct {shell.home / '.env'}, or the environment")
        return
    yield from home.examine(home.House(settings, int(min_free_gib * home.GIB)))
    yield from vendors.taken(settings) if online else vendors.reachable(settings)


def _outside(shell: Shell, url: str, source: str, ca: Path | None, patience_s: int) -> Iterator["Line"]:
    from mogine.doctor.outside import Outside
    from mogine.doctor.public import PORTS, examine

    ports = PORTS
    if shell.is_home:
        settings = shell.settings
        ports = (settings.proxy.port, settings.kb.port, settings.analytics.port)
    yield from examine(Outside.of(url, source=source, ca=ca, patience_s=patience_s), ports)


def _print(line: "Line") -> None:
    status = typer.style(f"{line.status:<8}", fg=COLOURS[line.status])
    typer.echo(f"{status}{line.name:<{WIDTH}} {safe_line(line.detail)}")
    for place, text in enumerate(safe(line.fix).splitlines()):
        typer.echo(f"{' ' * 8}{'→ ' if place == 0 else '  '}{text}")
