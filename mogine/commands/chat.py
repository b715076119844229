"""`mogine chat`: a conversation in the terminal, or one question in a script."""

import logging
from typing import Annotated

import typer

from mogine.commands.shell import shell_of


def chat(
    ctx: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT|-", show_default=False, help="The question; - reads it from standard input."
        ),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="doubao, dashscope, openai or extract; else the first with a key.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model of that provider; else the one set.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")
    ] = False,
    kb: Annotated[bool, typer.Option(help="Answer from the knowledge base, with citations.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; needs a question.")] = False,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a running server as visitors do; it records the question."),
    ] = None,
) -> None:
    """Chat with the assistant; without a question, in turns.

    Examples:

      mogine chat

      mogine chat "How long is the warranty?" --provider doubao

      cat question.txt | mogine chat - --json

      mogine chat --continue "And for chairs?"

      mogine chat "Hello" --provider extract --server http://127.0.0.1:8741

    In turns, Ctrl-C stops an answer and, at the empty prompt, leaves. Alt-Enter makes a new line.

    There are the commands /help, /new, /provider and /quit.

    Asking a provider directly is the owner's own test: nothing is recorded.
    """
    # Imported here: they bring rich, the vendors' clients and line editing, which no other command needs.
    from mogine.commands.talk import Choice, talk

    if not logging.getLogger("mogine").isEnabledFor(logging.DEBUG):
        # What `answer` logs for the owner of a server is told here in words of the chat's own.
        logging.getLogger("mogine.answer").setLevel(logging.ERROR)
    code = talk(
        shell_of(ctx),
        Choice(prompt, provider, model, go_on=go_on, kb=kb, as_json=as_json, server=server),
    )
    if code:
        raise typer.Exit(code)
