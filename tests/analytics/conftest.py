"""A record of questions on a fresh folder, and rows to put into it."""

from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder of a home."""
    data = tmp_path / "data"
    data.mkdir()
    return data


@pytest.fixture
def store(data: Path) -> AnalyticsStore:
    """A record that has no file yet."""
    return AnalyticsStore(data / "analytics.db")
