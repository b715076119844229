"""The way to a public address as a visitor takes it: an HTTP client, TLS seen from near."""

import ipaddress
import socket
import ssl
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx

from mogine.errors import SettingsError

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Outside:
    """`url` ends with a slash. `source` is our address from which to call, `ca` whom to trust, too.

    `patience_s` is the longest silence that a stream must outlast.
    """

    url: str
    source: str = ""
    ca: Path | None = None
    patience_s: int = 20

    @classmethod
    def of(cls, url: str, *, source: str = "", ca: Path | None = None, patience_s: int = 20) -> "Outside":
        """Raises SettingsError for what is no address of a page."""
        parts = urlsplit(url)
        try:
            port_is_right = parts.port is None or parts.port > 0
        except ValueError:
            port_is_right = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
            raise SettingsError(
                f"--public {url!r}: write the address of the site, such as https://www.example.com/"
            )
        if ca is not None and not ca.is_file():
            raise SettingsError(f"--ca: there is no file {ca}")
        return cls(url.partition("?")[0].rstrip("/") + "/", source, ca, patience_s)

    @property
    def parts(self) -> SplitResult:
        """The address in parts."""
        return urlsplit(self.url)

    @property
    def host(self) -> str:
        """The name that visitors call."""
        return self.parts.hostname or ""

    @property
    def port(self) -> int:
        """The port that they reach."""
        return self.parts.port or (443 if self.parts.scheme == "https" else 80)

    def client(self, *, verify: bool = True) -> httpx.Client:
        """A client that follows nothing and tells nothing of itself but what is asked."""
        transport = httpx.HTTPTransport(
            verify=self.context(verify=verify), local_address=self.source or None, retries=1
        )
        return httpx.Client(
            base_url=self.url,
            transport=transport,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers={"User-Agent": "mogine-doctor", "Accept-Encoding": "gzip"},
        )

    def context(self, *, verify: bool) -> ssl.SSLContext:
        """Whom to believe; with `verify` off anybody, after that has been told."""
        context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def connect(self, port: int | None = None, *, timeout_s: float = TIMEOUT_S) -> socket.socket:
        """A bare connection. Raises OSError."""
        source = (self.source, 0) if self.source else None
        return socket.create_connection((self.host, port or self.port), timeout_s, source)

    def is_local(self) -> bool:
        """Whether the name leads to this very machine, by loopback."""
        with suppress(OSError):
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)
        return False


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the site showed. `problem` is why nobody should believe it; "" when all is well."""

    problem: str
    protocol: str = ""
    ends_at: datetime | None = None


def certificate(outside: Outside) -> Certificate:
    """One handshake. Raises OSError when nobody answers."""
    with outside.connect() as sock:
        try:
            with outside.context(verify=True).wrap_socket(sock, server_hostname=outside.host) as secure:
                shown = secure.getpeercert() or {}
                ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
                return Certificate("", secure.version() or "", ends)
        except ssl.SSLCertVerificationError as error:
            return Certificate(error.verify_message or "it cannot be verified")


def takes_old_protocol(outside: Outside) -> bool:
    """Whether TLS 1.1 or older is spoken, which browsers gave up in 2020."""
    context = outside.context(verify=False)
    with suppress(ssl.SSLError, ValueError):
        context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that they are old is what is asked
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    try:
        with outside.connect() as sock, context.wrap_socket(sock, server_hostname=outside.host):
            return True
    except OSError:  # ssl.SSLError is one
        return False
