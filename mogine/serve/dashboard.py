"""The owner's dashboard on the analytics server: its page, and what it needs beside the record of questions.

What the knowledge base and the proxy know is asked of them over HTTP, with the admin token, so that a browser
deals with one server and one cookie, with a prefix and a proxy before it or without.
"""

import asyncio
import os
import platform
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from importlib import metadata
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
from aiohttp import hdrs, web

from mogine.analytics.spending import Spending
from mogine.analytics.store import open_store
from mogine.doctor.home import House, examine
from mogine.errors import StoreError, Unavailable
from mogine.serve.access import Access
from mogine.serve.admin_sessions import AdminToken, open_sessions
from mogine.serve.app import DOORKEEPER, Route, json_response, read_json
from mogine.serve.assets import Library, asset_route, page_routes
from mogine.serve.keys import SETTINGS
from mogine.settings import Settings

READ_S = 10.0
CHANGE_S = 300.0  # taking in a large document takes its time
LONGEST_ANSWER = timedelta(minutes=10)
PASSED_ON = (hdrs.CONTENT_TYPE, hdrs.RETRY_AFTER)
SERVERS = ("proxy", "kb", "analytics")
KB = "/api/analytics/kb"

TOKEN = web.AppKey("DASHBOARD_TOKEN", AdminToken)
CLIENT = web.AppKey("DASHBOARD_CLIENT", httpx.AsyncClient)
LOOKING = web.AppKey("DASHBOARD_LOOKING", asyncio.Lock)


def dashboard_routes() -> list[Route]:
    """Everything of the dashboard that the analytics server has for it alone."""
    library = Library()
    return [
        *page_routes(library, "dashboard"),
        asset_route(library),
        Route("POST", "/api/analytics/session/token", sign_in_by_token, Access.ADMIN),
        Route("GET", "/api/analytics/budget", show_budget, Access.ADMIN),
        Route("GET", "/api/analytics/system", show_system, Access.ADMIN),
        Route("POST", "/api/analytics/doctor", look_at_all, Access.ADMIN),
        Route("GET", f"{KB}/search", search, Access.ADMIN),
        Route("GET", f"{KB}/documents", list_documents, Access.ADMIN),
        Route("POST", f"{KB}/documents", take_in, Access.ADMIN),
        Route("GET", KB + "/documents/{id:[0-9A-Za-z_-]{1,128}}", show_document, Access.ADMIN),
        Route("DELETE", KB + "/documents/{id:[0-9A-Za-z_-]{1,128}}", take_out, Access.ADMIN),
        Route("GET", f"{KB}/generations", list_generations, Access.ADMIN),
        Route("POST", f"{KB}/rollback", roll_back, Access.ADMIN),
    ]


async def keep_client(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: the way to the other servers."""
    app[TOKEN] = await asyncio.to_thread(AdminToken, app[SETTINGS])
    app[LOOKING] = asyncio.Lock()
    async with httpx.AsyncClient(timeout=READ_S, follow_redirects=False, trust_env=False) as client:
        app[CLIENT] = client
        yield


async def sign_in_by_token(request: web.Request) -> web.Response:
    """The bearer of the admin token gets the cookie, so that the page need not keep the token."""
    sessions = open_sessions(request.app[SETTINGS], request.app[TOKEN])
    session = await asyncio.to_thread(lambda: sessions.redeem(sessions.new_link()))
    response = json_response({"expires_at": session.expires_at.isoformat()})
    request.app[DOORKEEPER].let_in(request, response, session)
    return response


# --- budget ----------------------------------------------------------------------------------------


async def show_budget(request: web.Request) -> web.Response:
    """What was spent today and this month, of how much, and where the month is going."""
    settings = request.app[SETTINGS]
    return json_response(await asyncio.to_thread(_budget, settings, datetime.now(UTC)))


def _budget(settings: Settings, now: datetime) -> dict[str, Any]:
    zone = ZoneInfo(settings.analytics.timezone)
    today = now.astimezone(zone).date()
    first = today.replace(day=1)
    days = ((first + timedelta(days=32)).replace(day=1) - first).days
    day, month = (datetime.combine(date, time_of_day(), zone).astimezone(UTC) for date in (today, first))
    store = open_store(settings)
    spent = (0.0, 0.0)
    if store.exists():
        spent = Spending(store, LONGEST_ANSWER).since((day, month), (), now).since  # type: ignore[assignment]
    elapsed = (now - month) / timedelta(days=1)
    # In the first hours of a month a forecast would be noise.
    forecast = spent[1] / elapsed * days if elapsed >= 0.5 else None
    return {
        "today_cny": round(spent[0], 6),
        "month_cny": round(spent[1], 6),
        "daily_budget_cny": settings.access.daily_budget_cny,
        "monthly_budget_cny": settings.access.monthly_budget_cny,
        "forecast_month_cny": None if forecast is None else round(forecast, 4),
        "day": today.isoformat(),
        "days_of_month": days,
    }


# --- the machine -----------------------------------------------------------------------------------


async def show_system(request: web.Request) -> web.Response:
    """Versions, files, room on the disk, and how each server says it is."""
    settings = request.app[SETTINGS]
    files = asyncio.to_thread(_files, settings)
    *servers, found = await asyncio.gather(*(_readiness(request.app, name) for name in SERVERS), files)
    versions = {name: _version(name) for name in ("mogine", "aiohttp", "chromadb", "onnxruntime")}
    return json_response(
        {
            "versions": {**versions, "python": platform.python_version(), "system": platform.platform()},
            "servers": dict(zip(SERVERS, servers, strict=True)),
            "timezone": settings.analytics.timezone,
            "retention_days": settings.analytics.retention_days,
            "now": datetime.now(UTC).isoformat(),
            **found,
        }
    )


async def look_at_all(request: web.Request) -> web.Response:
    """What `mogine doctor` says of this home; it takes a second or two, so it is asked for by itself."""
    await read_json(request)  # an empty object: a form of another site cannot send one
    async with request.app[LOOKING]:
        lines = await asyncio.to_thread(lambda: list(examine(House(request.app[SETTINGS]))))
    return json_response({"lines": [asdict(line) for line in lines]})


async def _readiness(app: web.Application, name: str) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        response = await app[CLIENT].get(f"{app[SETTINGS].server_url(name)}/readyz", timeout=3.0)
        body = response.json()
        problems = {str(part): str(why) for part, why in body["problems"].items()}
        providers = body.get("providers", {})
    except (httpx.HTTPError, ValueError, KeyError, AttributeError):
        return {"status": "unreachable", "problems": {}, "took_ms": None}
    took_ms = round((time.perf_counter() - began) * 1000, 1)
    found = {"status": str(body["status"]), "problems": problems, "took_ms": took_ms}
    return {**found, "providers": providers} if providers else found


def _files(settings: Settings) -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(settings.data_path if settings.data_path.is_dir() else settings.home)
        disk = {"free_bytes": usage.free, "total_bytes": usage.total}
    except OSError as error:
        raise StoreError("the data folder cannot be looked at") from error
    return {
        "disk": disk,
        "newest_backup_at": _newest(settings.data_path / "backups"),
        "files": {
            **_record_size(settings),
            "knowledge": _size(settings.kb_path, "**/*"),
            "spool": _size(settings.data_path / "spool", "*"),
            "backups": _size(settings.data_path / "backups", "*"),
            "all": _size(settings.data_path, "**/*"),
        },
    }


def _newest(folder: Path) -> str | None:
    moments = [path.stat().st_mtime for path in folder.glob("*") if path.is_file()]
    return datetime.fromtimestamp(max(moments), UTC).isoformat() if moments else None


def _record_size(settings: Settings) -> dict[str, int]:
    """What the record takes, here or in PostgreSQL; nothing while that does not answer."""
    if not settings.analytics.database_url:
        return {"record": _size(settings.analytics_path.parent, f"{settings.analytics_path.name}*")}
    try:
        return {"record": open_store(settings).size_bytes()}
    except Unavailable:
        return {}


def _size(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        try:
            found = os.lstat(path)
        except OSError:
            continue  # gone between the two looks
        total += found.st_size
    return total


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# --- the knowledge base ----------------------------------------------------------------------------


async def search(request: web.Request) -> web.Response:
    """GET /api/search of the knowledge base."""
    return await _passed_on(request, "/api/search")


async def list_documents(request: web.Request) -> web.Response:
    """GET /api/documents."""
    return await _passed_on(request, "/api/documents")


async def show_document(request: web.Request) -> web.Response:
    """GET /api/documents/{id}."""
    return await _passed_on(request, f"/api/documents/{request.match_info['id']}")


async def take_in(request: web.Request) -> web.Response:
    """POST /api/documents: the files go on as they come."""
    return await _passed_on(request, "/api/documents", patience_s=CHANGE_S)


async def take_out(request: web.Request) -> web.Response:
    """DELETE /api/documents/{id}."""
    return await _passed_on(request, f"/api/documents/{request.match_info['id']}", patience_s=CHANGE_S)


async def list_generations(request: web.Request) -> web.Response:
    """GET /api/kb/generations."""
    return await _passed_on(request, "/api/kb/generations")


async def roll_back(request: web.Request) -> web.Response:
    """POST /api/kb/rollback."""
    return await _passed_on(request, "/api/kb/rollback", patience_s=CHANGE_S)


async def _passed_on(request: web.Request, path: str, *, patience_s: float = READ_S) -> web.Response:
    settings = request.app[SETTINGS]
    base = settings.proxy.kb_url or settings.server_url("kb")
    headers: dict[str, str] = {hdrs.AUTHORIZATION: f"Bearer {request.app[TOKEN]()}"}
    for name in (hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH):
        if name in request.headers:
            headers[name] = request.headers[name]
    body = request.content.iter_any() if request.body_exists else None
    try:
        response = await request.app[CLIENT].request(
            request.method,
            base.rstrip("/") + path,
            params=list(request.query.items()),
            content=body,
            headers=headers,
            timeout=patience_s,
        )
    except httpx.HTTPError as error:
        raise Unavailable(
            "the knowledge base does not answer; `mogine serve kb` starts it", reason="kb_unavailable"
        ) from error
    passed: Mapping[str, str] = {
        name: response.headers[name] for name in PASSED_ON if name in response.headers
    }
    return web.Response(
        status=response.status_code,
        body=response.content,
        headers={**passed, hdrs.CACHE_CONTROL: "no-store"},
    )
