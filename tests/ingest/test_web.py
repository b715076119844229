"""Pages are fetched from public hosts alone, politely, within limits, whatever a redirect says."""

import gzip
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from mogine.errors import Forbidden
from mogine.ingest.find import Gone, Page, Skipped
from mogine.ingest.web import MAX_PAGE_BYTES, Web, is_public
from tests.ingest.site import Reply, Site, serving
from tests.upstreams.tls import certificate_files

HOST = "site.test"


class Names:
    """A name server: each name with the addresses that it tells in turn."""

    def __init__(self, **names: Sequence[str]) -> None:
        self._names = {name.replace("_", "."): list(addresses) for name, addresses in names.items()}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        addresses = self._names.get(host)
        if addresses is None:
            raise OSError("unknown")
        return [addresses.pop(0) if len(addresses) > 1 else addresses[0]]


@contextmanager
def open_web(**options: Any) -> Iterator[Web]:
    waits: list[float] = options.pop("waits", [])
    options = {
        "hosts": [HOST],
        "resolve": Names(site_test=["127.0.0.1"]),
        "pause_s": 0.0,
        "sleep": waits.append,
        **options,
    }
    with closing(Web(**options)) as web:
        yield web


def fetched(web: Web, *urls: str) -> list[Page | Gone | Skipped]:
    return [came for _, came in web.pages(urls)]


def only(web: Web, url: str) -> Page | Gone | Skipped:
    (came,) = fetched(web, url)
    return came


def why(came: Page | Gone | Skipped) -> str:
    assert isinstance(came, Skipped), came
    return came.reason


# --- which addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://www.example.com/",
        "https://www.example.com:8443/",
        "https://user:secret@www.example.com/",
        "file:///etc/passwd",
        "ftp://www.example.com/a",
        "https://",
        "https://exa mple.com/",
        "https://www.example.com\\@127.0.0.1/",
        "https://www.example.com/\nHost: evil",
        "https://[::1/",
        "https://www.example.com/" + "a" * 3000,
    ],
)
def test_an_address_that_is_not_plain_https_is_refused_before_anything_is_asked(url: str) -> None:
    names = Names()
    with open_web(resolve=names) as web, pytest.raises(Forbidden) as caught:
        fetched(web, url)
    assert caught.value.reason == "url_not_allowed"
    assert names.asked == []


def test_an_address_has_one_spelling() -> None:
    with open_web() as web:
        assert web.checked("HTTPS://WWW.Example.com:443/退款?q=a b#x".replace(" ", "%20")) == (
            "https://www.example.com/%E9%80%80%E6%AC%BE?q=a%20b"
        )


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::1", "64:ff9b::7f00:1", "2001:db8::1",
        "fec0::1", "192.0.0.8", "192.88.99.1", "3fff::1", "::127.0.0.1", "2001:0:7f00:1::", "x",
    ],
)  # fmt: skip
def test_private_addresses_in_every_dress_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("name", ["inner.test", "mixed.test"])
def test_a_name_that_leads_inside_is_not_connected_to(name: str) -> None:
    def names(host: str, port: int) -> Sequence[str]:
        return {"inner.test": ["127.0.0.1"], "mixed.test": ["93.184.216.34", "10.0.0.1"]}[host]

    with serving(Site({})) as site, open_web(resolve=names) as web:
        assert "private network" in why(only(web, f"https://{name}/"))
    assert site.asked == []


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """P36, B12: The name is asked once a request, so that a second, different answer has no use."""
    names = Names(site_test=["127.0.0.1", "127.0.0.1", "203.0.113.9"])
    with serving(Site({"/": "hello world"})) as site, open_web(resolve=names) as web:
        came = only(web, f"http://{HOST}:{site.port}/")
    assert isinstance(came, Page)
    assert names.asked == [HOST, HOST], "once for robots.txt, once for the page"
    assert site.asked[1] == ("/", f"{HOST}:{site.port}")


def test_the_next_address_of_a_host_is_tried_when_one_takes_no_connection() -> None:
    addresses = ["127.0.0.9", "::1", "127.0.0.1"]
    with serving(Site({"/": "hello world"})) as site, open_web(resolve=lambda *_: addresses) as web:
        came = only(web, f"http://{HOST}:{site.port}/")
    assert isinstance(came, Page) and came.data == b"hello world"
    assert site.asked[-1] == ("/", f"{HOST}:{site.port}")


def test_an_address_that_swallows_everything_leaves_time_for_the_next() -> None:
    # Two in the queue of a listener that never accepts, and the kernel answers no third.
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.9", 0), backlog=0))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        site = stack.enter_context(serving(Site({"/": "hello world"}), port=deaf.getsockname()[1]))
        addresses = ["127.0.0.9", "127.0.0.1"]
        web = stack.enter_context(open_web(resolve=lambda *_: addresses, timeout_s=2.0))
        came = only(web, f"http://{HOST}:{site.port}/")
    assert isinstance(came, Page), came


def test_one_private_address_among_public_ones_forbids_the_host() -> None:
    """B12"""
    with (
        serving(Site({})) as site,
        open_web(hosts=[], resolve=lambda *_: ["93.184.215.14", "10.0.0.1"]) as web,
    ):
        assert "private network" in why(only(web, "https://mixed.test/"))
    assert not site.asked


def test_tls_is_checked_against_the_name_not_the_address() -> None:
    trusting = ssl.create_default_context(cafile=str(certificate_files()[0]))
    names = Names(localhost=["127.0.0.1"], other_test=["127.0.0.1"])
    with (
        serving(Site({"/": "hello"}), tls=True) as site,
        open_web(hosts=["localhost", "other.test"], resolve=names, tls=trusting) as web,
    ):
        assert isinstance(only(web, f"https://localhost:{site.port}/"), Page)
        asked = len(site.asked)
        assert "robots.txt cannot be read" in why(only(web, f"https://other.test:{site.port}/"))
        assert len(site.asked) == asked


# --- redirects -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "not https"),
        ("https://inner.test/", "another host"),
        ("http://other.test:{port}/", "not https"),
        ("//other.test/", "not https"),
        ("file:///etc/passwd", "no web address"),
        ("/loop", "more than 5 times"),
        ("/secret/page", "robots.txt"),
    ],
)
def test_a_redirect_is_checked_like_the_address_itself(location: str, reason: str) -> None:
    site = Site({"/robots.txt": "User-agent: *\nDisallow: /secret/", "/secret/page": "secret"})
    with serving(site), open_web() as web:
        for path in ("/a", "/loop"):
            site.pages[path] = Reply(status=302, headers={"Location": location.format(port=site.port)})
        came = only(web, f"http://{HOST}:{site.port}/a")
    assert reason in why(came)
    assert "/secret/page" not in site.paths


def test_a_redirect_within_the_site_is_followed_and_the_source_stays() -> None:
    site = Site({"/a": Reply(status=301, headers={"Location": "b.pdf"}), "/b.pdf": Reply(b"%PDF-1.7")})
    with serving(site), open_web() as web:
        came = only(web, f"http://{HOST}:{site.port}/a")
    assert came == Page(f"http://{HOST}:{site.port}/a", "b.pdf", b"%PDF-1.7")


# --- robots, pace, limits ------------------------------------------------------------------------


def test_what_robots_txt_forbids_is_not_asked_for() -> None:
    site = Site({"/robots.txt": "User-agent: *\nDisallow: /x", "/x": "no", "/y": "yes"})
    with serving(site), open_web() as web:
        x, y = fetched(web, *(f"http://{HOST}:{site.port}/{name}" for name in "xy"))
    assert "robots.txt" in why(x)
    assert isinstance(y, Page)
    assert site.paths == ["/robots.txt", "/y"], "and the rules are read once"
    assert all(agent.startswith("mogine/") for agent in site.agents)


def test_a_site_whose_rules_cannot_be_read_is_left_alone() -> None:
    site = Site({"/robots.txt": Reply(status=500), "/": "yes"})
    with serving(site), open_web() as web:
        assert "try again later" in why(only(web, f"http://{HOST}:{site.port}/"))
    assert site.paths == ["/robots.txt"]


def test_requests_keep_the_distance_that_the_site_asks_for() -> None:
    site = Site({"/robots.txt": "User-agent: *\nCrawl-delay: 3", "/1": "one", "/2": "two"})
    waits: list[float] = []
    with serving(site), open_web(waits=waits, clock=lambda: 100.0, pause_s=0.5) as web:
        fetched(web, *(f"http://{HOST}:{site.port}/{n}" for n in (1, 2)))
    assert waits == [3.0, 3.0]


def test_a_busy_site_is_asked_once_more_after_the_time_it_names() -> None:
    site = Site({"/": Reply(status=503, headers={"Retry-After": "7"})})
    waits: list[float] = []
    with serving(site), open_web(waits=waits) as web:
        assert "status 503" in why(only(web, f"http://{HOST}:{site.port}/"))
    assert waits == [7.0]
    assert site.paths == ["/robots.txt", "/", "/"]


def test_pages_that_are_too_large_slow_or_compressed_are_told() -> None:
    site = Site(
        {
            "/large": Reply(b"x" * (MAX_PAGE_BYTES + 1)),
            "/packed": Reply(gzip.compress(b"x"), headers={"Content-Encoding": "gzip"}),
            "/teapot": Reply(status=418),
            "/gone": Reply(status=410),
        }
    )
    with serving(site), open_web() as web:
        large, packed, teapot, gone = fetched(
            web, *(f"http://{HOST}:{site.port}/{name}" for name in ("large", "packed", "teapot", "gone"))
        )
    assert "larger than 10 MiB" in why(large)
    assert "compressed" in why(packed)
    assert "status 418" in why(teapot)
    assert isinstance(gone, Gone)
    with serving(site), open_web(clock=iter(range(0, 1000, 6)).__next__) as web:
        assert "longer than 10 seconds" in why(only(web, f"http://{HOST}:{site.port}/large"))


def test_a_host_that_is_not_there_is_told() -> None:
    with open_web(hosts=["nowhere.test"]) as web:
        assert "robots.txt cannot be read" in why(only(web, "https://nowhere.test/"))


# --- sitemaps ------------------------------------------------------------------------------------


def sitemap(*urls: str, kind: str = "urlset") -> str:
    return f'<?xml version="1.0"?><{kind}>' + "".join(
        f"<url><loc> {url} </loc></url>" for url in urls
    ) + f"</{kind}>"  # fmt: skip


def test_a_sitemap_gives_the_pages_of_its_own_host() -> None:
    site = Site({"/1": "one", "/2?a=1&b=2": "two", "/3": "three"})
    with serving(site), open_web() as web:
        root = f"http://{HOST}:{site.port}"
        inner = gzip.compress(sitemap(f"{root}/3", f"{root}/1").encode())
        site.pages["/inner.xml.gz"] = Reply(inner, content_type="application/gzip")
        site.pages["/map.xml"] = sitemap(
            f"{root}/1", "https://elsewhere.test/x", "file:///etc/passwd", f"{root}/inner.xml.gz",
            f"{root}/2?a=1&amp;b=2", f"{root}/map.xml",
        )  # fmt: skip
        came = fetched(web, f"{root}/map.xml")
    assert [page.url for page in came if isinstance(page, Page)] == [
        f"{root}/1", f"{root}/3", f"{root}/2?a=1&b=2",
    ]  # fmt: skip
    assert len(came) == 3


def test_entities_in_a_sitemap_are_text() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><urlset><url><loc>&a;</loc></url></urlset>'
    with serving(Site({"/map.xml": bomb})) as site, open_web() as web:
        came = only(web, f"http://{HOST}:{site.port}/map.xml")
    assert isinstance(came, Page), "a file with a DTD counts as a page; nothing in it is resolved"


def test_a_name_gets_the_suffix_that_the_type_tells() -> None:
    site = Site({"/v1.2": Reply(b"a,b", content_type="text/csv; charset=gb18030"), "/": "<p>x"})
    with serving(site), open_web() as web:
        csv, index = fetched(web, *(f"http://{HOST}:{site.port}/{path}" for path in ("v1.2", "")))
    assert isinstance(csv, Page) and isinstance(index, Page)
    assert (csv.name, index.name) == ("v1.2.csv", "index.html")
