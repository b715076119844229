"""`mogine keys`: set, rotate and try the vendors' keys; read from a prompt or stdin, never an argument."""

import asyncio
import sys
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands import envfile
from mogine.commands.shell import Shell, shell_of
from mogine.errors import SettingsError
from mogine.settings import Settings, load_settings, parse_keys

if TYPE_CHECKING:
    from mogine.providers.trial import Trial

app = typer.Typer(no_args_is_help=True, help="Set, rotate and test the vendors' keys.")

OVERLAP_S = 2.0


class Vendor(StrEnum):
    """Whose keys there are."""

    DOUBAO = "doubao"
    DASHSCOPE = "dashscope"
    OPENAI = "openai"

    @property
    def variable(self) -> str:
        """The setting that holds them."""
        return f"{self.value.upper()}_API_KEY"


Provider = Annotated[Vendor, typer.Argument(help="Whose keys.", show_default=False)]


@app.command("set")
def set_(ctx: typer.Context, provider: Provider) -> None:
    """Write the key (or several, comma separated) into .env; running servers take it up within a second.

    Examples:

      mogine keys set doubao

      pass show ark/key | mogine keys set doubao
    """
    shell = shell_of(ctx)
    path = _env_path(shell, provider)
    keys = _ask_for_keys(provider)
    envfile.write(path, envfile.with_value(envfile.read(path), provider.variable, ",".join(keys)))
    count = "the key" if len(keys) == 1 else f"{len(keys)} keys"
    typer.echo(f"{count} of {provider} stand in {path}; `mogine keys test {provider}` tries them", err=True)


@app.command()
def rotate(
    ctx: typer.Context,
    provider: Provider,
    keep: Annotated[bool, typer.Option("--keep-old", help="Keep the old key behind the new one.")] = False,
    overlap_s: Annotated[
        float, typer.Option("--overlap", help="Seconds for which both keys are valid.", min=0, max=3600)
    ] = OVERLAP_S,
) -> None:
    """Try a new key with one short question, then put it in the place of the first one.

    Examples:

      mogine keys rotate doubao

      pass show ark/new-key | mogine keys rotate doubao

    Nothing is changed when the vendor does not take the new key. For a moment both stand in .env, the new one
    first, so that no question meets a server that knows neither; running answers are not disturbed.
    """
    shell = shell_of(ctx)
    path = _env_path(shell, provider)
    old = _keys_of(shell.settings, provider)
    new = _ask_for_keys(provider)
    if len(new) != 1:
        raise SettingsError("one new key takes the place of one old key; give one")
    if new[0] in old[:1]:
        raise SettingsError(f"that is the key that {provider} has already")
    trial = _try_key(shell.settings, provider, new[0])
    if trial.problem:
        typer.echo(f"the new key was not taken, and nothing was changed: {trial.problem}", err=True)
        raise typer.Exit(trial.exit_code)
    others = tuple(key for key in old if key != new[0])
    before = envfile.read(path)
    try:
        envfile.write(path, envfile.with_value(before, provider.variable, ",".join((*new, *others))))
        _require_in_force(shell, provider, new[0])
        if not keep and old:
            time.sleep(overlap_s)
            rest = tuple(key for key in others if key != old[0])
            envfile.write(path, envfile.with_value(before, provider.variable, ",".join((*new, *rest))))
    except BaseException:
        # Whatever happened in between, the keys from before were good.
        envfile.write(path, before)
        typer.echo("the rotation was undone", err=True)
        raise
    typer.echo(f"{provider} has its new key; the vendor took it in {trial.took_ms} ms", err=True)
    if old and not keep:
        typer.echo("now revoke the old one in the vendor's console", err=True)


@app.command()
def test(ctx: typer.Context, provider: Provider) -> None:
    """Ask the vendor for one token with each key.

    Examples:

      mogine keys test doubao
    """
    from mogine.providers.care import shown

    settings = shell_of(ctx).existing()
    keys = _keys_of(settings, provider)
    if not keys and not settings.has_credentials(provider.value):
        raise SettingsError(f"{provider.variable} is not set: `mogine keys set {provider}`")
    worst = 0
    for key in keys or ("",):
        trial = _try_key(settings, provider, key)
        name = f"key {shown(key)}" if key else "no key"
        typer.echo(f"{provider}: {name}: {trial.problem or f'taken, {trial.took_ms} ms'}")
        worst = max(worst, trial.exit_code)
    if worst:
        raise typer.Exit(worst)


def _env_path(shell: Shell, provider: Vendor) -> Path:
    """The home's `.env`; SettingsError when what is written there would not count."""
    settings = shell.existing()
    if settings.sources.get(provider.variable) == "environment":
        raise SettingsError(
            f"{provider.variable} is set in the process environment, which wins over .env: change it there"
        )
    return shell.home / ".env"


def _ask_for_keys(provider: Vendor) -> tuple[str, ...]:
    if sys.stdin.isatty():
        text = typer.prompt(f"{provider.variable} (not shown)", hide_input=True, err=True)
    else:
        text = sys.stdin.read()
    try:
        keys = parse_keys(",".join(text.split()))
    except ValueError as error:
        raise SettingsError(f"{provider.variable}: {error}") from error
    if not keys:
        raise SettingsError(f"no key came on stdin: `mogine keys set {provider}` asks for one in a terminal")
    if any(mark in key for key in keys for mark in "#'\"\\$` "):
        raise SettingsError(f"{provider.variable}: a key has none of # ' \" \\ $ in it; paste it again")
    return keys


def _keys_of(settings: Settings, provider: Vendor) -> tuple[str, ...]:
    keys: tuple[str, ...] = getattr(settings, provider.value).keys
    return keys


def _require_in_force(shell: Shell, provider: Vendor, key: str) -> None:
    """The file must say what was meant, as a server reads it."""
    if _keys_of(load_settings(shell.environ, shell.home), provider)[:1] != (key,):
        raise SettingsError(f"{shell.home / '.env'} does not give the new key back as it was written")


def _try_key(settings: Settings, provider: Vendor, key: str) -> "Trial":
    from mogine.providers.trial import try_key

    section = replace(getattr(settings, provider.value), keys=(key,) if key else ())
    if not replace(settings, **{provider.value: section}).has_credentials(provider.value):
        missing = "DASHSCOPE_APP_ID" if provider is Vendor.DASHSCOPE else "OPENAI_BASE_URL and OPENAI_MODEL"
        raise SettingsError(f"a key of {provider} cannot be tried before {missing} is set")
    return asyncio.run(try_key(settings, provider.value, key))
