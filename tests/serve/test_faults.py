"""Faults and abuse that the tables of promises name, on each way to a vendor, as in production."""

import asyncio
import inspect
import time
from typing import Any

import pytest

from mogine.providers.care import Breaker, Keys
from mogine.serve.limits import Limits
from tests.serve.conftest import Reply, Served, Start, assert_envelope, is_idle, question
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.raw import deaf_port
from tests.upstreams.script import (
    cut,
    gzip_bomb,
    hang,
    head,
    pause,
    redirect,
    refuse,
    reply,
    say,
    script,
    usage,
)
from tests.upstreams.server import Playable

PLAY = script(say("你", "好"), usage(3, 2))
WAYS = ("/api/llm/doubao", "/v1/chat/completions")
SHORT = {
    "DOUBAO_MODEL": MODEL,
    "MOGINE_FIRST_BYTE_TIMEOUT": "0.3",
    "MOGINE_IDLE_TIMEOUT": "0.3",
    "MOGINE_CONNECT_TIMEOUT": "0.5",
}


async def ask(served: Served, way: str, **fields: Any) -> Reply:
    return await served.post(way, question(model="doubao", **fields))


def last_error(reply: Reply) -> dict[str, Any]:
    """The error with which a stream ended, which never looks complete."""
    assert reply.status == 200 and b"[DONE]" not in reply.body
    error: dict[str, Any] = reply.frames[-1]["error"]
    return error


# --- F1 to F6 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_a_black_hole_is_given_up_in_time(way: str, serve: Start) -> None:
    """F1."""
    with deaf_port() as port:
        env = {**SHORT, "DOUBAO_API_KEY": "test-key", "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}"}
        served = await serve(env=env)
        assert_envelope(await ask(served, way), 504, "upstream_timeout")
    assert is_idle(served)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("play", [hang(), script(head(), hang())], ids=["before the head", "after it"])
async def test_a_stall_before_the_first_word_is_a_504(way: str, play: Playable, serve: Start) -> None:
    """F2."""
    async with DoubaoFake(play) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        assert_envelope(await ask(served, way, stream=True), 504, "upstream_timeout")
        await fake.wait_disconnect()
    assert len(fake.requests) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (script(say("一"), hang()), "upstream_timeout"),
        (script(say("一"), cut(reset=True)), "upstream_bad_response"),
        (script(say("一"), cut()), "upstream_bad_response"),
    ],
    ids=["stall", "reset", "early end"],
)
async def test_an_answer_that_stops_half_way_ends_with_an_error(
    way: str, play: Playable, reason: str, serve: Start
) -> None:
    """F2, F3."""
    async with DoubaoFake(play) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        began = time.monotonic()
        assert last_error(await ask(served, way, stream=True))["reason"] == reason
        assert time.monotonic() - began < 5
    row = await served.row_with("error")
    assert (row.answer, row.error_type) == ("一", reason)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_told_to_the_owner_alone(
    way: str, status: int, serve: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """F4."""
    async with DoubaoFake(refuse(status, leak=True)) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        for _ in range(3):
            answer = await ask(served, way)
            assert_envelope(answer, 502, "upstream_refused")
            assert fake.environ["DOUBAO_API_KEY"] not in answer.body.decode() + str(answer.headers)
            assert answer.headers["x-should-retry"] == "false"
    assert len(fake.requests) == 3, "no second tries"
    alerts = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(alerts) == 1 and fake.environ["DOUBAO_API_KEY"] not in caplog.text


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("7", 7),
        ("Wed, 21 Oct 2065 07:28:00 GMT", 120),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1),
        ("soon", 5),
        ("1000000000", 120),
        ("-1", 5),
    ],
)
async def test_a_busy_vendor_is_told_with_a_sensible_wait(asked: str, told: int, serve: Start) -> None:
    """F5."""
    async with DoubaoFake(refuse(429, headers={"Retry-After": asked})) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        answer = await ask(served, WAYS[0])
    assert_envelope(answer, 429, "upstream_busy")
    assert int(answer.headers["Retry-After"]) == told
    assert len(fake.requests) <= 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "play",
    [
        *(refuse(status) for status in (500, 502, 503, 504)),
        reply(200, b"<html>hello</html>", content_type="text/html"),
        reply(200, b'{"choices": [', content_type="application/json"),
        reply(204),
        reply(200, b'{"a":"' + b"x" * (5 << 20) + b'"}', content_type="application/json"),
        redirect("http://127.0.0.1:1/elsewhere"),
        gzip_bomb(8),
    ],
    ids=["500", "502", "503", "504", "html", "half", "204", "huge", "redirect", "gzip bomb"],
)
async def test_nonsense_is_a_502_after_three_tries_at_most(
    play: Playable, stream: bool, serve: Start
) -> None:
    """F6, F8."""
    async with DoubaoFake(play) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        answer = await ask(served, WAYS[1], stream=stream)
    assert answer.status == 502 and answer.json["error"]["type"] == "proxy_error"
    assert 1 <= len(fake.requests) <= 3
    assert {request.path for request in fake.requests} == {"/api/v3/chat/completions"}


# --- F21: the clock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [Limits, Breaker, Keys])
def test_waits_are_measured_by_a_clock_that_nobody_sets(measured: type) -> None:
    assert inspect.signature(measured).parameters["clock"].default is time.monotonic


# --- B1 to B4 ----------------------------------------------------------------------------------------

HOSTILE: dict[str, Any] = {
    "base_url": "http://attacker.example",
    "api_base": "http://attacker.example",
    "api_key": "attackers-key",
    "app_id": "attackers-app",
    "tools": [{"type": "web_search"}],
    "plugins": ["x"],
    "thinking": {"type": "enabled"},
    "service_tier": "fast",
    "logprobs": True,
    "metadata": {"a": "b"},
    "extra_body": {"base_url": "http://attacker.example"},
    "max_tokens": 10**9,
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_visitor_chooses_neither_the_address_nor_the_key_nor_the_price(
    way: str, serve: Start
) -> None:
    """B1, B3."""
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**fake.environ, **SHORT})
        answer = await served.post(
            f"{way}?base_url=http://attacker.example&api_key=x",
            question(model="doubao", **HOSTILE),
            headers={
                "Authorization": "Bearer attackers-key",
                "X-Api-Base": "http://attacker.example",
                "X-DashScope-WorkSpace": "attacker",
                "OpenAI-Organization": "attacker",
            },
        )
        assert answer.status == 200
        sent = fake.requests[0]
    assert sent.bearer == fake.environ["DOUBAO_API_KEY"]
    assert set(sent.json) == {"model", "messages", "stream", "max_tokens"}
    assert (sent.json["model"], sent.json["max_tokens"]) == (MODEL, 2048)
    assert "ttacker" not in str(dict(sent.headers)) + sent.path


@pytest.mark.parametrize("way", WAYS)
async def test_pages_of_other_sites_spend_nothing(way: str, serve: Start) -> None:
    """B2, B5."""
    async with DoubaoFake(PLAY) as fake:
        served = await serve(env={**fake.environ, **SHORT, "MOGINE_ALLOWED_ORIGINS": "https://example.com"})
        for origin in ("https://evilexample.com", "https://example.com.evil", "null", "http://example.com"):
            answer = await served.post(way, question(model="doubao"), headers={"Origin": origin})
            assert_envelope(answer, 403, "origin_not_allowed")
        form = await served.ask("POST", way, data=b"{}", headers={"Content-Type": "text/plain"})
        assert_envelope(form, 415, "unsupported_media_type")
        assert fake.requests == []


async def test_a_hundred_parallel_streams_of_one_visitor_are_three(serve: Start) -> None:
    """B3."""
    async with DoubaoFake(script(say("一"), pause(0.5), say("二"))) as fake:
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": MODEL})
        ways = [WAYS[number % 2] for number in range(100)]
        answers = await asyncio.gather(*(ask(served, way, stream=True) for way in ways))
    taken = [answer for answer in answers if answer.status == 200]
    assert len(taken) == 3 == len(fake.requests)
    for answer in answers:
        if answer.status != 200:
            assert_envelope(answer, 429, "too_many_streams")


async def test_no_header_makes_a_new_visitor(serve: Start) -> None:
    """B4; the rate of a minute and of an hour both hold."""
    async with DoubaoFake(PLAY) as fake:
        env = {"MOGINE_RATE_LIMIT": "5/minute,3/hour", "MOGINE_TRUSTED_PROXIES": "192.0.2.1/32"}
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": MODEL, **env})
        statuses = []
        for number in range(5):
            forged = {
                "X-Forwarded-For": f"198.51.100.{number}",
                "Forwarded": f"for=198.51.100.{number}",
                "CF-Connecting-IP": f"198.51.100.{number}",
                "True-Client-IP": f"198.51.100.{number}",
                "X-Real-IP": f"198.51.100.{number}",
                "Cookie": f"session={number}",
            }
            way = WAYS[number % 2]
            answer = await served.post(way, question(model="doubao"), headers=forged)
            statuses.append(answer.status)
        assert answer.headers["x-should-retry"] == "false", "an hour is too long to wait for"
    assert statuses == [200, 200, 200, 429, 429]
