"""What answers cost: the shipped table of prices, and the owner's own entries that win over it."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import resources
from math import inf
from typing import Any

from mogine.chat import Usage
from mogine.errors import SettingsError

ANY = "*"
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Tier:
    """CNY per million tokens, for questions of at most these sizes."""

    input: float
    output: float
    cached: float
    up_to_input: float = inf
    up_to_output: float = inf


@dataclass(frozen=True, slots=True)
class Price:
    """What one model costs from a day on. `provider` "*": of any provider."""

    provider: str
    model: str
    valid_from: date
    tiers: tuple[Tier, ...]
    certain: bool = True

    def holds_for(self, provider: str, model: str) -> bool:
        """Whether the entry is about that model."""
        if self.provider not in (ANY, provider):
            return False
        return self.model in (ANY, model) or model.startswith(f"{self.model}-")

    def cost_cny(self, usage: Usage) -> float:
        """What `usage` costs."""
        for tier in self.tiers:
            if usage.prompt_tokens <= tier.up_to_input and usage.completion_tokens <= tier.up_to_output:
                break
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        total = (
            (usage.prompt_tokens - cached) * tier.input
            + cached * tier.cached
            + usage.completion_tokens * tier.output
        )
        return round(total / MILLION, 8)


class Prices:
    """The table; `own` are the entries of `site.toml`, `[prices."MODEL"]`."""

    def __init__(self, shipped: Sequence[Price], own: Sequence[Price] = ()) -> None:
        self._tables = (tuple(own), tuple(shipped))
        self._known: dict[tuple[str, str, date], Price | None] = {}

    def renew(self, own: Sequence[Price]) -> None:
        """From now on these are the owner's entries."""
        self._tables = (tuple(own), self._tables[1])
        self._known.clear()

    def find(self, provider: str, model: str, day: date) -> Price | None:
        """The entry for a model on a day; None when nothing is known."""
        key = (provider, model, day)
        if key not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            found = (_best(table, provider, model, day) for table in self._tables)
            self._known[key] = next((price for price in found if price is not None), None)
        return self._known[key]


def _best(table: Iterable[Price], provider: str, model: str, day: date) -> Price | None:
    fitting = [price for price in table if price.holds_for(provider, model)]
    # A price that is not valid yet is better than none: prices fall more often than they rise.
    return max(
        fitting,
        key=lambda p: (
            p.model != ANY,
            len(p.model),
            p.valid_from <= day,
            p.valid_from.toordinal() if p.valid_from <= day else -p.valid_from.toordinal(),
        ),
        default=None,
    )


@cache
def shipped_prices() -> tuple[Price, ...]:
    """The table that came with this version."""
    text = (resources.files("mogine") / "data/prices.toml").read_text("utf-8")
    return tuple(
        _price(entry, str(entry["provider"]), str(entry["model"])) for entry in tomllib.loads(text)["price"]
    )


def own_prices(table: Mapping[str, Any]) -> tuple[Price, ...]:
    """`[prices]` of `site.toml`. Raises SettingsError that names the entry."""
    found = []
    for model, entry in table.items():
        try:
            if not isinstance(entry, dict):
                raise ValueError("expected a table with input and output")
            found.append(_price(entry, str(entry.get("provider", ANY)), model))
        except (ValueError, TypeError, KeyError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise SettingsError(f'site.toml, [prices."{model}"]: {what}') from error
    return tuple(found)


def _price(entry: Mapping[str, Any], provider: str, model: str) -> Price:
    valid_from = entry.get("valid_from", date(2000, 1, 1))
    if not isinstance(valid_from, date):
        raise ValueError("valid_from must be a day such as 2026-08-27")
    tiers = entry.get("tiers", [entry])
    if not isinstance(tiers, list) or not tiers:
        raise ValueError("tiers must be a list with at least one entry")
    return Price(provider, model, valid_from, tuple(map(_tier, tiers)), bool(entry.get("certain", True)))


def _tier(entry: Mapping[str, Any]) -> Tier:
    return Tier(
        _number(entry, "input"),
        _number(entry, "output"),
        _number(entry, "cached", _number(entry, "input")),
        _number(entry, "up_to_input", inf),
        _number(entry, "up_to_output", inf),
    )


def _number(entry: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = entry[name] if default is None else entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{name} must be a number that is not negative")
    return float(value)
