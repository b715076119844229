"""Gaps over HTTP: listed, accepted, ignored and opened again by the owner alone."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mogine.analytics.store import AnalyticsStore
from mogine.kb.embedders import NoEmbedder
from mogine.kb.gate import load_tests
from mogine.kb.generations import Generations
from tests.analytics.rows import row
from tests.kb.conftest import make_document
from tests.serve.conftest import Reply, Served, Start, assert_envelope
from tests.servers import ADMIN_TOKEN

GAPS = "/api/analytics/gaps"
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def take_in(home: Path, source: str, text: str) -> None:
    document, passages = make_document(source, text)
    with Generations(home / "data/kb").begin(NoEmbedder()) as draft:
        draft.replace(document, passages)
        draft.commit()


@pytest_asyncio.fixture
async def served(serve: Start, home: Path) -> AsyncIterator[Served]:
    """An analytics server of a home with documents, and one question that they did not answer."""
    take_in(home, "docs/returns.md", "退款三个工作日到账。")
    (home / "data").mkdir(exist_ok=True)
    unanswered: dict[str, Any] = {"answered": "no", "signals": ("no_passage",), "citations": ()}
    rows = [
        row(timedelta(minutes=n), at=datetime.now(UTC), question="可以用花呗分期吗", visitor=v, **unanswered)
        for n, v in ((5, "a"), (6, "b"))
    ]
    AnalyticsStore(home / "data/analytics.db").insert(rows, busy_ms=5000)
    yield await serve("analytics")


async def get(served: Served, path: str = "", **params: str) -> Reply:
    return await served.ask("GET", GAPS + path, server="analytics", headers=ADMIN, params=params)


async def listed(served: Served, **params: str) -> Any:
    """The list once nothing is looked for any more."""
    async with asyncio.timeout(60):
        while (body := (await get(served, **params)).json)["looking"]:  # noqa: ASYNC110 - it is not our process
            await asyncio.sleep(0.05)
    return body


async def post(served: Served, path: str, body: Any) -> Reply:
    return await served.ask("POST", GAPS + path, server="analytics", headers=ADMIN, json=body)


async def test_gaps_are_listed_with_what_comes_nearest(served: Served) -> None:
    body = await listed(served)
    (gap,) = body["gaps"]
    assert (gap["question"], gap["visitors"], gap["asked"]) == ("可以用花呗分期吗", 2, 2)
    assert (gap["status"], gap["signals"]) == ("open", {"no_passage": 2})
    assert gap["nearest"]["generation"] == "g000001"
    assert body["counts"] == {"open": 1, "accepted": 0, "closed": 0, "ignored": 0}
    assert (body["looking"], body["problem"]) == (False, None)
    assert body["definitions"].keys() == {"gap", "signals", "weight", "status"}


async def test_an_accepted_gap_closes_when_the_document_is_there(served: Served, home: Path) -> None:
    (gap,) = (await listed(served))["gaps"]
    path = f"/{gap['id']}"
    told = (await post(served, f"{path}/accept", {"expect": "docs/huabei.md"})).json
    assert (told["status"], told["test"]["document"]) == ("accepted", "docs/huabei.md")
    assert told["evidence"]["passed"] is False
    assert [test.document for test in load_tests(home / "kb-tests.jsonl")] == ["docs/huabei.md"]
    take_in(home, "docs/huabei.md", "可以用花呗分期，三期免息。")
    async with asyncio.timeout(60):  # lists look anew every few seconds
        while (closed := (await get(served, path)).json)["status"] != "closed":
            await asyncio.sleep(0.1)
            await listed(served)
    assert (closed["evidence"]["generation"], closed["evidence"]["rank"]) == ("g000002", 1)
    assert [step["status"] for step in closed["history"]] == ["accepted", "closed"]
    assert [q["signals"] for q in closed["questions"]] == [["no_passage"]] * 2
    assert (await listed(served))["gaps"] == []
    assert [g["id"] for g in (await get(served, status="closed")).json["gaps"]] == [gap["id"]]


async def test_ignored_and_opened_again(served: Served) -> None:
    (gap,) = (await listed(served))["gaps"]
    path = f"/{gap['id']}"
    assert (await post(served, f"{path}/ignore", {"reason": "another company"})).json["status"] == "ignored"
    assert (await get(served, status="all")).json["gaps"][0]["reason"] == "another company"
    assert (await post(served, f"{path}/reopen", {})).json["status"] == "open"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/1/accept", {}, "expect"),
        ("/1/accept", {"expect": "  "}, "expect"),
        ("/1/accept", {"expect": 7}, "expect"),
        ("/1/accept", {"expect": "a.md", "top_k": 0}, None),
        ("/1/accept", {"expect": "a.md", "top_k": True}, None),
        ("/1/accept", {"expect": "a.md", "question": "x" * 3000}, None),
        ("/1/accept", {"expect": "a.md", "path": "/etc/passwd"}, "path"),
        ("/1/ignore", {"reason": ""}, "reason"),
        ("/1/ignore", {"reason": "x" * 301}, "reason"),
        ("/1/reopen", {"id": 2}, "id"),
    ],
)
async def test_bad_input_is_named(served: Served, path: str, body: Any, param: str | None) -> None:
    await listed(served)
    assert_envelope(await post(served, path, body), 400, "invalid_request", param)


@pytest.mark.parametrize(
    "params",
    [
        {"status": "x"},
        {"status": "' OR 1=1 --"},
        {"limit": "0"},
        {"limit": "501"},
        {"limit": "²"},
        {"x": "1"},
    ],
)
async def test_bad_filters_are_refused(served: Served, params: dict[str, str]) -> None:
    assert_envelope(await get(served, **params), 400, "bad_filter", next(iter(params)))


async def test_unknown_gaps_and_odd_ids_are_not_found(served: Served) -> None:
    for path in ("/99", "/-1", "/1e3", "/1' OR '1'='1", "/9999999999999999"):
        assert_envelope(await get(served, path), 404, "not_found")
    for act, body in (("accept", {"expect": "a.md"}), ("ignore", {"reason": "x"}), ("reopen", {})):
        assert_envelope(await post(served, f"/99/{act}", body), 404, "not_found")


async def test_only_the_owner_sees_gaps(served: Served) -> None:
    for method, path in (
        *(("GET", GAPS), ("HEAD", GAPS), ("GET", f"{GAPS}/1"), ("POST", f"{GAPS}/1/accept")),
        *(("POST", f"{GAPS}/1/ignore"), ("POST", f"{GAPS}/1/reopen")),
    ):
        assert (await served.ask(method, path, server="analytics")).status == 401


async def test_a_damaged_knowledge_base_is_told_and_the_list_is_there(served: Served, home: Path) -> None:
    (home / "data/kb/generations/g000001/texts.db").write_bytes(b"no database" * 500)
    body = await listed(served)
    assert len(body["gaps"]) == 1 and "damaged" in body["problem"]
