"""The LLM proxy: the server that visitors talk to."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import hdrs, web

from mogine.serve import chat, feedback, llm, pages, plain, v1
from mogine.serve.access import Access
from mogine.serve.app import Route, base_app
from mogine.serve.assets import Library, asset_route, page_routes, redirect
from mogine.serve.desk import DESK, open_desk
from mogine.serve.keys import METERS, STATE
from mogine.serve.metrics import Snapshot
from mogine.serve.openapi import OPENAPI_ROUTE
from mogine.serve.probe import PROBE_ROUTES, add_probes
from mogine.serve.replay import keeping
from mogine.serve.shared import REPORT_S
from mogine.serve.siblings import meeting
from mogine.settings import PROVIDER_NAMES, Settings

BREAKER = {"closed": 0.0, "half_open": 0.5, "open": 1.0}

LLM_PATHS = {f"/api/llm/{name}": {"provider": name} for name in PROVIDER_NAMES}
ROUTES = (
    Route(hdrs.METH_POST, "/api/llm/{provider}", llm.llm, Access.VISITOR, short=LLM_PATHS),
    Route(
        hdrs.METH_POST,
        "/v1/chat/completions",
        v1.completions,
        Access.VISITOR,
        short={"/v1/chat/completions": {}},
    ),
    Route(hdrs.METH_GET, "/v1/models", v1.models, Access.VISITOR),
    Route(hdrs.METH_GET, "/v1/models/{id:.+}", v1.model, Access.VISITOR),
    Route(hdrs.METH_POST, "/api/chat", chat.chat, Access.VISITOR, short={"/api/chat": {}}),
    Route(hdrs.METH_POST, "/api/chat/resume", chat.resume, Access.VISITOR),
    Route(hdrs.METH_POST, "/api/chat/stop", chat.stop, Access.VISITOR),
    Route(hdrs.METH_POST, "/api/feedback", feedback.feedback, Access.VISITOR),
    Route(hdrs.METH_GET, "/api/chat/config", pages.config, Access.PUBLIC),
    Route(hdrs.METH_GET, "/api/chat/handoff.picture", pages.picture, Access.PUBLIC),
    Route(hdrs.METH_GET, "/widget.js", pages.widget, Access.PUBLIC),
    Route(hdrs.METH_POST, "/chat/", plain.ask, Access.VISITOR),
    Route(hdrs.METH_GET, "/", redirect("chat/"), Access.PUBLIC),
)


def create_app(settings: Settings) -> web.Application:
    """The server of contract section 3."""
    library = Library()
    origins = settings.access.allowed_origins
    routes = (
        *ROUTES,
        *page_routes(library, "chat", ancestors=("'self'", *origins), forms="'self'"),
        asset_route(library),
        *PROBE_ROUTES,
        OPENAPI_ROUTE,
    )
    app = base_app(settings, "proxy", routes, ready=_problems, details=_details, snapshot=_snapshot)
    add_probes(app)
    app[pages.LIBRARY] = library
    app[pages.WIDGETS] = {}
    app.cleanup_ctx.extend((open_desk, keeping(settings.proxy.resume_grace_s), meeting, _reporting))
    return app


def _problems(app: web.Application) -> Mapping[str, str]:
    """The proxy answers as long as it runs; only a record that cannot be written is worth a word."""
    problem = app[DESK].recorder.stats().problem
    return {"record": problem} if problem else {}


def _details(app: web.Application) -> Mapping[str, Any]:
    """How the vendors are doing; a proxy without them still quotes passages, so it is ready."""
    desk = app[DESK]
    redis = (
        {}
        if desk.fleet is None
        else {"redis": f"away ({desk.fleet.trouble})" if desk.fleet.trouble else "ok"}
    )
    return {
        **redis,
        "providers": {
            vendor.name: {
                "breaker": vendor.care.breaker.state,
                "keys": len(vendor.care.keys.all),
                "keys_resting": vendor.care.keys.resting,
            }
            for vendor in desk.providers.vendors
        },
    }


async def _snapshot(app: web.Application) -> Snapshot:
    """All numbers of this server, of all its processes."""
    remote = app[DESK].parent
    return _own_snapshot(app) if remote is None else await remote.metrics(_own_snapshot(app))


async def _reporting(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: as one of several workers, tell the parent what was counted, also at the end."""
    remote = app[DESK].parent
    if remote is None:
        yield
        return

    async def report() -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            remote.tell(do="report", snapshot=_own_snapshot(app).to_json())

    task = asyncio.create_task(report())
    yield
    task.cancel()
    remote.tell(do="report", snapshot=_own_snapshot(app).to_json())


def _own_snapshot(app: web.Application) -> Snapshot:
    """The numbers of this process."""
    desk = app[DESK]
    found = app[METERS].snapshot()
    found.add("mogine_streams_open", (), len(app[STATE].running))
    found.add("mogine_visitors_tracked", (), desk.limits.tracked)
    for vendor in desk.providers.vendors:
        name, care = (vendor.name,), vendor.care
        for kind, count in care.errors.items():
            found.add("mogine_upstream_errors", (*name, kind), count)
        found.add("mogine_upstream_retries", name, vendor.retries.retried)
        found.add("mogine_key_changes", name, care.key_changes)
        found.add("mogine_breaker_open", name, BREAKER[care.breaker.state])
        found.add("mogine_keys", name, len(care.keys.all))
        found.add("mogine_keys_resting", name, care.keys.resting)
    record = desk.recorder.stats()
    found.add("mogine_rows_stored", (), record.stored)
    found.add("mogine_rows_dropped", (), record.dropped)
    found.add("mogine_rows_waiting", (), record.waiting)
    found.add("mogine_rows_spooled", (), record.spooled)
    if desk.fleet is not None:
        found.add("mogine_redis_away", (), float(bool(desk.fleet.trouble)))
    budget = desk.books.budget
    found.add("mogine_budget_used_ratio", (), budget.share)
    found.add("mogine_spent_today_cny", (), budget.today_cny)
    found.add("mogine_spent_month_cny", (), budget.month_cny)
    return found
