"""A Chroma server and the collections in it: the vectors of generations that several machines search.

Asked over its HTTP interface (API version 2), not with chromadb's own client: that one waits for ever on a
server which is paused, follows proxies of the environment, and costs every process a second and 77 MB.
"""

import base64
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from mogine.errors import Unavailable
from mogine.kb.embedders import Vectors

if TYPE_CHECKING:
    from mogine.settings import KnowledgeSettings

log = logging.getLogger(__name__)

CONNECT_S = 1.0
PATIENCE_S = 10.0
# Rows in thousands: writing builds the graph of neighbours, and the next rows wait for it.
ROWS_S = 120.0
# After a failure nobody waits for the server; one search in so many seconds tries again.
REST_S = 2.0
_BATCH = 2000  # a Chroma server takes at most 5,461 rows a call
_DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
_LISTED = 1000
_MISSING = 404


@dataclass(frozen=True, slots=True)
class Chroma:
    """Where the server is. `timeout_s` is what a search waits; `token` goes along as a bearer token."""

    url: str
    token: str = field(default="", repr=False)
    timeout_s: float = 1.0

    @classmethod
    def of(cls, kb: "KnowledgeSettings") -> "Chroma | None":
        """What the settings name; None without MOGINE_CHROMA_URL."""
        return cls(kb.chroma_url, kb.chroma_token, kb.chroma_timeout_s) if kb.chroma_url else None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a draft's vectors go: a server, and the name of a new collection."""

    chroma: Chroma
    name: str


class Missing(Unavailable):
    """The server is there and does not have the collection."""


class ChromaServer:
    """The server's collections by name. Whatever goes wrong is Unavailable (kb_unavailable)."""

    def __init__(self, chroma: Chroma, timeout_s: float = PATIENCE_S) -> None:
        import httpx

        headers = {"Content-Type": "application/json"}
        if chroma.token:
            headers["Authorization"] = f"Bearer {chroma.token}"
        self._client = httpx.Client(
            base_url=chroma.url,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            headers=headers,
            follow_redirects=False,
            trust_env=False,
        )
        self._failures: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)

    def version(self) -> str:
        """What the server calls itself."""
        return str(self._ask("GET", "/api/v2/version"))

    def create(self, name: str) -> str:
        """A new collection, to be searched by cosine; its id."""
        body = {"name": name, "configuration": {"hnsw": {"space": "cosine"}}, "get_or_create": False}
        return _text(self._ask("POST", f"{_DATABASE}/collections", body), "id")

    def id_of(self, name: str) -> str:
        """Raises Missing."""
        return _text(self._ask("GET", f"{_DATABASE}/collections/{name}"), "id")

    def names(self, prefix: str) -> list[str]:
        """The collections whose names begin so."""
        found: list[str] = []
        offset = 0
        while True:
            rows = self._ask("GET", f"{_DATABASE}/collections?limit={_LISTED}&offset={offset}")
            if not isinstance(rows, list):
                raise _strange()
            found += [name for row in rows if (name := _text(row, "name")).startswith(prefix)]
            offset += len(rows)
            if len(rows) < _LISTED:
                return found

    def delete(self, name: str) -> None:
        """Raises Missing."""
        self._ask("DELETE", f"{_DATABASE}/collections/{name}")

    def ask(self, id: str, what: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        """One operation on the collection with this id. Raises Missing."""
        return self._ask("POST", f"{_DATABASE}/collections/{id}/{what}", body, timeout_s)

    def count(self, id: str) -> int:
        """Raises Missing."""
        return int(self._ask("GET", f"{_DATABASE}/collections/{id}/count"))

    def close(self) -> None:
        self._client.close()

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        content = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        timeout = self._client.timeout if timeout_s is None else timeout_s
        try:
            response = self._client.request(method, path, content=content, timeout=timeout)
            if response.is_success:
                return orjson.loads(response.content) if response.content else None
        except self._failures as error:
            raise Unavailable(
                f"the Chroma server of MOGINE_CHROMA_URL does not answer ({type(error).__name__}); "
                "start it, or look at its log",
                reason="kb_unavailable",
            ) from error
        except ValueError as error:
            raise _strange() from error
        if response.status_code == _MISSING and b"NotFoundError" in response.content:
            raise Missing(
                "the Chroma server of MOGINE_CHROMA_URL does not have the vectors of this generation; "
                "`mogine kb ingest ./docs` fills them in again",
                reason="kb_unavailable",
            )
        raise Unavailable(
            f"the Chroma server of MOGINE_CHROMA_URL refused with status {response.status_code}; "
            "check MOGINE_CHROMA_URL and MOGINE_CHROMA_TOKEN, and look at its log",
            reason="kb_unavailable",
        )


def _strange() -> Unavailable:
    return Unavailable(
        "no Chroma server of API version 2 answers at MOGINE_CHROMA_URL; it takes Chroma 1.0 or newer",
        reason="kb_unavailable",
    )


def _text(row: Any, name: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise _strange()
    return value


class Collection:
    """The vectors of one generation on the server, for searching. The server is asked when it is needed.

    When it fails, searches fail at once for a while instead of waiting for it, until one gets through.
    """

    def __init__(
        self,
        chroma: Chroma,
        name: str,
        *,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = ChromaServer(chroma, timeout_s or chroma.timeout_s)
        self._name = name
        self._clock = clock
        self._id = ""
        self._guard = threading.Lock()
        self._problem: Unavailable | None = None
        self._resting_until = 0.0

    @property
    def problem(self) -> str:
        """Why the last request failed; "" when it did not."""
        problem = self._problem
        return problem.message if problem else ""

    def look_again(self) -> None:
        """Whether a server that failed is back, so that no search has to find out."""
        if self._problem and self._clock() >= self._resting_until:
            self.count()

    def search(self, vector: Vectors, limit: int) -> dict[int, float]:
        """The nearest numbers with their cosine, nearest first."""
        body = {"query_embeddings": [vector], "n_results": limit, "include": ["distances"]}
        found = self._ask("query", body)
        near = zip(found["ids"][0], found["distances"][0], strict=True)
        return {int(id): 1.0 - float(distance) for id, distance in near}

    def numbers(self) -> set[int]:
        """Every number that the collection knows."""
        return {int(id) for id in self._ask("get", {"include": []})["ids"]}

    def vectors(self, numbers: Sequence[int]) -> dict[int, Vectors]:
        """Number to vector, for those that are in the collection."""
        rows: dict[int, Vectors] = {}
        for start in range(0, len(numbers), _BATCH):
            ids = [str(number) for number in numbers[start : start + _BATCH]]
            found = self._ask("get", {"ids": ids, "include": ["embeddings"]})
            embeddings = np.asarray(found["embeddings"], dtype=np.float32)
            rows.update((int(id), row) for id, row in zip(found["ids"], embeddings, strict=True))
        return rows

    def cosines(self, vector: Vectors, numbers: Sequence[int]) -> Mapping[int, float]:
        """The cosine of each of `numbers`; one that is not in the collection is left out."""
        return {number: float(row @ vector) for number, row in self.vectors(numbers).items()}

    def warm(self, dimensions: int) -> None:
        """Has the server read the index into memory; it would do it at the first search."""
        self.search(np.ones(dimensions, dtype=np.float32), 1)

    def count(self) -> int:
        return int(self._guarded(lambda id: self._server.count(id)))

    def close(self) -> None:
        self._server.close()

    def _ask(self, what: str, body: Mapping[str, Any]) -> Any:
        found = self._guarded(lambda id: self._server.ask(id, what, body))
        if not isinstance(found, dict) or not {"ids", *body["include"]} <= found.keys():
            raise _strange()
        return found

    def _guarded(self, work: Callable[[str], Any]) -> Any:
        with self._guard:
            now = self._clock()
            if self._problem:
                if now < self._resting_until:
                    raise Unavailable(self._problem.message, reason="kb_unavailable")
                self._resting_until = now + REST_S  # this one tries, the others do not wait
        try:
            result = self._named(work)
        except Unavailable as error:
            with self._guard:
                self._problem, self._resting_until = error, self._clock() + REST_S
            raise
        self._problem = None
        return result

    def _named(self, work: Callable[[str], Any]) -> Any:
        """An id is the server's own: one that was started empty and filled again has another."""
        if self._id:
            try:
                return work(self._id)
            except Missing:
                self._id = ""
        id = self._server.id_of(self._name)
        result = work(id)
        self._id = id
        return result


class NewCollection:
    """A collection while a draft fills it."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self.added: set[int] = set()
        self._server = ChromaServer(target.chroma)
        try:
            self._id = self._server.create(target.name)
        except BaseException:
            self._server.close()
            raise

    def add(self, numbers: Sequence[int], vectors: Vectors) -> None:
        """New numbers only."""
        rows = np.ascontiguousarray(vectors, dtype="<f4")
        for start in range(0, len(numbers), _BATCH):
            ids = [str(number) for number in numbers[start : start + _BATCH]]
            packed = [base64.b64encode(row.tobytes()).decode() for row in rows[start : start + _BATCH]]
            self._server.ask(self._id, "add", {"ids": ids, "embeddings": packed}, timeout_s=ROWS_S)
        self.added.update(numbers)

    def remove(self, numbers: Sequence[int]) -> None:
        """What was not added has not been carried over from the generation before, and never will be."""
        known = sorted(self.added.intersection(numbers))
        for start in range(0, len(known), _BATCH):
            ids = [str(number) for number in known[start : start + _BATCH]]
            self._server.ask(self._id, "delete", {"ids": ids}, timeout_s=ROWS_S)
        self.added.difference_update(known)

    def close(self) -> None:
        self._server.close()


class Collections:
    """The collections on a server that a folder of generations has made; `owner` is a file in it.

    Several homes may share a server, and none may take another's collections for its own.
    """

    def __init__(self, chroma: Chroma, owner: Path) -> None:
        self._chroma = chroma
        self._owner = owner

    def target_for(self, generation: str) -> Target:
        """A collection that never was, for a generation that is begun."""
        return Target(self._chroma, f"{self._prefix()}{generation}-{secrets.token_hex(4)}")

    def sweep(self, generations: Iterable[str]) -> None:
        """Deletes those of other generations than these, as far as the server answers."""
        prefix = self._prefix()
        kept = tuple(f"{prefix}{name}-" for name in generations)
        try:
            with closing(ChromaServer(self._chroma)) as server:
                for name in server.names(prefix):
                    if not name.startswith(kept):
                        server.delete(name)
        except Unavailable as error:
            log.warning("old collections stay until the next ingest: %s", error.message)

    def _prefix(self) -> str:
        try:
            owner, inode = self._owner.read_text("ascii").split()
        except (OSError, ValueError):
            owner, inode = "", ""
        # A copied home is another one, and would else sweep the collections of the first.
        if not owner or inode != str(self._owner.stat().st_ino):
            owner = secrets.token_hex(6)
            with self._owner.open("w", encoding="ascii") as file:
                file.write(f"{owner} {os.fstat(file.fileno()).st_ino}\n")
        return f"mogine-{owner}-"
