"""What is written about the program is made from the program, and people's shells complete its words."""

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from mogine.cli import app
from mogine.commands.manual import commands_page, leaves, man_page, settings_page
from mogine.settings import variables
from tests.conftest import ROOT, clean_environ


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/make-docs as a module."""
    loader = importlib.machinery.SourceFileLoader("make_docs", str(ROOT / "scripts/make-docs"))
    spec = importlib.util.spec_from_loader("make_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_pages_are_what_the_program_says(script: ModuleType) -> None:
    version = metadata.version("mogine")
    pages = {
        "commands.md": commands_page(app),
        "settings.md": settings_page(),
        "mogine.1": man_page(app, version, script.released_on()),
    }
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == text, "run scripts/make-docs"


def test_every_command_and_every_setting_has_its_place() -> None:
    commands, settings = commands_page(app), settings_page()
    assert [path for path, _ in leaves(app) if f"\n## mogine {path}\n" not in commands] == []
    assert [v.env for v in variables() if f"| `{v.env}` |" not in settings] == []


def test_man_reads_the_page_without_a_complaint(tmp_path: Path) -> None:
    command = ["man", "--warnings=all", "-l", str(ROOT / "docs/mogine.1")]
    env = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MAN_KEEP_STDERR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.sub(r".\x08", "", done.stdout)
    assert "mogine kb ingest" in shown and "--with-secrets" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_words(shell: str) -> None:
    names = {"bash": "COMP_WORDS", "zsh": "_TYPER_COMPLETE_ARGS", "fish": "_TYPER_COMPLETE_ARGS"}
    env = {
        **clean_environ(),
        "_MOGINE_COMPLETE": f"complete_{shell}",
        names[shell]: "mogine kb rollb",
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "import sys; sys.argv[0] = 'mogine'; from mogine.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "rollback" in done.stdout, done.stderr
