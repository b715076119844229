"""Spans for OpenTelemetry: of requests, of searches and of calls to vendors, sent to a collector by a thread.

Imported only where an address for them is set. What a span says is put together when it ends, from what the
record of questions knows then; no token passes through here.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.util.re import parse_env_headers

from mogine.analytics.masking import TextPolicy, mask
from mogine.analytics.records import QueryRecord
from mogine.answer import Found, Retriever
from mogine.chat import ChatRequest, Chunk, Finish, Provider, Usage
from mogine.errors import MogineError, SettingsError
from mogine.kb.client import KnowledgeClient
from mogine.serve.keys import REQUEST_ID
from mogine.serve.requests import Request
from mogine.serve.traces import parent_id, trace_flags, trace_id, trace_of, written
from mogine.settings import OtelSettings, Settings

FLUSH_S = 1.0
# Pages and their files are not traced, nor what asks again and again whether all is well.
TRACED = ("/api/", "/v1/", "/chat/")
UNTRACED = frozenset(
    ("/api/chat/config", "/api/chat/handoff.picture", "/api/kb/health", "/api/analytics/health")
)
LEFT = 499
NO_SPAN = Context()  # a span in it begins a trace
LIBRARY_LOGS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")

Attributes = dict[str, str | bool | int | float | Sequence[str]]

log = logging.getLogger(__name__)

SPAN: web.RequestKey["RequestSpan | None"] = web.RequestKey("SPAN")


# --- spans ------------------------------------------------------------------------------------------


class Tracing:
    """Makes the spans of one server."""

    def __init__(self, provider: TracerProvider, settings: Settings) -> None:
        self.tracer = provider.get_tracer("mogine", metadata.version("mogine"))
        self.settings = settings
        kept = settings.analytics.store_questions
        self.words = TextPolicy(kept if kept == "text" else "none", answers=settings.analytics.store_answers)

    def begin(self, request: Request, route: str) -> "RequestSpan | None":
        """The span of a request, below the caller's if it sends a `traceparent`; None for what is not traced.
        `route` is the address as it was declared, "" when there is none."""
        span = request[SPAN] = self._begin(request, route) if _is_traced(request.method, route) else None
        return span

    def _begin(self, request: Request, route: str) -> "RequestSpan":
        caller = trace_of(request.headers)
        attributes: Attributes = {
            "http.request.method": request.method,
            "http.route": route,
            "url.path": request.path,  # and no query: it holds what was searched for
            "url.scheme": "http",
            "mogine.request_id": request[REQUEST_ID],
        }
        name = f"{request.method} {route}"
        span = self.tracer.start_span(name, _below(caller), SpanKind.SERVER, attributes)
        return RequestSpan(span, has_caller=bool(caller))

    def question(self, request: Request, vendors: Settings) -> "QuestionTrace | None":
        """What is traced of the question that `request` asks; it begins now. `vendors` has the addresses of
        those who may be asked, which change while a server runs."""
        span = request[SPAN]
        return None if span is None else QuestionTrace(self, span, vendors)


class RequestSpan:
    """The span of a request to one of our servers."""

    __slots__ = ("has_caller", "span")

    def __init__(self, span: Span, *, has_caller: bool) -> None:
        self.span = span
        self.has_caller = has_caller

    def end(self, status: int, reason: str) -> str:
        """The request is over; gives the `traceparent` that names its span."""
        span = self.span
        if status != LEFT:
            span.set_attribute("http.response.status_code", status)
        if reason:
            span.set_attribute("mogine.reason", reason)
        if status >= 500 or (status < 400 and reason):  # what fails after its first byte has said 200
            _fail(span, reason or str(status))
        span.end()
        return _traceparent(span)


class QuestionTrace:
    """The spans of one question, below that of its request: the search, and the call to each vendor asked."""

    __slots__ = (
        *("_asked_at_ns", "_began_ns", "_call", "_context", "_request", "_streams", "_tracing", "_vendors"),
    )

    def __init__(self, tracing: Tracing, request: RequestSpan, vendors: Settings) -> None:
        self._tracing = tracing
        self._request = request
        self._vendors = vendors
        self._context = set_span_in_context(request.span, NO_SPAN)
        self._began_ns = time.time_ns()
        self._call: Span | None = None
        self._asked_at_ns = 0
        self._streams = False

    def retriever(self, knowledge: KnowledgeClient) -> Retriever:
        """`knowledge`, its searches traced."""
        return _TracedSearch(self._tracing, self._context, knowledge)

    def providers(self, providers: Sequence[Provider]) -> Sequence[Provider]:
        """`providers`, who tell when one of them is asked."""
        return [_TracedProvider(provider, self) for provider in providers]

    def asking(self, provider: Provider, request: ChatRequest) -> ChatRequest:
        """`provider` is asked from now on; gives the request as it goes there.

        Who has called us with a trace has it passed on, as ever; no vendor is told of one that begins here.
        """
        if not provider.dialect:  # it quotes, and calls nobody
            return request
        model = request.model or provider.default_model
        attributes = _named("chat", getattr(self._vendors, provider.name).base_url)
        attributes |= {"gen_ai.provider.name": provider.name, "gen_ai.request.stream": request.stream}
        if model:
            attributes["gen_ai.request.model"] = model
        for name in ("max_tokens", "temperature", "top_p"):
            if (value := getattr(request, name)) is not None:
                attributes[f"gen_ai.request.{name}"] = value
        if request.stop:
            attributes["gen_ai.request.stop_sequences"] = request.stop
        self._asked_at_ns = time.time_ns()
        self._streams = request.stream
        self._call = self._tracing.tracer.start_span(
            f"chat {model}".rstrip(),
            self._context,
            SpanKind.CLIENT,
            attributes,
            start_time=self._asked_at_ns,
        )
        if self._request.has_caller:
            return replace(request, traceparent=_traceparent(self._call))
        return request

    def failed(self, reason: str) -> None:
        """Whoever was asked last gave no answer."""
        call, self._call = self._call, None
        if call is not None:
            _fail(call, reason)
            call.end()

    def end(self, row: QueryRecord, finish: Finish | None, usage: Usage | None) -> None:
        """The question is over, as its row tells."""
        call, self._call = self._call, None
        outcome: Attributes = {"mogine.status": row.status}
        if row.error_type:
            outcome["mogine.reason"] = row.error_type
        if row.cost_cny is not None:
            outcome["mogine.cost_cny"] = row.cost_cny
        if call is not None:
            if call.is_recording():
                call.set_attributes({**outcome, **self._told(row, finish, usage)})
                if row.status not in ("ok", "aborted"):  # a visitor who leaves is no error
                    _fail(call, row.error_type)
            call.end()
        span = self._request.span
        if span.is_recording():  # an answer that is read on the next page outlives its request
            span.set_attributes({**outcome, **_summary(row)})

    def _told(self, row: QueryRecord, finish: Finish | None, usage: Usage | None) -> Attributes:
        """What the vendor's answer was."""
        found: Attributes = {}
        if row.model:
            found["gen_ai.response.model"] = row.model
        if finish is not None:
            found["gen_ai.response.finish_reasons"] = (finish.reason,)
        if row.prompt_tokens is not None and row.completion_tokens is not None:
            found["gen_ai.usage.input_tokens"] = row.prompt_tokens
            found["gen_ai.usage.output_tokens"] = row.completion_tokens
            found["mogine.tokens_estimated"] = row.tokens_estimated
        if row.reasoning_tokens:
            found["gen_ai.usage.reasoning.output_tokens"] = row.reasoning_tokens
        if usage is not None and usage.cached_tokens:
            found["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
        if self._streams and row.first_token_ms is not None:
            first_ns = self._began_ns + row.first_token_ms * 1_000_000
            found["gen_ai.response.time_to_first_chunk"] = max(0, first_ns - self._asked_at_ns) / 1e9
        return found | self._words(row)

    def _words(self, row: QueryRecord) -> Attributes:
        """The conversation's id, and what was said if the owner wants it there: masked as in the record."""
        found: Attributes = {}
        if session := mask(row.session):
            found["gen_ai.conversation.id"] = found["session.id"] = session
        if self._tracing.settings.otel.content:
            kept = self._tracing.words.apply(row)
            if kept.question:
                found["gen_ai.input.messages"] = _message("user", kept.question)
            if kept.answer:
                found["gen_ai.output.messages"] = _message("assistant", kept.answer)
        return found


class _TracedProvider:
    """A provider of whom it is told when he is asked; his answer itself is handed on untouched."""

    def __init__(self, provider: Provider, trace: QuestionTrace) -> None:
        self._provider = provider
        self._trace = trace
        self.name = provider.name
        self.default_model = provider.default_model
        self.dialect = provider.dialect

    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The provider's own answer."""
        return self._provider.stream(self._trace.asking(self._provider, request))


class _TracedSearch:
    """The knowledge base, searched below a span of a question's."""

    def __init__(self, tracing: Tracing, context: Context, knowledge: KnowledgeClient) -> None:
        self._tracing = tracing
        self._context = context
        self._knowledge = knowledge

    async def search(self, query: str, top_k: int) -> Found:
        """See `KnowledgeClient.search`."""
        settings = self._tracing.settings
        attributes = _named("retrieval", settings.proxy.kb_url or settings.server_url("kb"))
        attributes |= {"gen_ai.data_source.id": "knowledge_base", "gen_ai.request.top_k": float(top_k)}
        if settings.otel.content and (text := self._tracing.words.words(query)):
            attributes["gen_ai.retrieval.query.text"] = text
        span = self._tracing.tracer.start_span(
            "retrieval knowledge_base", self._context, SpanKind.CLIENT, attributes
        )
        try:
            found = await self._knowledge.search(query, top_k, traceparent=_traceparent(span))
            span.set_attributes({"mogine.kb.generation": found.generation, "mogine.kb.hits": len(found.hits)})
            return found
        except MogineError as error:
            _fail(span, error.reason)
            raise
        finally:
            span.end()


def _is_traced(method: str, route: str) -> bool:
    if method in (hdrs.METH_HEAD, hdrs.METH_OPTIONS) or not route.startswith(TRACED):
        return False
    return route not in UNTRACED and not (method == hdrs.METH_GET and route.startswith("/chat/"))


def _below(traceparent: str) -> Context:
    """Where a span belongs under the one that `traceparent` names, or where a trace begins."""
    if not traceparent:
        return NO_SPAN
    trace, parent = int(trace_id(traceparent), 16), int(parent_id(traceparent), 16)
    caller = SpanContext(trace, parent, is_remote=True, trace_flags=TraceFlags(trace_flags(traceparent)))
    return set_span_in_context(NonRecordingSpan(caller), NO_SPAN)


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    return written(context.trace_id, context.span_id, context.trace_flags)


def _fail(span: Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)


def _named(operation: str, url: str) -> Attributes:
    host, port = _place(url)
    return {"gen_ai.operation.name": operation, "server.address": host, "server.port": port}


@lru_cache(maxsize=16)
def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _summary(row: QueryRecord) -> Attributes:
    """What the request's own span says of its question."""
    found: Attributes = {
        "mogine.kind": row.kind,
        "mogine.provider": row.provider,
        "mogine.answered": row.answered,
        "mogine.citations": len(row.citations),
        "mogine.bot": row.bot,
    }
    if row.first_token_ms is not None:
        found["mogine.first_token_ms"] = row.first_token_ms
    return found


def _message(role: str, text: str) -> str:
    """One message in the form of the GenAI conventions; spans take no structures, so it is JSON."""
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)


# --- the way out ------------------------------------------------------------------------------------


@asynccontextmanager
async def open_tracing(settings: Settings, server: str) -> AsyncIterator[Tracing]:
    """The spans of `server` ("proxy" ...), sent from a thread for as long as the context lasts.

    At its end what waits is sent within FLUSH_S, or lost. Raises SettingsError.
    """
    try:
        exporter = _Exporter(settings.otel)
        provider = TracerProvider(
            resource=_resource(settings.otel.service_name, server),
            sampler=_sampler(settings.otel),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError as error:
        raise SettingsError(f"an OTEL_ variable of the environment is wrong: {error}") from error
    try:
        yield Tracing(provider, settings)
    finally:
        # The library would wait for half a minute. Its threads are daemons, and do not keep the process.
        closing = threading.Thread(target=provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, FLUSH_S)
        if closing.is_alive():
            log.warning("the last traces were not taken by %s within %g s", settings.otel.target, FLUSH_S)
        else:
            exporter.forget()


def _resource(service_name: str, server: str) -> Resource:
    """Who sends: as OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say, else by our own names."""
    found = Resource.create({SERVICE_VERSION: metadata.version("mogine")})
    if service_name or str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: service_name or f"mogine-{server}"}))
    return found


def _sampler(settings: OtelSettings) -> sampling.Sampler:
    share = settings.sampler_share
    samplers: Mapping[str, sampling.Sampler] = {
        "always_on": sampling.ALWAYS_ON,
        "always_off": sampling.ALWAYS_OFF,
        "traceidratio": sampling.TraceIdRatioBased(share),
        "parentbased_always_on": sampling.DEFAULT_ON,
        "parentbased_always_off": sampling.DEFAULT_OFF,
        "parentbased_traceidratio": sampling.ParentBasedTraceIdRatio(share),
    }
    return samplers[settings.sampler]


class _Exporter(SpanExporter):
    """The library's exporter, which would complain of every batch: one warning when a collector begins to
    take nothing, one line when it takes spans again."""

    def __init__(self, settings: OtelSettings) -> None:
        self._target = settings.target
        headers = parse_env_headers(settings.headers, liberal=True)
        self._exporter = OTLPSpanExporter(endpoint=self._target, headers=headers)
        self._thread = 0
        self._complaint = ""
        self._lost = 0
        for name in LIBRARY_LOGS:
            logging.getLogger(name).addFilter(self._hear)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by the one thread that sends."""
        self._thread = threading.get_ident()
        self._complaint = ""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                log.warning("traces cannot be sent to %s (%s)", self._target, self._complaint)
            self._lost += len(spans)
        elif self._lost:
            log.info("traces are sent again; %d spans were lost", self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def forget(self) -> None:
        """Listen no more to what the library logs."""
        for name in LIBRARY_LOGS:
            logging.getLogger(name).removeFilter(self._hear)

    def _hear(self, record: logging.LogRecord) -> bool:
        """A filter of the library's loggers: what it says of our spans is ours to tell."""
        if record.thread != self._thread and not self._lost:
            return True
        self._complaint = self._complaint or record.getMessage()
        return False
