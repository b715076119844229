"""`mogine kb`: documents in and out of the knowledge base, and a look at what it finds."""

import time
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mogine.commands import console, kbcare, kbingest, kbshare, kbtests
from mogine.commands.console import safe, safe_json, safe_line
from mogine.commands.knowledge import open_kb, print_rows, tests_path
from mogine.commands.shell import shell_of
from mogine.errors import NotFound, RequestError

if TYPE_CHECKING:
    from mogine.ingest.pipeline import Summary
    from mogine.kb.passages import Hit, StoredDocument

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Take documents into the knowledge base, and search it."
)

app.add_typer(kbtests.app, name="test")
for command in (
    *(kbingest.ingest, kbcare.generations, kbcare.rollback, kbcare.verify, kbcare.compact),
    *(kbshare.publish, kbshare.pull),
):
    app.command()(command)

EXCERPT_CHARS = 240

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of words.")]


class Mode(StrEnum):
    """How to search."""

    HYBRID = "hybrid"
    VECTOR = "vector"
    KEYWORD = "keyword"


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
        with open_kb(shell_of(ctx), embeds=mode is not Mode.KEYWORD) as kb:
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
    with open_kb(shell_of(ctx), embeds=False) as kb:
        documents = kb.documents()
        name = kb.name
    if as_json:
        listed = [_document_dict(document) for document in documents]
        typer.echo(safe_json({"generation": name, "documents": listed}))
        return
    columns = ("id", "passages", "characters", "updated", "source", "title")
    rows = [(d.id, f"{d.passages}", f"{d.characters}", d.updated, d.source, d.title) for d in documents]
    print_rows(columns, rows)
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
    with open_kb(shell, embeds=False) as kb:
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
    gate: Annotated[
        kbingest.GateMode,
        typer.Option(
            help="When a test of kb-tests.jsonl gets worse: keep the documents, tell, or do not ask."
        ),
    ] = kbingest.GateMode.WARN,
    as_json: AsJson = False,
) -> None:
    """Take documents out of the knowledge base; the files themselves stay.

    Examples:

      mogine kb remove docs/old-prices.xlsx

      mogine kb remove docs/a.md docs/b.md --gate strict

    Exit code 3 when the gate kept the documents.
    """
    from mogine.ingest.pipeline import Gate, take_out
    from mogine.kb.embedders import open_embedder
    from mogine.kb.gate import load_tests
    from mogine.kb.generations import Generations

    shell = shell_of(ctx)
    with open_kb(shell, embeds=False) as kb:
        known = kb.documents()
    sources = [_find(known, doc, shell.home).source for doc in docs]
    settings = shell.existing()
    tests = load_tests(tests_path(shell.home)) if gate is not kbingest.GateMode.OFF else []
    with closing(open_embedder(settings)) as embedder:
        summary = take_out(sources, Generations.of(settings), embedder, gate=Gate(tuple(tests), gate.value))
    if as_json:
        told = {
            "generation": summary.generation,
            "removed": [] if summary.is_held_back else summary.removed,
            "held_back": summary.is_held_back,
            "tests": kbtests.verdict_dict(summary.verdict) if summary.verdict else None,
        }
        typer.echo(safe_json(told))
    else:
        _tell_removed(summary)
    if summary.is_held_back:
        raise typer.Exit(kbtests.FOUND_SOMETHING)


def _tell_removed(summary: "Summary") -> None:
    if summary.verdict:
        kbtests.print_verdict(summary.verdict)
    if summary.is_held_back:
        console.err.print(
            f"generation {summary.generation} serves on, because the gate is strict and a test got worse; "
            "`--gate warn` takes the documents out all the same"
        )
        return
    for source in summary.removed:
        console.out.print(f"removed {safe_line(source)}")
    console.err.print(
        f"generation {summary.generation} serves now; files that stay in place come back with the next ingest"
    )


# --- what the commands share ---------------------------------------------------------------------


def _find(documents: "list[StoredDocument]", wanted: str, home: Path) -> "StoredDocument":
    """By source, by id, by the path of its file as seen from here, or by a file name that only one has.

    Raises NotFound.
    """
    import difflib

    from mogine.ingest.find import source_of

    by_name = {name: d for d in documents for name in (d.id, d.source)}
    found = by_name.get(wanted) or by_name.get(source_of(Path(wanted).expanduser(), home))
    if found is None and len(namesakes := [d for d in documents if d.source.endswith("/" + wanted)]) == 1:
        return namesakes[0]
    if found is None:
        close = difflib.get_close_matches(wanted, [d.source for d in documents], n=1, cutoff=0.5)
        hint = (
            f"did you mean {safe_line(close[0], 200)}?" if close else "`mogine kb list` shows what there is"
        )
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


def _print_hit(hit: "Hit", rank: int) -> None:
    p = hit.passage
    path = " > ".join(filter(None, (p.title, p.heading)))
    place = f", page {p.page}" if p.page is not None else ""
    console.out.print(f"{rank}. {safe_line(path, 160)}", style="bold")
    console.out.print(f"   {hit.score:.3f}  {safe_line(p.url or p.source, 160)}{place}", style="dim")
    excerpt = " ".join(p.text.split())
    console.out.print(f"   {safe_line(excerpt, EXCERPT_CHARS)}\n")
