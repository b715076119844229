"""nginx itself reads the file and passes traffic as visitors send it; gixy has nothing to find."""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mogine.deploy import nginx as renderer
from mogine.deploy.site import Site
from tests.deploy.sites import PLAIN, PREFIXED, SPREAD
from tests.fronts.deployed import Go
from tests.servers import ADMIN_TOKEN
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import hang, say, script
from tests.upstreams.tls import certificate_files

PREFIX = "/~temp/mogine_agent/"
NUMBERED = replace(SPREAD, kbs=("127.0.0.1:8739", "localhost:8739"))  # nginx looks up each name that it reads
BODY = json.dumps({"messages": [{"role": "user", "content": "你好"}]})
STREAM = json.dumps({"messages": [{"role": "user", "content": "你好"}], "stream": True})
JSON = ("-H", "Content-Type: application/json", "-d")


# --- the file ------------------------------------------------------------------------------------


def files_of(site: Site, folder: Path) -> Path:
    """An nginx.conf around what is made for `site`, its certificate a real one."""
    certificate, key = certificate_files()
    site = replace(
        site, certificate=certificate, certificate_key=key, log_dir=folder, http_port=18080, https_port=18443
    )
    (folder / "mogine.conf").write_text(renderer.render(site)["mogine.conf"])
    main = folder / "nginx.conf"
    main.write_text(f"pid {folder}/pid;\nevents {{ }}\nhttp {{ include {folder}/mogine.conf; }}\n")
    return main


def into_site(site: Site, folder: Path) -> Path:
    """The other form: an own server block that includes the locations."""
    certificate, key = certificate_files()
    site = replace(site, log_dir=folder)
    for name, text in renderer.render_into_site(site).items():
        (folder / name).write_text(text)
    main = folder / "nginx.conf"
    main.write_text(
        f"pid {folder}/pid;\nevents {{ }}\nhttp {{ include {folder}/mogine_http.conf; server_tokens off;\n"
        f"server {{ listen 18443 ssl default_server; server_name www.example.com;\n"
        f"ssl_certificate {certificate}; ssl_certificate_key {key};\nssl_protocols TLSv1.2 TLSv1.3;\n"
        f"ssl_ciphers {renderer.CIPHERS};\n"
        f'add_header Strict-Transport-Security "max-age=31536000" always;\n'
        f"include {folder}/mogine_locations.conf; }} }}\n"
    )
    return main


@pytest.mark.parametrize("make", [files_of, into_site])
@pytest.mark.parametrize("site", [PLAIN, PREFIXED, replace(PLAIN, host="::1"), NUMBERED])
def test_nginx_takes_it_without_a_word_and_gixy_finds_nothing(make: Any, site: Site, tmp_path: Path) -> None:
    """P44"""
    main = make(site, tmp_path)
    command = ["/usr/sbin/nginx", "-t", "-q", "-p", str(tmp_path), "-c", str(main), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True)
    told = "\n".join(line for line in done.stderr.splitlines() if "Address already in use" not in line)
    assert (done.returncode, told) == (0, "")
    assert gixy(main) == []


def test_gixy_would_find_what_is_wrong(tmp_path: Path) -> None:
    main = files_of(PLAIN, tmp_path)
    path = tmp_path / "mogine.conf"
    path.write_text(
        path.read_text().replace("proxy_set_header Host $host:18443;", "proxy_set_header Host $http_host;")
    )
    assert [finding["plugin"] for finding in gixy(main)] == ["host_spoofing"]


def gixy(main: Path) -> list[Any]:
    command = [sys.executable, "-c", "from gixy.cli.main import main; main()", "-f", "json", str(main)]
    done = subprocess.run(command, capture_output=True, text=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_path_with_blanks_and_quotation_marks_stays_one_word(tmp_path: Path) -> None:
    folder = tmp_path / 'my "logs"; here\\'
    folder.mkdir()
    main = files_of(PLAIN, folder)
    main = main.rename(tmp_path / "nginx.conf")
    conf = (folder / "mogine.conf").rename(tmp_path / "mogine.conf")
    main.write_text(f"pid {tmp_path}/pid;\nevents {{ }}\nhttp {{ include {conf}; }}\n")
    command = ["/usr/sbin/nginx", "-t", "-p", str(tmp_path), "-c", str(main), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "mogine_proxy_access.log").exists()


# --- traffic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [PREFIX, "/"])
async def test_the_three_servers_answer_plain_curl_below_the_prefix(behind: Go, prefix: str) -> None:
    async with behind(prefix) as site:
        found = await site.curl("api/search?q=test")
        assert (found.status, found.json["results"][0]["source"]) == (200, "docs/test.md")
        told = await site.curl("api/llm/doubao", *JSON, BODY)
        assert (told.status, told.json["choices"][0]["message"]["content"]) == (200, "好")
        health = await site.curl("api/analytics/health")
        assert (health.status, health.json["status"]) == (200, "ok")
        assert health.headers["strict-transport-security"] == "max-age=31536000"
        assert site.front.problems() == []


async def test_the_way_in_leads_to_the_page_and_http_to_tls(behind: Go) -> None:
    async with behind() as site:
        assert (await site.curl("")).headers["location"] == "chat/"
        page = await site.curl("chat/", "-H", "Accept-Encoding: gzip")
        assert (page.status, page.headers["content-encoding"]) == (200, "gzip")
        bare = await site.curl("", "--path-as-is", "--request-target", PREFIX.rstrip("/"))
        assert (bare.status, bare.headers["location"]) == (301, PREFIX)
        plain = await site.curl("chat/?x=1", scheme="http")
        assert plain.status == 301
        assert plain.headers["location"] == f"https://localhost:{site.front.port}{PREFIX}chat/?x=1"


async def test_each_piece_of_an_answer_passes_while_the_rest_is_not_there_yet(
    behind: Go, doubao: DoubaoFake
) -> None:
    doubao.play(script(say("一"), hang()))
    async with behind() as site:
        url = site.front.url("api/llm/doubao", PREFIX)
        process = await asyncio.create_subprocess_exec(
            *("curl", "-sSN", "--compressed", "--cacert", str(site.front.ca_file), url, *JSON, STREAM),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        async with asyncio.timeout(10):
            while "一" not in (await process.stdout.readline()).decode():
                assert process.returncode is None
        process.kill()
        await process.wait()
        async with asyncio.timeout(5):
            await doubao.wait_disconnect()


@pytest.mark.parametrize(
    "path",
    [
        *("metrics", "healthz", "readyz", "//metrics", "x/../metrics", "%6detrics"),
        *(
            "api/documents",
            "api/documents/x",
            "api/analytics/statistics",
            "api/analytics/queries",
            "dashboard/",
        ),
        *("api/llm/..%2f..%2fmetrics", "api/chat/../../metrics"),
    ],
)
async def test_what_is_for_the_owner_and_the_machine_is_not_there(behind: Go, path: str) -> None:
    async with behind() as site:
        bearer = ("-H", f"Authorization: Bearer {ADMIN_TOKEN}")
        answer = await site.curl(path, "--path-as-is", *bearer)
        assert answer.status == 404
        assert answer.json["error"]["reason"] == "not_found"


async def test_the_owners_side_opens_for_named_networks_and_still_wants_the_token(behind: Go) -> None:
    bearer = ("-H", f"Authorization: Bearer {ADMIN_TOKEN}")
    async with behind(admin_from=("127.0.0.2/32",)) as site:
        assert (await site.curl("api/analytics/queries", *bearer)).status == 403
        inside = ("--interface", "127.0.0.2")
        assert (await site.curl("api/analytics/queries", *bearer, *inside)).status == 200
        assert (await site.curl("api/analytics/queries", *inside)).status == 401
        assert (await site.curl("api/documents", *bearer, *inside)).status == 200


async def test_a_visitor_is_counted_under_the_real_address_whatever_is_claimed(behind: Go) -> None:
    async with behind() as site:
        claims = [
            ("-H", f"{name}: 198.51.100.7")
            for name in ("X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP", "Forwarded")
        ]
        for claim in ((), *claims):
            answer = await site.curl("api/probe/arrival", "--interface", "127.0.0.9", *claim)
            assert answer.json["visitor"] == "127.0.0.9"
            assert answer.json["scheme"] == "https"


async def test_behind_a_balancer_its_word_counts_and_no_other(behind: Go) -> None:
    async with behind(behind=("127.0.0.8/32",)) as site:
        claim = ("-H", "X-Forwarded-For: 198.51.100.7")
        told = await site.curl("api/probe/arrival", "--interface", "127.0.0.8", *claim)
        assert told.json["visitor"] == "198.51.100.7"
        told = await site.curl("api/probe/arrival", "--interface", "127.0.0.9", *claim)
        assert told.json["visitor"] == "127.0.0.9"


async def test_errors_of_nginx_have_the_shape_of_all_errors(behind: Go) -> None:
    async with behind(kb_port=1) as site:
        (site.site.home / "large").write_text("x" * 300_000)
        large = await site.curl("api/llm/doubao", *JSON, f"@{site.site.home}/large")
        assert (large.status, large.json["error"]["reason"]) == (413, "payload_too_large")
        away = await site.curl("api/search?q=test")
        assert (away.status, away.json["error"]["reason"]) == (502, "upstream_unavailable")
        assert away.json["error"]["code"] == 502 and away.json["error"]["request_id"]
        assert away.headers["retry-after"] == "5"
        assert (await site.curl("api/llm/doubao", *JSON, BODY)).status == 200, "the others go on"


async def test_logs_tell_neither_what_was_searched_nor_whole_addresses(behind: Go) -> None:
    async with behind() as site:
        await site.curl("api/search?q=geheim", "--interface", "127.0.0.77")
        await site.curl("api/llm/doubao", *JSON, BODY)
        await site.curl("api/analytics/health")
        site.front.stop()
        names = {path.name for path in site.logs.iterdir()}
        assert names == {
            f"mogine_{s}_{k}.log" for s in ("proxy", "kb", "analytics") for k in ("access", "error")
        }
        (line,) = (site.logs / "mogine_kb_access.log").read_text().splitlines()
        told = json.loads(line)
        assert (told["visitor"], told["path"]) == ("127.0.0.0", f"{PREFIX}api/search")
        assert len(told["request_id"]) == 44
        assert "geheim" not in line
