"""The vendors' own clients as judges of the answers that mogine composes in their dialects."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import openai
import pytest
from dashscope import Application

from mogine.chat import ChatEvent, Delta, Finish, Reasoning, Usage
from mogine.errors import ErrorEnvelope, UpstreamBusy
from mogine.providers.compatible import OpenAIEncoder, encode
from mogine.providers.dashscope import DashScopeEncoder

ANSWER: list[ChatEvent] = [
    Reasoning("想"),
    Delta("你好，"),
    Delta("世界🙂"),
    Usage(9, 5, 2),
    Finish("stop", "m"),
]
BUSY = ErrorEnvelope.of(UpstreamBusy("busy", upstream_code="Throttling"), "r-1").to_dict()


@contextmanager
def serving(body: bytes, content_type: str = "text/event-stream") -> Iterator[str]:
    """A server on loopback that answers every POST with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="test-key", max_retries=0)


def ask_app(url: str, **options: Any) -> Any:
    """`Application.call`, whose types do not know what its answers hold."""
    call: Any = Application.call
    return call("app", "hi", api_key="test-key", base_address=f"{url}/api/v1", **options)


def composed(encoder: OpenAIEncoder | DashScopeEncoder, events: list[ChatEvent]) -> bytes:
    return b"".join(encoder.chunk(event) for event in events)


def test_openais_client_reads_our_stream() -> None:
    encoder = OpenAIEncoder("chatcmpl-1", "m", 1, include_usage=True)
    with (
        serving(composed(encoder, ANSWER) + b": ping\n\n" + encoder.end()) as url,
        openai_client(url) as client,
    ):
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "你好，世界🙂"
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "想"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 14


def test_openais_client_reads_our_whole_answer() -> None:
    body = encode(OpenAIEncoder("chatcmpl-1", "m", 1).whole(ANSWER))
    with serving(body, "application/json") as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("你好，世界🙂", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_openais_client_raises_our_error_within_a_stream() -> None:
    encoder = OpenAIEncoder("chatcmpl-1", "m", 1)
    with serving(encoder.chunk(Delta("x")) + encoder.error(BUSY)) as url, openai_client(url) as client:
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="busy"):
            list(stream)


@pytest.mark.parametrize("incremental", [True, False])
def test_dashscopes_client_reads_our_stream(incremental: bool) -> None:
    encoder = DashScopeEncoder("s" * 32, "r-1", "m", incremental=incremental)
    with serving(composed(encoder, ANSWER), "text/event-stream;charset=UTF-8") as url:
        parts = list(ask_app(url, stream=True, **({"incremental_output": True} if incremental else {})))
    texts = [part.output.text for part in parts]
    assert ("".join(texts) if incremental else texts[-1]) == "你好，世界🙂"
    assert (parts[-1].output.finish_reason, parts[-1].output.session_id) == ("stop", "s" * 32)
    assert parts[-1].usage.models[0].output_tokens == 5
    assert parts[0].output.thoughts[0].thought == "想"


def test_dashscopes_client_reads_our_whole_answer() -> None:
    body = encode(DashScopeEncoder("s" * 32, "r-1", "m", incremental=True).whole(ANSWER))
    with serving(body, "application/json") as url:
        answer = ask_app(url)
    assert (answer.status_code, answer.output.text) == (200, "你好，世界🙂")


def test_dashscopes_client_understands_our_error_within_a_stream() -> None:
    encoder = DashScopeEncoder("s" * 32, "r-1", "m", incremental=True)
    with serving(encoder.chunk(Delta("x")) + encoder.error(BUSY), "text/event-stream;charset=UTF-8") as url:
        parts = list(ask_app(url, stream=True, incremental_output=True))
    assert (parts[0].output.text, parts[-1].code, parts[-1].message) == ("x", "upstream_busy", "busy")
