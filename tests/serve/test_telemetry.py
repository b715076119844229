"""Traces of OpenTelemetry, as a real collector takes them from servers that run as in production."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mogine.errors import SettingsError
from mogine.serve.middlewares import TRACING
from mogine.settings import load_settings
from tests.conftest import clean_environ
from tests.fronts.nginx import PREFIX, Fronted
from tests.serve.conftest import Start, question
from tests.serve.test_behind_nginx import ask, browser
from tests.serve.test_proxy_chat import CHAT, REFUNDS, knowing, take_in
from tests.serve.test_proxy_leaving import Visitor
from tests.servers import Spawn
from tests.upstreams.collector import Collector, Span
from tests.upstreams.doubao import KEY, MODEL, DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.raw import closed_port
from tests.upstreams.script import fail, hang, pause, refuse, say, script, think, usage

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
PLAY = script(think("查"), say("三个工作日", "[1]。"), usage(40, 9, reasoning=3))
ASK = {"question": "退款多久到账？"}
LLM = "/api/llm/doubao"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that gets spans at once; the library reads these two from the process alone."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    async with Collector() as running:
        yield running


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(PLAY) as fake:
        yield fake


def traced(collector: Collector, *fakes: DoubaoFake | OpenAIFake, **more: str) -> dict[str, str]:
    """Settings with traces on."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **more}
    for fake in fakes:
        env |= fake.environ
    return env


def by_name(spans: list[Span]) -> Mapping[str, Span]:
    assert len({span.name for span in spans}) == len(spans), spans
    return {span.name: span for span in spans}


# --- one question, one trace --------------------------------------------------------------------------


async def test_a_question_is_one_trace_from_its_caller_through_both_processes_to_the_vendor(
    spawn: Spawn, nginx: Fronted, home: Path, doubao: DoubaoFake
) -> None:
    """Through a real nginx; proxy and knowledge base are processes of their own."""
    take_in(home, refunds=REFUNDS)
    async with Collector() as collector:
        env = traced(collector, doubao, OTEL_BSP_SCHEDULE_DELAY="20", MOGINE_BASE_PATH=PREFIX)
        kb = await spawn("kb", env)
        proxy = await spawn("proxy", {**env, "MOGINE_KB_URL": kb.url("knowledge base")})
        front = nginx(proxy.port())
        async with browser(front) as session:
            reply = await ask(session, front, "api/chat", ASK, **CALLER)
        spans = by_name(await collector.until(4))
    asked, search, found, call = (
        spans[name]
        for name in (f"POST {CHAT}", "retrieval knowledge_base", "GET /api/search", f"chat {MODEL}")
    )
    assert {span.trace for span in spans.values()} == {TRACE}
    assert [asked.parent, search.parent, found.parent, call.parent] == [PARENT, asked.id, search.id, asked.id]
    assert [s.kind for s in (asked, search, found, call)] == ["server", "client", "server", "client"]
    assert [s.service for s in (asked, search, found, call)] == [
        *("mogine-proxy", "mogine-proxy", "mogine-kb", "mogine-proxy")
    ]
    assert not any(span.is_error for span in spans.values())
    assert asked.began_ns <= search.began_ns <= found.began_ns <= found.ended_ns <= search.ended_ns
    assert search.ended_ns <= call.began_ns <= call.ended_ns <= asked.ended_ns
    assert asked.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.path": CHAT,
        "url.scheme": "http",
        "http.response.status_code": 200,
        "mogine.request_id": reply.headers["X-Request-Id"],
        "mogine.status": "ok",
        "mogine.kind": "chat",
        "mogine.provider": "doubao",
        "mogine.answered": "yes",
        "mogine.citations": 1,
        "mogine.bot": False,
        "mogine.first_token_ms": asked.attributes["mogine.first_token_ms"],
        "mogine.cost_cny": asked.attributes["mogine.cost_cny"],
    }
    assert search.attributes == {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.data_source.id": "knowledge_base",
        "gen_ai.request.top_k": 4.0,
        "server.address": "127.0.0.1",
        "server.port": kb.port("knowledge base"),
        "mogine.kb.hits": 1,
        "mogine.kb.generation": search.attributes["mogine.kb.generation"],
    }
    assert found.attributes["url.path"] == found.attributes["http.route"] == "/api/search"
    told = dict(call.attributes)
    assert 0 <= told.pop("gen_ai.response.time_to_first_chunk") * 1e9 <= call.ended_ns - call.began_ns + 1e6
    assert told.pop("mogine.cost_cny") > 0
    assert told.pop("gen_ai.conversation.id") == told.pop("session.id") != ""
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "doubao",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 2048,
        "gen_ai.response.model": MODEL,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "server.address": "127.0.0.1",
        "server.port": doubao.port,
        "mogine.status": "ok",
        "mogine.tokens_estimated": False,
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (LLM, question(stream=True, temperature=0.5, stop=["。"])),
        (LLM, question()),
        ("/v1/chat/completions", question(model="doubao", stream=True)),
    ],
)
async def test_a_question_to_a_model_alone_is_a_trace_too(
    path: str, body: Any, serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    served = await serve(env=traced(collector, doubao))
    assert (await served.post(path, body)).status == 200
    asked, call = await collector.until(2)
    assert (asked.parent, call.parent, call.trace) == ("", asked.id, asked.trace)
    assert call.attributes["gen_ai.usage.output_tokens"] == 9
    assert call.attributes["gen_ai.request.stream"] is bool(body.get("stream"))
    assert ("gen_ai.response.time_to_first_chunk" in call.attributes) is bool(body.get("stream"))
    assert call.attributes.get("gen_ai.request.temperature") == body.get("temperature")
    assert call.attributes.get("gen_ai.request.stop_sequences") == body.get("stop")


async def test_a_vendor_is_told_of_a_trace_only_when_the_caller_brought_it(
    serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    """And then of the span that calls it, as the next one below."""
    served = await serve(env=traced(collector, doubao))
    for path, body in ((LLM, question()), (CHAT, ASK)):
        await served.post(path, body)
        await served.post(path, body, headers=CALLER)
    spans = await collector.until(10)
    told = [request.headers.get("traceparent", "") for request in doubao.requests]
    calls = [span.id for span in spans if span.name == f"chat {MODEL}" and span.trace == TRACE]
    assert told == ["", f"00-{TRACE}-{calls[0]}-01", "", f"00-{TRACE}-{calls[1]}-01"]


async def test_the_log_names_the_trace_that_begins_here(
    serve: Start, collector: Collector, doubao: DoubaoFake, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(env=traced(collector, doubao))
    with caplog.at_level("INFO", "mogine.access"):
        await served.post(LLM, question())
        asked, _ = await collector.until(2)
        await served.until(lambda: f"trace={asked.trace}" in caplog.text)


async def test_pages_and_health_are_not_traced(
    serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    served = await serve(env=traced(collector, doubao))
    for path in ("/chat/", "/widget.js", "/healthz", "/readyz", "/api/chat/config", "/nothing"):
        await served.ask("GET", path)
    await served.ask("GET", "/v1/models")
    await served.post(LLM, question())
    spans = await collector.until(3)
    assert [span.name for span in spans] == ["GET /v1/models", "POST /api/llm/{provider}", f"chat {MODEL}"]


# --- how it ended -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LLM, CHAT])
async def test_an_error_of_the_vendor_is_an_error_of_both_spans(
    path: str, serve: Start, collector: Collector
) -> None:
    async with DoubaoFake(script(say("三"), fail(500))) as fake:
        served = await serve(env={**traced(collector, fake), "MOGINE_PROVIDERS": "doubao"})
        body = ASK if path == CHAT else question(stream=True)
        reply = await served.post(path, body)
        assert reply.status == 200  # the error comes in the stream
        spans = await collector.until(3 if path == CHAT else 2)
    asked, call = spans[0], spans[-1]
    for span in (asked, call):
        assert span.is_error
        assert span.attributes["error.type"] == span.attributes["mogine.reason"] == "upstream_error"
        assert span.attributes["mogine.status"] == "error"
    assert call.attributes["mogine.tokens_estimated"] is True


async def test_a_vendor_that_refuses_is_an_error_with_its_status(serve: Start, collector: Collector) -> None:
    async with DoubaoFake(script(refuse(401))) as fake:
        served = await serve(env=traced(collector, fake))
        assert (await served.post(LLM, question())).status == 502
        asked, call = await collector.until(2)
    assert (asked.is_error, asked.attributes["http.response.status_code"]) == (True, 502)
    assert (call.is_error, call.attributes["error.type"]) == (True, "upstream_refused")


async def test_a_question_that_is_refused_is_no_error_of_ours(
    serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    served = await serve(env={**traced(collector, doubao), "MOGINE_RATE_LIMIT": "1/hour"})
    await served.post(LLM, question())
    assert (await served.post(LLM, question())).status == 429
    refused = (await collector.until(3))[-1]
    assert (refused.is_error, refused.attributes["http.response.status_code"]) == (False, 429)
    assert refused.attributes["mogine.reason"] == "rate_limited"
    assert (refused.attributes["mogine.status"], "error.type" in refused.attributes) == ("refused", False)


async def test_a_visitor_who_leaves_is_no_error(serve: Start, collector: Collector) -> None:
    async with DoubaoFake(script(say("三个工作日"), hang())) as fake:
        served = await serve(env=traced(collector, fake))
        visitor = await Visitor.asking(served, LLM, question(stream=True))
        await visitor.read_until("三个工作日".encode())
        visitor.leave()
        asked, call = await collector.until(2)
    for span in (asked, call):
        assert not span.is_error
        assert (span.attributes["mogine.status"], span.attributes["mogine.reason"]) == (
            "aborted",
            "client_left",
        )
    assert "http.response.status_code" not in asked.attributes
    assert call.attributes["mogine.tokens_estimated"] is True
    assert call.attributes["gen_ai.usage.output_tokens"] > 0
    assert "gen_ai.response.time_to_first_chunk" in call.attributes


@pytest.mark.parametrize("path", ["/v1/chat/completions", CHAT])
async def test_fail_over_is_a_failed_call_and_the_one_that_answers(
    path: str, serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    async with OpenAIFake(script(refuse(500))) as broken:
        env = {**traced(collector, broken, doubao), "MOGINE_PROVIDERS": "openai,doubao"}
        served = await serve(env=env)
        body = ASK if path == CHAT else question(model="auto", stream=True)
        assert (await served.post(path, body)).status == 200
        spans = await collector.until(4 if path == CHAT else 3)
    asked, (failed, answered) = spans[0], spans[-2:]
    assert failed.attributes["gen_ai.provider.name"] == "openai"
    assert (failed.is_error, failed.attributes["error.type"]) == (True, "upstream_error")
    assert failed.attributes["server.port"] == broken.port
    assert answered.attributes["gen_ai.provider.name"] == "doubao"
    assert (answered.is_error, answered.attributes["gen_ai.usage.input_tokens"]) == (False, 40)
    assert failed.ended_ns <= answered.began_ns
    assert failed.parent == answered.parent == asked.id
    assert (asked.is_error, asked.attributes["mogine.provider"]) == (False, "doubao")


async def test_a_knowledge_base_that_is_away_is_an_error_of_the_search_alone(
    serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}"
        served = await serve(env={**traced(collector, doubao), "MOGINE_KB_URL": url})
        assert (await served.post(CHAT, ASK)).status == 200
    asked, search, call = await collector.until(3)
    assert [span.is_error for span in (asked, search, call)] == [False, True, False]
    assert search.attributes["error.type"] == "kb_unavailable"


async def test_a_vendor_that_has_moved_is_named_by_its_new_address(
    serve: Start, home: Path, collector: Collector, doubao: DoubaoFake
) -> None:
    env = home / ".env"
    env.write_text("".join(f"{name}={value}\n" for name, value in doubao.environ.items()))
    served = await serve(env=traced(collector))
    async with DoubaoFake(PLAY) as moved:
        env.write_text("".join(f"{name}={value}\n" for name, value in moved.environ.items()))
        served.running.hang_up()
        await served.post(LLM, question())
        _, call = await collector.until(2)
    assert (len(doubao.requests), call.attributes["server.port"]) == (0, moved.port)


async def test_every_worker_sends_its_spans(spawn: Spawn, doubao: DoubaoFake) -> None:
    async with Collector() as collector:
        env = traced(collector, doubao, OTEL_BSP_SCHEDULE_DELAY="20")
        proxy = await spawn("proxy", env, "--workers", "2")
        for _ in range(8):
            visitor = await Visitor.asking(proxy, LLM, question(stream=True))
            await visitor.read_until(b"[DONE]")
            visitor.leave()
        spans = await collector.until(16)
    assert len({span.trace for span in spans}) == 8


async def test_quoted_answers_call_no_vendor(serve: Start, home: Path, collector: Collector) -> None:
    served = await knowing(serve, home, traced(collector))
    await served.post(CHAT, ASK)
    spans = by_name(await collector.until(3))
    assert set(spans) == {f"POST {CHAT}", "retrieval knowledge_base", "GET /api/search"}
    assert spans[f"POST {CHAT}"].attributes["mogine.provider"] == "extract"


async def test_an_answer_that_is_read_on_the_next_page_is_traced_to_its_end(
    serve: Start, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    async with DoubaoFake(script(say("三"), pause(0.2), say("日"), usage(40, 9))) as fake:
        served = await serve(env=traced(collector, fake))
        visitor = await Visitor.asking(served, CHAT, {**ASK, "resume": True})
        await visitor.read_until("三".encode())
        visitor.leave()
        spans = by_name(await collector.until(3))
    asked, call = spans[f"POST {CHAT}"], spans[f"chat {MODEL}"]
    assert call.parent == asked.id and call.ended_ns > asked.ended_ns
    assert (call.attributes["mogine.status"], call.attributes["gen_ai.usage.output_tokens"]) == ("ok", 9)
    assert "opentelemetry" not in {record.name.partition(".")[0] for record in caplog.records}


# --- which questions ----------------------------------------------------------------------------------


async def test_a_caller_that_is_not_sampled_is_not_traced_here_nor_in_the_knowledge_base(
    serve: Start, home: Path, collector: Collector, doubao: DoubaoFake
) -> None:
    served = await knowing(serve, home, traced(collector, doubao))
    for flags in ("00", "01"):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
        assert (await served.post(CHAT, ASK, headers=headers)).status == 200
    await collector.until(4)
    await asyncio.sleep(0.1)
    assert [span.name for span in collector.spans if span.kind == "server"].count(f"POST {CHAT}") == 1
    assert len(collector.spans) == 4
    assert doubao.requests[0].headers["traceparent"].endswith("-00")


@pytest.mark.parametrize(
    ("sampler", "share", "flags", "count"),
    [
        ("always_off", "1", "01", 0),
        ("always_on", "1", "00", 2),
        ("traceidratio", "0", "01", 0),
        ("parentbased_traceidratio", "0", "01", 2),
        ("parentbased_always_off", "1", None, 0),
    ],
)
async def test_the_sampler_decides(
    sampler: str,
    share: str,
    flags: str | None,
    count: int,
    serve: Start,
    collector: Collector,
    doubao: DoubaoFake,
) -> None:
    env = traced(collector, doubao, OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=share)
    served = await serve(env=env)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"} if flags else {}
    await served.post(LLM, question(), headers=headers)
    await collector.until(count)
    await asyncio.sleep(0.1)
    assert len(collector.spans) == count


# --- what is told -------------------------------------------------------------------------------------

PHONE = "13800138000"
SECRETIVE = {"question": f"退款多久到账？请打 {PHONE}"}


async def test_no_words_addresses_or_keys_leave_in_a_trace(
    serve: Start, home: Path, collector: Collector, doubao: DoubaoFake
) -> None:
    """P18, B23."""
    served = await knowing(serve, home, traced(collector, doubao))
    headers = {"X-Forwarded-For": "203.0.113.9", "User-Agent": "Browser/1", "Referer": "https://a.example/"}
    await served.post(CHAT, SECRETIVE, headers=headers)
    await collector.until(4)
    sent = b"".join(collector.bodies)
    for word in ("退款", "三个工作日", PHONE, "203.0.113.9", "Browser/1", "a.example", KEY, REFUNDS):
        assert word.encode() not in sent, word


async def test_words_that_are_wanted_are_masked_as_in_the_record(
    serve: Start, home: Path, collector: Collector
) -> None:
    async with DoubaoFake(script(say("好的，", f"会打 {PHONE}。"), usage(40, 9))) as fake:
        served = await knowing(serve, home, traced(collector, fake, MOGINE_OTEL_CONTENT="true"))
        await served.post(CHAT, SECRETIVE)
        spans = by_name(await collector.until(4))
        (row,) = await served.rows()
    call = spans[f"chat {MODEL}"].attributes
    assert json.loads(call["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": row.question}]}
    ]
    assert json.loads(call["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": row.answer}]}
    ]
    assert spans["retrieval knowledge_base"].attributes["gen_ai.retrieval.query.text"] == row.question
    assert PHONE.encode() not in b"".join(collector.bodies)


async def test_words_that_the_record_may_not_keep_go_nowhere_else(
    serve: Start, home: Path, collector: Collector, doubao: DoubaoFake
) -> None:
    settings = {
        "MOGINE_OTEL_CONTENT": "true",
        "MOGINE_STORE_QUESTIONS": "hash",
        "MOGINE_STORE_ANSWERS": "false",
    }
    served = await knowing(serve, home, traced(collector, doubao, **settings))
    await served.post(CHAT, SECRETIVE)
    spans = by_name(await collector.until(4))
    assert not {"gen_ai.input.messages", "gen_ai.output.messages"} & set(spans[f"chat {MODEL}"].attributes)
    assert "退款".encode() not in b"".join(collector.bodies)


# --- switched on and off ------------------------------------------------------------------------------


async def test_all_of_it_can_stand_in_the_home_s_settings(
    serve: Start, home: Path, collector: Collector, doubao: DoubaoFake
) -> None:
    (home / ".env").write_text(
        f"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT={collector.url}/v1/traces\n"
        "OTEL_EXPORTER_OTLP_HEADERS=Authorization=Basic%20dGVzdC1rZXk=,x-a=b\n"
        "OTEL_SERVICE_NAME=shop\n"
    )
    served = await serve(env=doubao.environ)
    await served.post(LLM, question())
    spans = await collector.until(2)
    assert {span.service for span in spans} == {"shop"}
    assert collector.headers[0]["Authorization"] == "Basic dGVzdC1rZXk="
    assert collector.headers[0]["x-a"] == "b"


async def test_a_name_among_the_attributes_of_the_process_is_taken(
    serve: Start, collector: Collector, doubao: DoubaoFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop-chat,deployment.environment=test")
    served = await serve(env=traced(collector, doubao))
    await served.post(LLM, question())
    assert {span.service for span in await collector.until(2)} == {"shop-chat"}


@pytest.mark.parametrize("disabled", [True, False])
async def test_nothing_is_made_or_sent_when_off(
    disabled: bool, serve: Start, collector: Collector, doubao: DoubaoFake
) -> None:
    env = {**traced(collector), "OTEL_SDK_DISABLED": "true"} if disabled else {}
    served = await serve("kb", "proxy", "analytics", env={**doubao.environ, **env})
    assert (await served.post(CHAT, ASK, headers=CALLER)).status == 200
    assert not any(TRACING in app for app in served.running.apps.values())
    assert doubao.requests[0].headers["traceparent"] == CALLER["traceparent"]
    await asyncio.sleep(0.1)
    assert collector.headers == []


def test_a_proxy_without_traces_imports_none_of_it(home: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from mogine.settings import load_settings\n"
        "from mogine.serve import proxy\n"
        f"proxy.create_app(load_settings({{}}, pathlib.Path({str(home)!r})))\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environ(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mogine.serve.telemetry", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)


@pytest.fixture
def wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")


WHY_NOT = [("no_packages", r"pip install 'mogine\[otel\]'"), ("wrong_number", "an OTEL_ variable of the env")]


@pytest.mark.parametrize(("trouble", "told"), WHY_NOT)
async def test_traces_that_the_home_asks_for_and_cannot_be_made_are_an_error(
    trouble: str, told: str, request: pytest.FixtureRequest, serve: Start, collector: Collector, home: Path
) -> None:
    request.getfixturevalue(trouble)
    (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in traced(collector).items()))
    with pytest.raises(SettingsError, match=told):
        await serve()


@pytest.mark.parametrize(("trouble", "told"), WHY_NOT)
async def test_an_address_for_all_programs_of_the_machine_keeps_none_from_serving(
    trouble: str,
    told: str,
    request: pytest.FixtureRequest,
    serve: Start,
    collector: Collector,
    doubao: DoubaoFake,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request.getfixturevalue(trouble)
    served = await serve(env=traced(collector, doubao))
    assert (await served.post(LLM, question())).status == 200
    assert re.search(f"no traces are sent: .*{told}", caplog.text)
    assert collector.headers == []


def test_names_that_only_the_process_environment_can_set_are_told(home: Path) -> None:
    (home / ".env").write_text("OTEL_BSP_SCHEDULE_DELAY=100\nOTEL_TRACES_SAMPLER=always_on\n")
    (warning,) = load_settings({}, home).warnings
    assert "OTEL_BSP_SCHEDULE_DELAY" in warning and "process environment" in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, home: Path) -> None:
    (warning,) = load_settings({name: value}, home).warnings
    assert name in warning and repr(value) in warning
    (home / ".env").write_text(f"{name}={value}\n")
    with pytest.raises(SettingsError, match=name):
        load_settings({}, home)


# --- a collector in trouble -----------------------------------------------------------------------------


async def test_a_collector_that_is_away_costs_one_warning_and_no_answer(
    serve: Start, collector: Collector, doubao: DoubaoFake, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told again when spans arrive again."""
    async with Collector() as away:
        pass
    served = await serve(env=traced(away, doubao))
    for _ in range(5):
        assert (await served.post(LLM, question())).status == 200
        await asyncio.sleep(0.05)
    await served.until(lambda: "traces cannot be sent" in caplog.text)
    await served.post(LLM, question())
    await asyncio.sleep(0.4)
    told = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert [r.name for r in told] == ["mogine.serve.telemetry"], told
    assert away.url in told[0].getMessage()
    with caplog.at_level("INFO", "mogine"):
        async with away:
            await served.post(LLM, question())
            await away.until(2)
            await served.until(lambda: "traces are sent again" in caplog.text)


async def test_a_collector_that_refuses_is_told_with_its_status(
    serve: Start, collector: Collector, doubao: DoubaoFake, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 401
    served = await serve(env=traced(collector, doubao))
    await served.post(LLM, question())
    await served.until(lambda: "traces cannot be sent" in caplog.text)
    assert "401" in caplog.text


async def test_a_collector_that_hangs_holds_up_neither_answers_nor_the_end(
    spawn: Spawn, doubao: DoubaoFake
) -> None:
    async with Collector() as collector:
        collector.hangs = True
        env = {**traced(collector, doubao), "OTEL_BSP_SCHEDULE_DELAY": "20"}
        proxy = await spawn("proxy", env)
        for _ in range(3):
            visitor = await Visitor.asking(proxy, LLM, question(stream=True))
            await visitor.read_until(b"[DONE]")
            visitor.leave()
        await asyncio.sleep(0.1)
        proxy.process.terminate()
        assert await proxy.ended() == 0
    assert "the last traces were not taken" in proxy.stderr
    assert "Traceback" not in proxy.stderr
