"""The site as visitors see it: through the web server, at its public address."""

import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from mogine.doctor.line import Line, error, ok, warning
from mogine.doctor.outside import Outside, certificate, takes_old_protocol

FORGED = "198.51.100.77"
STRANGER = "https://stranger.example"
GROUP_MS = 25.0
LATE_MS = 400.0
FEW_DAYS = 14
OWNERS = ("api/analytics/statistics", "api/analytics/queries", "api/documents", "dashboard/")
MACHINES = ("metrics", "healthz", "readyz")
PORTS = (8741, 8739, 8742)
OURS = re.compile(r"[0-9a-f]{44}")

UNBUFFERED = """\
in the location of /api/llm/, /v1/ and /api/chat:
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering off;
    proxy_cache off;
    gzip off;
and no `proxy_ignore_headers X-Accel-Buffering`; a CDN in front has a switch of its own"""
ADDRESS = """\
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
and MOGINE_TRUSTED_PROXIES must hold the address from which nginx calls mogine, and no other"""
PREFIX = """\
location ^~ {path} {{
    proxy_pass http://127.0.0.1:8741/;    # the slash at its end takes the prefix off
}}
`mogine deploy nginx --prefix {path}` writes all of it"""


@dataclass(slots=True)
class Visit:
    """One examination: what is known so far is here for the probes that come later."""

    outside: Outside
    client: httpx.Client
    ports: Sequence[int] = PORTS
    arrival: dict[str, Any] = field(default_factory=dict)

    def get(self, path: str, **how: Any) -> httpx.Response:
        """One request below the public address."""
        return self.client.get(path, **how)

    @property
    def path(self) -> str:
        """The prefix."""
        return self.outside.parts.path


Probe = Callable[[Visit], Iterator[Line]]


def examine(outside: Outside, ports: Sequence[int] = PORTS) -> Iterator[Line]:
    """All probes, in order; after one that makes the others pointless, none."""
    believed = True
    if outside.parts.scheme == "https":
        for line in _tls(outside):
            believed = believed and line.status != "error"
            yield line
    else:
        yield error(
            "tls", "the address is plain http: everybody on the way reads along", "`mogine deploy nginx`"
        )
    with outside.client(verify=believed) as client, ThreadPoolExecutor(1) as beside:
        visit = Visit(outside, client, ports)
        reached = list(_safely(reach, visit))
        yield from reached
        if not visit.arrival:
            return
        silence = beside.submit(lambda: list(_safely(silences, visit)))
        for probe in PROBES:
            yield from _safely(probe, visit)
        yield from silence.result()


def _safely(probe: Probe, visit: Visit) -> Iterator[Line]:
    try:
        yield from probe(visit)
    except httpx.HTTPError as problem:
        name = probe.__name__.replace("_", " ")
        yield error(
            name, f"the connection failed: {type(problem).__name__} {problem}", "look into nginx' error log"
        )


# --- TLS -----------------------------------------------------------------------------------------


def _tls(outside: Outside) -> Iterator[Line]:
    renew = (
        "`certbot renew`, then `systemctl reload nginx`; the file must hold the whole chain (fullchain.pem)"
    )
    try:
        shown = certificate(outside)
    except OSError as problem:
        yield error(
            "tls",
            f"nobody speaks TLS at {outside.host}, port {outside.port} ({problem})",
            "is nginx running, the firewall open (`mogine deploy firewall`), the name right?",
        )
        return
    if shown.problem:
        yield error("tls", f"no browser believes the certificate: {shown.problem}", renew)
    elif shown.ends_at is not None:
        days = (shown.ends_at - datetime.now(UTC)).days
        words = f"{shown.protocol}, the certificate is good for {days} more days"
        yield ok("tls", words) if days >= FEW_DAYS else warning("tls", words, renew)
    if takes_old_protocol(outside):
        yield warning("tls", "TLS 1.1 or older is spoken too", "    ssl_protocols TLSv1.2 TLSv1.3;")


def hsts(visit: Visit) -> Iterator[Line]:
    """Browsers are told to come by TLS only, and those who come without are sent there."""
    if visit.outside.parts.scheme != "https":
        return
    value = visit.get("chat/").headers.get("strict-transport-security", "")
    age = re.search(r"max-age=(\d+)", value)
    if age and int(age[1]) > 0:
        yield ok("hsts", value)
    else:
        yield warning(
            "hsts",
            "browsers are not told to come by TLS only",
            '    add_header Strict-Transport-Security "max-age=31536000" always;',
        )
    if visit.outside.port == 443:
        yield from _plain(visit)


def _plain(visit: Visit) -> Iterator[Line]:
    address = f"http://{visit.outside.host}{visit.path}"
    try:
        answer = visit.client.get(address)
    except httpx.HTTPError:
        yield ok("http", "port 80 does not answer")
        return
    if answer.headers.get("location", "").startswith("https://"):
        yield ok("http", "leads to https")
    else:
        yield warning(
            "http",
            f"{address} answers without TLS",
            f"    return 301 https://{visit.outside.host}$request_uri;",
        )


# --- the way to the servers ------------------------------------------------------------------------


def reach(visit: Visit) -> Iterator[Line]:
    """The proxy answers below the prefix."""
    answer = visit.get("api/probe/arrival")
    found = _json(answer)
    if answer.status_code == 200 and "visitor" in found:
        visit.arrival = found
        yield ok("proxy", f"answers below {visit.path}")
        if found["base_path"] != visit.path:
            yield warning(
                "prefix",
                f"visitors come to {visit.path}, and MOGINE_BASE_PATH says {found['base_path']}",
                f"in .env: MOGINE_BASE_PATH={visit.path}",
            )
        return
    reason = str(found.get("error", {}).get("reason", ""))
    if reason == "host_not_allowed":
        yield error(
            "host",
            f"mogine does not answer to the name {visit.outside.host}",
            f"in .env: MOGINE_ALLOWED_HOSTS={visit.outside.host}, then start mogine again",
        )
    elif answer.status_code in (502, 503, 504):
        yield error(
            "proxy",
            f"nginx is there, and mogine's proxy does not answer it (status {answer.status_code})",
            "does it run, and on the port that nginx calls? `mogine doctor` on the server tells",
        )
    elif OURS.fullmatch(answer.headers.get("x-request-id", "")):
        yield error(
            "prefix",
            f"requests reach mogine with {visit.path} still in front, where it knows no such address",
            PREFIX.format(path=visit.path),
        )
    else:
        yield error(
            "prefix",
            f"{visit.path}api/probe/arrival does not lead to mogine's proxy (status {answer.status_code})",
            PREFIX.format(path=visit.path),
        )


def knowledge(visit: Visit) -> Iterator[Line]:
    """Search answers."""
    answer = visit.get("api/search", params={"q": "test"})
    found = _json(answer)
    if answer.status_code == 200 and "results" in found:
        yield ok("search", f"answers in {found['took_ms']} ms (generation {found['generation']})")
        return
    told = found.get("error", {}).get("message") or f"status {answer.status_code}"
    yield error(
        "search",
        f"the knowledge base does not answer: {told}",
        "start it: `systemctl start mogine-kb`, `pm2 start mogine-kb` or `mogine serve kb`; "
        "`mogine doctor` on the server tells more",
    )


def record(visit: Visit) -> Iterator[Line]:
    """Questions are recorded."""
    answer = visit.get("api/analytics/health")
    found = _json(answer)
    if answer.status_code == 200 and found.get("status") == "ok":
        yield ok("analytics", "health is ok")
    elif answer.status_code == 404:
        yield ok("analytics", "is not passed on to the outside")
    else:
        told = found.get("status") or found.get("error", {}).get("message") or answer.status_code
        yield error("analytics", f"is not well: {told}", "`mogine doctor` on the server tells more")


# --- streams ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """One event: when it was sent and when it came, in ms from the first."""

    sent_ms: float
    came_ms: float


def streams(visit: Visit) -> Iterator[Line]:
    """Pieces of an answer come when they are sent, as they are."""
    ticks, headers = _listen(visit, "api/probe/ticks")
    packed = headers.get("content-encoding", "identity")
    if packed != "identity":
        yield error(
            "compression", f"event streams are compressed ({packed}), which holds them back", UNBUFFERED
        )
    else:
        yield ok("compression", "event streams are left alone")
    if len(ticks) < 3:
        yield error("stream", f"only {len(ticks)} pieces of a stream came", UNBUFFERED)
        return
    groups = 1 + sum(b.came_ms - a.came_ms > GROUP_MS for a, b in pairwise(ticks))
    late_ms = max(tick.came_ms - tick.sent_ms for tick in ticks)
    held_ms = min(late_ms, ticks[-1].sent_ms - ticks[0].sent_ms)
    words = f"{len(ticks)} pieces came in {groups} parcels {histogram(ticks)}"
    if groups <= len(ticks) // 2:
        yield error("stream", f"is buffered: {words}", UNBUFFERED)
    elif late_ms > LATE_MS:
        yield warning("stream", f"is held back by up to {held_ms:.0f} ms: {words}", UNBUFFERED)
    else:
        yield ok("stream", f"comes as it is sent: {words}")


def _listen(visit: Visit, path: str) -> tuple[list[Tick], httpx.Headers]:
    found: list[tuple[float, float]] = []
    rest = b""
    with visit.client.stream("GET", path) as answer:
        # Parts that came together are one read each: the clock tells them from those that came apart.
        for part in answer.iter_bytes():
            came_ms = time.perf_counter() * 1000
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if data := re.search(rb"^data: (\{.*\})$", event, re.M):
                    found.append((float(json.loads(data[1])["sent_ms"]), came_ms))
        headers = answer.headers
    if not found:
        return [], headers
    # Nobody knows how long the way is; the quickest piece is taken for on time.
    ahead = min(came - sent for sent, came in found)
    return [Tick(sent, came - ahead) for sent, came in found], headers


def histogram(ticks: Sequence[Tick]) -> str:
    """When pieces came, in tenths of the stream's time: `▁` none, `█` many."""
    span = max(ticks[-1].sent_ms, ticks[-1].came_ms, 1.0)
    counts = [0] * 10
    for tick in ticks:
        counts[min(9, int(tick.came_ms / span * 10))] += 1
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[0] if not n else bars[max(1, round(n / max(counts) * 7))] for n in counts)


def silences(visit: Visit) -> Iterator[Line]:
    """A thinking model is quiet for a while; whoever is in between must wait."""
    patience_s = visit.outside.patience_s
    began = time.perf_counter()
    try:
        answer = visit.client.get(
            "api/probe/ticks", params={"pause": patience_s}, timeout=httpx.Timeout(10, read=patience_s + 10)
        )
        pieces = answer.text.count("event: tick")
    except httpx.HTTPError:
        pieces = 0
    if pieces == 2:
        yield ok("read timeout", f"a silence of {patience_s} s is borne")
    else:
        yield error(
            "read timeout",
            f"a stream that was silent was cut after {time.perf_counter() - began:.0f} s",
            "    proxy_read_timeout 315s;\nand the like in every balancer and CDN in front",
        )


# --- who the visitor is ----------------------------------------------------------------------------


def address(visit: Visit) -> Iterator[Line]:
    """Each visitor is counted under their own address, which they cannot choose."""
    seen = str(visit.arrival["visitor"])
    claimed = {"X-Forwarded-For": FORGED, "X-Real-IP": FORGED, "Forwarded": f"for={FORGED}"}
    forged = str(_json(visit.get("api/probe/arrival", headers=claimed)).get("visitor", ""))
    if forged == FORGED:
        yield error("address", "a visitor may claim any address, and so has no limit", ADDRESS)
    elif visit.outside.source and seen != visit.outside.source:
        yield error("address", f"calls from {visit.outside.source} are counted under {seen}", ADDRESS)
    elif _is_inner(seen) and not visit.outside.source:
        if visit.outside.is_local():
            yield warning(
                "address",
                f"from this machine the visitor is {seen}, which says nothing about others",
                "run this from another machine, or with --from and another address of this one",
            )
        else:
            yield error("address", f"all visitors are counted under {seen} and share one limit", ADDRESS)
    else:
        yield ok("address", f"visitors are told apart (you are {seen}), and cannot claim another address")
    if visit.outside.parts.scheme == "https" and visit.arrival["scheme"] != "https":
        yield warning(
            "scheme",
            "mogine is not told that visitors come by TLS",
            "    proxy_set_header X-Forwarded-Proto $scheme;",
        )


def _is_inner(text: str) -> bool:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return True
    return network.is_private or network.is_loopback


# --- pages -----------------------------------------------------------------------------------------


class _References(HTMLParser):
    """What a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "src" or (name == "href" and tag == "link")):
                self.found.append(value)


def pages(visit: Visit) -> Iterator[Line]:
    """The chat page comes, and all that it loads, by TLS and below the prefix."""
    base = urljoin(visit.outside.url, "chat/")
    page = visit.get("chat/")
    if page.status_code != 200:
        yield error("pages", f"{base} answers {page.status_code}", PREFIX.format(path=visit.path))
        return
    parser = _References()
    parser.feed(page.text)
    addresses = [urljoin(base, reference) for reference in parser.found]
    mixed = [a for a in addresses if a.startswith("http://") and visit.outside.parts.scheme == "https"]
    if mixed:
        yield error(
            "mixed content", f"the chat page loads {mixed[0]} without TLS", "leave pages as they are sent"
        )
    ours = [a for a in addresses if urlsplit(a).hostname == visit.outside.host]
    missing = [a for a in ours if visit.client.get(a).status_code != 200]
    if missing:
        yield error(
            "pages", f"the chat page needs {missing[0]}, which is not there", PREFIX.format(path=visit.path)
        )
    elif not mixed:
        yield ok("pages", f"the chat page and the {len(ours)} files that it loads come, all by the same way")


def cors(visit: Visit) -> Iterator[Line]:
    """Pages of strangers may not ask, and nobody adds headers to ours."""
    asked = {"Origin": STRANGER, "Access-Control-Request-Method": "POST"}
    preflight = visit.client.options("api/chat", headers=asked)
    plain = visit.get("api/chat/config", headers={"Origin": STRANGER})
    given = [
        value
        for answer in (preflight, plain)
        for value in answer.headers.get_list("access-control-allow-origin")
    ]
    if not given:
        yield ok("cors", "pages of other sites may not ask")
    elif "*" in given:
        yield warning(
            "cors",
            "pages of every site may ask at your expense",
            "name your own in MOGINE_ALLOWED_ORIGINS, and take `add_header Access-Control-Allow-Origin` "
            "out of nginx: mogine sends it where it is due",
        )
    else:
        yield error(
            "cors", f"pages of {given[0]} may ask", "take `add_header Access-Control-...` out of nginx"
        )


def bodies(visit: Visit) -> Iterator[Line]:
    """As large as may be passes, and larger is refused in the shape of every error."""
    most = int(visit.arrival["max_body_bytes"])
    fits = visit.client.post("api/chat", content=b"{" + b" " * (most - 1), headers=JSON)
    if fits.status_code == 413:
        yield error(
            "body limit",
            f"a request of {most} bytes, which mogine allows, is refused on the way",
            f"    client_max_body_size {most};",
        )
        return
    too_large = visit.client.post("api/chat", content=b" " * (most + 1), headers=JSON)
    if too_large.status_code == 413 and "error" in _json(too_large):
        yield ok("body limit", f"{most} bytes pass, more is refused")
    else:
        yield warning(
            "body limit",
            f"a request of {most + 1} bytes is answered {too_large.status_code}",
            f"    client_max_body_size {most};",
        )


JSON = {"Content-Type": "application/json"}


def owners_side(visit: Visit) -> Iterator[Line]:
    """What is for the owner and for the machine is not for everybody."""
    bare: list[str] = []
    guarded: list[str] = []
    for path in (*OWNERS, *MACHINES):
        status = visit.get(path).status_code
        if status == 200 and path != "dashboard/":
            bare.append(path)
        elif status in (200, 401):
            guarded.append(path)
    if bare:
        yield error(
            "admin",
            f"anybody can read {', '.join(visit.path + path for path in bare)}",
            "`mogine deploy nginx` passes only what visitors need",
        )
    if guarded:
        yield warning(
            "admin",
            f"{', '.join(visit.path + path for path in guarded)}: only the admin token keeps strangers out",
            "`mogine deploy nginx --admin-from YOUR.NETWORK/24` lets only you come so far",
        )
    if not bare and not guarded:
        yield ok("admin", "the owner's side and the machine's are closed")


def open_ports(visit: Visit) -> Iterator[Line]:
    """The servers' own ports are for nginx alone."""
    if visit.outside.is_local():
        return
    found = []
    for port in visit.ports:
        try:
            visit.outside.connect(port, timeout_s=2.0).close()
        except OSError:
            continue
        found.append(port)
    if found:
        yield error(
            "ports",
            f"{', '.join(map(str, found))} can be reached past nginx",
            "MOGINE_HOST=127.0.0.1, or a firewall: `mogine deploy firewall`",
        )
    else:
        yield ok("ports", "the servers' own cannot be reached")


PROBES: tuple[Probe, ...] = (
    *(knowledge, record, streams, address, pages, cors, bodies, owners_side, open_ports, hsts),
)


def _json(answer: httpx.Response) -> dict[str, Any]:
    """The object of an answer; {} for anything else."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
