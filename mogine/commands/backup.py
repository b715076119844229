"""`mogine backup` and `restore`: a home in one file and back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.shell import shell_of
from mogine.errors import SettingsError

if TYPE_CHECKING:
    from mogine.backup import Contents
    from mogine.settings import Settings


def backup(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The archive; else a new one in data/backups.")
    ] = None,
    with_secrets: Annotated[
        bool,
        typer.Option("--with-secrets", help="Take keys and the admin token along: keep FILE to yourself."),
    ] = False,
    docs: Annotated[bool, typer.Option(help="Take the folder docs/ along.")] = True,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", min=1, help="Of the archives in data/backups keep the newest N."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Write the record, the knowledge base, site.toml and the tests into one file, also while it serves.

    Examples:

      mogine backup

      mogine backup /mnt/elsewhere/mogine.tar.gz

      mogine backup --keep 14      (a line for cron)

      mogine backup moving.tar.gz --with-secrets

    A backup on the same disk does not outlive the disk: copy it away, too. A record that MOGINE_DATABASE_URL
    keeps in PostgreSQL is not in it: that has `pg_dump`.
    """  # fmt: skip
    from mogine import backup as archives

    settings = shell_of(ctx).existing()
    target = file.expanduser().absolute() if file else archives.default_target(settings)
    if keep and file:
        raise SettingsError("--keep is for the archives in data/backups: leave FILE away")
    contents = archives.backup(settings, target, with_secrets=with_secrets, docs=docs)
    dropped = archives.drop_old(settings, keep) if keep else []
    if as_json:
        size = target.stat().st_size
        found = {"file": str(target), "bytes": size, "dropped": len(dropped), **_summary(contents)}
        typer.echo(json.dumps(found, ensure_ascii=False))
    elif file or not keep:  # from cron, no news is good news
        typer.echo(f"{target}: {target.stat().st_size / 1024**2:.1f} MiB, {_words(contents)}", err=True)
        if settings.analytics.database_url:
            typer.echo(
                "the record of questions is in PostgreSQL and not in this file: `pg_dump` saves it, "
                "`pg_restore` brings it back",
                err=True,
            )


def restore(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive of `mogine backup`.")],
    only_check: Annotated[
        bool, typer.Option("--check", help="Compare every file with its checksum; restore nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Though servers of this home seem to run.")] = False,
) -> None:
    """Put a backup into the home; what is there moves into a folder before-restore-... of the home.

    Examples:

      mogine restore data/backups/mogine-20261123T031000Z.tar.gz --check

      mogine --home ./new-home restore mogine.tar.gz

    Stop the servers first. An older backup is brought to this version; one of a newer mogine is refused. Keys
    that the home has stay, unless the archive was made --with-secrets.
    """
    from mogine import backup as archives

    shell = shell_of(ctx)
    source = file.expanduser().absolute()
    if only_check:
        typer.echo(f"{source} is whole: {_words(archives.check(source))}", err=True)
        return
    if shell.is_home and not force:
        _require_silence(shell.settings)
    done = archives.restore(source, shell.home)
    typer.echo(f"restored into {shell.home}: {_words(done.contents)}", err=True)
    if done.kept_in:
        typer.echo(f"what was there before: {done.kept_in} (remove it when all is well)", err=True)
    if not done.contents.secrets and not done.kept_env:
        typer.echo("the backup holds no keys: `mogine keys set doubao`", err=True)


def _require_silence(settings: "Settings") -> None:
    """A server that goes on writing into moved files would lose what it writes."""
    import httpx

    for name in ("proxy", "kb", "analytics"):
        try:
            answer = httpx.get(settings.server_url(name) + "/healthz", timeout=2, trust_env=False)
        except httpx.TransportError:
            continue
        if answer.headers.get("server") == "mogine":
            raise SettingsError(
                f"a server answers at {settings.server_url(name)}: stop mogine first, "
                "or say --force when it is that of another home"
            )


def _summary(contents: "Contents") -> dict[str, object]:
    return {
        "created_at": contents.created_at,
        "mogine": contents.mogine,
        "secrets": contents.secrets,
        "rows": contents.rows,
        "generation": contents.generation,
        "files": len(contents.files),
    }


def _words(contents: "Contents") -> str:
    keys = "with keys" if contents.secrets else "without keys"
    knowledge = f"knowledge base {contents.generation}" if contents.generation else "no knowledge base"
    return f"{contents.rows:,} questions, {knowledge}, {keys}, of {contents.created_at}"
