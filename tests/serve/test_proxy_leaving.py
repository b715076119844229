"""Visitors who leave, read slowly or wait long; limits on what is open; answers when a server stops."""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.serve.conftest import Reply, Served, Start, assert_envelope, is_idle, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import Script, cut, endless, hang, head, pause, refuse, say, script, think

LLM = "/api/llm/doubao"
FROM_A = "X-Forwarded-For: 203.0.113.1\r\n"
A, B = {"X-Forwarded-For": "203.0.113.1"}, {"X-Forwarded-For": "203.0.113.2"}


class Visitor:
    """A visitor on a bare socket, who may leave as rudely as they like."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.received = b""

    @classmethod
    async def asking(
        cls, served: Served, path: str, body: Any, *, receive_buffer: int = 0, headers: str = ""
    ) -> "Visitor":
        """Connect and send one whole question."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        visitor = cls(sock)
        await visitor._loop.sock_connect(sock, ("127.0.0.1", served.port()))
        data = json.dumps(body).encode()
        request = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        await visitor.send(request.encode() + data)
        return visitor

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def read_until(self, mark: bytes) -> None:
        async with asyncio.timeout(5):
            while mark not in self.received:
                block = await self._loop.sock_recv(self._sock, 65536)
                assert block, self.received
                self.received += block

    async def read_to_end(self) -> bytes:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                while block := await self._loop.sock_recv(self._sock, 65536):
                    self.received += block
        return self.received

    def leave(self, *, reset: bool = False) -> float:
        if reset:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()
        return time.monotonic()


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake() as fake:
        yield fake


# --- leaving -------------------------------------------------------------------------------------

WAYS: dict[str, tuple[Script, dict[str, Any], bytes]] = {
    "mid-stream": (script(say("一"), hang()), {"stream": True}, "一".encode()),
    "mid-thought": (script(think("嗯"), hang()), {"stream": True}, "嗯".encode()),
    "after-the-head": (script(head(), hang()), {"stream": True}, b""),
    "before-the-head": (script(hang()), {"stream": True}, b""),
    "whole": (script(hang()), {"stream": False}, b""),
    "while-it-pours": (script(endless("字", every_s=0.001)), {"stream": True}, "字".encode()),
}


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_visitor_who_leaves_ends_the_upstream_call_within_a_second(
    serve: Start, doubao: DoubaoFake, way: str, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """P5, F11, B22."""
    steps, fields, mark = WAYS[way]
    doubao.play(steps)
    served = await serve(env=doubao.environ)
    visitor = await Visitor.asking(served, LLM, question(**fields))
    await doubao.wait_requests(1)
    if mark:
        await visitor.read_until(mark)
    left_at = visitor.leave(reset=reset)
    assert await doubao.wait_disconnect() - left_at < 1.0
    row = await served.row_with("aborted")
    assert row.error_type == "client_left"
    assert row.answer.startswith(mark.decode()) if mark and way != "mid-thought" else row.answer == ""
    await served.until(lambda: is_idle(served))
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_visitor_of_the_assistant_who_leaves_ends_the_upstream_call(
    serve: Start, doubao: DoubaoFake, stream: bool
) -> None:
    doubao.play(script(say("一"), hang()))
    served = await serve(env=doubao.environ)
    visitor = await Visitor.asking(served, "/api/chat", {"question": "x", "stream": stream})
    await doubao.wait_requests(1)
    if stream:
        await visitor.read_until(b"event: delta")
    left_at = visitor.leave()
    assert await doubao.wait_disconnect() - left_at < 1.0
    row = await served.row_with("aborted")
    assert (row.kind, row.provider, row.answered) == ("chat", "doubao", "unknown")


async def test_a_visitor_who_leaves_dashscope_ends_the_upstream_call(serve: Start) -> None:
    async with DashScopeFake(script(say("图"), hang())) as fake:
        served = await serve(env=fake.environ)
        visitor = await Visitor.asking(
            served, "/api/llm/dashscope", {"prompt": "x"}, headers="X-DashScope-SSE: enable\r\n"
        )
        await visitor.read_until("图".encode())
        left_at = visitor.leave()
        assert await fake.wait_disconnect() - left_at < 1.0
        assert (await served.row_with("aborted")).answer == "图"


async def test_a_visitor_who_leaves_is_not_asked_for_again(serve: Start, doubao: DoubaoFake) -> None:
    """Retries stop with the visitor: the vendor hears nothing more."""
    doubao.play(script(refuse(503)), script(hang()))
    served = await serve(env=doubao.environ)
    visitor = await Visitor.asking(served, LLM, question())
    await doubao.wait_requests(1)
    visitor.leave()
    await served.row_with("aborted")
    await served.until(lambda: is_idle(served))
    asked = len(doubao.requests)
    assert asked <= 2
    assert all(request.is_over for request in doubao.requests)


async def test_a_visitor_who_leaves_within_the_request_costs_nothing(
    serve: Start, doubao: DoubaoFake
) -> None:
    served = await serve(env=doubao.environ)
    for head_bytes in (
        b"POST /api/llm/doubao HTTP/1.1\r\nHost: local",
        b"POST /api/llm/doubao HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{",
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port())
        writer.write(head_bytes)
        await writer.drain()
        writer.close()
    assert (await served.ask("GET", "/healthz")).status == 200
    assert not doubao.requests
    assert await served.rows() == []


# --- slow readers and long waits -----------------------------------------------------------------


async def test_a_visitor_who_stops_reading_holds_the_vendor_back_and_is_disconnected(
    serve: Start, doubao: DoubaoFake
) -> None:
    """P6, F12."""
    doubao.play(script(endless("a")))
    served = await serve(env={**doubao.environ, "MOGINE_READER_TIMEOUT": "0.4"})
    visitor = await Visitor.asking(served, LLM, question(stream=True), receive_buffer=4096)
    await doubao.wait_disconnect(timeout_s=20)
    row = await served.row_with("aborted")
    assert 0 < len(row.answer) < 60_000, "the answer's own limit was not reached: the reader held it back"
    visitor.leave()
    await served.until(lambda: is_idle(served))


async def test_silence_is_bridged_by_comments_before_and_within_an_answer(
    serve: Start, doubao: DoubaoFake
) -> None:
    """P3."""
    doubao.play(script(head(), pause(0.3), say("一"), pause(0.3), say("二")))
    served = await serve(env={**doubao.environ, "MOGINE_PING_INTERVAL": "0.05"})
    for path, body in ((LLM, question(stream=True)), ("/api/chat", {"question": "x"})):
        reply = await served.post(path, body)
        before, _, rest = reply.body.partition("一".encode())
        within, _, _ = rest.partition("二".encode())
        assert b": ping\n\n" in before and b": ping\n\n" in within
        assert b"id:" not in reply.body
        assert reply.events[-1][1] == "[DONE]" or reply.events[-1][0] == "done"


async def test_an_error_after_a_comment_is_told_within_the_stream(serve: Start, doubao: DoubaoFake) -> None:
    doubao.play(script(pause(0.3), refuse(401)))
    served = await serve(env={**doubao.environ, "MOGINE_PING_INTERVAL": "0.05"})
    reply = await served.post(LLM, question(stream=True))
    assert (reply.status, reply.events[-1][0]) == (200, "error")
    assert reply.events[-1][1]["error"]["reason"] == "upstream_refused"
    assert (await served.row_with("error")).error_type == "upstream_refused"


async def test_pieces_go_out_as_they_come(serve: Start, doubao: DoubaoFake) -> None:
    doubao.play(script(say("一"), hang()))
    served = await serve(env=doubao.environ)
    for path, body in ((LLM, question(stream=True)), ("/api/chat", {"question": "x"})):
        visitor = await Visitor.asking(served, path, body)
        await visitor.read_until("一".encode())
        visitor.leave()


# --- limits --------------------------------------------------------------------------------------


async def test_a_visitor_may_have_so_many_answers_open_and_no_more(serve: Start, doubao: DoubaoFake) -> None:
    """P9, B3."""
    doubao.play(script(say("一"), hang()))
    served = await serve(env={**doubao.environ, "MOGINE_MAX_STREAMS_PER_VISITOR": "2"})
    first = await Visitor.asking(served, LLM, question(stream=True), headers=FROM_A)
    second = await Visitor.asking(served, LLM, question(stream=True), headers=FROM_A)
    await doubao.wait_requests(2)
    for path, body in ((LLM, question()), ("/api/chat", {"question": "x"})):
        assert_envelope(await served.post(path, body, headers=A), 429, "too_many_streams")
    doubao.play(script(say("好")))
    assert (await served.post(LLM, question(), headers=B)).status == 200
    first.leave()
    await served.until(lambda: served.answers == 1)
    assert (await served.post(LLM, question(), headers=A)).status == 200
    second.leave()
    await served.until(lambda: is_idle(served))


async def test_all_visitors_together_may_have_so_many_answers_open(serve: Start, doubao: DoubaoFake) -> None:
    """P10."""
    doubao.play(script(say("一"), hang()))
    served = await serve(env={**doubao.environ, "MOGINE_MAX_STREAMS": "1"})
    visitor = await Visitor.asking(served, LLM, question(stream=True), headers=FROM_A)
    await visitor.read_until("一".encode())
    assert_envelope(await served.post(LLM, question(), headers=B), 503, "overloaded")
    visitor.leave()
    await served.until(lambda: is_idle(served))
    doubao.play(script(say("好")))
    assert (await served.post(LLM, question(), headers=B)).status == 200


async def test_questions_are_counted_by_the_address_that_the_proxy_in_front_saw(
    serve: Start, doubao: DoubaoFake
) -> None:
    """P12, B4."""
    served = await serve(env={**doubao.environ, "MOGINE_RATE_LIMIT": "2/minute"})

    async def ask(**headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        reply: Reply = await served.post(LLM, question(), headers=names)
        return reply.status

    assert [await ask(X_Forwarded_For="203.0.113.1") for _ in range(3)] == [200, 200, 429]
    for forged in (
        {"X_Forwarded_For": "198.51.100.7, 203.0.113.1"},
        {"X_Forwarded_For": "203.0.113.1", "Forwarded": "for=198.51.100.8"},
        {"X_Forwarded_For": "203.0.113.1, 127.0.0.1", "CF_Connecting_IP": "198.51.100.9"},
        {"X_Forwarded_For": "203.0.113.1", "True_Client_IP": "198.51.100.9", "Cookie": "a=1"},
        {"X_Forwarded_For": "::ffff:203.0.113.1"},
    ):
        assert await ask(**forged) == 429, forged
    assert await ask(X_Forwarded_For="203.0.113.2") == 200
    sixes = [await ask(X_Forwarded_For=f"2001:db8:1:2::{host}") for host in ("1", "2", "ffff")]
    assert sixes == [200, 200, 429]
    assert await ask(X_Forwarded_For="2001:db8:1:3::1") == 200


async def test_too_many_questions_are_told_when_to_come_back_and_recorded_once(
    serve: Start, doubao: DoubaoFake
) -> None:
    """P8."""
    served = await serve(env={**doubao.environ, "MOGINE_RATE_LIMIT": "1/minute"})
    assert (await served.post(LLM, question())).status == 200
    for _ in range(3):
        reply = await served.post(LLM, question("noch einmal"))
        assert "1/minute" in assert_envelope(reply, 429, "rate_limited")
        assert 50 <= int(reply.headers["Retry-After"]) <= 60
    rows = await served.rows()
    assert [(row.status, row.error_type) for row in rows] == [("ok", ""), ("refused", "rate_limited")]
    assert len(doubao.requests) == 1


async def test_the_whole_site_has_a_rate_too(serve: Start, doubao: DoubaoFake) -> None:
    served = await serve(env={**doubao.environ, "MOGINE_SITE_RATE_LIMIT": "2/hour"})
    replies = [
        await served.post(LLM, question(), headers={"X-Forwarded-For": f"203.0.113.{n}"}) for n in range(3)
    ]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert_envelope(replies[2], 429, "rate_limited")
    assert replies[2].headers["Retry-After"] == "120", "never longer than clients are willing to wait"


@pytest.mark.parametrize(
    ("steps", "body"),
    [
        (script(say("好")), question()),
        (script(say("好")), question(stream=True)),
        (script(refuse(401)), question(stream=True)),
        (script(say("好"), cut()), question(stream=True)),
        (script(cut()), question()),
        (script(endless("字" * 900)), question(stream=True)),
    ],
    ids=["whole", "stream", "refused", "cut", "cut-whole", "too-long"],
)
async def test_every_way_out_gives_the_place_back(
    serve: Start, doubao: DoubaoFake, steps: Any, body: Any
) -> None:
    """P9."""
    doubao.play(steps)
    served = await serve(env={**doubao.environ, "MOGINE_MAX_STREAMS_PER_VISITOR": "1"})
    for path, asked in ((LLM, body), ("/api/chat", {"question": "x"})):
        await served.post(path, asked)
        assert is_idle(served)


# --- stopping ------------------------------------------------------------------------------------


async def test_a_stopping_server_refuses_new_questions_and_says_so(serve: Start, doubao: DoubaoFake) -> None:
    """P39."""
    served = await serve(env=doubao.environ)
    served.running.drain()
    served.running.refuse()
    assert (await served.ask("GET", "/healthz")).json == {"status": "draining"}
    assert (await served.ask("GET", "/readyz")).status == 503
    for path, body in ((LLM, question()), ("/api/chat", {"question": "x"})):
        assert_envelope(await served.post(path, body), 503, "shutting_down")
    assert not doubao.requests


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_that_run_too_long_into_a_stop_end_with_an_error(
    serve: Start, doubao: DoubaoFake, stream: bool
) -> None:
    """P39."""
    doubao.play(script(say("一"), hang()))
    served = await serve(env=doubao.environ)
    visitor = await Visitor.asking(served, LLM, question(stream=stream))
    await doubao.wait_requests(1)
    if stream:
        await visitor.read_until("一".encode())
    served.running.end_answers()
    await visitor.read_until(b"shutting_down")
    if stream:
        await visitor.read_until(b"0\r\n\r\n")
        assert b"event: error" in visitor.received and b"[DONE]" not in visitor.received
    else:
        assert visitor.received.startswith(b"HTTP/1.1 503")
    await doubao.wait_disconnect()
    assert (await served.row_with("error")).error_type == "shutting_down"
    visitor.leave()
