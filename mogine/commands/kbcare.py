"""`mogine kb generations|rollback|verify|compact`: the generations of a knowledge base, and their health."""

from typing import Annotated

import typer

from mogine.commands import console
from mogine.commands.console import safe_json, safe_line
from mogine.commands.knowledge import print_rows
from mogine.commands.shell import shell_of
from mogine.errors import NotFound

FOUND_SOMETHING = 3

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of words.")]


def generations(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the generations that are kept, the newest first.

    Examples:

      mogine kb generations

      mogine kb generations --json
    """
    from mogine.kb.generations import Generations

    listed = Generations.of(shell_of(ctx).existing()).listed()
    if as_json:
        rows = []
        for kept in listed:
            manifest = kept.generation.manifest if kept.generation else None
            rows.append(
                {
                    "name": kept.name,
                    "serves": kept.is_current,
                    "bytes": kept.bytes,
                    "created_at": manifest.created_at if manifest else None,
                    "documents": manifest.documents if manifest else None,
                    "passages": manifest.passages if manifest else None,
                    "embedder": manifest.embedder if manifest else None,
                    "versions": dict(manifest.versions) if manifest else None,
                    "problem": kept.problem or None,
                }
            )
        typer.echo(safe_json({"generations": rows}))
        return
    table = []
    for kept in listed:
        serves = "serves" if kept.is_current else ""
        size = f"{kept.bytes / 1024**2:.1f} MiB"
        if kept.generation is None:
            table.append((kept.name, serves, "", "", "", size, kept.problem))
            continue
        m = kept.generation.manifest
        table.append((kept.name, serves, m.created_at, f"{m.documents}", f"{m.passages}", size, m.embedder))
    print_rows(("name", "", "created", "documents", "passages", "size", "embedder"), table)
    if not listed:
        console.err.print("there is no generation yet; `mogine kb ingest ./docs` makes the first")


def rollback(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Which one; the one before by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Let an older generation serve again, at once.

    Examples:

      mogine kb rollback

      mogine kb rollback g000007

    Servers that run follow within a second. The documents on disk stay as they are: the next ingest brings
    their changes back.
    """
    from mogine.kb.generations import Generations

    generation = Generations.of(shell_of(ctx).existing()).rollback(name or None)
    if as_json:
        typer.echo(safe_json({"generation": generation.name, "documents": generation.manifest.documents}))
        return
    console.out.print(
        f"generation {generation.name} serves now: {generation.manifest.documents} documents, "
        f"{generation.manifest.passages} passages, made {generation.manifest.created_at}"
    )


def verify(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Which one; the one that serves.")] = "",
    full: Annotated[
        bool, typer.Option("--full", help="Search for every vector instead of a sample of 300.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that documents, keyword index and vectors agree and no file has changed.

    Examples:

      mogine kb verify

      mogine kb verify g000007 --full --json

    Exit code 3 when something is wrong.
    """
    from mogine.kb.generations import Generations
    from mogine.kb.verify import SAMPLE
    from mogine.kb.verify import verify as check

    home = Generations.of(shell_of(ctx).existing())
    generation = home.named(name) if name else home.current()
    if generation is None:
        raise NotFound("there is no generation yet; `mogine kb ingest ./docs` makes the first")
    findings = check(generation, sample=None if full else SAMPLE)
    if as_json:
        rows = [{"part": finding.part, "detail": finding.detail} for finding in findings]
        typer.echo(safe_json({"generation": generation.name, "ok": not findings, "findings": rows}))
    else:
        for finding in findings:
            console.out.print(f"{finding.part}: {safe_line(finding.detail)}")
        if findings:
            remedy = (
                "`mogine kb ingest ./docs` fills the Chroma server again"
                if generation.manifest.collection and {f.part for f in findings} == {"vectors"}
                else "`mogine kb rollback` goes back to the one before, "
                "`mogine kb compact` writes it anew from what can be read"
            )
            console.err.print(f"generation {generation.name} is damaged; {remedy}")
        else:
            console.out.print(
                f"generation {generation.name} is whole: {generation.manifest.documents} documents, "
                f"{generation.manifest.passages} passages"
            )
    if findings:
        raise typer.Exit(FOUND_SOMETHING)


def compact(
    ctx: typer.Context,
    forget: Annotated[
        bool, typer.Option("--forget", help="Also remove the generations kept for a way back.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the knowledge base anew, without what removed documents have left in it.

    Examples:

      mogine kb compact

      mogine kb compact --forget

    The cache of vectors is emptied too. With --forget, what was removed from the documents is then nowhere
    in the home any more; there is no rollback after it.
    """
    from mogine.kb.embedders import open_embedder
    from mogine.kb.generations import Generations

    settings = shell_of(ctx).existing()
    home = Generations.of(settings)
    before = next((kept.bytes for kept in home.listed() if kept.is_current), 0)
    if not before:
        raise NotFound("there is no generation yet; `mogine kb ingest ./docs` makes the first")
    with home.begin(open_embedder(settings)) as draft:
        draft.rebuild()
        name = draft.commit()
        for path in settings.kb_path.glob("vectors.db*"):
            path.unlink(missing_ok=True)
    forgotten = home.forget_others() if forget else []
    after = next(kept.bytes for kept in home.listed() if kept.is_current)
    if as_json:
        body = {"generation": name, "bytes_before": before, "bytes": after, "forgotten": forgotten}
        typer.echo(safe_json(body))
        return
    told = f"; removed {', '.join(forgotten)}" if forgotten else ""
    console.out.print(
        f"generation {name} serves now: {after / 1024**2:.1f} MiB, before {before / 1024**2:.1f} MiB{told}"
    )
