"""Who may call: host names, browser origins, the admin token, the visitor's real address."""

import contextlib
import hmac
import ipaddress
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from aiohttp import hdrs, web

from mogine.errors import Forbidden, RateLimited, RequestError, SettingsError, Unauthorized
from mogine.serve.requests import Request, ShortRequest, peer_of
from mogine.settings import Network, Settings

ADMIN_TOKEN_FILE = "admin_token"  # noqa: S105 - a file's name
HOME_ID_FILE = "home_id"
FAILURES_PER_MINUTE = 10
MAX_TRACKED_ADDRESSES = 10_000
FORWARDED = (hdrs.X_FORWARDED_FOR, hdrs.FORWARDED, "X-Real-IP", "Via")
MAX_KNOWN_HOSTS = 100


class Access(Enum):
    """Who a route is for; every route declares one."""

    PUBLIC = "public"  # anyone, also other programs: health and search
    VISITOR = "visitor"  # anonymous people; browsers only from allowed origins
    LOCAL = "local"  # programs on this machine that come through no proxy, and the bearer of the admin token
    ADMIN = "admin"  # the bearer of the admin token


def admin_token(settings: Settings) -> str:
    """The configured token, else the one in `data/admin_token`, which is made when absent.

    Raises SettingsError when the configured token is too short to be one.
    """
    if settings.access.admin_token:
        if len(settings.access.admin_token) < 32:
            raise SettingsError(
                "MOGINE_ADMIN_TOKEN is too short: take at least 32 random characters, "
                "or leave it empty and mogine makes one in data/admin_token"
            )
        return settings.access.admin_token
    path = settings.data_path / ADMIN_TOKEN_FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            publish_once(path, secrets.token_urlsafe(32) + "\n")
        path.chmod(0o600)
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be used ({error.__class__.__name__}): make the folder writable for this user"
        ) from error
    if len(token) < 32:
        raise SettingsError(f"{path} holds no usable token: delete the file and start again")
    return token


def home_id(data_path: Path) -> str:
    """What tells this home from others, also when it moves; made in `data/home_id` when absent."""
    path = data_path / HOME_ID_FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            publish_once(path, secrets.token_hex(16) + "\n")
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be used ({error.__class__.__name__}): make the folder writable for this user"
        ) from error


def without_redis() -> SettingsError:
    """The setting is there and the package is not."""
    return SettingsError(
        "MOGINE_REDIS_URL needs the package redis: pip install 'mogine[redis]', or leave it empty"
    )


def publish_once(path: Path, text: str) -> None:
    """Writes `text` under a name of its own and links it into place: of several servers that start
    at once one wins, and none ever reads half a token."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


class Gate:
    """Decides for each request whether it may come in; one per server."""

    def __init__(
        self,
        settings: Settings,
        token: str | Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
        admits: Callable[[web.Request], bool] = lambda request: False,
    ) -> None:
        """`token` may change while it runs; `admits` knows the owner by something else than a token."""
        self._token: Callable[[], str] = token if callable(token) else lambda: str(token)
        self._admits = admits
        self._clock = clock
        self._trusted = settings.access.trusted_proxies
        self._origins = frozenset(settings.access.allowed_origins)
        self._hosts = _allowed_hosts(settings)
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        self._known_hosts: set[str] = set()

    def check_host(self, request: Request) -> None:
        """Refuses names that are not ours: a web page may point its own name at this machine."""
        hosts = request.headers.getall(hdrs.HOST, ())
        if len(hosts) != 1:
            raise RequestError("send exactly one Host header", reason="bad_host")
        if hosts[0] in self._known_hosts:
            return
        name = host_name(hosts[0])
        if name in self._hosts or "*" in self._hosts or _is_loopback(name):
            if len(self._known_hosts) < MAX_KNOWN_HOSTS:
                self._known_hosts.add(hosts[0])
            return
        raise Forbidden(
            "this server does not answer to that host name; its owner can add it to MOGINE_ALLOWED_HOSTS",
            reason="host_not_allowed",
        )

    def check_origin(self, request: Request) -> None:
        """Refuses a browser page of another site before it costs anything."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or self.allows_origin(origin, request):
            return
        raise Forbidden(
            "pages of this origin may not call; the server's owner can add it to MOGINE_ALLOWED_ORIGINS",
            reason="origin_not_allowed",
        )

    def allows_origin(self, origin: str, request: Request) -> bool:
        """Exact match against the list, or the page came from this very server."""
        if origin in self._origins or "*" in self._origins:
            return True
        return self.is_own(origin, request)

    @staticmethod
    def is_own(origin: str, request: Request) -> bool:
        """Whether the page came from this very server."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False  # brackets that hold no address
        own = request.headers.get(hdrs.HOST, "")
        return parts.scheme in ("http", "https") and bool(parts.netloc) and _same_host(parts, own)

    def check_local(self, request: web.Request) -> None:
        """Lets in who calls from this very machine, not through a proxy on it; else `check_admin`."""
        address = peer_of(request)
        forwarded = any(name in request.headers for name in FORWARDED)
        if forwarded or not (address and _is_loopback(address)):
            self.check_admin(request)

    def check_admin(self, request: web.Request) -> None:
        """Asks for `Authorization: Bearer TOKEN`, or the cookie that a link of `mogine admin link` gave;
        ten wrong tokens a minute close the door for an address."""
        address = client_address(request, self._trusted)
        now = self._clock()
        recent = [t for t in self._failures.get(address, ()) if now - t < 60]
        if len(recent) >= FAILURES_PER_MINUTE:
            raise RateLimited(
                "too many wrong tokens from your address; wait a minute",
                retry_after_s=max(1.0, 60 - (now - recent[0])),
            )
        values = request.headers.getall(hdrs.AUTHORIZATION, ())
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), self._token().encode()
        ):
            return
        if not values and isinstance(request, web.Request) and self._admits(request):
            return
        if values:
            self._failures[address] = [*recent, now]
            self._failures.move_to_end(address)
            if len(self._failures) > MAX_TRACKED_ADDRESSES:
                self._failures.popitem(last=False)
        raise Unauthorized("this needs the admin token; `mogine admin token` shows it on the server")


def host_name(value: str) -> str:
    """`Host` header to bare lower-case name: no port, no brackets, no trailing dot."""
    if value.startswith("["):
        return value[1:].partition("]")[0].lower()
    return value.partition(":")[0].lower()


def client_address(request: web.BaseRequest | ShortRequest, trusted: Collection[Network]) -> str:
    """The visitor's real address: the right-most hop of X-Forwarded-For that is no trusted proxy.

    The header counts only when the TCP peer is trusted. Returns "" for a peer without address.
    """
    address = peer_of(request)
    if not address or not is_trusted(address, trusted):
        return address
    forwarded = request.headers.getall(hdrs.X_FORWARDED_FOR, None)
    if not forwarded:
        return address
    hops = [h.strip() for v in forwarded for h in v.split(",")]
    for hop in reversed(hops):
        try:
            ipaddress.ip_address(hop)
        except ValueError:
            return address
        address = hop
        if not is_trusted(hop, trusted):
            break
    return address


def visitor_bucket(address: str) -> str:
    """What one visitor is counted under: the IPv4 address, or the IPv6 /64."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class Buckets:
    """What visitors are counted under, worked out once for each way by which requests come."""

    def __init__(self, trusted: Collection[Network]) -> None:
        self._trusted = trusted
        self._known: dict[tuple[str, ...], str] = {}

    def of(self, request: web.BaseRequest | ShortRequest) -> str:
        """The bucket of whoever sent `request`."""
        way = (peer_of(request), *request.headers.getall(hdrs.X_FORWARDED_FOR, ()))
        bucket = self._known.get(way)
        if bucket is None:
            if len(self._known) >= MAX_TRACKED_ADDRESSES:
                self._known.clear()
            bucket = self._known[way] = visitor_bucket(client_address(request, self._trusted))
        return bucket


def is_trusted(address: str, trusted: Collection[Network]) -> bool:
    """Whether `address` lies in one of the networks."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return any(ip.version == network.version and ip in network for network in trusted)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _allowed_hosts(settings: Settings) -> frozenset[str]:
    names: Sequence[str] = [*settings.access.allowed_hosts, settings.host]
    from_origins = [urlsplit(o).hostname or "" for o in settings.access.allowed_origins if o != "*"]
    return frozenset(host_name(n) if n != "*" else n for n in (*names, *from_origins) if n)


def _same_host(origin: SplitResult, host: str) -> bool:
    default = ":443" if origin.scheme == "https" else ":80"
    return origin.netloc.lower().removesuffix(default) == host.lower().removesuffix(default)
