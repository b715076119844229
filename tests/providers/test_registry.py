"""Which providers a home has."""

from pathlib import Path

import pytest

from mogine.errors import UpstreamUnreachable
from mogine.providers.registry import VENDORS, open_providers
from mogine.settings import PROVIDER_NAMES, load_settings
from tests.providers.outcome import ask, question
from tests.upstreams.dashscope import DashScopeFake
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.openai_like import OpenAIFake
from tests.upstreams.raw import closed_port
from tests.upstreams.script import say, script


def test_every_provider_of_the_settings_is_registered() -> None:
    assert (*VENDORS, "extract") == PROVIDER_NAMES


async def test_a_fresh_home_has_extract_alone(home: Path) -> None:
    async with open_providers(load_settings({}, home)) as providers:
        assert list(providers) == ["extract"]
        assert (providers["extract"].name, providers["extract"].dialect) == ("extract", "")


async def test_every_vendor_with_credentials_answers(home: Path) -> None:
    play = script(say("好"))
    async with DoubaoFake(play) as ark, DashScopeFake(play) as app, OpenAIFake(play) as server:
        environ = {**ark.environ, **app.environ, **server.environ, "OPENAI_MODEL": "test-model"}
        async with open_providers(load_settings(environ, home)) as providers:
            assert list(providers) == ["doubao", "dashscope", "openai", "extract"]
            assert [p.dialect for p in providers.values()] == ["openai", "dashscope", "openai", ""]
            assert [p.default_model for p in providers.values()][1:] == ["", "test-model", "extract"]
            for name in ("doubao", "dashscope", "openai"):
                assert providers[name].name == name
                assert (await ask(providers[name])).text == "好"


async def test_limits_come_from_the_settings(home: Path) -> None:
    with closed_port() as port:
        environ = {"DOUBAO_API_KEY": "test-key", "DOUBAO_BASE_URL": f"http://127.0.0.1:{port}"}
        settings = load_settings({**environ, "MOGINE_CONNECT_TIMEOUT": "0.1"}, home)
        async with open_providers(settings) as providers:
            outcome = await ask(providers["doubao"], question(stream=False))
    assert isinstance(outcome.error, UpstreamUnreachable)
    assert outcome.error.message.endswith("check DOUBAO_BASE_URL")


@pytest.mark.parametrize("name", ["doubao", "openai"])
async def test_the_model_of_a_request_wins_over_the_default(home: Path, name: str) -> None:
    async with OpenAIFake(models=()) as fake:
        environ = {"OPENAI_BASE_URL": fake.base_url, "OPENAI_MODEL": "one"}
        environ |= {"DOUBAO_API_KEY": "k", "DOUBAO_BASE_URL": fake.base_url, "DOUBAO_MODEL": "one"}
        async with open_providers(load_settings(environ, home)) as providers:
            await ask(providers[name])
            await ask(providers[name], question(model="two"))
    assert [request.json["model"] for request in fake.requests] == ["one", "two"]
