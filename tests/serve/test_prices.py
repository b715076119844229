"""Prices by model, day and size; the owner's own win."""

from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from mogine.chat import Usage
from mogine.errors import SettingsError
from mogine.serve.desk import DESK
from mogine.serve.prices import Prices, own_prices, shipped_prices
from tests.serve.conftest import Start

TODAY = date(2026, 11, 23)
PRICES = Prices(shipped_prices())


def cost(provider: str, model: str, usage: Usage, prices: Prices = PRICES) -> float:
    price = prices.find(provider, model, TODAY)
    assert price is not None
    return price.cost_cny(usage)


@pytest.mark.parametrize(
    ("model", "usage", "cny"),
    [
        ("doubao-seed-2-1-turbo-260628", Usage(1_000_000, 0), 3.0),
        ("doubao-seed-2-1-turbo-260628", Usage(0, 1_000_000, reasoning_tokens=900_000), 15.0),
        ("doubao-seed-2-1-turbo-260628", Usage(1_000_000, 0, cached_tokens=1_000_000), 0.6),
        ("doubao-seed-2-0-pro-260215", Usage(32_000, 0), 0.1024),
        ("doubao-seed-2-0-pro-260215", Usage(32_001, 0), 0.1536048),
        ("doubao-seed-2-0-pro-260215", Usage(300_000, 0), 2.88),
        ("doubao-seed-1-8-251228", Usage(1000, 200), 0.0012),
        ("doubao-seed-1-8-251228", Usage(1000, 201), 0.002408),
        ("doubao-1-5-thinking-vision-pro-250428", Usage(1_000_000, 1_000_000), 12.0),
        ("doubao-seed-2-1-turbo", Usage(1_000_000, 0), 3.0),
        ("doubao-seed-2-1-turbo2", Usage(1_000_000, 0), 6.0),
        ("ep-20260101-abcde", Usage(1_000_000, 0), 6.0),
    ],
)
def test_the_price_of_a_model_fits_its_release_and_the_questions_size(
    model: str, usage: Usage, cny: float
) -> None:
    assert cost("doubao", model, usage) == pytest.approx(cny)


def test_quotations_cost_nothing_and_a_server_of_ones_own_has_no_known_price() -> None:
    assert cost("extract", "extract", Usage(10, 10)) == 0
    assert PRICES.find("openai", "llama", TODAY) is None
    assert PRICES.find("dashscope", "", TODAY) is not None


def test_what_was_read_of_a_secondary_source_says_so() -> None:
    doubtful = {price.provider for price in shipped_prices() if not price.certain}
    assert doubtful == {"doubao", "dashscope"}
    assert all(not price.certain for price in shipped_prices() if price.provider == "dashscope")


def test_own_prices_win_and_newer_ones_replace_older_on_their_day() -> None:
    own = own_prices({"ep-1": {"input": 1, "output": 2}, "llama": {"input": 0, "output": 0}})
    prices = Prices(shipped_prices(), own)
    assert cost("doubao", "ep-1", Usage(1_000_000, 1_000_000), prices) == 3.0
    assert cost("openai", "llama", Usage(5, 5), prices) == 0
    dated = [
        {"input": 9, "output": 9, "valid_from": date(2026, 1, 1)},
        {"input": 1, "output": 1, "valid_from": date(2027, 1, 1)},
        {"input": 5, "output": 5, "valid_from": date(2026, 6, 1)},
    ]
    table = Prices([own_prices({"m": entry})[0] for entry in dated])
    found = [table.find("x", "m", day) for day in (date(2025, 1, 1), TODAY, date(2027, 1, 1))]
    assert [price and price.tiers[0].input for price in found] == [9, 5, 1]


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"input": 1},
        {"input": -1, "output": 1},
        {"input": True, "output": 1},
        {"input": "1", "output": 1},
        {"tiers": []},
        {"tiers": 7},
        {"input": 1, "output": 1, "valid_from": "soon"},
        {"tiers": [{"input": 1}]},
    ],
)
def test_a_wrong_price_is_told_by_its_name(entry: object) -> None:
    with pytest.raises(SettingsError, match="m1"):
        own_prices({"m1": entry})


async def test_sighup_brings_new_prices_and_a_mistake_leaves_the_old_ones(serve: Start, home: Path) -> None:
    site = home / "site.toml"
    site.write_text('[prices."own-model"]\ninput = 1.0\noutput = 1.0\n')
    served = await serve("proxy")
    books = served.running.apps["proxy"][DESK].books

    def priced() -> float:
        return float(books.cost_cny("openai", "own-model", Usage(1_000_000, 0), datetime.now(UTC)) or 0)

    assert priced() == 1.0
    site.write_text('[prices."own-model"]\ninput = 2.0\noutput = 1.0\n')
    served.running.hang_up()
    assert priced() == 2.0
    site.write_text('[prices."own-model"]\ninput = "much"\noutput = 1.0\n')
    served.running.hang_up()
    assert priced() == 2.0
    site.write_text("no toml")
    served.running.hang_up()
    assert priced() == 2.0
