"""`mogine serve`: the servers of a home, until a signal ends them."""

import ipaddress
import logging
import shlex
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.shell import Shell, shell_of
from mogine.errors import MogineError, SettingsError
from mogine.settings import PROVIDER_NAMES, Settings

if TYPE_CHECKING:
    from mogine.serve.runner import Running
    from mogine.serve.workers import Group


class Which(StrEnum):
    """What `mogine serve` can start."""

    ALL = "all"
    PROXY = "proxy"
    KB = "kb"
    ANALYTICS = "analytics"


def serve(
    ctx: typer.Context,
    which: Annotated[Which, typer.Argument(help="All three servers, or one of them.")] = Which.ALL,
    workers: Annotated[
        int, typer.Option("--workers", help="Processes for the proxy, on one port.", min=1, max=64)
    ] = 1,
    apart: Annotated[
        bool, typer.Option("--apart", help="Each server in a process of its own, started again when it dies.")
    ] = False,
) -> None:
    """Serve the chat page, the proxy to the models, the knowledge base and analytics.

    Examples:

      mogine serve all

      mogine --home /srv/assistant serve proxy

      MOGINE_PROXY_PORT=9000 mogine serve all

      mogine serve all --workers 4

      mogine serve all --apart

    One process for all is the smallest. With --apart the chat goes on without citations when the knowledge
    base dies, and loses no question when analytics does. `mogine deploy systemd` and `pm2` do the same with
    three services. SIGHUP reads keys, prices and site.toml again.

    Ctrl-C or SIGTERM ends it: no new questions are taken, running answers may finish, then everything
    is written and closed. A second signal does not wait for the answers.
    """
    shell = shell_of(ctx)
    if not shell.is_home:
        typer.echo(f"{shell.home} ({shell.home_source}) is no mogine home yet: making data/ in it", err=True)
    names = ("analytics", "kb", "proxy") if which is Which.ALL else (which.value,)
    if workers == 1 and not apart:
        serve_home(shell, names)
    else:
        serve_with_workers(shell, names, workers, apart=apart)


def worker(
    ctx: typer.Context,
    names: Annotated[str, typer.Argument(help="Servers, comma separated.")],
    descriptor: Annotated[int, typer.Option("--descriptor", help="The socket to the parent.")],
) -> None:
    """One of the processes of `mogine serve --workers N`, which starts them itself.

    Examples:

      mogine worker proxy --descriptor 5
    """
    from mogine.serve import logs, runner

    settings = shell_of(ctx).settings
    logs.configure(settings, verbose=logging.getLogger("mogine").isEnabledFor(logging.DEBUG))
    runner.run(settings, names.split(","), parent=descriptor)


def serve_with_workers(shell: Shell, names: tuple[str, ...], count: int, *, apart: bool) -> None:
    """`serve_home` with several processes for the proxy, or one for each server."""
    from mogine.serve import logs, workers

    settings = shell.settings
    logs.configure(settings, verbose=logging.getLogger("mogine").isEnabledFor(logging.DEBUG))
    repaired = prepare_home(settings)

    async def announce(group: "Group") -> None:
        typer.echo(banner(group, shell.home_source, repaired), err=True)

    if exit_code := workers.run(
        settings, names, count, environ=shell.environ, apart=apart, announce=announce
    ):
        raise typer.Exit(exit_code)
    typer.echo("mogine has stopped; everything is written", err=True)


def serve_home(shell: Shell, names: tuple[str, ...]) -> None:
    """Prepare the home's data folder, start the servers, show how to reach them, and wait for the end."""
    from mogine.serve import logs, runner
    from mogine.serve.notify import Herald

    settings = shell.settings
    logs.configure(settings, verbose=logging.getLogger("mogine").isEnabledFor(logging.DEBUG))
    repaired = prepare_home(settings)

    async def announce(running: "Running") -> None:
        typer.echo(banner(running, shell.home_source, repaired), err=True)

    runner.run(settings, names, announce=announce, herald=Herald.of(shell.environ))
    typer.echo("mogine has stopped; everything is written", err=True)


def prepare_home(settings: Settings) -> list[str]:
    """Make data/ and close it, and the settings, to other users; what was repaired, in words."""
    repaired: list[str] = []
    data, env = settings.data_path, settings.home / ".env"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, mode in ((data, 0o700), (env, 0o600)):
            if path.exists() and path.stat().st_mode & 0o077:
                path.chmod(mode)
                repaired.append(f"{path} was open to other users; its mode is {mode:o} now")
    except OSError as error:
        raise SettingsError(
            f"{error.filename or data} cannot be made or closed to other users ({error.strerror}): "
            "serve a home that belongs to this user, named by --home or MOGINE_HOME"
        ) from error
    return repaired


def banner(running: "Running | Group", where: str, repaired: list[str]) -> str:
    """What runs, where, with what; what to beware of; and how to try it."""
    settings = running.settings
    lines = [f"mogine {metadata.version('mogine')} serves {settings.home} ({where})", *_tree(running)]
    lines += [f"warning: {text}" for text in (*repaired, *_warnings(settings))]
    if "proxy" in running.names:
        lines += ["", "Try it:", *(f"  {command}" for command in _examples(running))]
    lines += ["", "Ctrl-C stops."]
    return "\n".join(lines)


def _tree(running: "Running | Group") -> list[str]:
    """One branch for each server, with what is behind it."""
    settings = running.settings
    branches: list[tuple[str, str, list[tuple[str, str]]]] = []
    if "proxy" in running.names:
        url = running.url("proxy")
        leaves = [("chat page", f"{url}/chat/"), ("OpenAI", f"{url}/v1")]
        branches.append(("proxy", url, [*leaves, ("providers", _providers(settings))]))
    if "kb" in running.names:
        branches.append(("knowledge base", running.url("kb"), [("documents", _documents(settings))]))
    if "analytics" in running.names:
        days = f"kept {settings.analytics.retention_days} days, in {settings.analytics.timezone}"
        url = running.url("analytics")
        dashboard = ("dashboard", f"{url}/dashboard/  (mogine admin link signs you in)")
        branches.append(("analytics", url, [dashboard, ("questions", days)]))
    lines = []
    for place, (title, url, leaves) in enumerate(branches):
        is_last = place == len(branches) - 1
        lines.append(f"{'└─' if is_last else '├─'} {title:<15} {url}")
        for number, (name, text) in enumerate(leaves):
            stem = " " if is_last else "│"
            lines.append(f"{stem}  {'└─' if number == len(leaves) - 1 else '├─'} {name:<12} {text}")
    return lines


def _documents(settings: Settings) -> str:
    from mogine.kb.generations import Generations

    try:
        generation = Generations.of(settings).current()
    except MogineError as error:
        return error.message
    if generation is None:
        return "none yet; `mogine kb ingest ./docs` takes them in, also while this runs"
    manifest = generation.manifest
    return f"{manifest.documents} in {manifest.passages} passages (generation {generation.name})"


def _providers(settings: Settings) -> str:
    """In the order in which they are asked, then those that are not set up."""
    asked = [
        f"{name} (key: yes)" if getattr(settings, name).keys else f"{name} (without a key)"
        for name in settings.provider_order
        if name != "extract" and settings.has_credentials(name)
    ]
    missing = [f"{name} (key: no)" for name in PROVIDER_NAMES if not settings.has_credentials(name)]
    return ", ".join([*asked, "extract", *missing])


def _warnings(settings: Settings) -> list[str]:
    found: list[str] = []
    if not _is_loopback(settings.host):
        found.append(
            f"MOGINE_HOST={settings.host} lets other machines in: keep these ports behind a firewall, "
            "and nginx with TLS in front of the proxy"
        )
    if "*" in settings.access.allowed_origins:
        found.append("MOGINE_ALLOWED_ORIGINS=* lets pages of every site spend your credit")
    if not any(settings.has_credentials(name) for name in PROVIDER_NAMES[:-1]):
        found.append(
            "no provider has a key: answers are quoted from the documents, without a model "
            f"(set DOUBAO_API_KEY in {settings.home / '.env'})"
        )
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _examples(running: "Running | Group") -> list[str]:
    proxy = running.url("proxy")
    body = """-H 'Content-Type: application/json' -d"""
    first = next(n for n in running.settings.provider_order if running.settings.has_credentials(n))
    examples = [
        f"""curl -N {proxy}/api/chat {body} '{{"question": "退款多久到账？"}}'""",
        f"""curl -N {proxy}/api/llm/{first} {body} """
        """'{"messages": [{"role": "user", "content": "你好"}], "stream": true}'""",
    ]
    if "kb" in running.names:
        examples.append(f"curl '{running.url('kb')}/api/search?q=%E9%80%80%E6%AC%BE&top_k=3'")
    if "analytics" in running.names:
        home = shlex.quote(str(running.settings.home))
        examples.append(f"mogine --home {home} stats --days 30")
    return examples
