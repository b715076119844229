"""`mogine deploy`: the files that nginx, systemd, PM2, cron and logrotate need, from this home's settings."""

import difflib
import ipaddress
import math
import os
import shlex
import shutil
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogine.commands.shell import shell_of
from mogine.errors import SettingsError
from mogine.settings import Settings, parse_base_path

if TYPE_CHECKING:
    from mogine.deploy.site import Site
    from mogine.deploy.targets import Target

FOUND = 3


class Which(StrEnum):
    """For what program."""

    NGINX = "nginx"
    NGINX_LOCATIONS = "nginx-locations"
    SYSTEMD = "systemd"
    PM2 = "pm2"
    CRON = "cron"
    LOGROTATE = "logrotate"
    FIREWALL = "firewall"


OF_NGINX = (Which.NGINX, Which.NGINX_LOCATIONS)


def deploy(
    ctx: typer.Context,
    target: Annotated[Which, typer.Argument(help="For what program.", show_default=False)],
    domain: Annotated[
        str, typer.Option("--domain", help="Public name of the site; else the first of MOGINE_ALLOWED_HOSTS.")
    ] = "",
    prefix: Annotated[
        str,
        typer.Option("--prefix", help="Public path, such as /~temp/mogine_agent/; else MOGINE_BASE_PATH."),
    ] = "",
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="DIR", help="Write the files there instead of showing them."),
    ] = None,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff", help="Show what would change in DIR, or where the files belong; write nothing."
        ),
    ] = False,
    user: Annotated[str, typer.Option("--user", help="Who runs the servers; else the home's owner.")] = "",
    logs: Annotated[
        Path | None, typer.Option("--logs", metavar="DIR", help="Folder of the logs; else MOGINE_LOG_DIR.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="Its chain; else certbot's.")
    ] = None,
    certificate_key: Annotated[
        Path | None, typer.Option("--certificate-key", metavar="FILE", help="Its key; else certbot's.")
    ] = None,
    https_port: Annotated[int, typer.Option("--https-port", min=1, max=65535, help="Port for TLS.")] = 443,
    http_port: Annotated[
        int, typer.Option("--http-port", min=1, max=65535, help="Port that sends visitors to TLS.")
    ] = 80,
    admin_from: Annotated[
        list[str] | None,
        typer.Option(
            "--admin-from", metavar="NETWORK", help="Who may reach dashboard and uploads; nobody by default."
        ),
    ] = None,
    behind: Annotated[
        list[str] | None,
        typer.Option("--behind", metavar="NETWORK", help="Of a load balancer or CDN in front of nginx."),
    ] = None,
    upstreams: Annotated[
        list[str] | None,
        typer.Option(
            "--upstreams", metavar="HOST:PORT,...", help="The proxies, when there are several or not here."
        ),
    ] = None,
    kb_upstreams: Annotated[
        list[str] | None,
        typer.Option(
            "--kb-upstreams",
            metavar="HOST:PORT,...",
            help="The same for the knowledge base; documents go to the first.",
        ),
    ] = None,
    analytics_upstream: Annotated[
        str, typer.Option("--analytics-upstream", metavar="HOST:PORT", help="Analytics, when not here.")
    ] = "",
) -> None:
    """Make the files that put this home on a server, from its settings.

    Examples:

      mogine deploy nginx --domain www.example.com --prefix /~temp/mogine_agent/

      mogine deploy nginx-locations --domain www.example.com --write .

      sudo mogine --home /srv/assistant deploy systemd --write /etc/systemd/system

      mogine deploy systemd --diff

      mogine deploy pm2 --logs /www/wwwlogs --write .

      mogine deploy nginx --upstreams 10.0.0.1:8741,10.0.0.2:8741 --kb-upstreams 10.0.0.1:8739,10.0.0.2:8739

    nginx is a site of its own; nginx-locations is for a server block that you have already. With --diff the
    exit code is 3 when something would change. docs/deploy.md goes through a whole server.
    """  # fmt: skip
    from mogine.deploy.site import listed
    from mogine.deploy.targets import TARGETS

    settings = shell_of(ctx).existing()
    site = replace(
        site_of(settings, domain=domain, prefix=prefix, user=user, logs=logs),
        certificate=certificate and certificate.expanduser().absolute(),
        certificate_key=certificate_key and certificate_key.expanduser().absolute(),
        https_port=https_port,
        http_port=http_port,
        admin_from=tuple(admin_from or ()),
        behind=tuple(behind or ()),
        proxies=listed("--upstreams", upstreams),
        kbs=listed("--kb-upstreams", kb_upstreams),
        analytics_at=(analytics_upstream,) if analytics_upstream else (),
    )
    if site.is_spread and target not in OF_NGINX:
        raise SettingsError(f"--upstreams and its like are for nginx; {target} is about this machine")
    chosen = TARGETS[target.value]
    files = chosen.render(site)
    if diff:
        changed = _show_differences(files, _folder(write, chosen))
        raise typer.Exit(FOUND if changed else 0)
    if write is None:
        _show(files)
    else:
        _write(files, write.expanduser().resolve())
    _tell_what_next(site, settings, chosen, target, write)


def site_of(
    settings: Settings, *, domain: str = "", prefix: str = "", user: str = "", logs: Path | None = None
) -> "Site":
    """The home's settings as the programs around it need them. Raises SettingsError."""
    from mogine.deploy.site import Site, public_host, reachable

    try:
        base = parse_base_path(prefix) if prefix else settings.proxy.base_path
    except ValueError as error:
        raise SettingsError(f"--prefix {prefix!r}: {error}") from error
    body = settings.proxy.max_body_bytes
    if settings.proxy.allow_images:
        body += settings.proxy.max_image_bytes * 4 // 3 + 1024  # as base64
    # Servers that listen beyond this machine are asked from there, and share a database with others.
    speaks_out = settings.kb.embedder == "http" or not _is_loopback(settings.host)
    return Site(
        home=settings.home,
        executable=_executable(),
        programs=tuple(dict.fromkeys((Path(sys.prefix), Path(sys.base_prefix)))),
        domain=domain or public_host(settings),
        prefix=base,
        user=user or _owner(settings.home),
        log_dir=(logs or Path(settings.log_dir)).expanduser(),
        host=reachable(settings.host),
        proxy_port=settings.proxy.port,
        kb_port=settings.kb.port,
        analytics_port=settings.analytics.port,
        max_body_bytes=body,
        max_upload_bytes=settings.kb.max_upload_bytes,
        answer_timeout_s=settings.proxy.answer_timeout_s,
        shutdown_grace_s=settings.proxy.shutdown_grace_s,
        retention_days=settings.analytics.retention_days,
        kb_calls_out=speaks_out,
        analytics_calls_out=speaks_out,  # it gathers questions by meaning
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _executable() -> Path:
    """This program, by a path that stays: what was called, else the one beside this Python."""
    beside = Path(sys.executable).with_name("mogine")
    called = Path(sys.argv[0])
    if called.name == "mogine" and called.is_absolute() and called.exists():
        return called
    found = shutil.which("mogine")
    return beside if beside.exists() else Path(found or beside).absolute()


def _owner(home: Path) -> str:
    import pwd

    try:
        name = pwd.getpwuid(home.stat().st_uid).pw_name
    except KeyError:
        name = "root"
    # A server that reads what strangers send it has no business being root.
    return "mogine" if name == "root" else name


def _folder(write: Path | None, target: "Target") -> Path:
    folder = write or target.folder
    if folder is None:
        raise SettingsError("say with which folder to compare: --diff --write DIR")
    return folder.expanduser().resolve()


def _show(files: dict[str, str]) -> None:
    for name, text in files.items():
        if len(files) > 1:
            typer.echo(f"# ==> {name} <==")
        typer.echo(text, nl=False)
        if len(files) > 1:
            typer.echo()


def _write(files: dict[str, str], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / name
            if path.exists() and path.read_text("utf-8", "replace") == text:
                typer.echo(f"same     {path}", err=True)
                continue
            word = "changed" if path.exists() else "made"
            draft = path.with_name(f".{name}.{os.getpid()}")
            draft.write_text(text, "utf-8")
            draft.chmod(0o644)
            draft.replace(path)
            typer.echo(f"{word:<8} {path}", err=True)
    except OSError as error:
        raise SettingsError(
            f"{error.filename or folder} cannot be written ({error.strerror}): take another folder, or sudo"
        ) from error


def _show_differences(files: dict[str, str], folder: Path) -> bool:
    changed = False
    for name, text in files.items():
        path = folder / name
        there = path.read_text("utf-8", "replace") if path.exists() else ""
        lines = difflib.unified_diff(
            there.splitlines(keepends=True),
            text.splitlines(keepends=True),
            str(path) if path.exists() else "/dev/null",
            f"{path} (now)",
        )
        for line in lines:
            changed = True
            typer.echo(line, nl=False)
    return changed


def _tell_what_next(
    site: "Site", settings: Settings, target: "Target", which: Which, write: Path | None
) -> None:
    where = shlex.quote(str(write.expanduser().resolve())) if write else "DIR"
    values = {
        "dir": where,
        "home": shlex.quote(str(site.home)),
        "log_dir": shlex.quote(str(site.log_dir)),
        "user": site.user,
        "doctor": f"mogine doctor --public {site.url}",
    }
    steps = [step.format(**values) for step in target.then]
    if write is None and steps:
        steps.insert(0, f"write it: mogine deploy {which} ... --write {target.folder or 'DIR'}")
    if which in OF_NGINX:
        steps = [*_missing_settings(site, settings), *steps]
    if steps:
        typer.echo("\n".join(["Then:", *(f"  {step}" for step in steps)]), err=True)


def _missing_settings(site: "Site", settings: Settings) -> list[str]:
    """What the servers must be told, or they refuse the visitors that nginx sends."""
    if site.is_spread:
        return [
            f"in .env of each server: MOGINE_ALLOWED_HOSTS={site.domain}, MOGINE_BASE_PATH={site.prefix}, "
            "MOGINE_HOST=its own address, MOGINE_TRUSTED_PROXIES=the address of this nginx",
            "in .env of each proxy, for restarts that nobody notices: MOGINE_ROLLING_RESTART=true, "
            f"MOGINE_SHUTDOWN_GRACE={math.ceil(site.answer_timeout_s) + 10}",
        ]
    known = {name.partition(":")[0] for name in settings.access.allowed_hosts}
    known |= {origin.partition("://")[2].partition(":")[0] for origin in settings.access.allowed_origins}
    found = []
    if site.domain not in known and "*" not in known:
        found.append(
            f"in .env: MOGINE_ALLOWED_HOSTS={','.join((*settings.access.allowed_hosts, site.domain))}"
        )
    if settings.proxy.base_path != site.prefix:
        found.append(f"in .env: MOGINE_BASE_PATH={site.prefix}")
    if found:
        found.append("start the servers again: they read these at their start")
    return found
