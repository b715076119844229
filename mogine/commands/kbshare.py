"""`mogine kb publish|pull`: generations on their way to the other machines of a site."""

import re
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands import console
from mogine.commands.console import safe_json, safe_line
from mogine.commands.shell import shell_of
from mogine.errors import Locked, MogineError, NotFound, SettingsError, StoreError, UpstreamError

if TYPE_CHECKING:
    from mogine.kb.pull import Pulled, Source
    from mogine.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of words.")]


def publish(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="[FOLDER]", help="Where to; MOGINE_KB_SHARE by default.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Put the documents that serve here into a folder that other machines read.

    Examples:

      mogine kb publish /mnt/share/kb

      mogine kb ingest ./docs && mogine kb publish /srv/kb && rsync -a --delay-updates /srv/kb/ web2:/srv/kb/

    The folder may be shared (NFS) or copied (rsync). Only what it does not have is written, and the last
    three generations stay. Machines that ask this one's knowledge base server (`mogine kb pull https://...`)
    need no folder.
    """
    from mogine.kb.generations import Generations
    from mogine.kb.offers import Offers
    from mogine.kb.offers import publish as put

    settings = shell_of(ctx).existing()
    place = _place(target, settings, "publish")
    if _is_address(place):
        raise SettingsError(
            f"{safe_line(place, 200)} is an address: publish into a folder, or run `mogine kb pull` on the "
            "other machines with the address of this one's knowledge base server"
        )
    done = put(Offers(Generations.of(settings), settings.kb_path), Path(place).expanduser())
    if as_json:
        body = {"generation": done.generation, "bytes": done.size_bytes, "written_bytes": done.written_bytes}
        typer.echo(safe_json(body))
        return
    console.out.print(
        f"generation {done.generation} is in {safe_line(place, 200)}: {_size(done.size_bytes)}, "
        f"{_size(done.written_bytes)} of it written now"
    )


def pull(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="[URL|FOLDER]", help="Where from; MOGINE_KB_SHARE by default."),
    ] = "",
    every: Annotated[
        str, typer.Option(metavar="TIME", help="Go on, and look again so often: 30s, 5m, 1h.")
    ] = "",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Holds the admin token of the other machine; else MOGINE_ADMIN_TOKEN."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also replace documents that were taken in on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let the documents of another machine serve here.

    Examples:

      mogine kb pull https://writer.internal/

      mogine kb pull /mnt/share/kb --every 30s

      * * * * * mogine --home /srv/mogine kb pull      (a line of cron, with MOGINE_KB_SHARE in .env)

    Only what is new comes over, checked by SHA-256, and serves when all of it is there: servers that run
    follow within two seconds. Whatever happens on the way, the documents that serve go on. Nothing is said
    when there is nothing new.
    """
    from mogine.kb.embedders import open_embedder
    from mogine.kb.generations import Generations
    from mogine.kb.pull import pull as take

    pause_s = _seconds(every) if every else None
    settings = shell_of(ctx).existing()
    place = _place(source, settings, "pull")
    generations = Generations.of(settings)
    problem = ""
    with (
        closing(_source(place, token_file, settings)) as opened,
        closing(open_embedder(settings)) as embedder,
    ):
        while True:
            try:
                pulled = take(generations, opened, embedder=embedder.name, is_forced=force)
                _tell(pulled, opened.name, as_json=as_json, is_shown=pause_s is None)
                problem = ""
            except (Locked, StoreError, UpstreamError, NotFound) as error:
                if pause_s is None:
                    raise
                problem = _told_once(error, problem)
            if pause_s is None:
                return
            time.sleep(pause_s)


def _place(given: str, settings: "Settings", verb: str) -> str:
    place = given or settings.kb.share
    if not place:
        raise SettingsError(
            f"say where: `mogine kb {verb} /mnt/share/kb`, or set MOGINE_KB_SHARE to a folder or an address"
        )
    return place


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _source(place: str, token_file: Path | None, settings: "Settings") -> "Source":
    from mogine.kb.pull import FolderSource, ServerSource

    if not _is_address(place):
        return FolderSource(Path(place).expanduser())
    token = settings.access.admin_token
    if token_file is not None:
        try:
            token = token_file.expanduser().read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--token-file {token_file}: cannot be read ({error})") from error
    if not token or not token.isascii() or not token.isprintable():
        raise SettingsError(
            "the other machine wants its admin token: set MOGINE_ADMIN_TOKEN in .env to the same value on "
            "both, or name a file with it (--token-file); `mogine admin token` there prints it"
        )
    return ServerSource(place, token)


def _tell(pulled: "Pulled", name: str, *, as_json: bool, is_shown: bool) -> None:
    if pulled.manifest is None:
        if as_json and is_shown:
            typer.echo(safe_json({"generation": pulled.generation, "new": False, "fetched_bytes": 0}))
        elif is_shown and console.err.is_terminal:
            console.err.print(f"generation {pulled.generation} serves already")
        return
    if as_json:
        body = {
            "generation": pulled.generation,
            "new": True,
            "documents": pulled.manifest.documents,
            "passages": pulled.manifest.passages,
            "bytes": pulled.size_bytes,
            "fetched_bytes": pulled.fetched_bytes,
        }
        typer.echo(safe_json(body))
        return
    m = pulled.manifest
    console.out.print(
        f"generation {pulled.generation} serves now: {m.documents} documents, {m.passages} passages; "
        f"{_size(pulled.fetched_bytes)} of {_size(pulled.size_bytes)} came from {safe_line(name, 200)}"
    )


def _told_once(error: MogineError, before: str) -> str:
    if error.message != before:
        console.err.print(f"mogine: {safe_line(error.message)}")
    return error.message


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,6})\s*([smh]?)", text.strip().lower())
    seconds = int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0
    if not 1 <= seconds <= 86400:
        raise SettingsError(f"--every {safe_line(text, 40)!r}: expected a time such as 30s, 5m or 1h")
    return float(seconds)


def _size(count: int) -> str:
    return f"{count / 1024**2:.1f} MiB" if count >= 1024**2 else f"{count / 1024:.1f} KiB"
