"""A record of questions on a fresh folder, and rows to put into it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder of a home."""
    data = tmp_path / "data"
    data.mkdir()
    return data


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each of the databases that can keep a record; see `in_a_file`."""
    return str(request.getfixturevalue("postgres").url) if request.param == "postgres" else ""


@pytest.fixture
def open_again(data: Path, database_url: str) -> Iterator[Callable[[], AnalyticsStore]]:
    """The record of `store`, through connections of its own, as another process has it."""
    opened: list[AnalyticsStore] = []

    def open_it() -> AnalyticsStore:
        opened.append(AnalyticsStore(data / "analytics.db", database_url))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()


@pytest.fixture
def store(open_again: Callable[[], AnalyticsStore]) -> AnalyticsStore:
    """A record with nothing in it."""
    return open_again()
