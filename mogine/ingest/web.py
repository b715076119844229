"""Pages of a web site, fetched politely and never from where no visitor could get: one host, public, https.

The name is resolved once, every address it has is checked, and the connection goes to the first of those
checked that takes it; each redirect begins anew. Nothing a page says makes anything else be fetched.
"""

import html
import ipaddress
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import httpx

from mogine.errors import Forbidden
from mogine.ingest.find import Gone, Page, Skipped
from mogine.ingest.load import SUFFIXES, suffix_of
from mogine.ingest.robots import AGENT, MAX_BYTES, NOTHING, Robots

MAX_PAGE_BYTES = 10 * 1024**2
MAX_PAGES = 2000
_MAX_SITEMAPS = 50
_MAX_REDIRECTS = 5
_MAX_ADDRESSES = 8
_MAX_URL_CHARS = 2000
_MAX_WAIT_S = 30.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not of the open internet either, whatever this Python's `ipaddress` knows of them: addresses of a site, of
# protocols, of anycast relays, of documentation.
_INNER = tuple(
    map(ipaddress.ip_network, ("fec0::/10", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16"))
)
_REDIRECTS = (301, 302, 303, 307, 308)
_LOC = re.compile(r"<loc>\s*(?:<!\[CDATA\[)?\s*([^<>\]]{1,2000}?)\s*(?:\]\]>)?\s*</loc>", re.I)
_SITEMAP = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--.{0,1000}?-->\s*)*"
    rb"<(urlset|sitemapindex)[\s>]",
    re.S,
)
_SUFFIX_OF_TYPE = {
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "application/pdf": ".pdf",
    "text/markdown": ".md",
    "text/csv": ".csv",
    "text/plain": ".txt",
}

Resolve = Callable[[str, int], Sequence[str]]


class NotTaken(Exception):
    """Why an address gives nothing, said of the address."""


@dataclass(frozen=True, slots=True)
class _Answer:
    url: str
    status: int
    content_type: str
    data: bytes


def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Web:
    """Fetches pages. `hosts` are the owner's own, which may be private, speak http and use any port."""

    def __init__(
        self,
        *,
        hosts: Collection[str] = (),
        timeout_s: float = 10.0,
        pause_s: float = 0.5,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._resolve = resolve
        self._clock = clock
        self._sleep = sleep
        self._robots: dict[str, Robots] = {}
        self._asked: dict[str, float] = {}
        self._client = httpx.Client(
            verify=tls or True,
            trust_env=False,
            follow_redirects=False,
            # A connection is pinned to one name's address; another name with the same one gets its own.
            limits=httpx.Limits(max_connections=2, max_keepalive_connections=0),
            headers={
                "User-Agent": f"{AGENT}/1 (+https://www.robotstxt.org; knowledge base of a web site's owner)",
                "Accept": "text/html, application/xhtml+xml, application/pdf, text/*;q=0.9, */*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )

    def close(self) -> None:
        self._client.close()

    def pages(self, urls: Sequence[str]) -> Iterator[tuple[int, Page | Gone | Skipped]]:
        """What each address gives, with how many are known so far; a sitemap gives all its pages."""
        waiting = list(dict.fromkeys(self.checked(url) for url in urls))
        known = set(waiting)
        sitemaps = 0
        given = 0
        while waiting:
            url = waiting.pop(0)
            try:
                answer = self._get_politely(url)
                listed = self._listed(answer) if answer.status == 200 else None
                if listed is None:
                    given += 1
                    yield given + len(waiting), _page(url, answer)
                    continue
                sitemaps += 1
                if sitemaps > _MAX_SITEMAPS:
                    raise NotTaken(f"is one sitemap too many; {_MAX_SITEMAPS} are read")
                fresh = [entry for entry in listed if entry not in known]
                room = max(0, MAX_PAGES - given - len(waiting))
                waiting = [*fresh[:room], *waiting]
                known.update(fresh)
                if len(fresh) > room:
                    raise NotTaken(f"lists more than the {MAX_PAGES} pages that one run takes")
            except (NotTaken, Forbidden) as error:
                reason = error.message if isinstance(error, Forbidden) else str(error)
                yield given + len(waiting), Skipped(url, reason)

    def checked(self, url: str) -> str:
        """The address in its one spelling. Raises Forbidden (url_not_allowed); messages are said of it."""
        if len(url) > _MAX_URL_CHARS or re.search(r"[\x00-\x20\x7f\\]", url):
            raise _forbidden("is no proper address")
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parts.hostname or "").rstrip(".").encode("idna").decode("ascii").lower()
        except (ValueError, UnicodeError) as error:
            raise _forbidden("is no proper address") from error
        scheme = parts.scheme.lower()
        if scheme not in ("http", "https") or not host:
            raise _forbidden("is no web address; only https:// is fetched")
        if parts.username is not None or parts.password is not None:
            raise _forbidden("holds a user name; leave it out")
        default = {"http": 80, "https": 443}[scheme]
        if host not in self._hosts:
            if scheme != "https":
                raise _forbidden("is not https; name its host in MOGINE_INGEST_HOSTS if it is yours")
            if port not in (None, default):
                raise _forbidden("names a port; name its host in MOGINE_INGEST_HOSTS if it is yours")
        place = f"[{host}]" if ":" in host else host
        place += f":{port}" if port not in (None, default) else ""
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return urlunsplit((scheme, place, path, query, ""))

    # --- one address -------------------------------------------------------------------------------

    def _get_politely(self, url: str) -> _Answer:
        """Raises NotTaken, Forbidden."""
        site = _site(url)
        if site not in self._robots:
            self._robots[site] = self._read_robots(site)
        robots = self._robots[site]
        if not robots.allows(url):
            raise NotTaken(
                "may not be read by programs, says the site's robots.txt"
                if robots is not NOTHING
                else "is not read, because the site's robots.txt cannot be read now; try again later"
            )
        return self._get(url, robots)

    def _read_robots(self, site: str) -> Robots:
        try:
            answer = self._get(f"{site}/robots.txt", Robots(), MAX_BYTES)
        except NotTaken:
            return NOTHING
        if answer.status == 200:
            return Robots.of(answer.data.decode("utf-8", "replace"))
        return NOTHING if answer.status >= 500 or answer.status == 429 else Robots()

    def _get(self, url: str, robots: Robots, limit: int = MAX_PAGE_BYTES) -> _Answer:
        """The answer at the end of the redirects, all of them within the site and its rules."""
        host = urlsplit(url).hostname
        asked_again = False
        for _ in range(_MAX_REDIRECTS + 1):
            answer, location, wait_s = self._ask(url, max(self._pause_s, robots.delay_s), limit)
            if answer.status in (429, 503) and not asked_again:
                asked_again = True
                self._sleep(min(wait_s, _MAX_WAIT_S))
                continue
            if answer.status not in _REDIRECTS or not location:
                return answer
            url = self.checked(urljoin(url, location))
            if urlsplit(url).hostname != host:
                raise NotTaken("leads to another host; name that address itself")
            if not robots.allows(url):
                raise NotTaken("leads to where the site's robots.txt lets no programs in")
        raise NotTaken(f"leads from address to address more than {_MAX_REDIRECTS} times")

    def _ask(self, url: str, pause_s: float, limit: int) -> tuple[_Answer, str, float]:
        """Of the first of the host's addresses that takes a connection; all have been checked."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        addresses = self._addresses(host, parts.port or {"http": 80, "https": 443}[parts.scheme])
        self._pause(host, pause_s)
        deadline = self._clock() + self._timeout_s
        for number, address in enumerate(addresses, start=1):
            rest_s = max(0.1, deadline - self._clock())
            is_last = number == len(addresses)
            # One that swallows what is sent to it leaves time for the others.
            timeout = httpx.Timeout(rest_s, connect=rest_s if is_last else rest_s / 2)
            try:
                return self._ask_at(address, url, timeout, limit, deadline)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if is_last or _is_untrusted(error):
                    raise self._not_reached(error) from error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise self._not_reached(error) from error
            finally:
                self._client.cookies.clear()
                self._asked[host] = self._clock()
        raise AssertionError("a name that was found has an address")

    def _ask_at(
        self, address: str, url: str, timeout: httpx.Timeout, limit: int, deadline: float
    ) -> tuple[_Answer, str, float]:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        place = f"[{address}]" if ":" in address else address
        pinned = urlunsplit((parts.scheme, f"{place}:{port}", parts.path, parts.query, ""))
        with self._client.stream(
            "GET",
            pinned,
            headers={"Host": parts.netloc},
            timeout=timeout,
            extensions={"sni_hostname": parts.hostname},
        ) as response:
            data = self._body(response, limit, deadline)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        answer = _Answer(url, response.status_code, kind, data)
        return answer, response.headers.get("Location", ""), _seconds(response.headers.get("Retry-After"))

    def _not_reached(self, error: Exception) -> NotTaken:
        if isinstance(error, httpx.TimeoutException):
            return NotTaken(f"did not answer within {self._timeout_s:g} seconds")
        return NotTaken(f"cannot be reached ({_why(error)})")

    def _body(self, response: httpx.Response, limit: int, deadline: float) -> bytes:
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise NotTaken("came compressed though that was not asked for")
        received = bytearray()
        for block in response.iter_raw():
            received += block
            if len(received) > limit:
                raise NotTaken(f"is larger than {limit // 1024**2 or 1} MiB")
            if self._clock() > deadline:
                raise NotTaken(f"took longer than {self._timeout_s:g} seconds")
        return bytes(received)

    def _addresses(self, host: str, port: int) -> list[str]:
        """The checked addresses to connect to, at least one. Raises NotTaken, Forbidden."""
        try:
            found = self._resolve(host, port)
        except OSError as error:
            raise NotTaken("has a host name that cannot be found") from error
        if not found:
            raise NotTaken("has a host name that cannot be found")
        if host not in self._hosts and not all(is_public(address) for address in found):
            raise _forbidden(
                "leads into a private network; name its host in MOGINE_INGEST_HOSTS if it is yours"
            )
        return [address.partition("%")[0] for address in found[:_MAX_ADDRESSES]]

    def _pause(self, host: str, pause_s: float) -> None:
        if host in self._asked:
            rest = self._asked[host] + pause_s - self._clock()
            if rest > 0:
                self._sleep(rest)

    def _listed(self, answer: _Answer) -> list[str] | None:
        """The addresses of a sitemap, those of its own host only; None when it is none."""
        data = answer.data
        if data.startswith(b"\x1f\x8b"):
            data = _inflated(data)
        if not _SITEMAP.match(data[:4096]):
            return None
        host = urlsplit(answer.url).hostname
        listed = []
        for entry in _LOC.findall(data.decode("utf-8", "replace")):
            try:
                url = self.checked(html.unescape(entry))
            except Forbidden:
                continue
            if urlsplit(url).hostname == host:
                listed.append(url)
        return list(dict.fromkeys(listed))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, whatever other address it may carry inside."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    if any(ip in network for network in _INNER):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def _page(url: str, answer: _Answer) -> Page | Gone:
    if answer.status in (404, 410):
        return Gone(url, f"is not there (status {answer.status})")
    if answer.status != 200:
        raise NotTaken(f"was answered with status {answer.status}")
    name = PurePosixPath(urlsplit(answer.url).path).name or "index"
    if suffix_of(name) not in SUFFIXES:
        name += _SUFFIX_OF_TYPE.get(answer.content_type, "")
    return Page(url, name, answer.data)


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(data, MAX_PAGE_BYTES)
    except zlib.error as error:
        raise NotTaken("is a damaged archive") from error


def _site(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _seconds(value: str | None) -> float:
    return float(value) if value and re.fullmatch(r"[0-9]{1,5}", value) else 5.0


def _why(error: Exception) -> str:
    if _is_untrusted(error):
        return "its TLS certificate is not trusted"
    return "no proper answer" if isinstance(error, httpx.RemoteProtocolError) else "no connection"


def _is_untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _forbidden(message: str) -> Forbidden:
    return Forbidden(message, reason="url_not_allowed")
