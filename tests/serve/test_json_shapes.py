"""Every route that takes JSON, of every server, with JSON of every shape: never a fault of the server."""

import itertools
import json
from typing import Any

import pytest

from mogine.serve.runner import SERVERS
from tests.serve.conftest import Reply, Served, Start, assert_envelope
from tests.servers import ADMIN_TOKEN
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import say, script

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_TOKEN}"}
NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "half": b'{"messages": [',
    "depth 100,000": b"[" * 100_000,
    "closed depth 100,000": b'{"question":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects of depth 5,000": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "NaN": b'{"question": NaN}',
    "Infinity": b'{"question": -Infinity}',
    "bad UTF-8": b'{"question": "\xff\xfe"}',
    "overlong UTF-8": b'{"question": "\xc0\xaf"}',
    "UTF-8 of a surrogate": b'{"question": "\xed\xa0\x80"}',
    "lone surrogate": b'{"question": "\\ud800"}',
    "BOM": b'\xef\xbb\xbf{"question": "x"}',
    "UTF-16": '{"question": "x"}'.encode("utf-16"),
    "UTF-32": '{"question": "x"}'.encode("utf-32"),
    "NUL after it": b'{"question": "x"}\0',
    "NUL within": b'{"question": "a\0b"}',
    "two objects": b"{}{}",
    "single quotes": b"{'question': 'x'}",
    "comment": b'{"question": "x" /* y */}',
    "trailing comma": b'{"question": "x",}',
    "list": b"[]",
    "text": b'"question"',
    "number": b"1",
    "null": b"null",
}
VALUES: list[Any] = [
    None, True, -1, 1e308, 2**63, "", "\0\u202e", "x" * 9_000, [[]], {"a": {"b": [1]}}, [None] * 1_000,
    {"role": "user"},
]  # fmt: skip
FIELDS = (
    "messages", "question", "prompt", "model", "stream", "session_id", "input", "parameters", "max_tokens",
    "temperature", "top_p", "stop", "stream_options", "request_id", "rating", "comment", "reason",
    "page_url", "provider", "older_than_days", "dry_run", "n", "id", "url", "path",
)  # fmt: skip
RAW_NUMBERS = (b"1e999", b"-1e999", b"9" * 20_000, b"0." + b"1" * 20_000, b"-0", b"1E400", b"1e-999")


@pytest.fixture
async def served(serve: Start) -> Any:
    async with DoubaoFake(script(say("好"))) as fake:
        yield await serve(*SERVERS, env={**fake.environ, "DOUBAO_MODEL": MODEL})


def is_no_fault(reply: Reply) -> bool:
    """No server error, but for a vendor that is not set up."""
    return reply.status < 500 or reply.json["error"]["reason"] == "upstream_unavailable"


def routes(served: Served) -> list[tuple[str, str]]:
    """Server and path of every route that is posted to, placeholders filled."""
    found = []
    for server, app in served.running.apps.items():
        for route in app.router.routes():
            if route.method == "POST" and route.resource is not None:
                path = route.resource.canonical.replace("{provider}", "doubao")
                found.append((server, path))
    return found + [("proxy", f"/api/llm/{name}") for name in ("dashscope", "openai", "extract")]


async def test_every_route_refuses_what_is_no_json_object(served: Served) -> None:
    """B29, P41."""
    found = routes(served)
    assert {("proxy", "/api/chat"), ("proxy", "/v1/chat/completions"), ("proxy", "/api/feedback")} <= set(
        found
    )
    assert ("analytics", "/api/analytics/cleanup") in found
    for server, path in found:
        for name, body in NO_JSON.items():
            reply = await served.ask("POST", path, server=server, data=body, headers=HEADERS)
            assert reply.status >= 400 and is_no_fault(reply), (path, name, reply.body[:300])
            if server == "proxy" and reply.status not in (413, 503):
                assert_envelope(reply, 400, "invalid_json")


async def test_every_route_takes_or_refuses_any_value_of_any_field(served: Served) -> None:
    """B29, P41: what is known may be refused by name, what is not is left out."""
    base = {
        "messages": [{"role": "user", "content": "x"}],
        "question": "x",
        "request_id": "1",
        "rating": "up",
    }
    for server, path in routes(served):
        for field in FIELDS:
            for value in VALUES:
                body = json.dumps({**base, "dry_run": True, field: value})
                reply = await served.ask("POST", path, server=server, data=body, headers=HEADERS)
                assert is_no_fault(reply), (path, field, value, reply.body[:300])
                reply.body.decode("utf-8")


async def test_numbers_beyond_all_measure_and_keys_given_twice_are_no_fault(served: Served) -> None:
    """B29, P41."""
    for server, path in routes(served):
        for number in RAW_NUMBERS:
            for field in (b"temperature", b"max_tokens", b"older_than_days", b"question", b"n"):
                body = b'{"messages": [{"role": "user", "content": "x"}], "%b": %b}' % (field, number)
                reply = await served.ask("POST", path, server=server, data=body, headers=HEADERS)
                assert is_no_fault(reply), (
                    path,
                    body[:90],
                )
        twice = (
            b'{"question": "a", "question": "b", "messages": [], "messages": [{"role":"user","content":"c"}]}'
        )
        reply = await served.ask("POST", path, server=server, data=twice, headers=HEADERS)
        assert is_no_fault(reply)


async def test_every_route_takes_json_alone(served: Served) -> None:
    """P22, B16: what a form of another site could send costs nothing."""
    for server, path in routes(served):
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/json; q",
            "text/json",
            "",
        ):
            headers = {**HEADERS, "Content-Type": kind}
            reply = await served.ask("POST", path, server=server, data=b'{"question":"x"}', headers=headers)
            assert is_no_fault(reply), (path, kind)
            if kind != "application/json; q":
                assert reply.status in (400, 415, 503), (path, kind, reply.status)
        reply = await served.ask(
            "POST",
            path,
            server=server,
            data=b"\x1f\x8b" + bytes(100),
            headers={**HEADERS, "Content-Encoding": "gzip"},
        )
        assert reply.status in (400, 415, 503), (path, reply.status)


async def test_every_route_of_the_owner_asks_for_the_token(served: Served) -> None:
    """P20, P21, B6, B7, B9: whatever is sent instead, and however the address is spelt."""
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": ADMIN_TOKEN},
        {"Authorization": f"Basic {ADMIN_TOKEN}"},
        {"X-Api-Key": ADMIN_TOKEN, "X-Admin-Token": ADMIN_TOKEN, "Cookie": f"token={ADMIN_TOKEN}"},
        {"Proxy-Authorization": f"Bearer {ADMIN_TOKEN}"},
    ]
    owners, callers = 0, itertools.count()
    for server, app in served.running.apps.items():
        for route in app.router.routes():
            if route.resource is None or route.method == "*":
                continue
            path = route.resource.canonical.replace("{id}", "a" * 16)
            owned = path.startswith("/api/analytics/") and path != "/api/analytics/health"
            owned |= server == "kb" and (
                route.method in ("POST", "DELETE") or path.startswith("/api/documents")
            )
            if not owned:
                continue
            owners += 1
            for headers in wrong:
                for spelt in (path, f"{path}?token={ADMIN_TOKEN}", f"{path}?access_token={ADMIN_TOKEN}"):
                    who = next(callers)  # ten wrong ones of one address would be answered by 429
                    address = {"X-Forwarded-For": f"198.51.{who // 250}.{who % 250}"}
                    reply = await served.ask(
                        route.method, spelt, server=server, headers={**headers, **address}
                    )
                    assert reply.status == 401, (server, route.method, spelt, headers)
            for spelt in (f"/{path}", f"{path}/", path.upper(), path.replace("/api/", "/api/../api/")):
                reply = await served.ask(route.method, spelt, server=server)
                assert reply.status in (401, 404, 405), (server, spelt)
    assert owners >= 8
    for word in ("' OR 1=1 --", "gültig", "x" * 5_000, "\u202e"):
        headers = {"Authorization": f"Bearer {word}"}
        reply = await served.ask("GET", "/api/analytics/queries", server="analytics", headers=headers)
        assert reply.status in (401, 429), word
