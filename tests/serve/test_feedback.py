"""`POST /api/feedback`: a thumb reaches the row of who asked, and nobody else's."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from mogine.analytics import upkeep
from mogine.analytics.records import Selection, Window
from mogine.analytics.reports import statistics
from mogine.analytics.store import AnalyticsStore
from tests.serve.conftest import Served, Start, assert_envelope

FEEDBACK = "/api/feedback"


async def asked(served: Served, address: str = "198.51.100.7") -> dict[str, Any]:
    """The `done` of a question, from a visitor behind the trusted proxy."""
    headers = {"X-Forwarded-For": address}
    reply = await served.post("/api/chat", {"question": "退款多久到账？"}, headers=headers)
    return dict(next(data for name, data in reply.events if name == "done"))


async def test_thumb_is_kept_with_the_row_and_may_be_changed(serve: Start, home: Path) -> None:
    served = await serve("proxy")
    done = await asked(served)
    visitor = {"X-Forwarded-For": "198.51.100.7"}
    for rating in ("up", "down"):
        body = {"request_id": done["request_id"], "rating": rating, "reason": "wrong", "comment": "打错了"}
        reply = await served.post(FEEDBACK, body, headers=visitor)
        assert (reply.status, reply.json) == (200, {"request_id": done["request_id"], "rating": rating})
    store = AnalyticsStore(home / "data/analytics.db")
    rows = store.page(Selection(feedback="down")).records
    assert [row.id for row in rows] == [done["request_id"]]
    told = list(store.iterate_feedback())
    assert len(told) == 1 and "打错了" in str(told[0])


async def test_thumb_that_comes_again_with_its_reason_is_one(serve: Start, home: Path) -> None:
    served = await serve("proxy")
    done = await asked(served)
    store = AnalyticsStore(home / "data/analytics.db")
    thumb = {"request_id": done["request_id"], "rating": "down"}
    visitor = {"X-Forwarded-For": "198.51.100.7"}
    await served.post(FEEDBACK, thumb, headers=visitor)
    upkeep.sum_up(store, before=upkeep.END_OF_TIME, sleep=lambda _: None)
    await served.post(FEEDBACK, {**thumb, "reason": "wrong", "comment": "旧价格"}, headers=visitor)
    window = Window.last_days(2, datetime.now(UTC), ZoneInfo("Asia/Shanghai"))
    totals = statistics(store, window).to_dict()["totals"]
    assert (totals["thumbs_up"], totals["thumbs_down"]) == (0, 1)
    assert [(told.rating, told.reason, told.comment) for told in store.iterate_feedback()] == [
        ("down", "wrong", "旧价格")
    ]
    assert [row.signals for row in store.iterate()] == [("thumbs_down",)]


async def test_thumb_of_somebody_else_is_answered_like_one_for_nothing(serve: Start, home: Path) -> None:
    served = await serve("proxy")
    done = await asked(served)
    other = {"X-Forwarded-For": "203.0.113.9"}
    foreign = await served.post(FEEDBACK, {"request_id": done["request_id"], "rating": "down"}, headers=other)
    nothing = await served.post(FEEDBACK, {"request_id": "0" * 44, "rating": "down"}, headers=other)
    assert assert_envelope(foreign, 404, "not_found") == assert_envelope(nothing, 404, "not_found")
    assert not AnalyticsStore(home / "data/analytics.db").page(Selection(feedback="any")).records


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "up"}, "request_id"),
        ({"request_id": ["x"], "rating": "up"}, "request_id"),
        ({"request_id": "0" * 44}, "rating"),
        ({"request_id": "0" * 44, "rating": ["up"]}, "rating"),
        ({"request_id": "0" * 44, "rating": "up", "comment": "x" * 1001}, "comment"),
    ],
)
async def test_bad_thumb_is_refused_by_name(serve: Start, body: dict[str, Any], param: str) -> None:
    served = await serve("proxy")
    assert_envelope(await served.post(FEEDBACK, body), 400, "invalid_request", param)


async def test_thumbs_have_a_rate_of_their_own(serve: Start) -> None:
    served = await serve("proxy")
    body = {"request_id": "0" * 44, "rating": "up"}
    statuses = [(await served.post(FEEDBACK, body)).status for _ in range(31)]
    assert statuses == [404] * 30 + [429]


async def test_the_wish_for_a_person_is_kept_beside_the_thumb(serve: Start, home: Path) -> None:
    served = await serve("proxy")
    done = await asked(served)
    visitor = {"X-Forwarded-For": "198.51.100.7"}
    id = done["request_id"]

    def told() -> tuple[str, bool, str, tuple[str, ...]]:
        store = AnalyticsStore(home / "data/analytics.db")
        (given,) = store.iterate_feedback()
        return given.rating, given.handoff, given.comment, next(store.iterate()).signals

    reply = await served.post(FEEDBACK, {"request_id": id, "handoff": True}, headers=visitor)
    assert (reply.status, reply.json) == (200, {"request_id": id, "handoff": True})
    assert told() == ("", True, "", ("handoff",))
    body = {"request_id": id, "rating": "down", "comment": "没有帮助"}
    await served.post(FEEDBACK, body, headers=visitor)
    assert told() == ("down", True, "没有帮助", ("thumbs_down", "handoff"))
    await served.post(FEEDBACK, {"request_id": id, "handoff": True}, headers=visitor)
    assert told() == ("down", True, "没有帮助", ("thumbs_down", "handoff"))
    await served.post(FEEDBACK, {"request_id": id, "rating": "up"}, headers=visitor)
    assert told() == ("up", True, "", ("handoff",))


@pytest.mark.parametrize(
    "fields", [{}, {"handoff": False}, {"handoff": "yes"}, {"handoff": 1}, {"handoff": True, "rating": "meh"}]
)
async def test_feedback_that_says_nothing_is_refused(serve: Start, fields: dict[str, Any]) -> None:
    served = await serve("proxy")
    done = await asked(served)
    reply = await served.post(
        FEEDBACK, {"request_id": done["request_id"], **fields}, headers={"X-Forwarded-For": "198.51.100.7"}
    )
    assert_envelope(reply, 400, "invalid_request")
