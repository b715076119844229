"""`mogine config`: every setting, its value, and where it came from."""

import json
from typing import Annotated, Any

import typer

from mogine.commands.shell import shell_of
from mogine.settings import Settings, variables

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show the settings.")


@app.command()
def show(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show every setting, its value (secrets as set or unset) and where it came from.

    Examples:

      mogine config show

      mogine config show --json
    """
    shell = shell_of(ctx)
    rows = [
        {
            "name": v.env,
            "value": _shown(shell.settings, v.section, v.name, v.secret),
            "source": shell.settings.sources[v.env],
        }
        for v in variables()
    ]
    if as_json:
        typer.echo(json.dumps({"home": str(shell.home), "settings": rows}, ensure_ascii=False, indent=2))
        return
    typer.echo(f"home: {shell.home} ({shell.home_source})")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        typer.echo(f"{row['name']:<{width}}  {row['value'] or '-'}  ({row['source']})")


def _shown(settings: Settings, section: str, name: str, secret: bool) -> str:
    value = getattr(getattr(settings, section) if section else settings, name)
    if secret:
        return "set" if value else "unset"
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return "" if value is None else str(value)
