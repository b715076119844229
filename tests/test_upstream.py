"""The way out: frames in any split, limits for every phase, connections that end at once, tries again."""

import asyncio
import itertools
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.errors import (
    AnswerTooLong,
    SettingsError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamCut,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mogine.upstream import (
    MAX_EMPTY_BYTES,
    MAX_FRAME_BYTES,
    MAX_LINE_BYTES,
    MAX_STREAM_BYTES,
    USER_AGENT,
    Answer,
    Call,
    Client,
    Frame,
    FrameDecoder,
    Limits,
    Retries,
    open_client,
    retry_after_s,
)
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.raw import RawFake, closed_port, deaf_port
from tests.upstreams.replay import Fixture, ReplayFake, fixtures
from tests.upstreams.script import (
    cut,
    endless,
    gzip_bomb,
    hang,
    head,
    redirect,
    reply,
    say,
    script,
)
from tests.upstreams.tls import certificate_files

QUICK = Limits(connect_s=0.1, first_byte_s=0.1, idle_s=0.1, answer_s=5.0)
CALM = Limits(connect_s=5.0, first_byte_s=5.0, idle_s=5.0, answer_s=10.0)
BODY = b'{"model":"doubao-seed-2-1-turbo-260628","messages":[{"role":"user","content":"hi"}],"stream":true}'


def call_to(url: str) -> Call:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer test-key-doubao"}
    return Call(url, headers, BODY, "Test vendor", "TEST_BASE_URL")


def chat(base_url: str) -> Call:
    return call_to(f"{base_url}/chat/completions")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with open_client(CALM) as client:
        yield client


@pytest.fixture
async def hasty() -> AsyncIterator[Client]:
    async with open_client(QUICK) as client:
        yield client


async def drain(answer: Answer) -> bytes:
    return await answer.read_all(16 * 1024 * 1024)


# --- frames -----------------------------------------------------------------------------------------


def decode(*blocks: bytes) -> list[Frame]:
    decoder = FrameDecoder()
    return [frame for block in blocks for frame in decoder.feed(block)]


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(st.sampled_from(fixtures(kind="sse")), st.lists(st.integers(0, 10_000), max_size=40))
def test_any_split_of_a_recorded_stream_gives_the_same_frames(fixture: Fixture, cuts: list[int]) -> None:
    assert decode(*split(fixture.body, cuts)) == decode(fixture.body)


@pytest.mark.parametrize("fixture", fixtures(kind="sse"), ids=str)
def test_byte_by_byte_gives_the_same_frames(fixture: Fixture) -> None:
    assert decode(*(fixture.body[i : i + 1] for i in range(len(fixture.body)))) == decode(fixture.body)


@given(
    st.lists(st.sampled_from([b"data: x", b"data:", b":c", b"id:1", b"\r", b"\n", b"\r\n", b"e", b"\xff"]))
)
def test_raw_bytes_of_all_frames_are_the_stream_up_to_the_last_blank_line(parts: list[bytes]) -> None:
    data = b"".join(parts)
    frames = decode(data)
    rest = data
    for frame in frames:
        _, found, rest = rest.partition(frame.raw)
        assert found and frame.raw.endswith((b"\n\n", b"\n\r\n"))
    assert frames == decode(*(data[i : i + 1] for i in range(len(data))))


def test_a_frame_tells_all_its_lines() -> None:
    raw = b"id:7\nevent:error\n:HTTP_STATUS/429\ndata:{}\n\n"
    assert decode(raw) == [Frame(raw, b"{}", "error", 429, True)]


def test_spaces_crlf_and_unknown_fields_are_tolerated() -> None:
    raw = b"event: result\r\n: HTTP_STATUS/200\r\nretry: 3\r\nfoo\r\ndata: a\r\ndata:  b\r\n\r\n"
    assert decode(raw) == [Frame(raw, b"a\n b", "result", 200, False)]


def test_a_byte_order_mark_is_dropped_in_any_split() -> None:
    data = b"\xef\xbb\xbfdata: x\n\n"
    for place in range(5):
        assert decode(data[:place], data[place:]) == [Frame(b"data: x\n\n", b"x", "", None, False)]


def test_a_comment_is_a_frame_without_data() -> None:
    assert decode(b": ping\n\n") == [Frame(b": ping\n\n", b"", "", None, False)]


def test_an_unterminated_last_frame_is_discarded() -> None:
    assert decode(b"data: a\n\ndata: b\n") == [Frame(b"data: a\n\n", b"a", "", None, False)]


def test_unicode_line_separators_do_not_cut_a_line() -> None:
    data = "data: a\u2028b\u2029c\u0085d\n\n".encode()
    assert decode(data)[0].data.decode() == "a\u2028b\u2029c\u0085d"


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    decoder = FrameDecoder()
    with pytest.raises(UpstreamBadResponse, match="too long"):
        for _ in range(MAX_LINE_BYTES // 1000 + 2):
            decoder.feed(b"x" * 1000)


def test_a_long_line_in_one_block_is_refused_too() -> None:
    assert decode(b"data: " + b"x" * (MAX_LINE_BYTES - 10) + b"\n\n")[0].data.startswith(b"xxx")
    with pytest.raises(UpstreamBadResponse, match="too long"):
        decode(b"data: " + b"x" * MAX_LINE_BYTES + b"\n\n")


def test_a_frame_of_many_lines_is_refused() -> None:
    with pytest.raises(UpstreamBadResponse, match="too long"):
        decode(*[b"data: " + b"x" * 1000 + b"\n"] * (MAX_FRAME_BYTES // 1000))


def test_a_stream_without_end_is_refused() -> None:
    decoder = FrameDecoder()
    block = (b"data:" + b"x" * 1017 + b"\n\n") * 1024
    with pytest.raises(AnswerTooLong):
        for _ in range(MAX_STREAM_BYTES // len(block) + 1):
            decoder.feed(block)


@pytest.mark.parametrize("nothing", [b": keep-alive\n\n", b"\n", b"event: x\n\n"])
def test_a_stream_that_says_nothing_is_refused_early(nothing: bytes) -> None:
    decoder = FrameDecoder()
    with pytest.raises(UpstreamBadResponse):
        for _ in range(MAX_EMPTY_BYTES // len(nothing) // 1000 + 2):
            decoder.feed(nothing * 1000)
    patient = FrameDecoder()
    for _ in range(2 * MAX_EMPTY_BYTES // 100_000):
        patient.feed(b": keep-alive\n\n" * 7000)
        assert [frame.data for frame in patient.feed(b"\ndata: x\n\n")] == [b"x"]


def test_many_lines_of_one_frame_are_one_text() -> None:
    (frame,) = FrameDecoder().feed(b"data: x\n" * 10_000 + b"\n")
    assert frame.data == b"\n".join([b"x"] * 10_000)


# --- the client: what it sends ----------------------------------------------------------------------


async def test_only_headers_that_mogine_makes_are_sent(client: Client) -> None:
    async with DoubaoFake() as fake, client.post(chat(fake.base_url)) as answer:
        assert (answer.status, answer.header("content-type")[:17]) == (200, "text/event-stream")
        await drain(answer)
    sent = fake.requests[0].headers
    assert {name.lower() for name in sent} == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "authorization",
        "content-type",
        "content-length",
    }
    assert (sent["User-Agent"], sent["Accept-Encoding"]) == (USER_AGENT, "identity")
    assert fake.requests[0].body == BODY


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        async with (
            open_client(CALM) as client,
            DoubaoFake() as fake,
            client.post(chat(fake.base_url)) as answer,
        ):
            assert answer.status == 200


async def test_cookies_are_not_kept(client: Client) -> None:
    async with DoubaoFake(script(say("x"), headers={"Set-Cookie": "acw_tc=1; Path=/"})) as fake:
        for _ in range(2):
            async with client.post(chat(fake.base_url)) as answer:
                await drain(answer)
        assert "Cookie" not in fake.requests[1].headers


async def test_an_answer_read_to_its_end_leaves_the_connection_for_the_next(client: Client) -> None:
    async with DoubaoFake() as fake:
        for _ in range(3):
            async with client.post(chat(fake.base_url)) as answer:
                await drain(answer)
        assert {request.connection for request in fake.requests} == {1}


async def test_redirects_are_not_followed(client: Client) -> None:
    async with DoubaoFake() as elsewhere, DoubaoFake(redirect(elsewhere.origin)) as fake:
        async with client.post(chat(fake.base_url)) as answer:
            assert answer.status == 302
        assert elsewhere.requests == []


async def test_a_compressed_answer_is_refused_and_not_inflated(client: Client) -> None:
    async with DoubaoFake(gzip_bomb(8)) as fake:
        with pytest.raises(UpstreamBadResponse, match="compressed"):
            async with client.post(chat(fake.base_url)):
                pytest.fail("there is no answer to be had")


async def test_bytes_arrive_as_they_are_sent(client: Client) -> None:
    async with DoubaoFake(script(say("一"), hang())) as fake, client.post(chat(fake.base_url)) as answer:
        assert "一" in (await answer.read()).decode()


# --- the client: limits -----------------------------------------------------------------------------


async def test_a_closed_port_is_told_at_once(client: Client) -> None:
    with closed_port() as port, pytest.raises(UpstreamUnreachable, match="check TEST_BASE_URL"):
        async with client.post(call_to(f"http://127.0.0.1:{port}/x")):
            pytest.fail("nothing listens there")


async def test_a_port_that_does_not_accept_ends_in_a_timeout(hasty: Client) -> None:
    with deaf_port() as port, pytest.raises(UpstreamTimeout, match="MOGINE_CONNECT_TIMEOUT"):
        async with hasty.post(call_to(f"http://127.0.0.1:{port}/x")):
            pytest.fail("nobody accepts there")


async def test_an_unknown_host_is_told_by_its_setting(client: Client) -> None:
    with pytest.raises(UpstreamUnreachable, match="host name was not found; check TEST_BASE_URL"):
        async with client.post(call_to("http://no-such-host.invalid/x")):
            pytest.fail("there is no such host")


async def test_silence_before_the_head_ends_in_a_timeout(hasty: Client) -> None:
    async with DoubaoFake(hang()) as fake:
        with pytest.raises(UpstreamTimeout, match="MOGINE_FIRST_BYTE_TIMEOUT"):
            async with hasty.post(chat(fake.base_url)):
                pytest.fail("no head was sent")
        await fake.wait_disconnect()


async def test_silence_after_the_head_ends_in_a_timeout(hasty: Client) -> None:
    async with DoubaoFake(script(head(), hang())) as fake:
        with pytest.raises(UpstreamTimeout, match="MOGINE_FIRST_BYTE_TIMEOUT"):
            async with hasty.post(chat(fake.base_url)) as answer:
                await drain(answer)
        await fake.wait_disconnect()


async def test_silence_within_an_answer_ends_in_a_timeout(hasty: Client) -> None:
    async with DoubaoFake(script(say("一"), hang())) as fake:
        with pytest.raises(UpstreamTimeout, match="MOGINE_IDLE_TIMEOUT"):
            async with hasty.post(chat(fake.base_url)) as answer:
                await drain(answer)
        await fake.wait_disconnect()


async def test_a_slow_reader_is_not_taken_for_a_silent_vendor() -> None:
    limits = Limits(connect_s=1, first_byte_s=1, idle_s=0.03, answer_s=5)
    async with (
        open_client(limits) as client,
        DoubaoFake(script(say("一", "二"))) as fake,
        client.post(chat(fake.base_url)) as answer,
    ):
        first = await answer.read()
        await asyncio.sleep(0.1)
        assert b"[DONE]" in first + await drain(answer)


async def test_an_answer_that_never_ends_is_ended() -> None:
    limits = Limits(connect_s=1, first_byte_s=1, idle_s=1, answer_s=0.15)
    async with open_client(limits) as client, DoubaoFake(endless("字", 0.01)) as fake:
        with pytest.raises(UpstreamTimeout, match="MOGINE_ANSWER_TIMEOUT"):
            async with client.post(chat(fake.base_url)) as answer:
                await drain(answer)
        await fake.wait_disconnect()


async def test_the_clock_of_a_finished_answer_does_not_touch_its_connection() -> None:
    """The connection is back in the pool then and may serve somebody else."""
    limits = Limits(connect_s=1, first_byte_s=0.05, idle_s=0.05, answer_s=0.05)
    async with open_client(limits) as client, DoubaoFake() as fake:
        for _ in range(2):
            async with client.post(chat(fake.base_url)) as answer:
                await drain(answer)
            await asyncio.sleep(0.1)
        assert {request.connection for request in fake.requests} == {1}


async def test_an_answer_unread_at_its_end_does_not_abort_a_pooled_connection(client: Client) -> None:
    async with DoubaoFake(reply(200, b"{}")) as fake:
        async with client.post(chat(fake.base_url)) as answer:
            assert answer.status == 200
            await asyncio.sleep(0.05)  # all has arrived, nothing was read
        async with client.post(chat(fake.base_url)) as answer:
            assert await drain(answer) == b"{}"


async def test_a_body_larger_than_allowed_is_refused(client: Client) -> None:
    async with DoubaoFake(reply(200, b"x" * 65536, times=200)) as fake:
        with pytest.raises(UpstreamBadResponse, match="larger than 100000 bytes"):
            async with client.post(chat(fake.base_url)) as answer:
                await answer.read_all(100_000)


async def test_an_error_body_is_read_up_to_its_limit(client: Client) -> None:
    async with (
        DoubaoFake(reply(500, b"x" * 65536, times=20)) as fake,
        client.post(chat(fake.base_url)) as answer,
    ):
        assert await answer.read_some(1000) == b"x" * 1000


async def test_an_error_body_that_breaks_off_is_taken_as_it_is(client: Client) -> None:
    parts = b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\nhalf"
    async with RawFake(parts) as fake, client.post(call_to(fake.origin)) as answer:
        assert await answer.read_some(1000) == b"half"


@pytest.mark.parametrize("reset", [False, True])
async def test_a_broken_connection_is_a_cut_answer(client: Client, reset: bool) -> None:
    async with DoubaoFake(script(say("一"), cut(reset=reset))) as fake:
        with pytest.raises(UpstreamCut, match="cut"):
            async with client.post(chat(fake.base_url)) as answer:
                await drain(answer)


@pytest.mark.parametrize("head", [b"\x16\x03\x01 TLS\r\n\r\n", b"HTTP/1.1 two hundred\r\n\r\n"])
async def test_what_is_not_http_is_a_bad_response(client: Client, head: bytes) -> None:
    async with RawFake(head) as fake:
        with pytest.raises(UpstreamBadResponse, match="check TEST_BASE_URL"):
            async with client.post(call_to(fake.origin)):
                pytest.fail("that was no HTTP")


async def test_an_error_before_the_answer_holds_no_key(client: Client) -> None:
    async with RawFake(b"HTTP/1.1 two hundred\r\n\r\n") as fake:
        with pytest.raises(UpstreamError) as raised:
            async with client.post(call_to(fake.origin)):
                pytest.fail("that was no HTTP")
    error: BaseException | None = raised.value
    while error is not None:
        assert "test-key" not in repr(error) + str(error)
        error = error.__cause__ or error.__context__


def test_a_call_shows_no_key() -> None:
    assert "test-key" not in repr(chat("http://127.0.0.1"))


# --- the client: leaving ----------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
async def test_leaving_within_an_answer_is_seen_by_the_vendor_at_once(tls: bool) -> None:
    async with (
        DoubaoFake(endless("字", 0.01), tls=tls) as fake,
        open_client(CALM, tls=ssl.create_default_context(cafile=fake.ca_file)) as client,
    ):
        async with client.post(chat(fake.base_url)) as answer:
            assert await answer.read()
        left_at = time.monotonic()
        assert await fake.wait_disconnect(timeout_s=1.0) - left_at < 1.0


@pytest.mark.parametrize("tls", [False, True])
async def test_leaving_while_the_vendor_is_silent_is_seen_at_once(tls: bool) -> None:
    async with (
        DoubaoFake(script(say("一"), hang()), tls=tls) as fake,
        open_client(CALM, tls=ssl.create_default_context(cafile=fake.ca_file)) as client,
    ):
        async with client.post(chat(fake.base_url)) as answer:
            assert await answer.read()
        await fake.wait_disconnect(timeout_s=1.0)


class DeafTlsServer:
    """Begins an answer, falls silent and has no ear for the goodbye of TLS: only the end of TCP counts."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(10)
        self._listener.close()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._listener.getsockname()[1]}/x"

    def _serve(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate_files())
        accepted, _ = self._listener.accept()
        with context.wrap_socket(accepted, server_side=True, suppress_ragged_eofs=True) as connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: x\n\n")
            with socket.socket(fileno=os.dup(connection.fileno())) as tcp:
                tcp.settimeout(0.02)
                while not self.stop.is_set() and not self.left.is_set():
                    self._listen(tcp)

    def _listen(self, tcp: socket.socket) -> None:
        try:
            if not tcp.recv(65536):
                self.left.set()
        except TimeoutError:
            return
        except OSError:
            self.left.set()


async def test_leaving_over_tls_reaches_a_vendor_that_does_not_listen() -> None:
    """A polite close waits for the vendor's, for up to 30 s in which the vendor goes on and bills."""
    trust = ssl.create_default_context(cafile=certificate_files()[0])
    with DeafTlsServer() as server:
        async with open_client(CALM, tls=trust) as client:
            async with client.post(call_to(server.url)) as answer:
                assert await answer.read()
            assert await asyncio.to_thread(server.left.wait, 1.0)


@pytest.mark.parametrize("tls", [False, True])
async def test_leaving_before_the_head_is_seen_at_once(tls: bool) -> None:
    async with (
        DoubaoFake(hang(), tls=tls) as fake,
        open_client(CALM, tls=ssl.create_default_context(cafile=fake.ca_file)) as client,
    ):

        async def ask() -> None:
            async with client.post(chat(fake.base_url)):
                pytest.fail("there is no answer")

        task = asyncio.create_task(ask())
        await fake.wait_requests()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fake.wait_disconnect(timeout_s=1.0)


async def test_a_certificate_that_is_not_trusted_is_refused(client: Client) -> None:
    async with DoubaoFake(tls=True) as fake:
        with pytest.raises(UpstreamUnreachable, match="TLS"):
            async with client.post(chat(fake.base_url)):
                pytest.fail("anybody could have answered")
        assert fake.requests == []


async def test_a_context_that_does_not_verify_is_refused() -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(SettingsError, match="verified"):
        async with open_client(CALM, tls=context):
            pytest.fail("that client would trust anybody")


async def test_a_vendor_that_keeps_the_body_open_is_left_after_a_moment(client: Client) -> None:
    async with DoubaoFake(script(say("一"), hang())) as fake:
        async with client.post(chat(fake.base_url)) as answer:
            assert await answer.read()
            await answer.finish(0.01)
        await fake.wait_disconnect(timeout_s=1.0)


@pytest.mark.parametrize("chop", [1, 5])
async def test_recorded_bytes_arrive_unchanged(client: Client, chop: int) -> None:
    async with (
        ReplayFake("dashscope_stream_citations.sse", chop=chop) as fake,
        client.post(call_to(f"{fake.base_url}/apps/x/completion")) as answer,
    ):
        body = await drain(answer)
    assert body == next(f for f in fixtures() if f.file == "dashscope_stream_citations.sse").body


# --- asking again -----------------------------------------------------------------------------------


class Sleeper:
    """A clock that only notes how long somebody wanted to sleep."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


class Attempts:
    """Fails with each of `errors` in turn, then answers 1, 2; `late` errors come after the first item."""

    def __init__(self, *errors: Exception, late: bool = False) -> None:
        self.errors = list(errors)
        self.late = late
        self.made = 0

    async def __call__(self) -> AsyncGenerator[int, None]:
        self.made += 1
        error = self.errors.pop(0) if self.errors else None
        if error and not self.late:
            raise error
        yield 1
        if error:
            raise error
        yield 2


async def items_of(retries: Retries, attempts: Attempts) -> list[int]:
    return [item async for item in retries.run(attempts)]


UNREACHABLE = UpstreamUnreachable("no")


@pytest.mark.parametrize(
    "error",
    [UNREACHABLE, UpstreamBusy("busy"), UpstreamError("ill", upstream_status=503), UpstreamError("ill")],
    ids=["unreachable", "429", "503", "in the stream"],
)
async def test_what_may_heal_is_tried_again(error: UpstreamError) -> None:
    sleeper = Sleeper()
    attempts = Attempts(error, error)
    assert await items_of(Retries(sleep=sleeper, random=lambda: 1.0), attempts) == [1, 2]
    assert (attempts.made, sleeper.slept) == (3, [0.3, 0.6])


async def test_at_most_two_more_tries_are_made() -> None:
    attempts = Attempts(*[UNREACHABLE] * 5)
    with pytest.raises(UpstreamUnreachable):
        await items_of(Retries(sleep=Sleeper()), attempts)
    assert attempts.made == 3


@pytest.mark.parametrize(
    "error",
    [
        UpstreamRefused("401"),
        UpstreamTimeout("late"),
        UpstreamBadResponse("odd"),
        UpstreamError("400", upstream_status=400),
        UpstreamBusy("quota", upstream_code="QuotaExceeded"),
    ],
    ids=lambda error: error.message,
)
async def test_what_does_not_heal_is_not_tried_again(error: UpstreamError) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        await items_of(Retries(never=frozenset(("QuotaExceeded",)), sleep=Sleeper()), attempts)
    assert attempts.made == 1


async def test_nothing_is_tried_again_after_the_first_item() -> None:
    attempts = Attempts(UNREACHABLE, late=True)
    with pytest.raises(UpstreamUnreachable):
        await items_of(Retries(sleep=Sleeper()), attempts)
    assert attempts.made == 1


async def test_nothing_is_tried_again_when_the_consumer_has_left() -> None:
    asleep = asyncio.Event()

    async def sleep(_: float) -> None:
        asleep.set()
        await asyncio.Event().wait()

    attempts = Attempts(UNREACHABLE)
    retries = Retries(sleep=sleep)
    task = asyncio.create_task(items_of(retries, attempts))
    await asleep.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (attempts.made, retries.in_flight, retries.retrying) == (1, 0, 0)


async def test_waits_have_jitter() -> None:
    sleeper = Sleeper()
    await items_of(Retries(sleep=sleeper, random=lambda: 0.0), Attempts(UNREACHABLE))
    assert sleeper.slept == [0.15]


async def test_a_short_retry_after_is_honoured() -> None:
    sleeper = Sleeper()
    await items_of(Retries(sleep=sleeper), Attempts(UpstreamBusy("busy", retry_after_s=3.0)))
    assert 3.0 <= sleeper.slept[0] <= 3.2


@pytest.mark.parametrize(("asked", "told"), [(6.0, 6.0), (1e9, 120.0), (119.0, 119.0)])
async def test_a_long_retry_after_is_handed_to_the_visitor(asked: float, told: float) -> None:
    attempts = Attempts(UpstreamBusy("busy", retry_after_s=asked))
    with pytest.raises(UpstreamBusy) as raised:
        await items_of(Retries(sleep=Sleeper()), attempts)
    assert (attempts.made, raised.value.retry_after_s) == (1, told)


@pytest.mark.parametrize(("asked", "told"), [(None, 5.0), (0.0, 1.0), (0.5, 1.0)])
async def test_a_busy_vendor_always_comes_with_a_retry_after(asked: float | None, told: float) -> None:
    with pytest.raises(UpstreamBusy) as raised:
        await items_of(
            Retries(sleep=Sleeper()), Attempts(*[UpstreamBusy("x", retry_after_s=asked) for _ in range(3)])
        )
    assert raised.value.retry_after_s == told


async def test_what_never_heals_asks_for_the_longest_wait() -> None:
    error = UpstreamBusy("quota", upstream_code="QuotaExceeded", retry_after_s=1.0)
    with pytest.raises(UpstreamBusy) as raised:
        await items_of(Retries(never=frozenset(("QuotaExceeded",)), sleep=Sleeper()), Attempts(error))
    assert raised.value.retry_after_s == 120.0


async def test_a_vendor_in_trouble_is_not_buried_under_second_tries() -> None:
    """Of ten requests that fail at once, three are tried again; the others give up."""
    asleep: list[asyncio.Future[None]] = []

    async def sleep(_: float) -> None:
        asleep.append(asyncio.get_running_loop().create_future())
        await asleep[-1]

    retries = Retries(sleep=sleep)
    attempts = [Attempts(UNREACHABLE) for _ in range(10)]
    tasks = [asyncio.create_task(items_of(retries, one)) for one in attempts]
    await asyncio.wait(tasks, timeout=0.05)
    assert (len(asleep), sum(task.done() for task in tasks)) == (3, 7)
    for future in asleep:
        future.set_result(None)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(result == [1, 2] for result in results) == 3
    assert (retries.in_flight, retries.retrying) == (0, 0)


async def test_closing_early_closes_the_attempt() -> None:
    closed: list[bool] = []

    async def attempt() -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async with aclosing(Retries().run(attempt)) as items:
        assert await anext(items) == 1
    assert closed == [True]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        (" 7 ", 7.0),
        ("9" * 40, 1e9),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("1.5", None),
        ("Thu, 99 Jan 1970 00:00:01 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(header: str, seconds: float | None) -> None:
    assert retry_after_s(header, now=1000.0) == seconds
