"""`mogine kb test`: questions with known answers, asked of the knowledge base that serves."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mogine.commands import console
from mogine.commands.console import safe_json, safe_line
from mogine.commands.knowledge import open_kb, print_rows, tests_path
from mogine.commands.shell import Shell, shell_of
from mogine.errors import NotFound, RequestError, StoreError

if TYPE_CHECKING:
    from mogine.kb.gate import KbTest, Outcome, Verdict

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

FOUND_SOMETHING = 3
SHOWN_CHANGES = 40


@app.callback()
def run(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Also write the results for a CI system.")
    ] = None,
) -> None:
    """Ask the questions of kb-tests.jsonl, and tell which find what they should.

    Examples:

      mogine kb test

      mogine kb test --junit results.xml --json

      mogine kb test add 怎么退款 --document docs/returns.md

    Exit code 3 when one fails. `mogine kb ingest` asks them too, before a new generation serves.
    """
    if ctx.invoked_subcommand:
        return
    from mogine.kb.gate import junit as render
    from mogine.kb.gate import load_tests, run_tests

    shell = shell_of(ctx)
    shell.existing()
    path = tests_path(shell.home)
    tests = load_tests(path)
    if not tests:
        raise NotFound(f"{path} holds no tests; `mogine kb test add QUESTION --document SOURCE` adds one")
    started = time.perf_counter()
    with open_kb(shell, embeds=any(test.mode != "keyword" for test in tests)) as kb:
        outcomes = run_tests(kb, tests)
        name = kb.name
    if junit is not None:
        try:
            junit.expanduser().write_text(render(outcomes, time.perf_counter() - started), "utf-8")
        except OSError as error:
            raise StoreError(f"{junit} cannot be written ({error.strerror})") from error
    failed = sum(not outcome.passed for outcome in outcomes)
    if as_json:
        results = [_outcome_dict(outcome) for outcome in outcomes]
        body = {"generation": name, "passed": len(outcomes) - failed, "failed": failed, "results": results}
        typer.echo(safe_json(body))
    else:
        rows = [
            (
                "ok" if o.passed else "FAILED",
                str(o.rank or "-"),
                str(o.test.top_k),
                o.test.question,
                _expected(o),
                "" if o.passed else o.first,
            )
            for o in outcomes
        ]
        print_rows(("result", "rank", "top_k", "question", "expected", "found first"), rows)
        console.err.print(f"{len(outcomes) - failed} passed, {failed} failed, generation {name}")
    if failed:
        raise typer.Exit(FOUND_SOMETHING)


@app.command()
def add(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="As a visitor would ask it.")],
    document: Annotated[
        str,
        typer.Option("--document", "-d", help="The document that must be found: source, file name or id."),
    ] = "",
    contains: Annotated[str, typer.Option("--contains", "-c", help="Text that the passage must hold.")] = "",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=50, help="Among the first how many.")] = 3,
) -> None:
    """Add a question and what it must find to kb-tests.jsonl.

    Examples:

      mogine kb test add 怎么退款 --document docs/returns.md

      mogine kb test add "how long is the warranty" --contains "two years" --top-k 1
    """
    from mogine.kb.gate import add_test, test_from

    shell = shell_of(ctx)
    shell.existing()
    if not document.strip() and not contains.strip():
        raise RequestError("say what must be found: --document, --contains, or both")
    fields = {"question": question, "document": document, "contains": contains, "top_k": top_k}
    path = tests_path(shell.home)
    test = test_from(fields)
    is_new = add_test(path, test)
    console.err.print(f"added to {path}" if is_new else f"{path} has this test already")
    if test.document and not _is_there(shell, test):
        console.err.print(
            f"warning: there is no document {safe_line(test.document, 200)}, so the test fails until it is "
            "taken in; `mogine kb list` shows what there is"
        )


def _is_there(shell: Shell, test: "KbTest") -> bool:
    """Whether the knowledge base has the document that a test expects."""
    try:
        with open_kb(shell, embeds=False) as kb:
            return any(test.names(document.source, document.url) for document in kb.documents())
    except NotFound:
        return False


def verdict_dict(verdict: "Verdict") -> dict[str, Any]:
    """For `--json`."""
    return {
        "may_serve": verdict.may_serve,
        "tests": len(verdict.changes),
        "failed": [outcome.test.question for outcome in verdict.failed],
        "worse": [change.after.test.question for change in verdict.worse],
        "moved": [
            {
                "question": change.after.test.question,
                "rank_before": change.before.rank if change.before else None,
                "rank_now": change.after.rank,
                "first_now": change.after.first,
                "top_k": change.after.test.top_k,
            }
            for change in verdict.moved
        ],
    }


def print_verdict(verdict: "Verdict") -> None:
    """Which questions changed rank, and what the gate made of it, on stderr."""
    for change in verdict.moved[:SHOWN_CHANGES]:
        before = change.before.rank if change.before else None
        word = "WORSE " if change.is_worse else "      "
        first = f"  (first is now {safe_line(change.after.first, 100)})" if change.after.rank != 1 else ""
        console.err.print(
            f"{word} rank {before or '-'} -> {change.after.rank or '-'}  "
            f"{safe_line(change.after.test.question, 100)}{first if change.after.first else ''}"
        )
    if len(verdict.moved) > SHOWN_CHANGES:
        console.err.print(f"  and {len(verdict.moved) - SHOWN_CHANGES} more")
    passed = len(verdict.changes) - len(verdict.failed)
    console.err.print(f"tests: {passed} of {len(verdict.changes)} pass, {len(verdict.worse)} got worse")


def _outcome_dict(outcome: "Outcome") -> dict[str, Any]:
    return {**outcome.test.to_dict(), "passed": outcome.passed, "rank": outcome.rank, "first": outcome.first}


def _expected(outcome: "Outcome") -> str:
    test = outcome.test
    return " ".join(filter(None, (test.document, f'"{test.contains}"' if test.contains else "")))
