"""The manual that is made from the program itself: every command's help, every setting, the man page."""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import typer

from mogine.settings import Settings, variables

WIDTH = 100
HEAD = "<!-- Made by scripts/make-docs: change the help or the settings in mogine/, then run it again. -->\n"
EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "wrong use or settings",
    3: "a check found something",
    4: "a vendor or the network failed",
    5: "locked by another run",
    6: "a budget is used up",
    130: "interrupted",
}


def leaves(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Every visible command by its words, such as `kb ingest`."""

    def below(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(command, typer.core.TyperGroup):
            if command.invoke_without_command and path:
                yield path, command
            for name, child in command.commands.items():
                if not child.hidden:
                    yield from below(f"{path} {name}".strip(), child)
        else:
            yield path, command

    return below("", typer.main.get_command(app))


def help_of(path: str, command: Any) -> str:
    """What `mogine PATH --help` shows on a terminal of WIDTH columns."""
    context = typer.Context(
        command,
        info_name=f"mogine {path}".strip(),
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def commands_page(app: typer.Typer) -> str:
    """docs/commands.md."""
    parts = [
        f"# Commands\n\n{HEAD}\n"
        "What `--help` says of each. `--home DIR` and `--verbose` come before the command: "
        "`mogine --home /srv/assistant stats`.\n\n"
        "Results go to stdout, words to stderr; `--json` wherever a script may listen. Exit codes: "
        + ", ".join(f"{code} {words}" for code, words in EXIT_CODES.items())
        + ".\n"
    ]
    for path, command in leaves(app):
        parts.append(f"## mogine {path}\n\n```\n{help_of(path, command)}\n```\n")
    return "\n".join(parts)


def settings_page() -> str:
    """docs/settings.md."""
    defaults = Settings(home=Path())
    parts = [
        f"# Settings\n\n{HEAD}\n"
        "They stand in the `.env` of the home. A flag wins over the process environment, that over `.env`, "
        "that over the default. `mogine config show` tells every value and where it came from. Servers read "
        "them at their start; the vendors' keys, addresses and models also while they run.\n"
    ]
    section = None
    for variable in variables():
        if variable.section != section:
            section = variable.section
            tree = type(getattr(defaults, section)) if section else None
            title = ((tree.__doc__ if tree else None) or "All servers.").strip().splitlines()[0].rstrip(".")
            parts.append(f"\n## {title}\n\n| setting | default | meaning |\n| --- | --- | --- |")
        default = "a secret" if variable.secret else _shown(variable.default)
        parts.append(f"| `{variable.env}` | {default} | {_cell(variable.help)} |")
    return "\n".join(parts) + "\n"


def man_page(app: typer.Typer, version: str, day: date) -> str:
    """mogine(1), in man(7) macros."""
    lines = [
        f'.TH MOGINE 1 "{day}" "mogine {version}" "User Commands"',
        ".SH NAME",
        r"mogine \- the AI assistant of a company website, on its own server",
        ".SH SYNOPSIS",
        r"\fBmogine\fR [\fB\-\-home\fR \fIDIR\fR] [\fB\-\-verbose\fR] \fICOMMAND\fR ...",
        ".SH DESCRIPTION",
        "Three small servers (a proxy to language models, a knowledge base, a record of questions) and the",
        "commands around them. The home is the folder with .env, site.toml, docs/ and data/: the one named",
        r"by \fB\-\-home\fR, else by MOGINE_HOME, else the current folder.",
        ".SH COMMANDS",
    ]
    for path, command in leaves(app):
        shown = map(_roff, help_of(path, command).splitlines())
        lines += [f".SS mogine {_roff(path)}", ".nf", *shown, ".fi"]
    lines += [".SH EXIT STATUS"]
    for code, words in EXIT_CODES.items():
        lines += [".TP", str(code), words]
    lines += [".SH FILES", ".TP", ".env", "settings; `mogine config show` explains them", ".TP", "site.toml"]
    lines += ["what the assistant knows about the company", ".TP", "data/", "everything mogine writes"]
    return "\n".join(lines) + "\n"


def _roff(line: str) -> str:
    escaped = line.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + escaped if re.match(r"[.']", escaped) else escaped


def _shown(value: Any) -> str:
    if value is None or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
