"""What every command is handed: the home it works in, and its settings, read when first asked for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer

from mogine.errors import SettingsError
from mogine.settings import Settings, load_settings

HOME_MARKS = (".env", "site.toml", "data")


@dataclass
class Shell:
    """One run of the command line. `home_source` says in words why this folder was taken."""

    home: Path
    home_source: str
    environ: Mapping[str, str]

    @cached_property
    def settings(self) -> Settings:
        """The settings of the home, whether or not it exists yet; warnings go to stderr once."""
        settings = load_settings(self.environ, self.home)
        for warning in settings.warnings:
            typer.echo(f"warning: {warning}", file=sys.stderr)
        return settings

    @property
    def is_home(self) -> bool:
        """Whether the folder holds anything of ours."""
        return any((self.home / mark).exists() for mark in HOME_MARKS)

    def existing(self) -> Settings:
        """The settings of a home that is there; SettingsError that names the folder when it is not."""
        if not self.is_home:
            raise SettingsError(
                f"{self.home} is no mogine home ({self.home_source}): "
                "it has no .env, site.toml or data folder. Go to your home, "
                "name it with --home or MOGINE_HOME, or make one with `mogine init`"
            )
        return self.settings


def shell_of(ctx: typer.Context) -> Shell:
    """The Shell that the front door put into the context."""
    shell = ctx.find_root().obj
    if not isinstance(shell, Shell):
        raise SettingsError("this command was called without its front door")
    return shell
