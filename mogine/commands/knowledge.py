"""The knowledge base of a home as commands use it: opened, its tests, its tables on terminal and in pipes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mogine.commands import console
from mogine.commands.console import safe_line
from mogine.commands.shell import Shell
from mogine.errors import NotFound

if TYPE_CHECKING:
    from mogine.kb.knowledge import KnowledgeBase
    from mogine.settings import Settings


@contextmanager
def open_kb(shell: Shell, *, embeds: bool) -> Iterator["KnowledgeBase"]:
    """The current generation, open; without `embeds` neither model nor vectors are loaded."""
    from mogine.kb.embedders import NoEmbedder, open_embedder
    from mogine.kb.generations import Generations
    from mogine.kb.knowledge import KnowledgeBase
    from mogine.kb.manifest import check_files

    settings: Settings = shell.existing()
    generation = Generations.of(settings).current()
    if generation is None:
        raise NotFound(f"the knowledge base of {shell.home} is empty; `mogine kb ingest ./docs` fills it")
    check_files(generation)
    kb = KnowledgeBase(generation, open_embedder(settings) if embeds else NoEmbedder(), readers=1)
    try:
        yield kb
    finally:
        kb.close()


def tests_path(home: Path) -> Path:
    """Where a home keeps its tests."""
    from mogine.kb.gate import TESTS_NAME

    return home / TESTS_NAME


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; in a pipe one line a row with tabs between the cells, nothing cut."""
    shown = [[safe_line(cell, 200) for cell in row] for row in rows]
    if not console.out.is_terminal:
        for row in shown:
            typer.echo("\t".join(row))
        return
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in shown:
        table.add_row(*row)
    console.out.print(table)
