"""The analytics server as started in production: closed by default, exact, streamed, deaf to tricks."""

import asyncio
import csv
import io
import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import aiohttp
import pytest
import pytest_asyncio

from mogine.analytics.records import QueryRecord, Window
from mogine.analytics.reports import RETRY_S, statistics
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore, encode_cursor
from mogine.analytics.upkeep import CROWD_ROWS
from mogine.errors import Unavailable
from mogine.serve.access import admin_token
from mogine.serve.runner import started
from mogine.settings import Settings
from tests.analytics.rows import row

ADMIN_ROUTES = [
    ("GET", "/api/analytics/statistics"),
    ("HEAD", "/api/analytics/statistics"),
    ("GET", "/api/analytics/queries"),
    ("GET", "/api/analytics/export"),
    ("HEAD", "/api/analytics/export"),
    ("POST", "/api/analytics/cleanup"),
]


@dataclass
class Client:
    """A caller of the running server; with the admin token unless told otherwise."""

    session: aiohttp.ClientSession
    url: str
    token: str

    async def ask(
        self, method: str, path: str, *, token: str | None = None, status: int = 200, **kwargs: Any
    ) -> tuple[Any, aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"} if token != "" else {}
        async with self.session.request(method, self.url + path, headers=headers, **kwargs) as response:
            text = await response.text()
            assert response.status == status, text
            is_json = response.content_type == "application/json"
            return (json.loads(text) if is_json and text else text), response

    async def get(self, path: str, **params: Any) -> Any:
        return (await self.ask("GET", path, params=params))[0]

    async def refused(self, method: str, path: str, status: int, **kwargs: Any) -> dict[str, Any]:
        body, response = await self.ask(method, path, status=status, **kwargs)
        error: dict[str, Any] = body["error"]
        assert error["code"] == status
        assert error["request_id"] == response.headers["X-Request-Id"]
        return error


@pytest.fixture
def store(settings: Settings) -> AnalyticsStore:
    settings.data_path.mkdir()
    return AnalyticsStore(settings.analytics_path)


@pytest_asyncio.fixture
async def client(settings: Settings, store: AnalyticsStore) -> AsyncIterator[Client]:
    async with started(settings, ["analytics"]) as running, aiohttp.ClientSession() as session:
        yield Client(session, running.url("analytics"), admin_token(settings))


def now() -> datetime:
    return datetime.now(UTC)


def fill(store: AnalyticsStore, count: int = 5, **changes: Any) -> list[QueryRecord]:
    rows = [row(timedelta(seconds=n), at=now(), **changes) for n in range(count)]
    store.insert(rows, busy_ms=5000)
    return rows


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
@pytest.mark.parametrize("token", ["", "wrong", "ü", "x" * 5000])
async def test_only_the_admin_token_opens(client: Client, method: str, path: str, token: str) -> None:
    _, response = await client.ask(method, path, token=token, status=401)
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "path",
    [
        "//api/analytics/queries",
        "/api/analytics/queries/",
        "/API/analytics/queries",
        "/api/analytics//queries",
    ],
)
async def test_twins_of_a_path_are_no_way_in(client: Client, store: AnalyticsStore, path: str) -> None:
    fill(store)
    await client.ask("GET", path, token="", status=404)


async def test_the_token_does_not_count_in_the_address(client: Client) -> None:
    await client.refused("GET", f"/api/analytics/queries?token={client.token}", 401, token="")
    await client.refused("GET", f"/api/analytics/queries?access_token={client.token}", 401, token="")


async def test_health_is_open_and_tells_no_secret(settings: Settings, store: AnalyticsStore) -> None:
    fill(store)
    async with started(settings, ["analytics"]) as running, aiohttp.ClientSession() as session:
        client = Client(session, running.url("analytics"), admin_token(settings))
        body, _ = await client.ask("GET", "/api/analytics/health", token="")
    assert (body["status"], body["database"], body["rows"]) == ("ok", "ok", 5)
    assert (body["waiting"], body["lost"]) == (0, 0)
    assert datetime.fromisoformat(body["last_write_at"]) > now() - timedelta(minutes=1)
    assert str(settings.home) not in json.dumps(body)


async def test_health_before_the_first_question_creates_no_file(client: Client, settings: Settings) -> None:
    body, _ = await client.ask("GET", "/api/analytics/health", token="")
    assert (body["status"], body["database"], body["rows"]) == ("ok", "empty", 0)
    body, _ = await client.ask("GET", "/readyz", token="")
    assert body["status"] == "ready"
    assert not settings.analytics_path.exists()


async def test_a_damaged_record_is_told_without_details(settings: Settings, store: AnalyticsStore) -> None:
    settings.analytics_path.write_bytes(b"no database" * 1000)
    spool = Spool(settings.data_path / "spool")
    spool.append([row()])
    async with started(settings, ["analytics"]) as running, aiohttp.ClientSession() as session:
        client = Client(session, running.url("analytics"), admin_token(settings))
        body, _ = await client.ask("GET", "/api/analytics/health", token="")
        assert (body["status"], body["database"], body["waiting"]) == ("degraded", "unusable", 1)
        body, _ = await client.ask("GET", "/readyz", token="", status=503)
        assert body["problems"].keys() == {"database"}
        error = await client.refused("GET", "/api/analytics/statistics", 500)
        assert "damaged" in error["message"] and str(settings.home) not in error["message"]
    spool.release()
    assert settings.analytics_path.read_bytes() == b"no database" * 1000


async def test_statistics_count_and_define(client: Client, store: AnalyticsStore) -> None:
    fill(store, 3)
    fill(store, 2, provider="extract", status="error")
    body = await client.get("/api/analytics/statistics", days=7, by="provider", tz="America/New_York")
    assert body["window"]["days"] == 7 and body["window"]["timezone"] == "America/New_York"
    assert body["totals"]["questions"] == 5 and body["previous"]["questions"] == 0
    assert [(g["provider"], g["questions"]) for g in body["series"]] == [("doubao", 3), ("extract", 2)]
    assert body["definitions"]["visitors"]


async def test_statistics_without_any_row_are_zeros(client: Client, settings: Settings) -> None:
    body = await client.get("/api/analytics/statistics")
    assert body["totals"]["questions"] == 0 and len(body["series"]) == 30
    assert not settings.analytics_path.exists()


async def test_statistics_that_need_sums_first_say_so(store: AnalyticsStore) -> None:
    fill(store, 1000)
    window = Window.last_days(30, now(), ZoneInfo("UTC"))
    with pytest.raises(Unavailable, match="not summed yet") as refused:
        statistics(store, window, deadline_s=-1)
    assert refused.value.retry_after_s == RETRY_S


async def test_a_server_without_a_proxy_beside_it_sums_what_an_upgrade_left(
    settings: Settings, store: AnalyticsStore
) -> None:
    store.insert([row(timedelta(minutes=1, seconds=n), at=now()) for n in range(3000)], busy_ms=5000)
    assert store.is_crowded(CROWD_ROWS)
    async with started(settings, ["analytics"]), asyncio.timeout(30):
        while await asyncio.to_thread(store.is_crowded, 0):  # noqa: ASYNC110 - a thread of the server decides
            await asyncio.sleep(0.02)


async def test_queries_are_paged_newest_first(client: Client, store: AnalyticsStore) -> None:
    rows = fill(store, 5)
    first = await client.get("/api/analytics/queries", limit=3)
    second = await client.get("/api/analytics/queries", limit=3, before=first["next"])
    assert [q["id"] for q in first["queries"] + second["queries"]] == [r.id for r in rows]
    assert second["next"] is None
    assert first["queries"][0]["question"] == "如何退款？"
    assert first["queries"][0]["citations"][0]["source"] == "docs/refund.md"


async def test_queries_are_filtered(client: Client, store: AnalyticsStore) -> None:
    fill(store, 3)
    fill(store, 2, status="error", provider="dashscope", question="100% sure?", bot=True)
    for params, count in [
        ({"status": "error"}, 2),
        ({"provider": "doubao"}, 3),
        ({"bot": "yes"}, 2),
        ({"bot": "no"}, 3),
        ({"bot": "all"}, 5),
        ({"bot": "no", "q": "100%"}, 0),
        ({"q": "100%"}, 2),
        ({"q": "%"}, 2),
        ({"since": "2020-01-01", "until": "2020-12-31"}, 0),
        ({"since": "2020-01-01"}, 5),
        ({"until": "9999-12-30"}, 5),
        ({"provider": "' OR 1=1 --"}, 0),
        ({"q": "' UNION SELECT sql FROM sqlite_master --"}, 0),
        ({"session": "s1'; DROP TABLE queries; --"}, 0),
    ]:
        assert len((await client.get("/api/analytics/queries", **params))["queries"]) == count, params
    assert (await client.get("/api/analytics/queries"))["next"] is None


async def test_a_plain_date_of_until_is_that_whole_local_day(client: Client, store: AnalyticsStore) -> None:
    midnight = datetime(2026, 3, 10, 16, tzinfo=UTC)  # the 11th begins in Shanghai
    store.insert([row(at=midnight), row(timedelta(milliseconds=1), at=midnight)])
    found = await client.get("/api/analytics/queries", since="2026-03-10", until="2026-03-10")
    assert [q["started_at"] for q in found["queries"]] == ["2026-03-10T15:59:59.999Z"]


BAD = [
    ("statistics", "days", ["0", "-1", "1e9", "1000000000", "3661", "", "abc", "1.5", "٣", " 7"]),
    ("statistics", "by", ["", "week", "day; DROP TABLE queries"]),
    ("statistics", "tz", ["Mars/Olympus", "../../etc/passwd", "/etc/localtime", "Asia", "x" * 100]),
    ("statistics", "limit", ["5"]),
    ("queries", "limit", ["0", "1001", "-5", "many"]),
    ("queries", "before", ["1", "'", encode_cursor(7)[:-1] + "z", "x" * 100]),
    ("queries", "status", ["OK", "", "ok'--"]),
    ("queries", "kind", ["web"]),
    ("queries", "bot", ["", "1", "true"]),
    ("queries", "since", ["yesterday", "2026-02-30", "2026-13-01", "0000-00-00", "99999-01-01", "9" * 100]),
    ("queries", "until", ["2026-02-30T10:00:00", "0001-01-01T00:00:00+14:00"]),
    ("queries", "q", ["x" * 101, "a\x00b", "a\nb"]),
    ("queries", "days", ["7"]),
    ("export", "format", ["xlsx", "", "csv\r\nX-Evil: 1"]),
    ("export", "days", ["0", "1e9"]),
    ("export", "bom", ["yes"]),
]


@pytest.mark.parametrize(("route", "name", "values"), BAD)
async def test_bad_filters_are_refused_by_name(
    client: Client, route: str, name: str, values: list[str]
) -> None:
    for value in values:
        error = await client.refused("GET", f"/api/analytics/{route}", 400, params={name: value})
        assert (error["reason"], error["param"]) == ("bad_filter", name), value


async def test_contradictions_are_refused(client: Client) -> None:
    for query, name in [
        ("limit=5&limit=6", "limit"),
        ("since=2026-03-02&until=2026-03-01", "until"),
        ("unknown=1", "unknown"),
        ("%00=1", "\x00"),
    ]:
        error = await client.refused("GET", f"/api/analytics/queries?{query}", 400)
        assert (error["reason"], error["param"]) == ("bad_filter", name)
    error = await client.refused("GET", "/api/analytics/export?days=3&since=2026-03-01", 400)
    assert error["param"] == "days"


async def test_exports_are_attachments_in_every_format(client: Client, store: AnalyticsStore) -> None:
    fill(store, 4, question="=1+1")
    text, response = await client.ask("GET", "/api/analytics/export")
    assert response.headers["Content-Disposition"].startswith("attachment; filename=")
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert text.startswith("\ufeff")
    assert [r["question"] for r in csv.DictReader(io.StringIO(text))] == ["'=1+1"] * 4
    text, _ = await client.ask("GET", "/api/analytics/export?bom=0")
    assert text.startswith('"id"')
    body = await client.get("/api/analytics/export", format="json", days=1)
    assert [r["question"] for r in body] == ["=1+1"] * 4
    text, response = await client.ask("GET", "/api/analytics/export?format=ndjson&status=error")
    assert text == "" and response.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"


async def test_an_export_is_sent_in_pieces(client: Client, store: AnalyticsStore) -> None:
    fill(store, 300, answer="答" * 2000)
    text, response = await client.ask("GET", "/api/analytics/export?format=ndjson")
    assert response.headers.get("Transfer-Encoding") == "chunked"
    assert len(text.splitlines()) == 300


async def test_a_taker_who_leaves_ends_the_export(client: Client, store: AnalyticsStore) -> None:
    fill(store, 600, answer="答" * 5000)
    headers = {"Authorization": f"Bearer {client.token}"}
    async with client.session.get(f"{client.url}/api/analytics/export", headers=headers) as response:
        await response.content.read(1000)
    assert len((await client.get("/api/analytics/queries"))["queries"]) == 100


async def test_cleanup_only_tells_unless_it_is_meant(client: Client, store: AnalyticsStore) -> None:
    store.insert([row(timedelta(days=200), at=now()), row(at=now())])
    body, _ = await client.ask("POST", "/api/analytics/cleanup", json={})
    assert (body["rows"], body["dry_run"], body["older_than_days"], body["bytes_freed"]) == (1, True, 180, 0)
    assert store.summary().rows == 2
    body, _ = await client.ask(
        "POST", "/api/analytics/cleanup", json={"older_than_days": 90, "dry_run": False}
    )
    assert (body["rows"], body["dry_run"]) == (1, False)
    assert store.summary().rows == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"older_than_days": 0}, "older_than_days"),
        ({"older_than_days": -1}, "older_than_days"),
        ({"older_than_days": 1e9}, "older_than_days"),
        ({"older_than_days": "90"}, "older_than_days"),
        ({"older_than_days": True}, "older_than_days"),
        ({"older_than_days": None}, "older_than_days"),
        ({"dry_run": "false"}, "dry_run"),
        ({"dry_run": 0}, "dry_run"),
        ({"force": 1}, "force"),
        ({"older_than": 90}, "older_than"),
    ],
)
async def test_cleanup_refuses_what_it_does_not_know(
    client: Client, store: AnalyticsStore, body: Any, param: str
) -> None:
    store.insert([row(timedelta(days=300), at=now())])
    error = await client.refused("POST", "/api/analytics/cleanup", 400, json=body)
    assert (error["reason"], error["param"]) == ("bad_filter", param)
    assert store.summary().rows == 1


async def test_cleanup_takes_json_only(client: Client) -> None:
    await client.refused("POST", "/api/analytics/cleanup", 415, data={"dry_run": "false"})
    await client.refused("GET", "/api/analytics/cleanup", 405)


async def test_cleanup_with_a_clock_that_cannot_be_right_is_refused(
    client: Client, store: AnalyticsStore
) -> None:
    store.insert([row(timedelta(days=300), at=now())])
    error = await client.refused("POST", "/api/analytics/cleanup", 400, json={"dry_run": False})
    assert "nothing was deleted" in error["message"]
    body, _ = await client.ask("POST", "/api/analytics/cleanup", json={"dry_run": False, "force": True})
    assert body["rows"] == 1


async def test_reading_goes_on_while_another_program_holds_the_lock(
    client: Client, store: AnalyticsStore
) -> None:
    fill(store)
    connection = sqlite3.connect(store.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    assert (await client.get("/api/analytics/statistics"))["totals"]["questions"] == 5
    connection.close()
