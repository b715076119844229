"""Asking a running server from `mogine chat --server`: `POST /api/chat`, as visitors' pages do."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from mogine.answer import AnswerEvent, Answering
from mogine.chat import ChatMessage, Citation, Citations, Delta, Finish, Reasoning, Usage
from mogine.commands.askers import require_known
from mogine.commands.console import safe_line
from mogine.errors import (
    MogineError,
    RateLimited,
    RequestError,
    SettingsError,
    Unavailable,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mogine.upstream import FrameDecoder

# A server that is alive says so every 15 s.
SERVER_SILENCE_S = 60.0
MAX_ERROR_BYTES = 64 * 1024


class ServerAsker:
    """Asks `POST /api/chat` of a running server, which searches, remembers and records."""

    def __init__(self, client: httpx.AsyncClient, root: str, provider: str | None, session_id: str) -> None:
        self._client = client
        self._root = root
        self._provider = provider
        self.session_id = session_id
        self.notes: list[str] = []
        self.label = root + (f" ({provider})" if provider else "")

    def choose(self, provider: str) -> None:
        require_known(provider)
        self._provider = provider
        self.label = f"{self._root} ({provider})"

    def forget(self) -> None:
        self.session_id = ""

    async def ask(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[AnswerEvent, None]:
        """The server knows the conversation by its session, so only the question goes out."""
        body: dict[str, Any] = {"question": messages[-1].text}
        body |= {"provider": self._provider} if self._provider else {}
        body |= {"session_id": self.session_id} if self.session_id else {}
        decoder = FrameDecoder()
        try:
            async with self._client.stream(
                "POST", f"{self._root}/api/chat", json=body, headers={"Accept": "text/event-stream"}
            ) as response:
                await self._check(response)
                async for block in response.aiter_raw():
                    for frame in decoder.feed(block):
                        if not frame.data:
                            continue
                        for event in self._events(frame.event, _json(frame.data)):
                            yield event
                            if isinstance(event, Finish):
                                return
        except httpx.TimeoutException as error:
            raise UpstreamTimeout(f"{self._root} did not answer in time") from error
        except httpx.ConnectError as error:
            raise UpstreamUnreachable(
                f"no server answers at {self._root}; start one with `mogine serve all`, "
                "or leave out --server to ask the provider directly"
            ) from error
        except httpx.TransportError as error:
            raise UpstreamBadResponse(f"the connection to {self._root} broke before the end") from error
        raise UpstreamBadResponse(f"{self._root} ended the answer before it was complete")

    async def _check(self, response: httpx.Response) -> None:
        kind = response.headers.get("Content-Type", "")
        if response.status_code == httpx.codes.OK and kind.startswith("text/event-stream"):
            return
        body = bytearray()
        async for block in response.aiter_raw():
            body += block
            if len(body) > MAX_ERROR_BYTES:
                break
        value = _json(bytes(body))
        if response.status_code == httpx.codes.OK or not isinstance(value.get("error"), dict):
            raise UpstreamBadResponse(
                f"{self._root} is no mogine server: it answered {response.status_code} "
                + (safe_line(kind, 60) or "without a content type")
            )
        raise error_of(value["error"])

    def _events(self, name: str, data: dict[str, Any]) -> list[AnswerEvent]:
        match name:
            case "delta":
                return [Delta(str(data.get("text", "")))]
            case "reasoning":
                return [Reasoning(str(data.get("text", "")))]
            case "citations":
                return [
                    Citations(tuple(_citation(c) for c in data.get("citations", ()) if isinstance(c, dict)))
                ]
            case "usage":
                return [_usage(data)]
            case "done":
                self.session_id = str(data.get("session_id") or self.session_id)
                model = str(data.get("model") or "")
                said_by = Answering(str(data.get("provider") or ""), model)
                return [said_by, Finish(str(data.get("finish_reason") or "stop"), model)]
            case "error":
                raise error_of(data.get("error") if isinstance(data.get("error"), dict) else {})
        return []


def error_of(told: Mapping[str, Any] | None) -> MogineError:
    """The error that a server's envelope tells of, as one of ours with its exit code."""
    told = told or {}
    reason = str(told.get("reason") or "upstream_error")
    message = str(told.get("message") or "the server told of an error without words")
    if request_id := told.get("request_id"):
        message += f" (request {request_id})"
    kinds: dict[str, type[MogineError]] = {
        "invalid_request_error": RequestError,
        "authentication_error": RequestError,
        "permission_error": RequestError,
        "rate_limit_error": UpstreamBusy if reason == "upstream_busy" else RateLimited,
        "server_error": UpstreamError if reason == "upstream_unavailable" else Unavailable,
    }
    return kinds.get(str(told.get("type")), UpstreamError)(message, reason=reason)


def server_root(address: str) -> str:
    """Where a server's paths begin; the address of one of its pages will do. Raises SettingsError."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        valid = False
    if not valid or parts.username or parts.query:
        raise SettingsError(
            f"--server {safe_line(address, 200)!r}: expected an address such as http://127.0.0.1:8741"
        )
    path = parts.path.removesuffix("/").removesuffix("/chat")
    return f"{parts.scheme}://{parts.netloc}{path}"


@asynccontextmanager
async def open_server(address: str, provider: str | None, session_id: str) -> AsyncIterator[ServerAsker]:
    """A ServerAsker; nothing is sent before the first question."""
    root = server_root(address)
    timeout = httpx.Timeout(10.0, read=SERVER_SILENCE_S)
    # No proxy of the environment: the server is nearly always on this machine.
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        asker = ServerAsker(client, root, None, session_id)
        if provider:
            asker.choose(provider)
        yield asker


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _usage(value: Mapping[str, Any]) -> Usage:
    return Usage(
        _whole(value.get("prompt_tokens")),
        _whole(value.get("completion_tokens")),
        _whole(value.get("reasoning_tokens")),
        _whole(value.get("cached_tokens")),
        value.get("estimated") is True,
    )


def _citation(value: Mapping[str, Any]) -> Citation:
    def text(name: str) -> str:
        return str(value.get(name) or "")

    score = value.get("score")
    return Citation(
        _whole(value.get("number")),
        text("title"),
        text("source"),
        text("heading"),
        text("url"),
        text("excerpt"),
        float(score) if isinstance(score, int | float) else 0.0,
    )
