"""A real model behind a real endpoint answers through the proxy from real documents."""

from pathlib import Path

import pytest

from tests.serve.conftest import Start, question
from tests.serve.test_proxy_chat import knowing, of
from tests.upstreams.llama import Llama

PHONE = "Our telephone number is 555-0188. Call us from Monday to Friday."


@pytest.mark.parametrize("provider", ["openai", "doubao"])
async def test_a_real_model_streams_through_the_proxy(serve: Start, llama: Llama, provider: str) -> None:
    """The dialect of Ark is close enough that `doubao` can be pointed at any compatible server."""
    env = {name.replace("OPENAI", provider.upper()): value for name, value in llama.environ.items()}
    served = await serve(env=env)
    asked = question("Say hello.", stream=True, max_tokens=12, temperature=0)
    reply = await served.post(f"/api/llm/{provider}", asked)
    assert reply.status == 200
    assert reply.frames[-1] == "[DONE]"
    text = "".join(f["choices"][0]["delta"].get("content") or "" for f in reply.frames[:-1])
    whole = await served.post(f"/api/llm/{provider}", {**asked, "stream": False})
    assert whole.json["choices"][0]["message"]["content"] == text != ""
    rows = await served.rows()
    assert [row.answer for row in rows] == [text, text]
    assert all(row.completion_tokens and not row.tokens_estimated for row in rows)


async def test_a_real_model_answers_from_our_documents(serve: Start, home: Path, llama: Llama) -> None:
    env = {**llama.environ, "MOGINE_MAX_OUTPUT_TOKENS": "40"}
    served = await knowing(serve, home, env, contact=PHONE)
    reply = await served.post("/api/chat", {"question": "What is your telephone number?"})
    assert of(reply, "citations")[0]["citations"][0]["source"] == "docs/contact.md"
    # What so small a model says is chance; that it read our prompt and wrote something is not.
    assert "".join(data["text"] for data in of(reply, "delta")).strip()
    usage = of(reply, "usage")[0]
    assert usage["prompt_tokens"] > 100 and usage["completion_tokens"] > 0 and not usage["estimated"]
    assert of(reply, "done")[0]["provider"] == "openai"
