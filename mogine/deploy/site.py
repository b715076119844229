"""What the files for a server are made from: names, folders and ports, checked once."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mogine.errors import SettingsError
from mogine.settings import Settings

DOMAIN = re.compile(r"(?=.{1,253}$)(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)
PREFIX = re.compile(r"/([A-Za-z0-9_.~-]+/)*")
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Site:
    """One home as the programs around it see it. Raises SettingsError for what no file could hold.

    `programs` are the folders that the executable needs to read: its virtual environment and its Python.
    `domain` may be empty where no web server is concerned. `prefix` begins and ends with `/`.
    `admin_from` are the networks that may reach the owner's side from outside; nobody by default.
    `behind` are the networks of a load balancer or CDN in front of nginx. `proxies`, `kbs` and `analytics_at`
    are servers that run elsewhere than `host`, or more than once, each as `host:port`.
    """

    home: Path
    executable: Path
    programs: tuple[Path, ...] = ()
    domain: str = ""
    prefix: str = "/"
    user: str = "mogine"
    log_dir: Path = Path("/var/log/mogine")
    host: str = "127.0.0.1"
    proxy_port: int = 8741
    kb_port: int = 8739
    analytics_port: int = 8742
    http_port: int = 80
    https_port: int = 443
    certificate: Path | None = None
    certificate_key: Path | None = None
    max_body_bytes: int = 256 * 1024
    max_upload_bytes: int = 32 * 1024**2
    answer_timeout_s: float = 300.0
    shutdown_grace_s: float = 15.0
    retention_days: int = 180
    kb_calls_out: bool = False
    analytics_calls_out: bool = False
    admin_from: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    kbs: tuple[str, ...] = ()
    analytics_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [*_names(self), *_paths(self), *_networks(self), *_servers(self)]
        if problems:
            raise SettingsError("\n".join(["no file can be made of this:", *(f"  - {p}" for p in problems)]))

    @property
    def tls_certificate(self) -> Path:
        """The certificate with its chain; certbot's place by default."""
        return self.certificate or Path("/etc/letsencrypt/live") / self.domain / "fullchain.pem"

    @property
    def tls_key(self) -> Path:
        """The certificate's key."""
        return self.certificate_key or Path("/etc/letsencrypt/live") / self.domain / "privkey.pem"

    @property
    def data(self) -> Path:
        """Everything mogine writes."""
        return self.home / "data"

    @property
    def is_spread(self) -> bool:
        """Whether nginx has to choose among servers, or to reach another machine."""
        return bool(self.proxies or self.kbs or self.analytics_at)

    def upstreams(self, name: str) -> tuple[str, ...]:
        """Where nginx finds `proxy`, `kb` or `analytics` if not at `host`; empty otherwise."""
        return {"proxy": self.proxies, "kb": self.kbs, "analytics": self.analytics_at}[name]

    @property
    def url(self) -> str:
        """What visitors open."""
        port = "" if self.https_port == 443 else f":{self.https_port}"
        return f"https://{self.domain}{port}{self.prefix}"


def public_host(settings: Settings) -> str:
    """The first public name that the settings give the servers; "" when they give none."""
    names = [name for name in settings.access.allowed_hosts if name != "*"]
    origins = [origin.partition("://")[2] for origin in settings.access.allowed_origins if origin != "*"]
    return next((name.partition(":")[0] for name in (*names, *origins)), "")


def reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - where to call


def listed(option: str, values: Sequence[str] | None) -> tuple[str, ...]:
    """The servers in the values of an option, each of which may name several, comma separated.

    Empty when it was not given. Raises SettingsError when it was and names none.
    """
    servers = tuple(word for value in values or () for part in value.split(",") if (word := part.strip()))
    if values and not servers:
        raise SettingsError(f"{option} names no server; write {option} 10.0.0.1:8741,10.0.0.2:8741")
    return servers


def _servers(site: Site) -> list[str]:
    found = []
    for name in ("proxy", "kb", "analytics"):
        known: dict[tuple[str, int], str] = {}
        for server in site.upstreams(name):
            try:
                where = _parted(server)
            except ValueError as error:
                found.append(f"{server!r} is no server: {error}")
                continue
            if where in known:
                found.append(f"{server!r} is the same server as {known[where]!r}; name each once")
            known.setdefault(where, server)
    return found


def _parted(server: str) -> tuple[str, int]:
    """Host and port, in the one form by which they are compared. Raises ValueError with the remedy."""
    if "/" in server:
        raise ValueError("write HOST:PORT, without a scheme and a path")
    host, colon, port = server.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ValueError("write an IPv6 address in brackets, and its port: [fd00::1]:8741")
    if not colon or not host:
        raise ValueError("write HOST:PORT, such as 10.0.0.1:8741 or proxy.example.com:8741")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError("a port is a number from 1 to 65535")
    if bracketed:
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if re.fullmatch(r"[0-9.]+", host):
        return str(ipaddress.IPv4Address(host)), int(port)
    if not DOMAIN.fullmatch(host):
        raise ValueError("its host is neither an address nor a name")
    return host.lower(), int(port)


def _names(site: Site) -> list[str]:
    found = []
    if site.domain and not DOMAIN.fullmatch(site.domain):
        found.append(f"{site.domain!r} is no host name; write one such as chat.example.com")
    if not PREFIX.fullmatch(site.prefix) or any(part in (".", "..") for part in site.prefix.split("/")):
        found.append(f"{site.prefix!r} is no prefix; write one such as /~temp/mogine_agent/")
    if not USER.fullmatch(site.user):
        found.append(f"{site.user!r} is no name of a user")
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", site.host):
        found.append(f"{site.host!r} is no address to listen on")
    return found


def _paths(site: Site) -> list[str]:
    found = []
    for path in (
        site.home,
        site.executable,
        *site.programs,
        site.log_dir,
        site.certificate,
        site.certificate_key,
    ):
        if path is None:
            continue
        if not path.is_absolute():
            found.append(f"{str(path)!r} must be a whole path, from / on")
        if any(not char.isprintable() for char in str(path)):
            found.append(f"{str(path)!r} holds a character that cannot be printed; choose another folder")
    return found


def _networks(site: Site) -> list[str]:
    found = []
    for network in (*site.admin_from, *site.behind):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            found.append(f"{network!r} is no network; write one such as 203.0.113.0/24")
    return found
