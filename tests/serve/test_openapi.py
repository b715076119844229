"""The servers do what mogine/data/openapi.json says: every route is in it, every answer as it tells."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.serve import runner
from mogine.serve.openapi import document
from mogine.settings import load_settings
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import Start
from tests.servers import ADMIN_TOKEN, DEFAULTS

DOCUMENT = json.loads(document())
METHODS = {"get", "post", "delete", "put", "patch"}
CASES = 12
UPLOADS = 4  # each makes a generation
# Slow by purpose, and known to be right by their own tests.
LEFT_OUT = {("GET", "/api/probe/ticks")}
NAMES = {
    *("not_a_server_error", "status_code_conformance"),
    *("content_type_conformance", "response_schema_conformance"),
}


def operations() -> list[tuple[str, str, str]]:
    """Server, method and path of everything in the document; what every server has is asked of the proxy."""
    ports = {"8741": "proxy", "8739": "kb", "8742": "analytics"}
    return [
        (ports[item["servers"][0]["url"].rpartition(":")[2]], method.upper(), path)
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method in METHODS
    ]


@pytest.mark.parametrize("name", ["proxy", "kb", "analytics"])
async def test_every_route_is_in_the_document_and_nothing_else(serve: Start, name: str) -> None:
    served = await serve(name)
    routes = set()
    for resource in served.running.apps[name].router.resources():
        path = resource.canonical
        if not path.startswith(("/chat", "/shared", "/widget", "/dashboard", "/vendor")) and path != "/":
            routes |= {(route.method, path) for route in resource if route.method != "HEAD"}
    common = {("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")}
    told = {(method, path) for server, method, path in operations() if server == name} | common
    assert routes == told, "correct mogine/data/openapi.json"


async def test_every_server_hands_it_out(serve: Start) -> None:
    served = await serve("analytics", "kb", "proxy")
    for name in ("analytics", "kb", "proxy"):
        reply = await served.ask("GET", "/openapi.json", server=name)
        assert reply.json == DOCUMENT and reply.headers["Content-Type"] == "application/json"


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The three servers, in a loop and thread of their own: schemathesis asks as blocking clients do."""
    home = tmp_path_factory.mktemp("home")
    (home / "site.toml").write_text('[company]\nname = "松涧"\n')
    found = load_settings({**DEFAULTS, "MOGINE_ADMIN_TOKEN": ADMIN_TOKEN}, home)
    take_in(Generations(found.kb_path), NoEmbedder(), make_document("docs/a.md", "退款 三天到账"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = runner.started(found, ("analytics", "kb", "proxy"))
    running = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
    yield {name: running.url(name) for name in running.names}
    asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.parametrize(("server", "method", "path"), [o for o in operations() if o[1:] not in LEFT_OUT])
def test_answers_are_as_the_document_tells(urls: dict[str, str], server: str, method: str, path: str) -> None:
    checks = [check for check in CHECKS.get_all() if check.__name__ in NAMES]
    assert len(checks) == len(NAMES)

    @settings(
        max_examples=UPLOADS if (method, path) == ("POST", "/api/documents") else CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=SCHEMA[path][method].as_strategy())
    def asked(case: Any) -> None:
        if "provider" in (case.path_parameters or {}):
            case.path_parameters["provider"] = "extract"  # the others have no key here, and say so with a 503
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        response = case.call(base_url=urls[server], headers=headers, timeout=20)
        case.validate_response(response, checks=checks)

    asked()
