"""The analytics server: health for everybody; numbers, rows, export and cleanup for the owner."""

import asyncio
import contextlib
import logging
import re
import time
import zoneinfo
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Any

from aiohttp import hdrs, web

from mogine.analytics.export import FORMATS, MEDIA_TYPES, to_dict
from mogine.analytics.lines import render_rows
from mogine.analytics.records import ANSWERED, KINDS, MAX_DAYS, RATINGS, STATUSES, Selection, Window
from mogine.analytics.reports import REPORTS, check_by, statistics
from mogine.analytics.retention import cleanup
from mogine.analytics.spool import Spool
from mogine.analytics.sqllines import Piece
from mogine.analytics.store import MAX_SEARCH_CHARS, AnalyticsStore, open_store
from mogine.analytics.upkeep import Upkeep
from mogine.errors import MogineError, RequestError
from mogine.gaps.loop import open_gaps
from mogine.serve import dashboard, gaps
from mogine.serve.access import Access
from mogine.serve.app import DOORKEEPER, Route, base_app, json_response, read_json
from mogine.serve.keys import SETTINGS
from mogine.serve.openapi import OPENAPI_ROUTE
from mogine.settings import Settings

log = logging.getLogger(__name__)

DEADLINE_S = 2.0
MAX_LIMIT = 1000
HEALTH_AGE_S = 5.0
PIECE_BYTES = 64 * 1024
MAX_LINK_BYTES = 1024
BOTS = ("yes", "no", "all")
GAP = "/api/analytics/gaps/{id:[0-9]{1,15}}"
FILTERS = (
    "provider",
    "model",
    "kind",
    "status",
    "answered",
    "visitor",
    "session",
    "feedback",
    "unanswered",
    "bot",
    "q",
    "since",
    "until",
)


@dataclass(slots=True)
class Health:
    """What was found at the last look, so that a public route cannot be used to keep the disk busy."""

    body: dict[str, Any]
    problem: str
    looked_at: float


STORE = web.AppKey("ANALYTICS_STORE", AnalyticsStore)
HEALTH = web.AppKey("ANALYTICS_HEALTH", dict[str, Health])


def create_app(settings: Settings) -> web.Application:
    """The server of port 8742."""
    routes = [
        *dashboard.dashboard_routes(),
        Route("GET", "/api/analytics/health", health, Access.PUBLIC),
        Route("POST", "/api/analytics/session", sign_in, Access.PUBLIC),
        Route("GET", "/api/analytics/session", show_session, Access.ADMIN),
        Route("DELETE", "/api/analytics/session", sign_out, Access.ADMIN),
        Route("GET", "/api/analytics/statistics", show_statistics, Access.ADMIN),
        Route("GET", "/api/analytics/queries", list_queries, Access.ADMIN),
        Route("GET", "/api/analytics/export", export, Access.ADMIN),
        Route("POST", "/api/analytics/cleanup", clean_up, Access.ADMIN),
        Route("GET", "/api/analytics/gaps", gaps.list_gaps, Access.ADMIN),
        Route("GET", GAP, gaps.show_gap, Access.ADMIN),
        Route("POST", f"{GAP}/accept", gaps.accept_gap, Access.ADMIN),
        Route("POST", f"{GAP}/ignore", gaps.ignore_gap, Access.ADMIN),
        Route("POST", f"{GAP}/reopen", gaps.reopen_gap, Access.ADMIN),
        OPENAPI_ROUTE,
    ]
    app = base_app(settings, "analytics", routes, ready=_problems)
    app[STORE] = open_store(settings)
    app[HEALTH] = {}
    app[gaps.GAPS] = open_gaps(settings)
    app[gaps.LOOKOUT] = gaps.Lookout(settings)
    app.cleanup_ctx.append(gaps.keep_lookout)
    app.cleanup_ctx.extend((_keep_looking, _keep_summing, dashboard.keep_client))
    return app


# --- handlers ------------------------------------------------------------------------------------


async def health(request: web.Request) -> web.Response:
    """Open to all, so it names no path and no text."""
    return json_response((await _health(request.app)).body)


async def sign_in(request: web.Request) -> web.Response:
    """A link of `mogine admin link` becomes the cookie. By POST: whoever only looks at links uses none up."""
    doorkeeper = request.app[DOORKEEPER]
    link = (await read_json(request, MAX_LINK_BYTES)).get("link")
    if not isinstance(link, str):
        raise RequestError('"link" must be what stands behind #link= in the address', param="link")
    if hdrs.ORIGIN in request.headers:
        doorkeeper.check_page(request)
    session = await asyncio.to_thread(doorkeeper.redeem, link)
    response = json_response({"expires_at": session.expires_at.isoformat()})
    doorkeeper.let_in(request, response, session)
    log.info("the owner has signed in by a link")
    return response


async def show_session(request: web.Request) -> web.Response:
    """Until when the cookie is good; null for a bearer of the token."""
    session = request.app[DOORKEEPER].session(request)
    return json_response({"expires_at": session and session.expires_at.isoformat()})


async def sign_out(request: web.Request) -> web.Response:
    """Ends the session of the cookie, in all browsers that have it."""
    response = json_response({"expires_at": None})
    await request.app[DOORKEEPER].show_out(request, response)
    return response


async def show_statistics(request: web.Request) -> web.Response:
    """All numbers of the last `days` whole days, or from the day `since` to the day `until`, included."""
    filters = Filters(request, "days", "since", "until", "by", "tz")
    window = filters.window(filters.zone("tz", request.app[SETTINGS].analytics.timezone))
    by = filters.one_of("by", tuple(REPORTS)) or "day"
    check_by(by)
    found = await asyncio.to_thread(statistics, request.app[STORE], window, by=by, deadline_s=DEADLINE_S)
    return json_response(found.to_dict())


async def list_queries(request: web.Request) -> web.Response:
    """Rows, newest first; `next` is the cursor for those before them."""
    filters = Filters(request, "limit", "before", *FILTERS)
    selection = filters.selection()
    page = await asyncio.to_thread(
        request.app[STORE].page,
        selection,
        limit=filters.whole("limit", 100, 1, MAX_LIMIT),
        before=filters.text("before", 64),
        deadline_s=DEADLINE_S,
    )
    return json_response({"queries": [to_dict(r) for r in page.records], "next": page.next or None})


async def export(request: web.Request) -> web.StreamResponse:
    """Every row of the filters as a file, oldest first, streamed; `bom=0` leaves out Excel's mark."""
    filters = Filters(request, "format", "days", "bom", *FILTERS)
    kind = filters.one_of("format", FORMATS) or "csv"
    selection = filters.selection(days=filters.whole("days", 0, 1, MAX_DAYS))
    bom = filters.one_of("bom", ("0", "1")) != "0"
    pieces = render_rows(request.app[STORE], selection, kind, bom=bom, deadline_s=DEADLINE_S)
    # The first piece before the head: what fails at once is still told as a plain error.
    first = await asyncio.to_thread(_next_piece, pieces)
    response = web.StreamResponse(
        headers={
            hdrs.CONTENT_TYPE: f"{MEDIA_TYPES[kind]}; charset=utf-8",
            hdrs.CONTENT_DISPOSITION: f'attachment; filename="queries-{datetime.now(UTC):%Y%m%d}.{kind}"',
            hdrs.CACHE_CONTROL: "no-store",
        }
    )
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        return response
    try:
        piece = first
        while piece:
            await response.write(piece)
            piece = await asyncio.to_thread(_next_piece, pieces)
    except MogineError as error:
        # The head is out: only a broken connection tells the taker that the file is not whole.
        log.error("export was cut: %s", error.message)
        if request.transport is not None:
            request.transport.abort()
    return response


async def clean_up(request: web.Request) -> web.Response:
    """Deletes rows past their time; only tells what it would do unless `dry_run` is false."""
    body = await read_json(request)
    if unknown := body.keys() - {"older_than_days", "dry_run", "force"}:
        raise _bad(sorted(unknown)[0], "is nothing that cleanup knows")
    days = body.get("older_than_days", request.app[SETTINGS].analytics.retention_days)
    if not isinstance(days, int) or isinstance(days, bool) or not 1 <= days <= MAX_DAYS:
        raise _bad("older_than_days", f"must be a whole number from 1 to {MAX_DAYS}")
    for name in ("dry_run", "force"):
        if not isinstance(body.get(name, False), bool):
            raise _bad(name, "must be true or false")
    dry_run = body.get("dry_run", True)
    done = await asyncio.to_thread(
        cleanup, request.app[STORE], days, dry_run=dry_run, force=body.get("force", False)
    )
    if not dry_run:
        log.info("cleanup deleted %d rows older than %d days", done.rows, days)
    return json_response(done.to_dict())


# --- filters -------------------------------------------------------------------------------------


class Filters:
    """The query string: only names that the route knows, each once; every fault is a 400 with its name."""

    def __init__(self, request: web.Request, *known: str) -> None:
        self._values: dict[str, str] = {}
        self._zone = zoneinfo.ZoneInfo(request.app[SETTINGS].analytics.timezone)
        for name, value in request.query.items():
            if name not in known:
                raise _bad(name[:40], f"is no filter here; there are {', '.join(known)}")
            if name in self._values:
                raise _bad(name, "stands there twice")
            if not value.isprintable():
                raise _bad(name, "holds characters that no value can have")
            self._values[name] = value

    def text(self, name: str, limit: int) -> str:
        value = self._values.get(name, "")
        if len(value) > limit:
            raise _bad(name, f"must not be longer than {limit} characters")
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise _bad(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._values.get(name, "")
        if name in self._values and value not in allowed:
            raise _bad(name, f"must be one of {', '.join(allowed)}")
        return value

    def zone(self, name: str, default: str) -> zoneinfo.ZoneInfo:
        try:
            return zoneinfo.ZoneInfo(self.text(name, 64) or default)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise _bad(name, "must be a time zone such as Asia/Shanghai") from error

    def moment(self, name: str) -> datetime | None:
        """A date or a time; a date is the local day's beginning, and of `until` its end."""
        value = self.text(name, 40)
        if not value:
            return None
        try:
            if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
                day = datetime.fromisoformat(value).date() + timedelta(days=name == "until")
                return datetime.combine(day, time_of_day(), self._zone).astimezone(UTC)
            at = datetime.fromisoformat(value)
            return (at if at.tzinfo else at.replace(tzinfo=self._zone)).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise _bad(name, "must be a date such as 2026-03-31, or a time with its offset") from error

    def window(self, zone: zoneinfo.ZoneInfo) -> Window:
        """Whole days of `zone`."""
        if not self._values.keys() & {"since", "until"}:
            return Window.last_days(self.whole("days", 30, 1, MAX_DAYS), datetime.now(UTC), zone)
        if "days" in self._values:
            raise _bad("days", "cannot stand beside since or until")
        first, last = (self._day(name) for name in ("since", "until"))
        if not 0 <= (last - first).days < MAX_DAYS:
            raise _bad("until", f"must be a day from since on, at most {MAX_DAYS} days")
        after = last + timedelta(days=1)
        since, until = (datetime.combine(day, time_of_day(), zone).astimezone(UTC) for day in (first, after))
        return Window(since, until, zone)

    def _day(self, name: str) -> date:
        value = self.text(name, 10)
        if re.fullmatch(r"(19[7-9]|20[0-9]|21[0-9])[0-9]-[0-9]{2}-[0-9]{2}", value):
            with contextlib.suppress(ValueError):
                return date.fromisoformat(value)
        raise _bad(name, "must be a day such as 2026-03-31; give both since and until")

    def selection(self, *, days: int = 0) -> Selection:
        since, until = self.moment("since"), self.moment("until")
        if since and until and since >= until:
            raise _bad("until", "must be later than since")
        if days:
            if since or until:
                raise _bad("days", "cannot stand beside since or until")
            since = Window.last_days(days, datetime.now(UTC), self._zone).since
        return Selection(
            since=since,
            until=until,
            provider=self.text("provider", 64),
            model=self.text("model", 256),
            kind=self.one_of("kind", KINDS),
            status=self.one_of("status", STATUSES),
            answered=self.one_of("answered", ANSWERED),
            visitor=self.text("visitor", 256),
            session=self.text("session", 256),
            feedback=self.one_of("feedback", (*RATINGS, "any")),
            unanswered=self.one_of("unanswered", ("0", "1")) == "1",
            bot="" if (bot := self.one_of("bot", BOTS)) == "all" else bot,
            search=self.text("q", MAX_SEARCH_CHARS),
        )


def _bad(name: str, fault: str) -> RequestError:
    return RequestError(f"{name} {fault}", reason="bad_filter", param=name)


# --- health --------------------------------------------------------------------------------------


async def _health(app: web.Application) -> Health:
    known = app[HEALTH].get("last")
    if known is None or time.monotonic() - known.looked_at > HEALTH_AGE_S:
        known = app[HEALTH]["last"] = await asyncio.to_thread(_look, app[STORE])
    return known


def _look(store: AnalyticsStore) -> Health:
    """How the record is: `waiting` rows lie in the spool, `lost` ones could not be kept."""
    body: dict[str, Any] = {"rows": None, "last_write_at": None, "waiting": None, "lost": None}
    problem = ""
    try:
        body["waiting"] = Spool(store.path.parent / "spool").count()
        summary = store.summary(deadline_s=DEADLINE_S)
        last = summary.last_write_at
        body |= {"rows": summary.rows, "last_write_at": last and last.isoformat(), "lost": summary.lost}
        body["database"] = "ok" if store.exists() else "empty"
    except MogineError as error:
        log.error("the record of questions cannot be read: %s", error.message)
        problem = "the record of questions cannot be read; the log says why"
        body["database"] = "unusable"
    except Exception:
        log.exception("the record of questions cannot be read")
        problem = "the record of questions cannot be read; the log says why"
        body["database"] = "unusable"
    status = "degraded" if problem or body["waiting"] else "ok"
    return Health({"status": status, **body}, problem, time.monotonic())


async def _keep_summing(app: web.Application) -> AsyncIterator[None]:
    """Statistics stay quick where no proxy records, as after an upgrade; of several only one is at it."""
    upkeep = Upkeep(app[STORE])
    upkeep.start()
    yield
    await asyncio.to_thread(upkeep.stop)


async def _keep_looking(app: web.Application) -> AsyncIterator[None]:
    """Looks every few seconds, so that readiness is never older than that."""

    async def look() -> None:
        while True:
            await _health(app)
            await asyncio.sleep(HEALTH_AGE_S)

    task = asyncio.create_task(look())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    app[STORE].close()


def _problems(app: web.Application) -> dict[str, str]:
    known = app[HEALTH].get("last")
    return {"database": known.problem} if known and known.problem else {}


def _next_piece(pieces: Iterator[Piece]) -> bytes:
    """The next lines of the file, with its beginning what belongs before them; nothing at its end."""
    taken = b""
    for piece in pieces:
        taken += piece.data
        if len(taken) >= PIECE_BYTES:
            break
    return taken
