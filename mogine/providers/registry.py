"""All providers there are, and the ones that this home can ask."""

import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from mogine.chat import Provider
from mogine.providers import dashscope, doubao, openai
from mogine.providers.care import Peers
from mogine.providers.extract import ExtractProvider
from mogine.providers.vendor import VendorProvider
from mogine.settings import Settings
from mogine.upstream import Client, Limits, open_client

VENDORS: Mapping[str, Callable[[Settings, Client], VendorProvider]] = {
    "doubao": lambda settings, client: doubao.provider(settings.doubao, client),
    "dashscope": lambda settings, client: dashscope.provider(settings.dashscope, client),
    "openai": lambda settings, client: openai.provider(settings.openai, client),
}


class Roster(Mapping[str, Provider]):
    """Name to provider, for every vendor with credentials and `extract`; changes when the settings do."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self._client = client
        self._providers: dict[str, Provider] = {}
        self._peers: Callable[[str], Peers] | None = None
        self.settings = settings
        self.renew(settings)

    def __getitem__(self, name: str) -> Provider:
        return self._providers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._providers)

    def __len__(self) -> int:
        return len(self._providers)

    @property
    def vendors(self) -> Iterator[VendorProvider]:
        """Those that are asked over the network."""
        return (p for p in self._providers.values() if isinstance(p, VendorProvider))

    def join(self, peers: Callable[[str], Peers] | None) -> None:
        """From here on what is learnt of a vendor is told to `peers(its name)`."""
        self._peers = peers
        for vendor in self.vendors:
            vendor.care.peers = peers and peers(vendor.name)

    def renew(self, settings: Settings) -> None:
        """Follow `settings` from the next question on; running answers are not disturbed."""
        before, self.settings = self.settings, settings
        providers: dict[str, Provider] = {}
        for name, make in VENDORS.items():
            if not settings.has_credentials(name):
                continue
            known = self._providers.get(name)
            old, new = getattr(before, name), getattr(settings, name)
            if isinstance(known, VendorProvider) and replace(old, keys=new.keys) == new:
                if old.keys != new.keys:
                    known.care.keys.replace(new.keys)
                providers[name] = known
            else:
                providers[name] = make(settings, self._client)
        self._providers = {**providers, "extract": ExtractProvider()}
        self.join(self._peers)


@asynccontextmanager
async def open_providers(settings: Settings, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Roster]:
    """The providers of a home; one pool of connections for all."""
    proxy = settings.proxy
    limits = Limits(
        connect_s=proxy.connect_timeout_s,
        first_byte_s=proxy.first_byte_timeout_s,
        idle_s=proxy.idle_timeout_s,
        answer_s=proxy.answer_timeout_s,
    )
    async with open_client(limits, tls=tls) as client:
        yield Roster(settings, client)
