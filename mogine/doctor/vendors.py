"""Whether the vendors can be reached from here, agree on the time, and take the keys."""

import asyncio
import email.utils
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx

from mogine.doctor.line import Line, error, ok, warning
from mogine.providers.care import shown
from mogine.providers.trial import try_key
from mogine.settings import PROVIDER_NAMES, Settings

REACH_S = 5.0
SKEW_S = 60.0


def reachable(settings: Settings) -> Iterator[Line]:
    """One look at the address of each vendor that is set up, without a key."""
    for name in PROVIDER_NAMES:
        if name != "extract" and settings.has_credentials(name):
            yield from _reach(name, getattr(settings, name).base_url)


def taken(settings: Settings) -> Iterator[Line]:
    """One question of one token with each key; it costs a fraction of a cent."""
    for name in PROVIDER_NAMES:
        if name == "extract" or not settings.has_credentials(name):
            continue
        for key in getattr(settings, name).keys or ("",):
            trial = asyncio.run(try_key(settings, name, key))
            which = f"key {shown(key)}" if key else "no key"
            if trial.problem:
                yield error(
                    f"key {name}",
                    f"{which}: {trial.problem}",
                    f"`mogine keys set {name}`; the vendor's console shows keys and models",
                )
            else:
                yield ok(f"key {name}", f"{which} was taken, {trial.took_ms} ms")


def _reach(name: str, address: str) -> Iterator[Line]:
    label = f"vendor {name}"
    try:
        answer = httpx.head(address, timeout=REACH_S, trust_env=False, follow_redirects=False)
    except httpx.TransportError as problem:
        yield error(
            label,
            f"{address} cannot be reached ({type(problem).__name__})",
            f"does this machine have a network, and a firewall that lets it out? curl -I {address}",
        )
        return
    yield ok(label, f"{httpx.URL(address).host} can be reached")
    sent = email.utils.parsedate_to_datetime(answer.headers["date"]) if "date" in answer.headers else None
    if sent is None:
        return
    skew_s = (datetime.now(UTC) - sent.astimezone(UTC)).total_seconds()
    if abs(skew_s) > SKEW_S:
        way = "ahead of" if skew_s > 0 else "behind"
        yield warning(
            "clock",
            f"this machine is {abs(skew_s):.0f} s {way} {httpx.URL(address).host}",
            "let it keep time: timedatectl set-ntp true; days and cleanup go by this clock",
        )
    else:
        yield ok("clock", f"agrees with {httpx.URL(address).host} within {SKEW_S:.0f} s")
