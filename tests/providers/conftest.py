"""Providers that ask a fake on loopback, with retries that do not wait."""

from collections.abc import AsyncIterator, Callable

import pytest

from mogine.providers import dashscope, doubao, openai
from mogine.providers.vendor import NEVER_HEALS, VendorProvider
from mogine.settings import DashScopeSettings, DoubaoSettings, OpenAISettings
from mogine.upstream import Client, Limits, Retries, open_client
from tests.upstreams.doubao import MODEL
from tests.upstreams.server import Fake

Ask = Callable[..., VendorProvider]
APP_ID = "test-app-dashscope"


async def no_sleep(_: float) -> None:
    """Retries are about how often, not how long."""


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    limits = Limits(connect_s=5, first_byte_s=5, idle_s=5, answer_s=10)
    async with open_client(limits) as client:
        yield client


def retries() -> Retries:
    return Retries(never=NEVER_HEALS, sleep=no_sleep)


@pytest.fixture
def ark(client: Client) -> Ask:
    def make(fake: Fake, model: str = MODEL) -> VendorProvider:
        settings = DoubaoSettings(("test-key-doubao",), fake.base_url, model)
        return doubao.provider(settings, client, retries())

    return make


@pytest.fixture
def app(client: Client) -> Ask:
    def make(fake: Fake) -> VendorProvider:
        settings = DashScopeSettings(("test-key-dashscope",), APP_ID, fake.base_url)
        return dashscope.provider(settings, client, retries())

    return make


@pytest.fixture
def server(client: Client) -> Ask:
    def make(fake: Fake) -> VendorProvider:
        settings = OpenAISettings((), fake.base_url, "tiny")
        return openai.provider(settings, client, retries())

    return make
