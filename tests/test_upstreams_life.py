"""What tests rely on in a fake beside its dialect: scripts, records of requests, life and death."""

import asyncio
import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.upstreams.dashscope import APP_ID, DashScopeFake
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.raw import RawFake, closed_port, deaf_port
from tests.upstreams.replay import ReplayFake, fixture, fixtures
from tests.upstreams.script import (
    Step,
    drip,
    endless,
    garble,
    gzip_bomb,
    hang,
    head,
    parse_script,
    pause,
    redirect,
    refuse,
    reply,
    say,
    script,
    send_raw,
    usage,
)

# No certificates are needed on plain HTTP, and reading them costs more than any test here.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ROOT = Path(__file__).parent.parent
HEAD = {"Authorization": "Bearer test-key-doubao"}
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "问"}], "stream": True}


async def post(fake: DoubaoFake, body: dict[str, Any] = BODY) -> httpx.Response:
    async with httpx.AsyncClient(verify=PLAIN) as client:
        return await client.post(fake.base_url + "/chat/completions", json=body, headers=HEAD)


async def leave_after(fake: DoubaoFake, url: str, seconds: float, verify: Any = PLAIN) -> float:
    """Ask, read for a while from when the question is there, leave; the monotonic moment of leaving."""

    async def read() -> None:
        async with (
            httpx.AsyncClient(verify=verify) as client,
            client.stream("POST", url, json=BODY, headers=HEAD) as answer,
        ):
            async for _ in answer.aiter_raw():
                pass

    reading = asyncio.create_task(read())
    await fake.wait_requests()
    await asyncio.sleep(seconds)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    return time.monotonic()


@pytest.mark.parametrize("steps", [[hang()], [head(), hang()], [say("一"), hang()], [endless(every_s=0.01)]])
@pytest.mark.parametrize("tls", [False, True])
async def test_caller_who_leaves_is_noticed_at_once(steps: list[Step], tls: bool) -> None:
    async with DoubaoFake(steps, tls=tls) as fake:
        verify: Any = ssl.create_default_context(cafile=str(fake.ca_file)) if tls else PLAIN
        left_at = await leave_after(fake, fake.base_url + "/chat/completions", 0.1, verify)
        noticed_at = await fake.wait_disconnect(timeout_s=1)
    assert noticed_at - left_at < 1
    assert fake.requests[0].finished_at is None


async def test_whole_answer_is_recorded_as_finished() -> None:
    async with DoubaoFake(script(say("一"))) as fake:
        answer = await post(fake)
        with pytest.raises(TimeoutError, match="the caller to leave"):
            await fake.wait_disconnect(timeout_s=0.05)
    record = fake.requests[0]
    assert (record.method, record.path) == ("POST", "/api/v3/chat/completions")
    assert (record.bearer, record.json) == ("test-key-doubao", BODY)
    assert record.bytes_sent == len(answer.content)
    assert record.finished_at is not None and record.disconnected_at is None
    assert record.head_at is not None and record.arrived_at <= record.head_at <= record.finished_at


async def test_connections_are_numbered() -> None:
    async with DoubaoFake() as fake, httpx.AsyncClient(verify=PLAIN) as client:
        for _ in range(2):
            await client.post(fake.base_url + "/chat/completions", json=BODY, headers=HEAD)
        assert fake.open_connections == 1
        await post(fake)
    assert [one.connection for one in fake.requests] == [1, 1, 2]


async def test_scripts_are_played_in_turn_and_the_last_repeats() -> None:
    async with DoubaoFake(script(refuse(429)), script(say("一"))) as fake:
        assert [(await post(fake)).status_code for _ in range(3)] == [429, 200, 200]
        fake.play([refuse(500)])
        assert (await post(fake)).status_code == 500


async def test_a_request_turned_away_uses_up_no_script() -> None:
    async with DoubaoFake(script(say("一")), script(say("二"))) as fake:
        assert (await post(fake, {**BODY, "model": "nobodys"})).status_code == 404
        assert "一" in (await post(fake)).text


@pytest.mark.parametrize("size", [1, 5])
async def test_chopped_writes_arrive_in_pieces_that_cut_characters(size: int) -> None:
    async with (
        DoubaoFake(script(say("你好🙂"), chop=size)) as fake,
        httpx.AsyncClient(verify=PLAIN) as client,
    ):
        url = fake.base_url + "/chat/completions"
        async with client.stream("POST", url, json=BODY, headers=HEAD) as answer:
            pieces = [piece async for piece in answer.aiter_raw()]
    assert max(map(len, pieces)) <= size
    assert "你好🙂" in b"".join(pieces).decode()


async def test_drop_after_counts_bytes_exactly() -> None:
    async with (
        DoubaoFake(script(say("你好"), drop_after=70)) as fake,
        httpx.AsyncClient(verify=PLAIN) as client,
    ):
        url = fake.base_url + "/chat/completions"
        data = b""
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", url, json=BODY, headers=HEAD) as answer:
                async for piece in answer.aiter_raw():
                    data += piece
    assert (len(data), fake.requests[0].bytes_sent) == (70, 70)


async def test_pauses_and_drips_take_their_time() -> None:
    async with DoubaoFake(script(pause(0.05), drip(100, 0.01), say("一二三"))) as fake:
        started = time.monotonic()
        answer = await post(fake)
    assert time.monotonic() - started >= 0.05 + 0.01 * (len(answer.content) // 100 - 1)


@pytest.mark.parametrize("kind", ["json", "utf8", "nul", "surrogate", "list", "html", "no_newline"])
@pytest.mark.parametrize("streaming", [True, False])
async def test_garbled_data_is_really_broken(kind: Any, streaming: bool) -> None:
    async with DoubaoFake(script(say("好"), garble(kind))) as fake:
        data = (await post(fake, {**BODY, "stream": streaming})).content
    payloads = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")] if streaming else [data]
    whole = 0
    for payload in payloads:
        try:
            text = json.dumps(json.loads(payload), ensure_ascii=False)
        except ValueError:
            continue
        whole += isinstance(json.loads(payload), dict) and "\ud800" not in text
    # A stream's good frames: "好" and the finish, unless the broken line swallows it.
    good = 1 if kind == "no_newline" else 2
    assert whole == (good if streaming else 0)


async def test_raw_bytes_and_whole_replies_are_sent_as_they_are() -> None:
    answers = (
        script(send_raw(b"\xef\xbb\xbfdata:x\r\n\r\n", times=3)),
        script(reply(200, "<html>", "text/html", headers={"X-Odd": "1"})),
        script(reply(200, b"ab", times=1000)),
        script(redirect("http://127.0.0.1:1/elsewhere")),
    )
    async with DoubaoFake(*answers) as fake:
        raw = await post(fake, {**BODY, "stream": False})
        page, long, moved = [await post(fake) for _ in range(3)]
    assert raw.content == b"\xef\xbb\xbfdata:x\r\n\r\n" * 3
    assert (page.content, page.headers["content-type"], page.headers["x-odd"]) == (
        b"<html>",
        "text/html",
        "1",
    )
    assert long.content == b"ab" * 1000
    assert (moved.status_code, moved.headers["location"]) == (302, "http://127.0.0.1:1/elsewhere")


async def test_gzip_bomb_is_small_on_the_wire() -> None:
    async with DoubaoFake(gzip_bomb(1)) as fake, httpx.AsyncClient(verify=PLAIN) as client:
        url = fake.base_url + "/chat/completions"
        async with client.stream("POST", url, json=BODY, headers=HEAD) as answer:
            size = sum([len(piece) async for piece in answer.aiter_raw()])
        assert answer.headers["content-encoding"] == "gzip"
        assert size < 4096


async def test_leaking_refusal_repeats_the_callers_key() -> None:
    async with DoubaoFake(refuse(401, leak=True)) as fake:
        assert "test-key-doubao" in (await post(fake)).text


async def test_refusal_after_words_is_no_script() -> None:
    with pytest.raises(ValueError, match="whole HTTP answer"):
        script(say("一"), refuse(429))


async def test_crash_inside_a_fake_fails_its_test() -> None:
    class Broken(DoubaoFake):
        async def respond(self, exchange: Any) -> Any:
            raise RuntimeError("the fake is wrong")

    with pytest.raises(AssertionError, match="the fake is wrong"):
        async with Broken() as fake:
            assert (await post(fake)).status_code == 500


async def test_fake_stops_although_a_caller_hangs_on() -> None:
    async with httpx.AsyncClient(verify=PLAIN) as client:
        async with DoubaoFake(hang()) as fake:
            url = fake.base_url + "/chat/completions"
            asking = asyncio.ensure_future(client.post(url, json=BODY, headers=HEAD))
            await fake.wait_requests()
        with pytest.raises(httpx.TransportError):
            await asking


def test_fake_runs_in_a_thread_for_blocking_callers() -> None:
    with DoubaoFake(script(say("一"))).in_thread() as fake:
        answer = httpx.post(fake.base_url + "/chat/completions", json=BODY, headers=HEAD)
    assert "一" in answer.text
    assert fake.requests[0].finished_at is not None


@pytest.mark.parametrize("module", ["doubao", "dashscope", "openai_like", "embeddings", "replay"])
def test_fake_runs_as_a_process(module: str) -> None:
    command = [sys.executable, "-m", f"tests.upstreams.{module}", "--port", "0"]
    command += ["--fixture", "ark_stream_thinking.sse"] if module == "replay" else ["--say", "一", "--tls"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            line = json.loads(child.stdout.readline())
            verify: Any = ssl.create_default_context(cafile=line["ca_file"]) if "ca_file" in line else True
            with httpx.Client(verify=verify) as client:
                url = f"{line['base_url']}/apps/{APP_ID}/completion"
                url = url if module == "dashscope" else line["base_url"] + "/chat/completions"
                wanted = {"input": {"prompt": "问"}} if module == "dashscope" else BODY
                wanted = wanted | {"model": "test-model"} if module == "openai_like" else wanted
                answer = client.post(url, json=wanted, headers=HEAD)
                control = client.post(line["origin"] + "/_fake/script", content='[["refuse", 503]]')
                seen = client.get(line["origin"] + "/_fake/requests").json()
        finally:
            child.terminate()
        assert child.wait(10) == 0
    assert answer.status_code == (404 if module == "embeddings" else 200)
    assert (control.json(), len(seen)) == ({"scripts": 1}, 1)
    assert json.loads(seen[0]["body"]) == wanted


def test_scripts_can_be_written_as_json() -> None:
    written = '[["say", "一", "二"], ["usage", 3, 2, {"reasoning": 1}], ["pause", 0.1], {"chop": 5}]'
    assert parse_script(written) == script(say("一", "二"), usage(3, 2, reasoning=1), pause(0.1), chop=5)


@pytest.mark.parametrize("chop", [0, 5])
@pytest.mark.parametrize("recorded", fixtures(), ids=str)
async def test_replay_repeats_every_recording_exactly(recorded: Any, chop: int) -> None:
    async with ReplayFake(recorded, chop=chop) as fake, httpx.AsyncClient(verify=PLAIN) as client:
        data, whole = b"", True
        async with client.stream("POST", fake.base_url + "/x", json={}) as answer:
            try:
                async for piece in answer.aiter_raw():
                    data += piece
            except httpx.RemoteProtocolError:
                whole = False
    assert (answer.status_code, data, whole) == (recorded.status, recorded.body, not recorded.is_truncated)
    assert answer.headers.get("content-type") == recorded.content_type
    assert {name: answer.headers[name] for name in recorded.headers} == dict(recorded.headers)
    assert fake.requests[0].body == b"{}"


async def test_replays_follow_one_another() -> None:
    names = ("ark_error_429.json", "ark_nonstream.json")
    async with ReplayFake(*names) as fake, httpx.AsyncClient(verify=PLAIN) as client:
        bodies = [(await client.post(fake.base_url)).content for _ in range(3)]
    assert bodies == [fixture(name).body for name in (*names, names[-1])]


async def test_raw_fake_sends_its_parts_and_closes() -> None:
    parts = (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"half")
    async with RawFake(*parts) as fake, httpx.AsyncClient(verify=PLAIN) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(fake.origin)
    assert fake.connections[0].received.startswith(b"GET / HTTP/1.1\r\n")


async def test_ports_refuse_or_stay_silent() -> None:
    async with httpx.AsyncClient(timeout=0.1, verify=PLAIN) as client:
        with closed_port() as port, pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}")
        with deaf_port() as port, pytest.raises(httpx.ConnectTimeout):
            await client.get(f"http://127.0.0.1:{port}")


async def test_environ_names_everything_a_caller_needs() -> None:
    async with DoubaoFake() as doubao, DashScopeFake() as dashscope:
        assert doubao.environ["DOUBAO_BASE_URL"] == doubao.base_url
        assert dashscope.environ["DASHSCOPE_APP_ID"] == APP_ID
