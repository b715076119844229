"""The proxy when vendors fail: left alone in time, others asked, keys changed under running answers."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from mogine.providers.registry import open_providers
from mogine.serve.desk import DESK
from mogine.serve.renewal import Renewal
from mogine.settings import load_settings
from tests.serve.conftest import Start, assert_envelope, question
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.raw import closed_port
from tests.upstreams.script import pause, refuse, say, script, usage

SLOW = script(say("一"), pause(1.0), say("二"), usage(3, 2))


async def test_a_vendor_that_is_down_costs_no_time_and_the_other_goes_on(serve: Start) -> None:
    """F1."""
    async with OpenAIFake(script(say("好"))) as fake:
        with closed_port() as port:
            env = {**fake.environ, "OPENAI_MODEL": "test-model", "DOUBAO_API_KEY": "test-key"}
            served = await serve(
                env={
                    **env,
                    "MOGINE_MAX_STREAMS_PER_VISITOR": "9",
                    "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}",
                }
            )
            first = await asyncio.gather(
                *(served.post("/api/llm/doubao", question()) for _ in range(3)),
                *(served.post("/api/llm/doubao", question(stream=True)) for _ in range(2)),
            )
            for reply in first:
                assert_envelope(reply, 502, "upstream_error")
            began = time.monotonic()
            for _ in range(20):
                reply = await served.post("/api/llm/doubao", question())
                assert_envelope(reply, 503, "upstream_unavailable")
                assert 1 <= int(reply.headers["Retry-After"]) <= 10
            assert (time.monotonic() - began) / 20 < 0.1, "no connection was tried"
        assert (await served.post("/api/llm/openai", question())).status == 200
        ready = await served.ask("GET", "/readyz")
    assert ready.status == 200
    assert ready.json["providers"]["doubao"]["breaker"] == "open"
    assert ready.json["providers"]["openai"]["breaker"] == "closed"


async def test_the_assistant_goes_on_with_the_next_provider(serve: Start) -> None:
    async with DoubaoFake(refuse(401, leak=True)) as one, OpenAIFake(script(say("好"))) as two:
        env = {**one.environ, **two.environ, "OPENAI_MODEL": "test-model", "DOUBAO_MODEL": MODEL}
        served = await serve(env=env)
        for _ in range(2):
            reply = await served.post("/api/chat", {"question": "你好"})
            done = dict(reply.events)["done"]
            assert (done["provider"], done["model"]) == ("openai", "test-model")


def rewrite(home: Path, **values: str) -> None:
    draft = home / ".env.new"
    draft.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    draft.replace(home / ".env")


@pytest.mark.parametrize("by", ["file", "signal"])
async def test_new_keys_are_in_force_within_a_second_while_streams_go_on(
    by: str, home: Path, serve: Start
) -> None:
    """F26, B8."""
    async with DoubaoFake(SLOW) as fake:
        rewrite(home, DOUBAO_API_KEY="old-key", DOUBAO_BASE_URL=fake.base_url, DOUBAO_MODEL=MODEL)
        env = {"MOGINE_MAX_STREAMS_PER_VISITOR": "200"}
        served = await serve(env=env)
        body = question(stream=True)
        running = [asyncio.create_task(served.post("/api/llm/doubao", body)) for _ in range(100)]
        await fake.wait_requests(100, timeout_s=20)
        rewrite(home, DOUBAO_API_KEY="new-key", DOUBAO_BASE_URL=fake.base_url, DOUBAO_MODEL=MODEL)
        if by == "signal":
            served.running.hang_up()
        else:
            await served.until(
                lambda: _keys(served) == ("new-key",),
                timeout_s=1.0,
            )
        fake.play(script(say("新")))
        fresh = await served.post("/api/llm/doubao", body)
        assert "新" in fresh.body.decode() and fake.requests[-1].bearer == "new-key"
        for reply in await asyncio.gather(*running):
            assert reply.body.decode().endswith("data: [DONE]\n\n") and "二" in reply.body.decode()
    assert {request.bearer for request in fake.requests[:100]} == {"old-key"}


def _keys(served: Any) -> tuple[str, ...]:
    roster = served.running.apps["proxy"][DESK].providers
    return tuple(next(iter(roster.vendors)).care.keys.all)


async def test_a_first_key_brings_a_provider_and_a_broken_file_changes_nothing(
    home: Path, serve: Start
) -> None:
    async with DoubaoFake(script(say("好"))) as fake:
        served = await serve()
        assert_envelope(await served.post("/api/llm/doubao", question()), 503, "upstream_unavailable")
        rewrite(home, DOUBAO_API_KEY="key", DOUBAO_BASE_URL=fake.base_url, DOUBAO_MODEL=MODEL)
        served.running.hang_up()
        assert (await served.post("/api/llm/doubao", question())).status == 200
        chat = await served.post("/api/chat", {"question": "你好"})
        assert dict(chat.events)["done"]["provider"] == "doubao"
        rewrite(home, DOUBAO_API_KEY="key", MOGINE_RATE_LIMIT="often")
        served.running.hang_up()
        assert (await served.post("/api/llm/doubao", question())).status == 200
        rewrite(home)
        served.running.hang_up()
        assert_envelope(await served.post("/api/llm/doubao", question()), 503, "upstream_unavailable")


async def test_keys_of_the_process_environment_stay(home: Path, serve: Start) -> None:
    async with DoubaoFake(script(say("好"))) as fake:
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": MODEL})
        rewrite(home, DOUBAO_API_KEY="file-key")
        served.running.hang_up()
        assert (await served.post("/api/llm/doubao", question())).status == 200
    assert fake.requests[0].bearer == fake.environ["DOUBAO_API_KEY"]


async def test_a_file_that_is_being_written_is_taken_up_when_it_is_whole(home: Path) -> None:
    """F24."""
    rewrite(home, DOUBAO_API_KEY="key")
    async with open_providers(load_settings({}, home)) as roster:
        keys = next(iter(roster.vendors)).care.keys
        renewal = Renewal(roster)
        assert not renewal.look()
        (home / ".env").write_text("")
        assert not renewal.look()
        (home / ".env").write_text("DOUBAO_API_KEY=new-key\n")
        assert not renewal.look() and keys.all == ("key",)
        assert renewal.look() and not renewal.look()
        assert keys.all == ("new-key",)
