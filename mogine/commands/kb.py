"""`mogine kb`: documents in and out of the knowledge base, and a look at what it finds."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mogine.commands import console
from mogine.commands.console import safe, safe_json, safe_line
from mogine.commands.shell import Shell, shell_of
from mogine.errors import NotFound, RequestError, UnreadableDocument

if TYPE_CHECKING:
    from mogine.ingest.pipeline import Summary
    from mogine.kb.knowledge import KnowledgeBase
    from mogine.kb.passages import Hit, StoredDocument
    from mogine.settings import Settings

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Take documents into the knowledge base, and search it."
)

SHOWN_SKIPPED = 40
EXCERPT_CHARS = 240

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of words.")]


class Mode(StrEnum):
    """How to search."""

    HYBRID = "hybrid"
    VECTOR = "vector"
    KEYWORD = "keyword"


@app.command()
def ingest(
    ctx: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files, or folders with all below.")],
    as_json: AsJson = False,
) -> None:
    """Take documents in: Markdown, text, HTML, CSV, PDF, DOCX, XLSX and PPTX.

    Examples:

      mogine kb ingest ./docs

      mogine kb ingest handbook.pdf faq.csv --json

    What has not changed is skipped, and documents that are gone from the given folders are taken out. Servers
    that run take up the change by themselves. Ctrl-C leaves everything as it was.
    """
    summary = take_in(paths, shell_of(ctx).settings)
    if as_json:
        typer.echo(safe_json(_summary_dict(summary)))
    else:
        _print_summary(summary)
    if not summary.took_anything:
        raise UnreadableDocument(_why_nothing(summary))


@app.command()
def search(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(metavar="Q", help="What to look for, in any words.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=50, help="How many passages.")] = 3,
    mode: Annotated[Mode, typer.Option(help="By meaning and words, by meaning, or by words.")] = Mode.HYBRID,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Ask a running knowledge base server instead of the files.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show the passages that a question finds, best first.

    Examples:

      mogine kb search 怎么退款

      mogine kb search "how long is the warranty" --top-k 5 --json

      mogine kb search 运费 --server http://127.0.0.1:8739
    """
    if not question.strip():
        raise RequestError("the question is empty; say what to look for", param="q")
    started = time.perf_counter()
    if server:
        hits, generation = _ask_server(server, question, top_k, mode)
    else:
        with _open_kb(shell_of(ctx), embeds=mode is not Mode.KEYWORD) as kb:
            hits, generation = kb.search(question, top_k, mode.value), kb.name
    took_ms = round((time.perf_counter() - started) * 1000, 1)
    if as_json:
        results = [_hit_dict(hit, rank) for rank, hit in enumerate(hits, 1)]
        typer.echo(
            safe_json(
                {
                    "query": question,
                    "mode": mode.value,
                    "generation": generation,
                    "took_ms": took_ms,
                    "results": results,
                }
            )
        )
        return
    for rank, hit in enumerate(hits, 1):
        _print_hit(hit, rank)
    if not hits:
        console.err.print("nothing found")


@app.command("list")
def list_documents(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the documents of the knowledge base.

    Examples:

      mogine kb list

      mogine kb list --json
    """
    with _open_kb(shell_of(ctx), embeds=False) as kb:
        documents = kb.documents()
        name = kb.name
    if as_json:
        listed = [_document_dict(document) for document in documents]
        typer.echo(safe_json({"generation": name, "documents": listed}))
        return
    columns = ("id", "passages", "characters", "updated", "source", "title")
    rows = [(d.id, f"{d.passages}", f"{d.characters}", d.updated, d.source, d.title) for d in documents]
    _print_rows(columns, rows)
    console.err.print(
        f"{len(documents)} documents, {sum(d.passages for d in documents)} passages, generation {name}"
    )


@app.command()
def show(
    ctx: typer.Context,
    doc: Annotated[str, typer.Argument(metavar="DOC", help="Its source, its path or its id.")],
    as_json: AsJson = False,
) -> None:
    """Show a document's passages as they were cut.

    Examples:

      mogine kb show docs/returns.zh.md

      mogine kb show docs/returns.zh.md --json
    """
    shell = shell_of(ctx)
    with _open_kb(shell, embeds=False) as kb:
        document = _find(kb.documents(), doc, shell.home)
        passages = kb.passages_of(document.id)
    if as_json:
        rows = [
            {"id": p.id, "position": p.position, "heading": p.heading, "page": p.page, "text": p.text}
            for p in passages
        ]
        typer.echo(safe_json({**_document_dict(document), "passages": rows}))
        return
    console.out.print(f"{safe_line(document.title)}  ({safe_line(document.source)})", style="bold")
    for passage in passages:
        place = f", page {passage.page}" if passage.page is not None else ""
        heading = f"  {safe_line(passage.heading)}" if passage.heading else ""
        console.out.print(
            f"\n[{passage.position}]{heading}  ({len(passage.text)} characters{place})", style="cyan"
        )
        console.out.print(safe(passage.text))


@app.command()
def remove(
    ctx: typer.Context,
    docs: Annotated[list[str], typer.Argument(metavar="DOC...", help="Sources, paths or ids.")],
    as_json: AsJson = False,
) -> None:
    """Take documents out of the knowledge base; the files themselves stay.

    Examples:

      mogine kb remove docs/old-prices.xlsx

      mogine kb remove docs/a.md docs/b.md --json
    """
    from mogine.kb.embedders import open_embedder
    from mogine.kb.generations import Generations

    shell = shell_of(ctx)
    with _open_kb(shell, embeds=False) as kb:
        known = kb.documents()
    sources = [_find(known, doc, shell.home).source for doc in docs]
    settings = shell.existing()
    with Generations(settings.kb_path).begin(open_embedder(settings)) as draft:
        removed = [source for source in dict.fromkeys(sources) if draft.remove(source)]
        name = draft.commit()
    if as_json:
        typer.echo(safe_json({"generation": name, "removed": removed}))
        return
    for source in removed:
        console.out.print(f"removed {safe_line(source)}")
    console.err.print(
        f"generation {name} serves now; files that stay in place come back with the next ingest"
    )


# --- what the commands share ---------------------------------------------------------------------


def take_in(paths: Sequence[Path], settings: "Settings") -> "Summary":
    """Ingest `paths` into the home of `settings`, with a bar on the terminal."""
    from mogine.ingest.pipeline import Progress, Summary, ingest
    from mogine.kb.embedders import open_embedder
    from mogine.kb.generations import Generations

    summary = Summary()
    with _progress() as bar:
        steps = ingest(
            [path.expanduser() for path in paths],
            Generations(settings.kb_path),
            open_embedder(settings),
            base=settings.home,
            own=[settings.data_path],
            on_embedded=bar.embedded,
        )
        for step in steps:
            if isinstance(step, Progress):
                bar.move(step.done, step.total, step.source)
            else:
                summary = step
    return summary


@contextmanager
def _open_kb(shell: Shell, *, embeds: bool) -> Iterator["KnowledgeBase"]:
    """The current generation, open; without `embeds` neither model nor vectors are loaded."""
    from mogine.kb.embedders import NoEmbedder, open_embedder
    from mogine.kb.generations import Generations
    from mogine.kb.knowledge import KnowledgeBase

    settings: Settings = shell.existing()
    generation = Generations(settings.kb_path).current()
    if generation is None:
        raise NotFound(f"the knowledge base of {shell.home} is empty; `mogine kb ingest ./docs` fills it")
    kb = KnowledgeBase(generation, open_embedder(settings) if embeds else NoEmbedder(), readers=1)
    try:
        yield kb
    finally:
        kb.close()


def _find(documents: "list[StoredDocument]", wanted: str, home: Path) -> "StoredDocument":
    """By source, by id, or by the path of its file as seen from here. Raises NotFound."""
    import difflib

    from mogine.ingest.find import source_of

    by_name = {name: d for d in documents for name in (d.id, d.source)}
    found = by_name.get(wanted) or by_name.get(source_of(Path(wanted).expanduser(), home))
    if found is None:
        close = difflib.get_close_matches(wanted, [d.source for d in documents], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "`mogine kb list` shows what there is"
        raise NotFound(f"there is no document {safe_line(wanted, 200)}; {hint}")
    return found


def _ask_server(url: str, question: str, top_k: int, mode: Mode) -> "tuple[list[Hit], str]":
    import asyncio

    from mogine.kb.client import KnowledgeClient

    async def ask() -> "tuple[list[Hit], str]":
        async with KnowledgeClient(url, timeout_s=30.0) as client:
            result = await client.search(question, top_k, mode.value)
        return list(result.hits), result.generation

    return asyncio.run(ask())


class _Bar:
    """What moves on a terminal while documents are taken in; does nothing in a pipe."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None, passages=0)
        self._passages = 0

    def move(self, done: int, total: int, source: str) -> None:
        what = safe_line(source, 40) if source else "finishing"
        self._progress.update(self._task, completed=done, total=total, description=what)

    def embedded(self, count: int) -> None:
        self._passages += count
        self._progress.update(self._task, passages=self._passages)


@contextmanager
def _progress() -> Iterator[_Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[passages]} passages"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console.err, transient=True, disable=not console.err.is_terminal
    ) as progress:
        yield _Bar(progress)


def _print_summary(summary: "Summary") -> None:
    from rich.table import Table

    if summary.took_anything:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name in ("added", "changed", "unchanged", "removed", "skipped"):
            table.add_row(name, str(len(getattr(summary, name))))
        console.out.print(table)
        console.out.print(
            f"{summary.documents_in_all} documents, {summary.passages_in_all} passages in generation "
            f"{summary.generation}; {summary.passages} passages written in {summary.seconds:.1f} s"
        )
    if summary.re_embedded:
        console.err.print("the embedder has changed, so every passage was embedded again")
    if summary.skipped or summary.notes:
        table = Table("file", "why", title="not taken, or not all of it", title_justify="left", box=None)
        entries = (*summary.notes, *summary.skipped)
        for entry in entries[:SHOWN_SKIPPED]:
            table.add_row(safe_line(entry.source, 120), safe_line(entry.reason))
        console.err.print(table)
        for reason, count in Counter(entry.reason for entry in entries[SHOWN_SKIPPED:]).most_common():
            console.err.print(f"  and {count} more: {safe_line(reason)}")


def _why_nothing(summary: "Summary") -> str:
    reasons = Counter(entry.reason for entry in summary.skipped)
    told = "; ".join(
        f"{next(e.source for e in summary.skipped if e.reason == reason)} {reason}"
        + (f" (and {count - 1} more like it)" if count > 1 else "")
        for reason, count in reasons.most_common(3)
    )
    return safe_line(f"nothing was taken in: {told or 'no file was named'}", 1000)


def _summary_dict(summary: "Summary") -> dict[str, Any]:
    return {
        "generation": summary.generation,
        "added": summary.added,
        "changed": summary.changed,
        "unchanged": summary.unchanged,
        "removed": summary.removed,
        "skipped": [{"source": e.source, "reason": e.reason} for e in summary.skipped],
        "notes": [{"source": e.source, "note": e.reason} for e in summary.notes],
        "passages": summary.passages,
        "documents_in_all": summary.documents_in_all,
        "passages_in_all": summary.passages_in_all,
        "re_embedded": summary.re_embedded,
        "seconds": round(summary.seconds, 3),
    }


def _document_dict(document: "StoredDocument") -> dict[str, Any]:
    return {
        "id": document.id,
        "source": document.source,
        "title": document.title,
        "url": document.url,
        "updated": document.updated,
        "digest": document.digest,
        "passage_count": document.passages,
        "characters": document.characters,
    }


def _hit_dict(hit: "Hit", rank: int) -> dict[str, Any]:
    p = hit.passage
    return {
        "id": p.id,
        "text": p.text,
        "title": p.title,
        "heading": p.heading,
        "source": p.source,
        "url": p.url,
        "page": p.page,
        "score": round(hit.score, 4),
        "rank": rank,
    }


def _print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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


def _print_hit(hit: "Hit", rank: int) -> None:
    p = hit.passage
    path = " > ".join(filter(None, (p.title, p.heading)))
    place = f", page {p.page}" if p.page is not None else ""
    console.out.print(f"{rank}. {safe_line(path, 160)}", style="bold")
    console.out.print(f"   {hit.score:.3f}  {safe_line(p.url or p.source, 160)}{place}", style="dim")
    excerpt = " ".join(p.text.split())
    console.out.print(f"   {safe_line(excerpt, EXCERPT_CHARS)}\n")
