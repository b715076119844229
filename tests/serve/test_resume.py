"""Answers of the widget: they go on for a moment without their page, and nobody else can read them."""

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.serve.conftest import Served, Start, assert_envelope, events_of
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import hang, pause, refuse, say, script

CHAT = "/api/chat"
RESUME = "/api/chat/resume"
SESSION = "a" * 32


async def begin(served: Served, **body: Any) -> aiohttp.ClientResponse:
    """A question whose answer is resumable, its stream open."""
    asked = {"question": "q", "session_id": SESSION, "resume": True, **body}
    return await served.session.post(served.url(CHAT), json=asked)


async def read_until(response: aiohttp.ClientResponse, text: str) -> bytes:
    """What came, up to and with the event in which `text` stands."""
    got = b""
    async with asyncio.timeout(5):
        while text.encode() not in got or not got.endswith(b"\n\n"):
            got += await response.content.readany()
    return got


def place(got: bytes) -> dict[str, str]:
    """What the page knows of an answer after its first event."""
    name, data = events_of(got)[0]
    assert name == "start"
    return {"request_id": data["request_id"], "session_id": data["session_id"]}


def last_id(got: bytes) -> str:
    return [line for line in got.decode().splitlines() if line.startswith("id: ")][-1].removeprefix("id: ")


async def test_an_answer_goes_on_without_its_page_and_is_replayed_from_the_last_event(serve: Start) -> None:
    async with DoubaoFake(script(say("one "), pause(0.1), say("two"))) as fake:
        served = await serve(env=fake.environ)
        first = await begin(served)
        got = await read_until(first, "one ")
        first.close()
        resumed = await served.post(RESUME, place(got), headers={"Last-Event-ID": last_id(got)})
        texts = [data["text"] for event, data in resumed.events if event == "delta"]
        assert "".join(texts) == "two"
        assert resumed.events[-1][0] == "done"
        whole = await served.post(RESUME, place(got), headers={"Last-Event-ID": "0"})
        assert [data["text"] for event, data in whole.events if event == "delta"] == ["one ", "two"]
        assert (await served.row_with("ok")).answer == "one two"
        assert len(fake.requests) == 1


async def test_events_are_numbered_for_the_widget_alone(serve: Start) -> None:
    async with DoubaoFake(*[script(say("a"))] * 3) as fake:
        served = await serve(env=fake.environ)
        numbered = await served.post(CHAT, {"question": "q", "resume": True})
        ids = [line for line in numbered.body.decode().splitlines() if line.startswith("id:")]
        assert ids == [f"id: {n}" for n in range(1, len(numbered.events) + 1)]
        plain = await served.post(CHAT, {"question": "q"})
        v1 = await served.post(
            "/v1/chat/completions",
            {
                "model": "doubao",
                "stream": True,
                "messages": [{"role": "user", "content": "q"}],
                "resume": True,
            },
        )
        assert v1.status == 200
        assert b"id: 1\n" not in plain.body + v1.body


@pytest.mark.parametrize("grace", ["0", "0.2"])
async def test_when_nobody_comes_back_the_vendor_is_left_and_the_row_says_so(
    serve: Start, grace: str
) -> None:
    """P5: within the grace that the widget asked for."""
    async with DoubaoFake(script(say("one"), hang())) as fake:
        served = await serve(env={**fake.environ, "MOGINE_RESUME_GRACE": grace})
        response = await begin(served)
        got = await read_until(response, "one")
        response.close()
        await fake.wait_disconnect(0)
        row = await served.row_with("aborted")
        assert (row.answer, row.error_type) == ("one", "client_left")
        await served.until(lambda: served.answers == 0)
        assert_envelope(await served.post(RESUME, place(got)), 404, "not_found")


async def test_stop_has_no_grace(serve: Start) -> None:
    """P5"""
    async with DoubaoFake(script(say("one"), hang())) as fake:
        served = await serve(env={**fake.environ, "MOGINE_RESUME_GRACE": "60"})
        response = await begin(served)
        got = await read_until(response, "one")
        stopped = await served.post("/api/chat/stop", place(got))
        assert stopped.status == 200
        await fake.wait_disconnect(0)
        await served.row_with("aborted")
        response.close()
        again = await served.post("/api/chat/stop", place(got))
        assert_envelope(again, 404, "not_found")


async def test_who_leaves_before_the_first_word_of_the_answer_can_come_back(serve: Start) -> None:
    async with DoubaoFake(script(pause(0.1), say("late"))) as fake:
        served = await serve(env=fake.environ)
        response = await begin(served)
        got = await read_until(response, "start")
        response.close()
        resumed = await served.post(RESUME, place(got), headers={"Last-Event-ID": last_id(got)})
        assert ("delta", {"text": "late"}) in resumed.events


async def test_an_answer_is_for_the_visitor_and_the_session_that_asked(serve: Start) -> None:
    """B11, P22: a foreign id is as one that never was, and pages of other sites get nothing."""
    async with DoubaoFake(script(say("secret"), hang())) as fake:
        served = await serve(env={**fake.environ, "MOGINE_RESUME_GRACE": "60"})
        response = await begin(served)
        mine = place(await read_until(response, "secret"))
        other_session = {**mine, "session_id": "b" * 32}
        unknown = {**mine, "request_id": "0" * 44}
        for body, headers in (
            (other_session, {}),
            (unknown, {}),
            (mine, {"X-Forwarded-For": "203.0.113.9"}),
            ({**mine, "session_id": ""}, {}),
        ):
            reply = await served.post(RESUME, body, headers=headers)
            assert_envelope(reply, 404, "not_found")
            assert b"secret" not in reply.body
            assert_envelope(await served.post("/api/chat/stop", body, headers=headers), 404, "not_found")
        assert served.answers == 1, "nobody else could stop it"
        foreign = await served.post(RESUME, mine, headers={"Origin": "https://evil.example"})
        assert_envelope(foreign, 403, "origin_not_allowed")
        await served.post("/api/chat/stop", mine)
        response.close()


@pytest.mark.parametrize("last", ["-1", "x", "1e3", "9" * 20])
async def test_a_last_event_id_that_is_none_is_refused(serve: Start, last: str) -> None:
    served = await serve()
    reply = await served.post(
        RESUME, {"request_id": "0" * 44, "session_id": SESSION}, headers={"Last-Event-ID": last}
    )
    assert_envelope(reply, 400, "invalid_request")


@pytest.mark.parametrize("body", [{}, {"request_id": 7, "session_id": SESSION}, {"request_id": "x"}])
async def test_a_place_that_is_none_is_refused(serve: Start, body: dict[str, Any]) -> None:
    served = await serve()
    assert_envelope(await served.post(RESUME, body), 400, "invalid_request")
    assert_envelope(await served.post("/api/chat/stop", body), 400, "invalid_request")


async def test_what_fails_before_the_answer_is_a_plain_error_and_later_an_event(serve: Start) -> None:
    async with DoubaoFake(refuse(401)) as fake:
        limits = {"MOGINE_RATE_LIMIT": "1/minute", "MOGINE_PROVIDERS": "doubao"}
        served = await serve(env={**fake.environ, **limits})
        failed = await served.post(CHAT, {"question": "q", "resume": True, "provider": "doubao"})
        assert failed.status == 200
        limited = await served.post(CHAT, {"question": "q", "resume": True})
        assert_envelope(limited, 429, "rate_limited")
        assert limited.headers["Retry-After"]
        assert_envelope(await served.post(CHAT, {"question": "q", "resume": "yes"}), 400, "invalid_request")


async def test_the_conversation_remembers_an_answer_that_was_read_on_another_page(serve: Start) -> None:
    async with DoubaoFake(script(say("one "), pause(0.1), say("two")), script(say("three"))) as fake:
        served = await serve(env=fake.environ)
        first = await begin(served)
        got = await read_until(first, "one ")
        first.close()
        await served.post(RESUME, place(got), headers={"Last-Event-ID": last_id(got)})
        await (await begin(served, question="and then?")).read()
        said = [m["content"] for m in fake.requests[1].json["messages"] if m["role"] != "system"]
        assert said == ["q", "one two", "and then?"]


async def test_an_ended_answer_is_forgotten_after_the_grace(serve: Start) -> None:
    async with DoubaoFake(script(say("one"))) as fake:
        served = await serve(env={**fake.environ, "MOGINE_RESUME_GRACE": "0.05"})
        response = await begin(served)
        got = await read_until(response, "done")
        await response.read()
        async with asyncio.timeout(5):
            while (await served.post(RESUME, place(got))).status != 404:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
