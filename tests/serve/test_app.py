"""The plumbing of every server: one shape of errors on every path, the gate, methods, bodies, headers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.serve.conftest import Reply, Served, Start, assert_envelope, question
from tests.servers import ADMIN_TOKEN
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import say, script

SERVERS = ("analytics", "kb", "proxy")
LLM = "/api/llm/doubao"
JSON = {"Content-Type": "application/json"}
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
async def all_three(serve: Start) -> Served:
    served: Served = await serve(*SERVERS)
    return served


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("好"))) as fake:
        yield fake


@pytest.fixture
async def proxy(serve: Start, doubao: DoubaoFake) -> Served:
    served: Served = await serve(
        "proxy", env={**doubao.environ, "MOGINE_ALLOWED_ORIGINS": "https://example.com"}
    )
    return served


async def raw(served: Served, request: bytes, server: str = "proxy") -> bytes:
    """The bytes that come back for exactly these bytes, until the server closes or falls silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port(server))
    writer.write(request)
    answer = b""
    try:
        async with asyncio.timeout(1):
            while block := await reader.read(65536):
                answer += block
                if b"\r\n\r\n" in answer and b'"request_id"' in answer:
                    break
    except (TimeoutError, ConnectionResetError):
        return answer
    finally:
        writer.close()
    return answer


# --- every server --------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
async def test_unknown_paths_and_methods_are_told_in_the_one_shape(all_three: Served, server: str) -> None:
    for path in ("/nothing", "/api/nothing", "/healthz/", "//healthz", "/HEALTHZ", "/%2e%2e/etc/passwd"):
        assert_envelope(await all_three.ask("GET", path, server=server), 404, "not_found")
    for method in ("POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        reply = await all_three.ask(method, "/healthz", server=server)
        assert_envelope(reply, 405, "method_not_allowed")
        assert reply.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("server", SERVERS)
async def test_head_answers_like_get_without_a_body(all_three: Served, server: str) -> None:
    get = await all_three.ask("GET", "/healthz", server=server)
    head = await all_three.ask("HEAD", "/healthz", server=server)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(get.body))
    assert get.json == {"status": "ok"}


@pytest.mark.parametrize("server", SERVERS)
async def test_every_response_bears_an_id_of_its_own_and_may_not_be_sniffed(
    all_three: Served, server: str
) -> None:
    replies = [await all_three.ask("GET", path, server=server) for path in ("/healthz", "/readyz", "/none")]
    assert len({reply.headers["X-Request-Id"] for reply in replies}) == 3
    assert all(reply.headers["X-Content-Type-Options"] == "nosniff" for reply in replies)
    assert all(reply.headers["Server"] == "mogine" for reply in replies)


@pytest.mark.parametrize("server", SERVERS)
async def test_names_that_are_not_ours_are_refused(all_three: Served, server: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8741"):
        reply = await all_three.ask("GET", "/healthz", server=server, headers={"Host": host})
        assert_envelope(reply, 403, "host_not_allowed")
    for host in ("localhost", "127.0.0.1:9", "[::1]:9", "LOCALHOST:80"):
        reply = await all_three.ask("GET", "/healthz", server=server, headers={"Host": host})
        assert reply.status == 200, host


@pytest.mark.parametrize("server", SERVERS)
async def test_two_or_no_host_headers_are_refused(all_three: Served, server: str) -> None:
    two = await raw(all_three, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: a\r\n\r\n", server)
    none = await raw(all_three, b"GET /healthz HTTP/1.0\r\n\r\n", server)
    for answer in (two, none):
        assert answer.split(b"\r\n", 1)[0].split(b" ")[1] == b"400"
        assert b'"bad_host"' in answer or answer.startswith(b"HTTP/1.0 400")


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://example.com/secret HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"\r\n\r\n\r\n\r\nnonsense\r\n\r\n",
    ],
    ids=range(14),
)
async def test_broken_http_is_refused_and_the_server_goes_on(
    all_three: Served, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for server in SERVERS:
        answer = await raw(all_three, request_bytes, server)
        assert answer == b"" or answer.split(b" ")[1][:1] == b"4", answer[:200]
        assert b"Traceback" not in answer
        assert (await all_three.ask("GET", "/healthz", server=server)).status == 200
    assert not any(record.exc_info for record in caplog.records)


async def test_admin_routes_ask_for_the_token_in_every_spelling(all_three: Served) -> None:
    right = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for method, path, server in (
        ("GET", "/api/analytics/statistics", "analytics"),
        ("HEAD", "/api/analytics/queries", "analytics"),
        ("GET", "/api/analytics/export?format=csv", "analytics"),
        ("POST", "/api/analytics/cleanup", "analytics"),
        ("GET", "/api/documents", "kb"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": ADMIN_TOKEN}):
            reply = await all_three.ask(method, path, server=server, headers=headers)
            assert reply.status == 401
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert_envelope(reply, 401, "unauthorized")
        query = "&" if "?" in path else "?"
        reply = await all_three.ask(method, f"{path}{query}token={ADMIN_TOKEN}", server=server)
        assert reply.status == 401
        reply = await all_three.ask(method, path, server=server, headers=right)
        assert reply.status not in (401, 403)


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b'{"question": NaN}',
        b'{"question": Infinity}',
        b"{'question': 1}",
        b'{"question": "\xff\xfe"}',
        b'{"question": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"question": "x"}'.encode("utf-16"),
        b'{"question": "x"}\x00',
        b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 40 + b"1" + b"}" * 40,
    ],
    ids=range(16),
)
async def test_a_body_that_is_no_json_object_is_refused(
    proxy: Served, doubao: DoubaoFake, path: str, body: bytes
) -> None:
    assert_envelope(await proxy.ask("POST", path, data=body, headers=JSON), 400, "invalid_json")
    assert not doubao.requests
    assert await proxy.rows() == []


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
async def test_numbers_no_one_needs_are_no_server_error(proxy: Served, path: str) -> None:
    for number in (b"1e999", b"-1e999", b"9" * 20_000, b"0." + b"1" * 20_000):
        body = (
            b'{"question": "x", "messages": [{"role": "user", "content": "x"}], "temperature": '
            + number
            + b"}"
        )
        reply = await proxy.ask("POST", path, data=body, headers=JSON)
        assert reply.status in (200, 400), reply.body


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
async def test_only_uncompressed_json_is_taken(proxy: Served, doubao: DoubaoFake, path: str) -> None:
    body = json.dumps({**question(), "question": "x"}).encode()
    kinds = (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
    )
    for kind in kinds:
        reply = await proxy.ask("POST", path, data=body, headers={"Content-Type": kind})
        assert_envelope(reply, 415, "unsupported_media_type")
    for coding in ("gzip", "deflate", "br", "identity, gzip"):
        reply = await proxy.ask("POST", path, data=body, headers={**JSON, "Content-Encoding": coding})
        assert_envelope(reply, 415, "unsupported_media_type")
    reply = await proxy.ask(
        "POST", path, data=body, headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert reply.status == 200


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
async def test_a_body_too_large_is_refused_announced_or_not(
    proxy: Served, doubao: DoubaoFake, path: str
) -> None:
    large = b'{"question": "' + b"x" * 300_000 + b'"}'
    assert_envelope(await proxy.ask("POST", path, data=large, headers=JSON), 413, "payload_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(large), 10_000):
            yield large[begin : begin + 10_000]

    assert_envelope(await proxy.ask("POST", path, data=pieces(), headers=JSON), 413, "payload_too_large")
    assert not doubao.requests


async def test_a_size_announced_too_large_is_refused_before_the_body_is_read(proxy: Served) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    answer = await raw(proxy, head % 10**12)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]
    assert b"payload_too_large" in answer


# --- browsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
async def test_pages_of_other_sites_spend_nothing(proxy: Served, doubao: DoubaoFake, path: str) -> None:
    bad = (
        "https://evil.example",
        "https://evilexample.com",
        "https://example.com.evil",
        "https://example.com.",
        "https://example.com:8443",
        "http://example.com",
        "https://user@example.com",
        "null",
        "",
        "file://",
    )
    body: Any = {**question(), "question": "x"}
    for origin in bad:
        reply = await proxy.post(path, body, headers={"Origin": origin})
        assert_envelope(reply, 403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in reply.headers
    assert not doubao.requests


@pytest.mark.parametrize("path", [LLM, "/api/chat"])
async def test_allowed_pages_can_read_answers_and_errors(proxy: Served, path: str) -> None:
    origin = {"Origin": "https://example.com"}
    replies: list[Reply] = [
        await proxy.post(path, {**question(stream=True), "question": "x"}, headers=origin),
        await proxy.post(path, {}, headers=origin),
        await proxy.ask("POST", "/nothing", headers=origin),
    ]
    assert [reply.status for reply in replies] == [200, 400, 404]
    for reply in replies:
        assert reply.headers["Access-Control-Allow-Origin"] == "https://example.com"
        assert "Origin" in reply.headers["Vary"]
        assert "X-Request-Id" in reply.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in reply.headers


async def test_a_preflight_is_answered_for_allowed_pages_only(proxy: Served) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    good = await proxy.ask("OPTIONS", "/api/chat", headers={**asks, "Origin": "https://example.com"})
    assert good.status == 204
    assert good.headers["Access-Control-Allow-Origin"] == "https://example.com"
    assert "POST" in good.headers["Access-Control-Allow-Methods"]
    bad = await proxy.ask("OPTIONS", "/api/chat", headers={**asks, "Origin": "https://evil.example"})
    assert_envelope(bad, 403, "origin_not_allowed")


async def test_our_own_pages_may_ask_under_the_name_they_came_from(proxy: Served) -> None:
    origin = proxy.url("").rstrip("/")
    assert (await proxy.post("/api/chat", {"question": "x"}, headers={"Origin": origin})).status == 200
