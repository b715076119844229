"""The knowledge base as another process asks for it: over HTTP, with one kind of failure."""

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import orjson

from mogine.errors import Unavailable
from mogine.http1 import Failure, Limits, Pool, Target, target_of
from mogine.kb.passages import MAX_QUERY_CHARS, Hit, Passage

MAX_ANSWER_BYTES = 4 * 1024 * 1024  # many times what fifty passages take


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found, in which generation, and how long the knowledge base took."""

    hits: tuple[Hit, ...]
    generation: str
    took_ms: float


class KnowledgeClient:
    """Asks a knowledge base server. An async context manager; connections stay open between searches.

    `timeout_s` is for the whole of a search. Every question of a visitor waits for one, so it goes out over
    our own client of HTTP, which needs a fraction of the time of httpx.
    """

    def __init__(self, base_url: str, timeout_s: float = 3.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._limits = Limits(timeout_s, timeout_s, timeout_s, timeout_s)
        self._pool: Pool | None = None

    async def __aenter__(self) -> Self:
        self._pool = Pool(asyncio.get_running_loop(), None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    async def search(
        self, query: str, top_k: int = 3, mode: str = "hybrid", *, traceparent: str = ""
    ) -> SearchResult:
        """The best passages; a long query is cut, an empty one finds nothing. `traceparent` goes along.

        Whatever goes wrong is Unavailable with the reason kb_unavailable: an answer can do without.
        """
        asked = query.encode("utf-8", "ignore").decode()[:MAX_QUERY_CHARS].strip()
        if not asked:
            return SearchResult((), "", 0.0)
        words = urlencode({"q": asked, "top_k": top_k, "mode": mode})
        try:
            async with asyncio.timeout(self._limits.answer_s):
                status, body = await self._get(target_of(f"{self._base_url}/api/search"), words, traceparent)
        except (Failure, TimeoutError) as error:
            raise Unavailable(
                "the knowledge base does not answer; `mogine serve kb` starts it", reason="kb_unavailable"
            ) from error
        if status != 200:
            raise Unavailable(_refusal(status, body), reason="kb_unavailable")
        try:
            found = orjson.loads(body)
            hits = tuple(_hit(item) for item in found["results"])
            return SearchResult(hits, str(found["generation"]), float(found["took_ms"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(
                "no knowledge base answers at this address; check MOGINE_KB_URL and MOGINE_KB_PORT",
                reason="kb_unavailable",
            ) from error

    async def _get(self, target: Target, words: str, traceparent: str) -> tuple[int, bytes]:
        """Status and body of the answer. Raises Failure."""
        if self._pool is None:
            raise RuntimeError("a KnowledgeClient is used with `async with`")
        request = b"GET %b?%b HTTP/1.1\r\nHost: %b\r\nAccept: application/json\r\n%b\r\n" % (
            target.path,
            words.encode(),
            target.host_header,
            b"traceparent: %b\r\n" % traceparent.encode() if traceparent else b"",
        )
        exchange = await self._pool.send(target, request, self._limits)
        try:
            blocks = []
            while block := await exchange.read():
                blocks.append(block)
                if sum(map(len, blocks)) > MAX_ANSWER_BYTES:
                    break
            return exchange.status, b"".join(blocks)
        finally:
            exchange.close()


def _refusal(status: int, body: bytes) -> str:
    """Our own servers say in their envelope what is wrong and what helps."""
    try:
        message = orjson.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the knowledge base answered {status}; check MOGINE_KB_URL and MOGINE_KB_PORT"
    return f"the knowledge base answered {status}: {str(message)[:500]}"


def _hit(item: dict[str, Any]) -> Hit:
    page = item["page"]
    passage = Passage(
        id=str(item["id"]),
        source=str(item["source"]),
        title=str(item["title"]),
        heading=str(item["heading"]),
        position=0,
        text=str(item["text"]),
        url=str(item["url"]),
        page=None if page is None else int(page),
    )
    return Hit(passage, float(item["score"]))
