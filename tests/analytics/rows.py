"""Rows for tests of analytics: realistic, and different where a test says so."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mogine.analytics.records import QueryRecord
from mogine.chat import Citation

# For tests that speak of the file of SQLite, not of what any record does.
in_a_file = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


def row(ago: timedelta = timedelta(0), *, at: datetime = NOON, **changes: Any) -> QueryRecord:
    """A question answered well, `ago` before `at`."""
    values: dict[str, Any] = {
        "started_at": at - ago,
        "kind": "chat",
        "provider": "doubao",
        "status": "ok",
        "session": "s1",
        "visitor": "v1",
        "page_url": "https://example.com/shop",
        "model": "doubao-1-5",
        "question": "如何退款？",
        "answer": "七天之内可以退款。",
        "answered": "yes",
        "citations": (cite("docs/refund.md"),),
        "top_score": 0.8,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "reasoning_tokens": 5,
        "cost_cny": 0.01,
        "first_token_ms": 300,
        "duration_ms": 2000,
    }
    return QueryRecord(**{**values, **changes})


def cite(source: str, *, number: int = 1, score: float = 0.8) -> Citation:
    return Citation(number, f"Title of {source}", source, "Heading", "https://example.com/doc", "", score)
