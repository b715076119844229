"""The knowledge base server: search over the generation that the pointer names, and what it holds."""

import asyncio
import contextlib
import functools
import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from aiohttp import hdrs, web

from mogine.errors import MogineError, NotFound, RequestError, StoreError, Unavailable, UpstreamError
from mogine.kb.e5 import give_back_memory
from mogine.kb.embedders import Embedder, clean, open_embedder
from mogine.kb.generations import Generations, Kept
from mogine.kb.knowledge import MODES, KnowledgeBase, Mode
from mogine.kb.manifest import Generation, check_files
from mogine.kb.offers import Offers
from mogine.kb.passages import MAX_QUERY_CHARS, Hit, StoredDocument, document_id
from mogine.kb.texts import MAX_READERS
from mogine.serve.access import Access
from mogine.serve.app import Route, base_app, json_response, read_json
from mogine.serve.clerks import Clerks
from mogine.serve.keys import SETTINGS, SITE
from mogine.serve.offers import OFFER_ROUTES, OFFERS
from mogine.serve.openapi import OPENAPI_ROUTE
from mogine.serve.receive import received, sweep
from mogine.serve.site import SiteFile
from mogine.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.5
RETRY_S = 5.0
MAX_TOP_K = 50
MAX_WAITING = 64
OPENING_S = 15.0
# Answers that are kept while their generation serves: visitors of a page ask the same things.
REMEMBERED = 256
REMEMBERED_TOP_K = 10
UPLOADS_NAME = "uploads"
UPLOAD = "upload:"

NOT_LOADED = "the knowledge base is being loaded; try again in a few seconds"
NO_GENERATION = "there are no documents yet; `mogine kb ingest ./docs` takes them in"
DAMAGED = "the files of the knowledge base cannot be read; the server's log says which, and what helps"

T = TypeVar("T")


def create_app(settings: Settings) -> web.Application:
    """The server of contract section 4; it takes connections when its embedder and index are loaded."""
    app = base_app(settings, "kb", ROUTES, ready=_problems)
    generations = Generations.of(settings)
    app[SHELF] = Shelf(generations, open_embedder(settings), searches_by_words=not settings.proxy.kb_required)
    app[OFFERS] = Offers(generations, settings.kb_path)
    app[CLERKS] = Clerks(settings)
    app[SITE_FILE] = SiteFile(settings.home / "site.toml", app[SITE])
    app.cleanup_ctx.append(_keep_shelf)
    return app


# --- the generation that serves ------------------------------------------------------------------


@dataclass(slots=True)
class _Lent:
    """An open generation, how many searches run on it, and its latest answers."""

    knowledge: KnowledgeBase
    searches: int = 0
    is_retired: bool = False
    answers: OrderedDict["Query", list[Hit]] = field(default_factory=OrderedDict)


class Shelf:
    """Holds the current generation open, and moves to the next when the pointer moves.

    The next one is opened and warmed beside the old; searches that run finish on the generation they
    began with, which is closed after its last one. Opening, and each search, has a thread.
    While an embedder or a Chroma server elsewhere is away, it `searches_by_words` alone, or not at all.
    """

    def __init__(
        self, generations: Generations, embedder: Embedder, *, searches_by_words: bool = True
    ) -> None:
        self._generations = generations
        self._embedder = embedder
        self._searches_by_words = searches_by_words
        self._vectors_problem = ""
        self._guard = threading.Lock()
        self._lent: _Lent | None = None
        self._problem = NOT_LOADED
        self._failed: tuple[str, float] | None = None
        self._waiting = 0
        self._looked = asyncio.Event()
        self._loader = ThreadPoolExecutor(1, "kb-load")
        self._searchers = ThreadPoolExecutor(MAX_READERS, "kb-search")

    @property
    def generation(self) -> Generation | None:
        """The one that serves."""
        lent = self._lent
        return lent.knowledge.generation if lent else None

    @property
    def problem(self) -> str:
        """Why nothing serves; "" when something does."""
        return "" if self._lent else self._problem

    @property
    def vectors_problem(self) -> str:
        """Why the Chroma server that has the vectors cannot be asked; "" when it can, or there is none."""
        return self._vectors_problem

    async def run(self, work: Callable[[KnowledgeBase], T]) -> T:
        """`work` on the current generation, in a thread. Raises Unavailable."""
        if self._lent is None:
            raise Unavailable(self._problem, reason="kb_unavailable")
        if self._waiting >= MAX_WAITING:
            raise Unavailable("the knowledge base has too many searches waiting; try again", retry_after_s=1)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._searchers, self._on_current, work)
        finally:
            self._waiting -= 1

    async def search(self, query: "Query") -> tuple[Mode, str, list[Hit]]:
        """Mode, generation and hits; stops when its caller is cancelled, who is a visitor that has left."""
        lent = self._lent
        if lent and query in lent.answers:
            lent.answers.move_to_end(query)
            return query.mode, lent.knowledge.name, lent.answers[query]
        is_left = threading.Event()
        search = _search if self._searches_by_words else _search_whole
        work = functools.partial(search, query, lambda: not is_left.is_set())
        try:
            mode, name, hits = await self.run(work)
        except StoreError:
            # Its folder may have gone (`kb compact --forget`) before the move was seen: Chroma opens its
            # files anew now and then. The generation that serves now has an answer.
            await self.look()
            if self._lent is lent:
                raise
            lent = self._lent
            mode, name, hits = await self.run(work)
        finally:
            is_left.set()
        # An answer by words alone, while an embedder is down, is none to keep.
        if lent and lent.knowledge.name == name and mode == query.mode and query.top_k <= REMEMBERED_TOP_K:
            lent.answers[query] = hits
            if len(lent.answers) > REMEMBERED:
                lent.answers.popitem(last=False)
        return mode, name, hits

    async def look(self) -> None:
        """Follows the pointer now, so that a change just made is found."""
        await asyncio.get_running_loop().run_in_executor(self._loader, self.refresh)

    async def opened(self, patience_s: float) -> None:
        """Waits until what is there serves, or cannot, or for `patience_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._looked.wait(), patience_s)

    async def watch(self) -> None:
        """Follows the pointer until cancelled."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, self.refresh)
        self._looked.set()
        if self._lent is None:
            # The first ingest is searchable the sooner for it.
            await loop.run_in_executor(self._loader, self._embedder.warm)
        while True:
            await asyncio.sleep(POLL_S)
            await loop.run_in_executor(self._loader, self.refresh)

    def refresh(self) -> None:
        """One look at the pointer; opens what it names. Says in `problem` and in the log what fails."""
        name = ""
        try:
            name = self._generations.current_name() or ""
            if self._lent and name == self._lent.knowledge.name:
                self._look_at_vectors(self._lent.knowledge)
                return
            if not name:
                self._problem = NO_GENERATION
                self._swap(None)
                return
            if self._failed and self._failed[0] == name and time.monotonic() < self._failed[1] + RETRY_S:
                return
            knowledge = self._open()
            self._swap(knowledge)
            self._failed = None
            if knowledge:
                self._look_at_vectors(knowledge)
        except MogineError as error:
            if not self._failed or self._failed[0] != name:
                log.error("knowledge base: %s", error.message)
            # A message about files names a path, which is for the owner and not for visitors.
            self._problem = error.message if isinstance(error, Unavailable) else DAMAGED
            self._failed = (name, time.monotonic())

    def close(self) -> None:
        """After the last search has ended."""
        self._loader.shutdown()
        self._searchers.shutdown(cancel_futures=True)
        self._swap(None)
        self._embedder.close()

    def _open(self) -> KnowledgeBase | None:
        generation = self._generations.current()
        if generation is None:
            return None
        check_files(generation)
        self._embedder.warm()
        knowledge = KnowledgeBase(generation, self._embedder)
        try:
            with contextlib.suppress(Unavailable):  # told by the next look; words can be searched meanwhile
                knowledge.warm()
        except BaseException:
            knowledge.close()
            raise
        give_back_memory()
        log.info("knowledge base: generation %s serves", generation.name)
        return knowledge

    def _look_at_vectors(self, knowledge: KnowledgeBase) -> None:
        with contextlib.suppress(Unavailable):  # which `problem` tells of
            knowledge.look_again()
        problem, before = knowledge.problem, self._vectors_problem
        self._vectors_problem = problem
        if problem and problem != before:
            log.error("knowledge base: %s", problem)
        elif before and not problem:
            log.info("knowledge base: the Chroma server answers again")

    def _swap(self, knowledge: KnowledgeBase | None) -> None:
        with self._guard:
            old, self._lent = self._lent, _Lent(knowledge) if knowledge else None
            if old is None:
                return
            old.is_retired = True
            is_idle = old.searches == 0
        if is_idle:
            old.knowledge.close()

    def _on_current(self, work: Callable[[KnowledgeBase], T]) -> T:
        with self._borrowed() as knowledge:
            return work(knowledge)

    @contextmanager
    def _borrowed(self) -> Iterator[KnowledgeBase]:
        """In the thread that searches, because a visitor who leaves does not end the thread's work."""
        with self._guard:
            lent = self._lent
            if lent is None:
                raise Unavailable(self._problem, reason="kb_unavailable")
            lent.searches += 1
        try:
            yield lent.knowledge
        finally:
            with self._guard:
                lent.searches -= 1
                is_over = lent.is_retired and lent.searches == 0
            if is_over:
                lent.knowledge.close()


SHELF = web.AppKey("SHELF", Shelf)
CLERKS = web.AppKey("CLERKS", Clerks)
SITE_FILE = web.AppKey("SITE_FILE", SiteFile)


async def _keep_shelf(app: web.Application) -> AsyncIterator[None]:
    await asyncio.to_thread(sweep, app[SETTINGS].data_path / UPLOADS_NAME)
    watcher = asyncio.create_task(app[SHELF].watch())
    # Who asks a server that has just said it serves must not be told that nothing was found.
    await app[SHELF].opened(OPENING_S)
    yield
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    await asyncio.to_thread(app[SHELF].close)


def _problems(app: web.Application) -> Mapping[str, str]:
    problem = app[SHELF].problem
    return {"knowledge": problem} if problem else {}


# --- handlers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Query:
    """A checked search."""

    text: str
    top_k: int
    mode: Mode

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "Query":
        """Raises RequestError that names the parameter."""
        text = clean(parameters.get("q", "")).strip()
        if not text:
            raise RequestError("q is empty: say what to search for, as in /api/search?q=refund", param="q")
        if len(text) > MAX_QUERY_CHARS:
            raise RequestError(f"q is longer than {MAX_QUERY_CHARS} characters", param="q")
        top_k = parameters.get("top_k", "3")
        if not re.fullmatch(r"[0-9]{1,4}", top_k) or not 1 <= int(top_k) <= MAX_TOP_K:
            raise RequestError(f"top_k must be a whole number from 1 to {MAX_TOP_K}", param="top_k")
        mode = next((m for m in MODES if m == parameters.get("mode", "hybrid")), None)
        if mode is None:
            raise RequestError(f"mode must be one of {', '.join(MODES)}", param="mode")
        return cls(text, int(top_k), mode)


async def search(request: web.Request) -> web.Response:
    """GET /api/search"""
    query = Query.of(request.query)
    started = time.perf_counter()
    mode, generation, hits = await request.app[SHELF].search(query)
    body = {
        "query": query.text,
        "mode": mode,
        "generation": generation,
        "took_ms": round((time.perf_counter() - started) * 1000, 1),
        "results": [_result(hit, rank) for rank, hit in enumerate(hits, start=1)],
    }
    return json_response(body)


def _search_whole(
    query: Query, is_wanted: Callable[[], bool], knowledge: KnowledgeBase
) -> tuple[Mode, str, list[Hit]]:
    hits = knowledge.search(query.text, query.top_k, query.mode, is_wanted=is_wanted)
    return query.mode, knowledge.name, hits


def _search(
    query: Query, is_wanted: Callable[[], bool], knowledge: KnowledgeBase
) -> tuple[Mode, str, list[Hit]]:
    """An embedder or a Chroma server elsewhere that is down costs the meaning, not the words."""
    try:
        return _search_whole(query, is_wanted, knowledge)
    except (UpstreamError, Unavailable) as error:
        if query.mode != "hybrid":
            raise
        if isinstance(error, UpstreamError):
            log.warning("search by keywords only: %s", error.message)
        return "keyword", knowledge.name, knowledge.search(query.text, query.top_k, "keyword")


def _result(hit: Hit, rank: int) -> dict[str, Any]:
    passage = hit.passage
    return {
        "id": passage.id,
        "text": passage.text,
        "title": passage.title,
        "heading": passage.heading,
        "source": passage.source,
        "url": passage.url,
        "page": passage.page,
        "score": round(hit.score, 4),
        "rank": rank,
    }


async def company_info(request: web.Request) -> web.Response:
    """GET /api/company_info"""
    company = request.app[SITE_FILE].now().company
    if not company:
        raise NotFound("nothing is known about the company; its owner can fill in [company] in site.toml")
    body = orjson.dumps(dict(company))
    etag = hashlib.sha256(body).hexdigest()[:32]
    headers = {hdrs.ETAG: f'"{etag}"', hdrs.CACHE_CONTROL: "no-cache"}
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type="application/json", headers=headers)


async def documents(request: web.Request) -> web.Response:
    """GET /api/documents"""
    name, found = await request.app[SHELF].run(lambda knowledge: (knowledge.name, knowledge.documents()))
    return json_response({"generation": name, "documents": [_document(document) for document in found]})


async def document(request: web.Request) -> web.Response:
    """GET /api/documents/{id}"""
    id = request.match_info["id"]
    found, passages = await request.app[SHELF].run(
        lambda knowledge: (knowledge.document(id), knowledge.passages_of(id))
    )
    shown = [
        {"id": p.id, "position": p.position, "heading": p.heading, "page": p.page, "text": p.text}
        for p in passages
    ]
    return json_response({**_document(found), "passages": shown})


async def upload(request: web.Request) -> web.Response:
    """POST /api/documents"""
    settings = request.app[SETTINGS]
    folder = settings.data_path / UPLOADS_NAME
    async with received(request, folder, settings.kb.max_upload_bytes) as files:
        documents = [(UPLOAD + file.name, file.name, file.path) for file in files]
        outcome = await request.app[CLERKS].take_in(documents)
    await request.app[SHELF].look()
    listed = {"added": outcome.added, "changed": outcome.changed, "unchanged": outcome.unchanged}
    taken = [
        {"id": document_id(source), "source": source, "status": status}
        for status, sources in listed.items()
        for source in sources
    ]
    body = {
        "generation": outcome.generation,
        "documents": taken,
        "passages": outcome.passages,
        "notes": outcome.notes,
        "failing_tests": outcome.worse,
    }
    return json_response(body, status=201 if outcome.added or outcome.changed else 200)


async def remove(request: web.Request) -> web.Response:
    """DELETE /api/documents/{id}"""
    id = request.match_info["id"]
    found = await request.app[SHELF].run(lambda knowledge: knowledge.document(id))
    outcome = await request.app[CLERKS].take_out(found.source)
    await request.app[SHELF].look()
    return json_response(
        {"generation": outcome.generation, "removed": outcome.removed, "failing_tests": outcome.worse}
    )


def _document(document: StoredDocument) -> dict[str, Any]:
    return {
        "id": document.id,
        "source": document.source,
        "title": document.title,
        "url": document.url,
        "updated": document.updated,
        "digest": document.digest,
        "passage_count": document.passages,
        "characters": document.characters,
    }


async def list_generations(request: web.Request) -> web.Response:
    """GET /api/kb/generations: those that are kept, the newest first."""
    listed = await asyncio.to_thread(Generations.of(request.app[SETTINGS]).listed)
    return json_response({"generations": [_kept(kept) for kept in listed]})


async def roll_back(request: web.Request) -> web.Response:
    """POST /api/kb/rollback: `{"generation"?}` serves again, by default the one before the current."""
    name = (await read_json(request)).get("generation")
    if not (name is None or (isinstance(name, str) and name)):
        raise RequestError('"generation" must be the name of one that is kept', param="generation")
    generation = await asyncio.to_thread(Generations.of(request.app[SETTINGS]).rollback, name)
    await request.app[SHELF].look()
    return json_response({"generation": generation.name})


def _kept(kept: Kept) -> dict[str, Any]:
    manifest = kept.generation.manifest if kept.generation else None
    return {
        "name": kept.name,
        "serves": kept.is_current,
        "bytes": kept.bytes,
        "created_at": manifest.created_at if manifest else None,
        "documents": manifest.documents if manifest else None,
        "passages": manifest.passages if manifest else None,
        "embedder": manifest.embedder if manifest else None,
        # What is wrong with it names a path.
        "problem": DAMAGED if kept.problem else None,
    }


async def health(request: web.Request) -> web.Response:
    """GET /api/kb/health"""
    shelf = request.app[SHELF]
    generation = shelf.generation
    if generation is None:
        return json_response({"status": "unavailable", "problem": shelf.problem, "generation": None})
    manifest = generation.manifest
    return json_response(
        {
            # Found by words alone meanwhile, or not at all with MOGINE_KB_REQUIRED.
            "status": "degraded" if shelf.vectors_problem else "ok",
            "problem": shelf.vectors_problem or None,
            "generation": generation.name,
            "created_at": manifest.created_at,
            "documents": manifest.documents,
            "passages": manifest.passages,
            "embedder": manifest.embedder,
        }
    )


ROUTES = (
    Route("GET", "/api/search", search, Access.PUBLIC),
    Route("GET", "/api/company_info", company_info, Access.PUBLIC),
    Route("GET", "/api/documents", documents, Access.ADMIN),
    Route("POST", "/api/documents", upload, Access.ADMIN),
    Route("GET", "/api/documents/{id}", document, Access.ADMIN),
    Route("DELETE", "/api/documents/{id}", remove, Access.ADMIN),
    Route("GET", "/api/kb/generations", list_generations, Access.ADMIN),
    Route("POST", "/api/kb/rollback", roll_back, Access.ADMIN),
    Route("GET", "/api/kb/health", health, Access.PUBLIC),
    *OFFER_ROUTES,
    OPENAPI_ROUTE,
)
