"""The site from outside, through a real nginx: all is well with ours, and what is broken gets its name."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mogine.doctor.line import Line
from mogine.doctor.outside import Outside
from mogine.doctor.public import Tick, examine, histogram
from mogine.errors import SettingsError
from tests.fronts.deployed import PREFIX, Behind, Go
from tests.upstreams.tls import certificate_files, write_certificate

VISITOR = "127.0.0.9"


async def looked_at(
    site: Behind, *, prefix: str = PREFIX, source: str = VISITOR, patience_s: int = 1
) -> dict[str, list[Line]]:
    """What the doctor says of it, by name."""
    outside = Outside.of(
        f"https://localhost:{site.front.port}{prefix}",
        source=source,
        ca=certificate_files()[0],
        patience_s=patience_s,
    )
    lines = await asyncio.to_thread(lambda: list(examine(outside)))
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.name, []).append(line)
    return found


def bad(found: dict[str, list[Line]]) -> dict[str, str]:
    """Name to status of all that is not well."""
    return {name: line.status for name, lines in found.items() for line in lines if line.status != "ok"}


@pytest.mark.parametrize("prefix", [PREFIX, "/"])
async def test_nothing_is_wrong_with_what_deploy_nginx_sets_up(behind: Go, prefix: str) -> None:
    async with behind(prefix) as site:
        found = await looked_at(site, prefix=prefix)
        # The certificate of the tests is good for two days.
        assert bad(found) == {"tls": "warning"}
        assert set(found) == {
            *("tls", "proxy", "search", "analytics", "compression", "stream", "read timeout", "address"),
            *("pages", "cors", "body limit", "admin", "hsts"),
        }
        assert "15 pieces came in 1" in found["stream"][0].detail
        assert VISITOR in found["address"][0].detail


def swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


def without(pattern: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, "", text)


PAGE = (
    "location = /~temp/mogine_agent/chat/ { default_type text/html; "
    "return 200 '<script src=\"http://cdn.example/x.js\"></script>'; }"
)

BROKEN: dict[str, tuple[Callable[[str], str], dict[str, str], str]] = {
    "buffering on": (
        swap("proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"),
        {"stream": "error"},
        "proxy_buffering off;",
    ),
    "compression on": (
        swap("gzip off;", "gzip on; gzip_types text/event-stream; gzip_min_length 0;"),
        {"compression": "error"},
        "gzip off;",
    ),
    "impatient": (
        swap("proxy_read_timeout 315s;", "proxy_read_timeout 1s;"),
        {"read timeout": "error"},
        "315s",
    ),
    "prefix left on": (without(r"rewrite \S+ \$1 break;"), {"prefix": "error"}, "takes the prefix off"),
    "no real address": (
        without(r"proxy_set_header X-Forwarded-For .*;"),
        {"address": "error"},
        "$remote_addr",
    ),
    "address from the visitor": (
        swap("X-Forwarded-For $remote_addr", "X-Forwarded-For $http_x_forwarded_for"),
        {"address": "error"},
        "$remote_addr",
    ),
    "no word of TLS": (without(r"proxy_set_header X-Forwarded-Proto .*;"), {"scheme": "warning"}, "$scheme"),
    "name unknown": (
        lambda text: re.sub(r"proxy_set_header Host \S+;", "proxy_set_header Host www.example.com;", text),
        {"host": "error"},
        "MOGINE_ALLOWED_HOSTS=localhost",
    ),
    "no HSTS": (without(r"add_header Strict.*;"), {"hsts": "warning"}, "Strict-Transport-Security"),
    "open to every page": (
        swap("gzip_vary on;", "gzip_vary on; add_header Access-Control-Allow-Origin * always;"),
        {"cors": "warning", "hsts": "warning"},
        "MOGINE_ALLOWED_ORIGINS",
    ),
    "open to a page": (
        swap("gzip_vary on;", "gzip_vary on; add_header Access-Control-Allow-Origin $http_origin always;"),
        {"cors": "error", "hsts": "warning"},
        "Access-Control",
    ),
    "small bodies": (
        swap("client_max_body_size 262144;", "client_max_body_size 10k;"),
        {"body limit": "error"},
        "262144",
    ),
    "metrics let out": (
        without(r"location = /~temp/mogine_agent/metrics \{\s*return 404;\s*\}"),
        {"admin": "warning"},
        "--admin-from",
    ),
    "health let out": (
        without(r"location = /~temp/mogine_agent/readyz \{\s*return 404;\s*\}"),
        {"admin": "error"},
        "deploy nginx",
    ),
    "mixed content": (
        swap("location ^~ /~temp/mogine_agent/v1/", f"{PAGE} location ^~ /~temp/mogine_agent/v1/"),
        {"mixed content": "error"},
        "pages",
    ),
    "old TLS": (
        lambda text: re.sub(r"ssl_ciphers .*;", "ssl_ciphers ALL:@SECLEVEL=0;", text).replace(
            "TLSv1.2 TLSv1.3", "TLSv1.1 TLSv1.2 TLSv1.3"
        ),
        {},
        "TLSv1.2 TLSv1.3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_broken_gets_its_name_and_the_lines_that_mend_it(behind: Go, name: str) -> None:
    change, expected, fix = BROKEN[name]
    async with behind(change=change) as site:
        found = await looked_at(site, patience_s=2 if name == "impatient" else 1)
        assert bad(found) == {"tls": "warning", **expected}
        mended = "\n".join(line.fix for lines in found.values() for line in lines if line.status != "ok")
        assert fix in mended


async def test_a_part_that_is_away_is_named_and_the_rest_looked_at(behind: Go) -> None:
    async with behind(kb_port=1, analytics_port=1) as site:
        found = await looked_at(site)
        assert bad(found) == {"tls": "warning", "search": "error", "analytics": "error"}
        assert "mogine-kb" in found["search"][0].fix


async def test_a_proxy_that_is_away_ends_the_examination(behind: Go) -> None:
    async with behind(proxy_port=1) as site:
        assert bad(await looked_at(site)) == {"tls": "warning", "proxy": "error"}


async def test_another_prefix_than_the_sites_leads_nowhere(behind: Go) -> None:
    async with behind() as site:
        found = await looked_at(site, prefix="/chatbot/")
        assert bad(found) == {"tls": "warning", "prefix": "error"}
        assert "location ^~ /chatbot/ {" in found["prefix"][0].fix


@pytest.mark.parametrize(("days", "words"), [(-1, "expired"), (3, "self-signed certificate")])
async def test_a_certificate_that_nobody_believes_is_an_error_and_the_rest_is_looked_at(
    behind: Go, tmp_path: Path, days: int, words: str
) -> None:
    """The expired one is trusted, the other is not."""
    certificate, key = write_certificate(tmp_path, days=days)
    async with behind(certificate=certificate, certificate_key=key) as site:
        url = f"https://localhost:{site.front.port}{PREFIX}"
        outside = Outside.of(url, source=VISITOR, ca=certificate if days < 0 else None, patience_s=1)
        lines = await asyncio.to_thread(lambda: list(examine(outside)))
        assert [(line.name, line.status) for line in lines if line.status != "ok"] == [("tls", "error")]
        assert words in lines[0].detail and "certbot renew" in lines[0].fix


async def test_nobody_there_is_told_in_one_breath() -> None:
    outside = Outside.of("https://localhost:1/", patience_s=1)
    lines = await asyncio.to_thread(lambda: list(examine(outside)))
    assert [(line.name, line.status) for line in lines] == [("tls", "error"), ("reach", "error")]


async def test_from_the_server_itself_nothing_is_said_of_addresses(behind: Go) -> None:
    async with behind() as site:
        found = await looked_at(site, source="")
        assert found["address"][0].status == "warning" and "--from" in found["address"][0].fix


@pytest.mark.parametrize("url", ["www.example.com", "ftp://x", "https://", "https://x:70000/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="--public"):
        Outside.of(url)


def test_a_picture_of_a_stream() -> None:
    even = [Tick(n * 100.0, n * 100.0) for n in range(10)]
    lump = [Tick(n * 100.0, 900.0) for n in range(10)]
    assert histogram(even) == "█" * 10
    assert histogram(lump) == "▁" * 9 + "█"


async def test_probes_are_few_and_small(behind: Go) -> None:
    async with behind() as site:
        answers = [await site.curl("api/probe/ticks?pause=1x")]
        assert (answers[0].status, answers[0].json["error"]["param"]) == (400, "pause")
        assert (await site.curl("api/probe/ticks?pause=61")).status == 400
        told = await site.curl("api/probe/arrival")
        assert set(told.json) == {"visitor", "scheme", "host", "base_path", "max_body_bytes"}
        many = await asyncio.gather(*(site.curl("api/probe/ticks") for _ in range(12)))
        statuses = sorted(answer.status for answer in many)
        assert statuses == [200] * 8 + [503] * 4
        assert json.loads(many[0].body) if many[0].status == 503 else many[0].body.count(b"event: tick") == 15
