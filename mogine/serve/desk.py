"""What the proxy's handlers work with: opened once, and reached under one key."""

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from aiohttp import web

from mogine.analytics.recorder import Recorder, open_recorder
from mogine.analytics.records import Kind
from mogine.answer import Manner
from mogine.chat import Provider
from mogine.errors import ErrorEnvelope, MogineError, NotFound, UpstreamTimeout, UpstreamUnavailable
from mogine.kb.client import KnowledgeClient
from mogine.providers.registry import open_providers
from mogine.serve.access import Buckets
from mogine.serve.keys import NOTE, REQUEST_ID, SETTINGS, SITE, STATE
from mogine.serve.limits import Deadline, Limits, Place
from mogine.serve.observe import Observation
from mogine.serve.sessions import Sessions, VendorSessions
from mogine.serve.site import SiteFile
from mogine.serve.visitors import Visitors
from mogine.settings import PROVIDER_NAMES, Settings

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
    providers: Mapping[str, Provider]
    knowledge: KnowledgeClient
    recorder: Recorder
    limits: Limits
    visitors: Visitors
    sessions: Sessions
    vendor_sessions: VendorSessions
    buckets: Buckets

    def provider(self, name: str) -> Provider:
        """The provider called `name`; NotFound for an unknown one, UpstreamUnavailable without a key."""
        provider = self.providers.get(name)
        if provider is None:
            raise self.absent(name)
        return provider

    def absent(self, name: str) -> MogineError:
        """Why there is no provider `name`."""
        if name in PROVIDER_NAMES:
            return UpstreamUnavailable(
                f"provider {name} is not set up on this server; its owner sets {MISSING[name]}"
            )
        return NotFound(f"there is no such provider; known are: {', '.join(PROVIDER_NAMES)}")

    def bucket(self, request: web.Request) -> str:
        """What the visitor is counted under."""
        return self.buckets.of(request)

    def observe(
        self, request: web.Request, bucket: str, kind: Kind, provider: str, question: str
    ) -> Observation:
        """Begin to watch one question."""
        return Observation(request[REQUEST_ID], kind, self.visitors.hash(bucket), provider, question)

    def manner(self) -> Manner:
        """How the assistant speaks, as `site.toml` says now."""
        return Manner.of(self.site.now(), top_k=self.settings.proxy.kb_top_k)

    def within(self, place: Place) -> Deadline:
        """The time that one answer may take."""
        seconds = self.settings.proxy.answer_timeout_s
        return place.within(
            seconds,
            UpstreamTimeout(
                f"API proxy error: the answer took longer than {seconds:g} s (MOGINE_ANSWER_TIMEOUT)"
            ),
        )


DESK = web.AppKey("DESK", Desk)


async def open_desk(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: open for as long as the server runs, and the record written when it ends."""
    settings = app[SETTINGS]
    kb_url = settings.proxy.kb_url or settings.server_url("kb")
    async with (
        open_recorder(settings) as recorder,
        KnowledgeClient(kb_url, settings.proxy.kb_timeout_s) as knowledge,
        open_providers(settings) as providers,
    ):
        app[DESK] = Desk(
            settings,
            SiteFile(settings.home / "site.toml", app[SITE]),
            providers,
            knowledge,
            recorder,
            Limits(settings.access, app[STATE]),
            Visitors(settings.data_path, ZoneInfo(settings.analytics.timezone)),
            Sessions(),
            VendorSessions(),
            Buckets(settings.access.trusted_proxies),
        )
        yield


def told(request: web.Request, error: Exception, seen: Observation) -> ErrorEnvelope:
    """The envelope of an error inside an answer that has begun; what is our fault goes to the log."""
    seen.error = error
    if isinstance(error, MogineError):
        request[NOTE] = error.reason
    else:
        request[NOTE] = "internal_error"
        log.error("request %s failed", seen.id, exc_info=error)
    return ErrorEnvelope.of(error, seen.id)
