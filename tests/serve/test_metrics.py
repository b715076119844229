"""What Prometheus reads, and who may."""

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mogine.serve.metrics import Snapshot, render
from tests.serve.conftest import Served, Start, assert_envelope, question
from tests.servers import ADMIN_TOKEN
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import hang, refuse, say, script, usage


async def numbers(
    served: Served, server: str = "proxy"
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = await served.ask("GET", "/metrics", server=server)
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def one(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[(name, tuple(sorted(labels.items())))]


async def test_a_question_is_counted_in_every_way(serve: Start) -> None:
    play = (script(say("好"), usage(1000, 500)), refuse(500), refuse(500), refuse(500))
    async with DoubaoFake(*play) as fake:
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": MODEL, "MOGINE_DAILY_BUDGET_CNY": "1"})
        assert (await served.post("/api/llm/doubao", question())).status == 200
        assert (await served.post("/api/llm/doubao", question())).status == 502
        await served.ask("GET", "/api/nowhere/4711")
        await served.rows()
        found = await numbers(served)
    route = {"server": "proxy", "method": "POST", "route": "/api/llm/{provider}"}
    assert one(found, "mogine_http_requests_total", **route, status="200") == 1
    assert one(found, "mogine_http_requests_total", **route, status="502") == 1
    assert "4711" not in str(found), "no address of a visitor's making becomes a label"
    ok = {"kind": "llm", "provider": "doubao", "status": "ok", "reason": ""}
    assert one(found, "mogine_questions_total", **ok) == 1
    tokens = {"provider": "doubao", "source": "vendor"}
    assert one(found, "mogine_tokens_total", **tokens, direction="in") == 1000
    assert one(found, "mogine_tokens_total", **tokens, direction="out") == 500
    cost = (1000 * 3 + 500 * 15) / 1e6
    assert one(found, "mogine_cost_cny_total", provider="doubao") == pytest.approx(cost)
    assert one(found, "mogine_budget_used_ratio") == pytest.approx(cost)
    assert one(found, "mogine_upstream_errors_total", provider="doubao", kind="error") == 1
    assert one(found, "mogine_upstream_retries_total", provider="doubao") == 2
    assert one(found, "mogine_breaker_open", provider="doubao") == 0
    assert one(found, "mogine_keys", provider="doubao") == 1
    assert one(found, "mogine_rows_stored_total") == 2
    assert one(found, "mogine_rows_spooled") == 0
    assert one(found, "mogine_first_token_seconds_count", provider="doubao") == 1
    assert one(found, "mogine_answer_seconds_bucket", provider="doubao", le="+Inf") == 1


async def test_open_streams_are_counted_while_they_are_open(serve: Start) -> None:
    async with DoubaoFake(script(say("一"), hang())) as fake:
        served = await serve(env={**fake.environ, "DOUBAO_MODEL": MODEL})
        task = asyncio.create_task(served.post("/api/llm/doubao", question(stream=True)))
        await served.until(lambda: served.answers == 1)
        assert one(await numbers(served), "mogine_streams_open") == 1
        task.cancel()
        await served.until(lambda: served.answers == 0)
        assert one(await numbers(served), "mogine_streams_open") == 0


@pytest.mark.parametrize("server", ["proxy", "kb", "analytics"])
async def test_metrics_are_for_this_machine_and_the_admin(server: str, serve: Start) -> None:
    served = await serve(server)
    assert (await served.ask("GET", "/metrics", server=server)).status == 200
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        passed_on = {header: "127.0.0.1"}
        reply = await served.ask("GET", "/metrics", server=server, headers=passed_on)
        assert_envelope(reply, 401, "unauthorized")
        admin = {**passed_on, "Authorization": f"Bearer {ADMIN_TOKEN}"}
        assert (await served.ask("GET", "/metrics", server=server, headers=admin)).status == 200


def test_snapshots_add_up_and_survive_the_way_between_processes() -> None:
    one_process, other = Snapshot(), Snapshot()
    for found, count in ((one_process, 2), (other, 3)):
        found.add("mogine_questions", ("llm", "doubao", "ok", ""), count)
        found.add("mogine_streams_open", (), count)
        found.add("mogine_keys", ("doubao",), 2)
        found.histograms[("mogine_answer_seconds", "doubao")] = [float(count)] * 14
    total = Snapshot()
    total.merge(one_process)
    total.merge(Snapshot.from_json(other.to_json()))
    assert total.values == {
        ("mogine_questions", ("llm", "doubao", "ok", "")): 5,
        ("mogine_streams_open", ()): 5,
        ("mogine_keys", ("doubao",)): 2,
    }
    gone = Snapshot()
    gone.merge(other, counters_only=True)
    assert list(gone.values) == [("mogine_questions", ("llm", "doubao", "ok", ""))]
    assert b'mogine_answer_seconds_bucket{le="+Inf",provider="doubao"} 65.0' in render(total)
