"""What the proxy's handlers work with: opened once, and reached under one key."""

import asyncio
import hashlib
import importlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from aiohttp import hdrs, web

from mogine.analytics.recorder import Recorder, open_recorder
from mogine.analytics.records import Kind
from mogine.analytics.spending import Spending
from mogine.analytics.store import open_store
from mogine.answer import Manner, Retriever
from mogine.chat import ChatMessage, Provider
from mogine.errors import (
    ErrorEnvelope,
    MogineError,
    NotFound,
    SettingsError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mogine.kb.client import KnowledgeClient
from mogine.providers.registry import Roster, open_providers
from mogine.serve.access import Buckets, home_id, without_redis
from mogine.serve.books import Books, Cheaper
from mogine.serve.bots import is_bot
from mogine.serve.budget import Amounts, Budget
from mogine.serve.keys import METERS, NOTE, REQUEST_ID, SETTINGS, SITE, STATE
from mogine.serve.limits import Deadline, Deadlines, Limits, Place
from mogine.serve.middlewares import TRACING
from mogine.serve.observe import SURE_SCORE, SURE_SCORE_BY_WORDS, Observation
from mogine.serve.prices import Prices, own_prices, shipped_prices
from mogine.serve.renewal import Renewal, watching
from mogine.serve.requests import Request
from mogine.serve.sessions import MAX_TURN_CHARS, Sessions, VendorSessions
from mogine.serve.shared import SHARED, Admission, Remote, SharedLimits
from mogine.serve.site import SiteFile
from mogine.serve.talks import Talks
from mogine.serve.visitors import Visitors
from mogine.settings import PROVIDER_NAMES, Settings

if TYPE_CHECKING:
    from mogine.serve.fleet import Fleet
    from mogine.serve.telemetry import Tracing

log = logging.getLogger(__name__)

MISSING = {
    "doubao": "DOUBAO_API_KEY",
    "dashscope": "DASHSCOPE_API_KEY and DASHSCOPE_APP_ID",
    "openai": "OPENAI_BASE_URL and OPENAI_MODEL",
}


@dataclass(frozen=True, slots=True)
class Desk:
    """Everything that has a lifetime or a memory."""

    settings: Settings
    site: SiteFile
    providers: Roster
    knowledge: KnowledgeClient
    recorder: Recorder
    books: Books
    limits: Limits
    visitors: Visitors
    sessions: Sessions
    vendor_sessions: VendorSessions
    shared: Admission | None
    parent: Remote | None
    fleet: "Fleet | None"
    talks: Talks | None
    tracing: "Tracing | None"
    buckets: Buckets
    deadlines: Deadlines

    def provider(self, name: str) -> Provider:
        """The provider called `name`; NotFound for an unknown one, UpstreamUnavailable without a key."""
        provider = self.providers.get(name)
        if provider is None:
            raise self.absent(name)
        return provider

    def in_order(self, wanted: str = "") -> list[Provider]:
        """Who is asked, in turn: `wanted` first, then the owner's order, at last the passages alone."""
        names = dict.fromkeys((wanted, *self.providers.settings.provider_order, "extract"))
        return [self.providers[name] for name in names if name in self.providers]

    def affordable(self, wanted: str = "") -> list[Provider]:
        """`in_order` as the budget allows: a cheaper model when it is tight, passages when it is spent."""
        budget = self.books.budget
        if budget.spent:
            return [self.providers["extract"]]
        cheap = self.providers.settings.doubao.cheap_model
        providers = self.in_order(wanted)
        if not (budget.tight and cheap):
            return providers
        return [Cheaper(p, cheap) if p.name == "doubao" else p for p in providers]

    def require_budget(self, provider: Provider) -> None:
        """Raises RateLimited when the budget is spent and `provider` costs money."""
        if self.books.budget.spent and provider.dialect:
            raise self.books.budget.refuse()

    async def open_session(self, id: str, bucket: str) -> tuple[str, tuple[ChatMessage, ...]]:
        """`Sessions.open`, of all workers and machines."""
        if self.parent is None:
            known = self.sessions.open(id, bucket)
        else:
            known = await self.parent.open_session(id, bucket)
        if self.talks is None or known[0] != id:
            return known
        return await self.talks.open(known, bucket)

    def add_turn(self, id: str, bucket: str, question: str, answer: str) -> None:
        """`Sessions.add`, for all workers and machines."""
        if self.talks is not None:
            self.talks.add(id, bucket, question, answer)
        if self.parent is None:
            self.sessions.add(id, bucket, question, answer)
        else:
            cut = {"question": question[:MAX_TURN_CHARS], "answer_text": answer[:MAX_TURN_CHARS]}
            self.parent.tell(do="add_turn", id=id, visitor=bucket, **cut)

    async def allows_vendor_session(self, id: str, bucket: str) -> bool:
        """`VendorSessions.allows`, of all workers and machines."""
        if self.parent is None:
            allowed = self.vendor_sessions.allows(id, bucket)
        else:
            allowed = await self.parent.allows(id, bucket)
        return allowed and (self.talks is None or await self.talks.allows(id, bucket))

    def note_vendor_session(self, id: str, bucket: str) -> None:
        """`VendorSessions.note`, for all workers and machines."""
        if self.talks is not None:
            self.talks.note(id, bucket)
        if self.parent is None:
            self.vendor_sessions.note(id, bucket)
        else:
            self.parent.tell(do="note", id=id, visitor=bucket)

    def absent(self, name: str) -> MogineError:
        """Why there is no provider `name`."""
        if name in PROVIDER_NAMES:
            return UpstreamUnavailable(
                f"provider {name} is not set up on this server; its owner sets {MISSING[name]}"
            )
        return NotFound(f"there is no such provider; known are: {', '.join(PROVIDER_NAMES)}")

    def bucket(self, request: Request) -> str:
        """What the visitor is counted under."""
        return self.buckets.of(request)

    def observe(self, request: Request, bucket: str, kind: Kind, provider: str, question: str) -> Observation:
        """Begin to watch one question."""
        bot = is_bot(request.headers.get(hdrs.USER_AGENT, ""))
        by_words = self.settings.kb.embedder == "none"
        return Observation(
            request[REQUEST_ID],
            kind,
            self.visitors.hash(bucket),
            provider,
            question,
            bot=bot,
            sure_score=SURE_SCORE_BY_WORDS if by_words else SURE_SCORE,
            trace=None if self.tracing is None else self.tracing.question(request, self.providers.settings),
        )

    def retriever(self, seen: Observation) -> Retriever:
        """Who searches for a question."""
        return self.knowledge if seen.trace is None else seen.trace.retriever(self.knowledge)

    def manner(self) -> Manner:
        """How the assistant speaks, as `site.toml` says now."""
        proxy = self.settings.proxy
        return Manner.of(self.site.now(), top_k=proxy.kb_top_k, is_kb_required=proxy.kb_required)

    def within(self, place: Place) -> Deadline:
        """The time that one answer may take."""
        return place.within(self.deadlines)


DESK = web.AppKey("DESK", Desk)


async def open_desk(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: open for as long as the server runs, and the record written when it ends."""
    settings = app[SETTINGS]
    timezone = ZoneInfo(settings.analytics.timezone)
    prices = Prices(shipped_prices(), own_prices(app[SITE].prices))
    site = SiteFile(settings.home / "site.toml", app[SITE])
    app[STATE].on_hangup.append(lambda: renew_prices(prices, site))
    budget = open_budget(settings, timezone)
    remote = app.get(SHARED)
    limits = (
        Limits(settings.access, app[STATE])
        if remote is None
        else SharedLimits(settings.access, app[STATE], remote)
    )
    kb_url = settings.proxy.kb_url or settings.server_url("kb")
    visitors = Visitors(settings.data_path, timezone)
    await asyncio.to_thread(is_bot, "")  # its patterns take a tenth of a second, once
    async with (
        open_recorder(settings) as recorder,
        KnowledgeClient(kb_url, settings.proxy.kb_timeout_s) as knowledge,
        open_providers(settings) as providers,
        watching(Renewal(providers), app[STATE].on_hangup),
        open_fleet(settings, remote, budget, providers, visitors) as fleet,
        budget.watching(None if fleet is None else fleet.exchange),
    ):
        app[DESK] = Desk(
            settings,
            site,
            providers,
            knowledge,
            recorder,
            Books(recorder, prices, budget, app[METERS], timezone),
            limits,
            visitors,
            Sessions(),
            VendorSessions(),
            remote if fleet is None else fleet,
            remote,
            fleet,
            None if fleet is None else Talks(fleet),
            app.get(TRACING),
            Buckets(settings.access.trusted_proxies),
            Deadlines(settings.proxy.answer_timeout_s, lambda: _took_too_long(settings)),
        )
        yield


def renew_prices(prices: Prices, site: SiteFile) -> None:
    """Take up `[prices]` of `site.toml`; a mistake there leaves the prices as they were."""
    try:
        prices.renew(own_prices(site.read_again().prices))
    except SettingsError as error:
        log.error("the prices stay as they were: %s", error.message)


@asynccontextmanager
async def open_fleet(
    settings: Settings, parent: Remote | None, budget: Budget, roster: Roster, visitors: Visitors
) -> "AsyncIterator[Fleet | None]":
    """All proxies that use the Redis of the settings; None without one.

    Raises SettingsError when the package for it is not installed.
    """
    if not settings.access.redis_url:
        yield None
        return
    try:
        fleet = importlib.import_module("mogine.serve.fleet")
    except ImportError as error:
        raise without_redis() from error
    await budget.look_safely()  # what it says now is told to all at once
    one = fleet.Fleet(
        settings.access.redis_url,
        settings.access,
        _record_of(settings),
        parent,
        budget=budget,
        roster=roster,
        visitors=visitors,
    )
    async with fleet.joined(one):
        yield one


def _record_of(settings: Settings) -> str:
    """What tells the record of this process from those of others, whose spending is to be added. One that
    several machines have in PostgreSQL is the same on all of them, whoever they log in as."""
    if url := settings.analytics.database_url:
        parts = urlsplit(url)
        where = f"{parts.hostname}:{parts.port or 5432}{parts.path}"
        return hashlib.sha256(where.encode()).hexdigest()[:16]
    return home_id(settings.data_path)


def _took_too_long(settings: Settings) -> UpstreamTimeout:
    return UpstreamTimeout(
        f"API proxy error: the answer took longer than {settings.proxy.answer_timeout_s:g} s"
        " (MOGINE_ANSWER_TIMEOUT)"
    )


def open_budget(settings: Settings, timezone: ZoneInfo) -> Budget:
    """The budget of a home, not looked up yet."""
    amounts = Amounts(settings.access.daily_budget_cny, settings.access.monthly_budget_cny)
    longest = timedelta(seconds=settings.proxy.answer_timeout_s + 60)
    return Budget(amounts, timezone, Spending(open_store(settings), longest))


def told(request: Request, error: Exception, seen: Observation) -> ErrorEnvelope:
    """The envelope of an error inside an answer that has begun; what is our fault goes to the log."""
    seen.error = error
    if isinstance(error, MogineError):
        request[NOTE] = error.reason
    else:
        request[NOTE] = "internal_error"
        log.error("request %s failed", seen.id, exc_info=error)
    return ErrorEnvelope.of(error, seen.id)
