"""What the dashboard needs of the analytics server: a cookie, the budget, the machine, the knowledge base."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage
from mogine.serve.dashboard import _budget
from mogine.settings import load_settings
from tests.analytics.rows import row
from tests.serve.conftest import Served, Start, assert_envelope
from tests.servers import ADMIN_TOKEN

BEARER = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
KB = "/api/analytics/kb"


def take_in(home: Path, *texts: str) -> None:
    with Generations(home / "data/kb").begin(NoEmbedder()) as draft:
        for number, text in enumerate(texts):
            source = f"docs/{number}.md"
            draft.replace(
                Document(source, f"Title {number}", text, f"digest-{text}"),
                [Passage(f"{number}:0", source, f"Title {number}", "", 0, text)],
            )
        draft.commit()


async def both(serve: Start, home: Path) -> Served:
    take_in(home, "Refunds take three days.")
    take_in(home, "Refunds take three days.", "Shipping is free.")
    served: Served = await serve("analytics", "kb")
    return served


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/analytics/session/token"),
        ("GET", "/api/analytics/budget"),
        ("GET", "/api/analytics/system"),
        ("POST", "/api/analytics/doctor"),
        ("GET", f"{KB}/search?q=x"),
        ("GET", f"{KB}/documents"),
        ("POST", f"{KB}/documents"),
        ("GET", f"{KB}/documents/x"),
        ("DELETE", f"{KB}/documents/x"),
        ("GET", f"{KB}/generations"),
        ("POST", f"{KB}/rollback"),
    ],
)
async def test_everything_of_it_is_for_the_owner(serve: Start, method: str, path: str) -> None:
    served = await serve("analytics")
    assert_envelope(await served.ask(method, path, server="analytics"), 401, "unauthorized")


async def test_page_is_strict_and_its_files_are_there(serve: Start) -> None:
    served = await serve("analytics")
    page = await served.ask("GET", "/dashboard/", server="analytics")
    policy = page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy and "form-action 'none'" in policy and "unsafe" not in policy
    assert (await served.ask("GET", "/dashboard", server="analytics")).headers["Location"] == "dashboard/"


async def test_token_becomes_a_cookie_that_opens_and_other_pages_cannot_use(serve: Start, home: Path) -> None:
    served = await both(serve, home)
    reply = await served.ask("POST", "/api/analytics/session/token", server="analytics", headers=BEARER)
    cookie = reply.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and ADMIN_TOKEN not in cookie
    carried = {"Cookie": cookie.split(";")[0]}
    found = await served.ask("GET", f"{KB}/documents", server="analytics", headers=carried)
    assert len(found.json["documents"]) == 2
    foreign = {**carried, "Origin": "https://evil.example"}
    refused = await served.ask("POST", f"{KB}/rollback", server="analytics", headers=foreign, json={})
    assert_envelope(refused, 403, "origin_not_allowed")


async def test_knowledge_base_is_reached_through_it(serve: Start, home: Path) -> None:
    served = await both(serve, home)

    async def ask(method: str, path: str, **how: object) -> object:
        reply = await served.ask(method, KB + path, server="analytics", headers=BEARER, **how)
        assert reply.headers["Cache-Control"] == "no-store"
        return reply.json

    found = await served.ask("GET", f"{KB}/search?q=refunds&top_k=1", server="analytics", headers=BEARER)
    assert [hit["source"] for hit in found.json["results"]] == ["docs/0.md"]
    listed = (await served.ask("GET", f"{KB}/documents", server="analytics", headers=BEARER)).json[
        "documents"
    ]
    id = next(each["id"] for each in listed if each["source"] == "docs/1.md")
    assert "Shipping is free." in str(await ask("GET", f"/documents/{id}"))
    generations = (await served.ask("GET", f"{KB}/generations", server="analytics", headers=BEARER)).json
    assert [g["serves"] for g in generations["generations"]] == [True, False]
    assert await ask("POST", "/rollback", json={"generation": "g000001"}) == {"generation": "g000001"}
    listed = (await served.ask("GET", f"{KB}/documents", server="analytics", headers=BEARER)).json[
        "documents"
    ]
    assert len(listed) == 1, "it serves at once"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n# A\n\nNew.\r\n--b--\r\n'
    )
    headers = {**BEARER, "Content-Type": "multipart/form-data; boundary=b"}
    taken = await served.ask("POST", f"{KB}/documents", server="analytics", headers=headers, data=body)
    assert (taken.status, taken.json["documents"][0]["status"]) == (201, "added")
    id = taken.json["documents"][0]["id"]
    assert (
        await served.ask("DELETE", f"{KB}/documents/{id}", server="analytics", headers=BEARER)
    ).status == 200


async def test_errors_of_the_knowledge_base_come_through_and_its_absence_is_told(
    serve: Start, home: Path
) -> None:
    served = await both(serve, home)
    for method, path, body, status, reason in (
        ("POST", "/rollback", {"generation": "g9"}, 404, "not_found"),
        ("POST", "/rollback", {"generation": 7}, 400, "invalid_request"),
        ("GET", "/search?q=", None, 400, "invalid_request"),
        ("GET", "/documents/none", None, 404, "not_found"),
    ):
        reply = await served.ask(method, KB + path, server="analytics", headers=BEARER, json=body)
        assert (reply.status, reply.json["error"]["reason"]) == (status, reason)
    alone = await serve("analytics", env={"MOGINE_KB_URL": "http://127.0.0.1:9"})
    reply = await alone.ask("GET", f"{KB}/documents", server="analytics", headers=BEARER)
    assert_envelope(reply, 503, "kb_unavailable")


async def test_system_tells_of_servers_that_do_not_run(serve: Start) -> None:
    served = await serve("analytics", "kb", env={"MOGINE_PROXY_PORT": "9"})
    found = (await served.ask("GET", "/api/analytics/system", server="analytics", headers=BEARER)).json
    assert {name: one["status"] for name, one in found["servers"].items()} == {
        "proxy": "unreachable",
        "kb": "not_ready",
        "analytics": "ready",
    }
    assert found["disk"]["free_bytes"] > 0 and found["versions"]["mogine"]
    assert str(served.settings.home) not in str(found)


async def test_doctor_is_asked_from_the_page(serve: Start) -> None:
    served = await serve("analytics")
    reply = await served.ask("POST", "/api/analytics/doctor", server="analytics", headers=BEARER, json={})
    lines = {line["name"]: line for line in reply.json["lines"]}
    assert lines["backup"]["status"] == "warning" and "mogine backup" in lines["backup"]["fix"]


def test_budget_counts_local_days_and_foresees_the_month(home: Path) -> None:
    settings = load_settings({"MOGINE_DAILY_BUDGET_CNY": "5", "MOGINE_TIMEZONE": "Asia/Shanghai"}, home)
    now = datetime(2026, 3, 10, 16, tzinfo=UTC)  # in Shanghai the 11th has just begun
    assert _budget(settings, now)["today_cny"] == 0.0, "no record yet"
    spent = [row(timedelta(minutes=n), at=now + timedelta(minutes=5), cost_cny=1.0) for n in (1, 10)]
    AnalyticsStore(settings.analytics_path).insert([*spent, row(timedelta(days=12), at=now, cost_cny=9.0)])
    found = _budget(settings, now + timedelta(minutes=6))
    assert (found["today_cny"], found["month_cny"]) == (1.0, 2.0)
    assert (found["daily_budget_cny"], found["monthly_budget_cny"]) == (5.0, None)
    assert found["forecast_month_cny"] == pytest.approx(2.0 / 10 * 31, rel=0.01)


@pytest.mark.parametrize(
    "query",
    [
        "since=2026-03-01",
        "since=2026-03-02&until=2026-03-01",
        "since=x&until=y",
        "since=2026-02-30&until=2026-03-01",
        "days=3&since=2026-03-01&until=2026-03-02",
        "since=1970-01-01&until=2190-01-01",
    ],
)
async def test_statistics_of_days_that_are_none_are_refused(serve: Start, query: str) -> None:
    served = await serve("analytics")
    reply = await served.ask("GET", f"/api/analytics/statistics?{query}", server="analytics", headers=BEARER)
    assert_envelope(reply, 400, "bad_filter")


async def test_statistics_of_some_days_include_the_last(serve: Start, home: Path) -> None:
    settings = load_settings({}, home)
    AnalyticsStore(settings.analytics_path).insert(
        [row(timedelta(days=n)) for n in range(4)]
    )  # until 10 March
    served = await serve("analytics")
    query = "since=2026-03-08&until=2026-03-09&tz=UTC"
    reply = await served.ask("GET", f"/api/analytics/statistics?{query}", server="analytics", headers=BEARER)
    assert reply.json["totals"]["questions"] == 2
    assert [day["day"] for day in reply.json["series"]] == ["2026-03-08", "2026-03-09"]
    assert reply.json["previous"]["questions"] == 1
