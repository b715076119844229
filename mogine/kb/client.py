"""The knowledge base as another process asks for it: over HTTP, with one kind of failure."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from mogine.errors import Unavailable
from mogine.kb.passages import MAX_QUERY_CHARS, Hit, Passage


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found, in which generation, and how long the knowledge base took."""

    hits: tuple[Hit, ...]
    generation: str
    took_ms: float


class KnowledgeClient:
    """Asks a knowledge base server. An async context manager; connections stay open between searches."""

    def __init__(self, base_url: str, timeout_s: float = 3.0) -> None:
        self._client = httpx.AsyncClient(
            base_url=base_url, timeout=timeout_s, follow_redirects=False, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def search(
        self, query: str, top_k: int = 3, mode: str = "hybrid", *, traceparent: str = ""
    ) -> SearchResult:
        """The best passages; a long query is cut, an empty one finds nothing. `traceparent` goes along.

        Whatever goes wrong is Unavailable with the reason kb_unavailable: an answer can do without.
        """
        asked = query.encode("utf-8", "ignore").decode()[:MAX_QUERY_CHARS].strip()
        if not asked:
            return SearchResult((), "", 0.0)
        try:
            response = await self._client.get(
                "/api/search",
                params={"q": asked, "top_k": top_k, "mode": mode},
                headers={"traceparent": traceparent} if traceparent else None,
            )
        except httpx.HTTPError as error:
            raise Unavailable(
                "the knowledge base does not answer; `mogine serve kb` starts it", reason="kb_unavailable"
            ) from error
        if response.status_code != 200:
            raise Unavailable(_refusal(response), reason="kb_unavailable")
        try:
            body = response.json()
            hits = tuple(_hit(item) for item in body["results"])
            return SearchResult(hits, str(body["generation"]), float(body["took_ms"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(
                "no knowledge base answers at this address; check MOGINE_KB_URL and MOGINE_KB_PORT",
                reason="kb_unavailable",
            ) from error


def _refusal(response: httpx.Response) -> str:
    """Our own servers say in their envelope what is wrong and what helps."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the knowledge base answered {response.status_code}; check MOGINE_KB_URL and MOGINE_KB_PORT"
    return f"the knowledge base answered {response.status_code}: {str(message)[:500]}"


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
