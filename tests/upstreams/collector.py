"""A real receiver of OTLP over HTTP: what OpenTelemetry's exporter sends, decoded by its own messages.

async with Collector() as collector:       # OTEL_EXPORTER_OTLP_ENDPOINT = collector.url
    ... (await collector.until(3)) ...     # the spans, once there are so many
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent

PROTOBUF = "application/x-protobuf"
KINDS = {Sent.SPAN_KIND_SERVER: "server", Sent.SPAN_KIND_CLIENT: "client"}


@dataclass(frozen=True)
class Span:
    """One span as a collector sees it; ids in hex, `parent` "" at the root."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    is_error: bool
    attributes: Mapping[str, Any]
    service: str
    began_ns: int
    ended_ns: int


class Collector:
    """`status` is what it answers; while `hangs` it answers nothing at all."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.status = 200
        self.hangs = False
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT gets."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def until(self, count: int, timeout_s: float = 20.0) -> list[Span]:
        """All spans, as soon as there are `count`, in the order of their beginnings."""
        async with asyncio.timeout(timeout_s):
            while len(self.spans) < count:  # noqa: ASYNC110 - they come from a thread of another's
                await asyncio.sleep(0.01)
        return sorted(self.spans, key=lambda span: span.began_ns)

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.headers.append(dict(request.headers))
        while self.hangs:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if self.status == 200:
            assert request.content_type == PROTOBUF
            self.bodies.append(body)
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(status=self.status, body=answer, content_type=PROTOBUF)


def _spans(message: ExportTraceServiceRequest) -> list[Span]:
    found = []
    for resource_spans in message.resource_spans:
        service = _attributes(resource_spans.resource.attributes)["service.name"]
        for scope_spans in resource_spans.scope_spans:
            for sent in scope_spans.spans:
                span = Span(
                    sent.name,
                    KINDS[sent.kind],
                    sent.trace_id.hex(),
                    sent.span_id.hex(),
                    sent.parent_span_id.hex(),
                    sent.status.code == 2,
                    _attributes(sent.attributes),
                    service,
                    sent.start_time_unix_nano,
                    sent.end_time_unix_nano,
                )
                found.append(span)
    return found


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    return getattr(value, kind or "string_value")
