"""All providers there are, and the ones that this home can ask."""

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from mogine.chat import Provider
from mogine.providers import dashscope, doubao, openai
from mogine.providers.extract import ExtractProvider
from mogine.settings import Settings
from mogine.upstream import Client, Limits, open_client

VENDORS: Mapping[str, Callable[[Settings, Client], Provider]] = {
    "doubao": lambda settings, client: doubao.provider(settings.doubao, client),
    "dashscope": lambda settings, client: dashscope.provider(settings.dashscope, client),
    "openai": lambda settings, client: openai.provider(settings.openai, client),
}


@asynccontextmanager
async def open_providers(
    settings: Settings, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Mapping[str, Provider]]:
    """Name to provider, for every vendor with credentials and `extract`; one pool of connections for all."""
    proxy = settings.proxy
    limits = Limits(
        connect_s=proxy.connect_timeout_s,
        first_byte_s=proxy.first_byte_timeout_s,
        idle_s=proxy.idle_timeout_s,
        answer_s=proxy.answer_timeout_s,
    )
    async with open_client(limits, tls=tls) as client:
        providers: dict[str, Provider] = {
            name: make(settings, client) for name, make in VENDORS.items() if settings.has_credentials(name)
        }
        yield {**providers, "extract": ExtractProvider()}
