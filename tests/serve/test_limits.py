"""Windows of time, places and their deadlines, sessions, hashes of visitors: with clocks of their own."""

import asyncio
import copy
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.errors import RateLimited, Unavailable, UpstreamTimeout
from mogine.serve.keys import ServerState
from mogine.serve.limits import Deadline, Deadlines, Limits, Place, TooOften, Window
from mogine.serve.sessions import LIFETIME_S, MAX_TURN_CHARS, MAX_TURNS, Sessions, VendorSessions
from mogine.serve.visitors import Visitors
from mogine.settings import AccessSettings, RateLimit


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, **fields: object) -> tuple[Limits, ServerState]:
    state = ServerState()
    return Limits(AccessSettings(**fields), state, clock=clock), state  # type: ignore[arg-type]


# --- rates ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5))
def test_no_window_of_time_ever_holds_more_than_allowed(pauses: list[float], count: int) -> None:
    window = Window(RateLimit(count, 60))
    now, taken = 0.0, []
    for pause in pauses:
        now += pause
        wait = window.wait_s("a", now)
        assert 0 <= wait <= 60
        if not wait:
            window.take("a", now)
            taken.append(now)
        else:
            later = copy.deepcopy(window)
            assert later.wait_s("a", now + wait + 1e-6) == 0, "the wait that is told is enough"
    for begin in taken:
        assert sum(begin <= time < begin + 60 for time in taken) <= count


def test_memory_of_visitors_is_bounded_and_the_quietest_is_forgotten_first() -> None:
    window = Window(RateLimit(1, 60), max_keys=3)
    for second, key in enumerate("abcad"):
        window.take(key, float(second))
    assert len(window) == 3
    assert [window.wait_s(key, 5.0) > 0 for key in "abcd"] == [True, False, True, True]


def test_a_refused_question_takes_nothing_from_the_rate() -> None:
    clock = Clock()
    gate, _ = limits(clock, rate_limit=(RateLimit(2, 60),), max_streams_per_visitor=1)
    with gate.open("a"):
        for _ in range(5):
            with pytest.raises(RateLimited) as busy:
                gate.open("a")
            assert busy.value.reason == "too_many_streams"
    with gate.open("a"), pytest.raises(RateLimited):
        gate.open("a")
    with pytest.raises(TooOften) as first:
        gate.open("a")
    with pytest.raises(TooOften) as second:
        gate.open("a")
    assert (first.value.repeated, second.value.repeated) == (False, True)
    assert first.value.retry_after_s == 60
    clock.now += 60
    with gate.open("a"):
        assert gate.tracked == 1


def test_a_site_that_is_asked_too_often_does_not_take_it_out_on_one_visitors_rate() -> None:
    gate, _ = limits(Clock(), rate_limit=(RateLimit(2, 60),), site_rate_limit=(RateLimit(1, 60),))
    with gate.open("a"):
        pass
    for visitor in ("a", "b", "c"):
        with pytest.raises(TooOften, match="all visitors"):
            gate.open(visitor)
    assert gate.tracked == 1


def test_places_are_counted_in_all_and_by_visitor_and_given_back() -> None:
    gate, state = limits(Clock(), max_streams=2)
    with gate.open("a"), gate.open("b"):
        assert gate.open_by_visitor == {"a": 1, "b": 1}
        with pytest.raises(Unavailable) as full:
            gate.open("c")
        assert full.value.reason == "overloaded"
    assert not state.running and not gate.open_by_visitor
    state.refusing = True
    with pytest.raises(Unavailable) as stopping:
        gate.open("a")
    assert stopping.value.reason == "shutting_down"


# --- deadlines -----------------------------------------------------------------------------------


def deadlines(seconds: float) -> Deadlines:
    return Deadlines(seconds, lambda: UpstreamTimeout("late"))


async def test_deadlines_ring_in_the_order_in_which_they_began() -> None:
    """Those that are over in time are forgotten, and one timer serves all."""
    shared, ended = deadlines(0.05), []

    async def answer(name: str, begins_s: float, takes_s: float) -> None:
        await asyncio.sleep(begins_s)
        try:
            with Deadline(shared):
                await asyncio.sleep(takes_s)
        except UpstreamTimeout:
            ended.append(name)

    await asyncio.gather(
        answer("first", 0, 30),
        answer("in time", 0, 0.01),
        answer("second", 0.02, 30),
        answer("third", 0.06, 30),
    )
    assert ended == ["first", "second", "third"]


async def test_a_deadline_raises_its_error_in_the_block() -> None:
    with pytest.raises(UpstreamTimeout, match="late"), Deadline(deadlines(0.01)):
        await asyncio.sleep(30)


async def test_a_place_can_be_stopped_before_during_and_after() -> None:
    gate, _ = limits(Clock())
    stop = Unavailable("stop", reason="shutting_down")
    place: Place = gate.open("a")
    place.stop(stop)
    with pytest.raises(Unavailable, match="stop"), place.within(deadlines(30)):
        asyncio.get_running_loop().call_soon(place.stop, stop)
        await asyncio.sleep(30)
    place.stop(stop)
    with place.within(deadlines(30)) as deadline:
        pass
    deadline.end(stop)


async def test_a_deadline_leaves_other_errors_and_cancellation_alone() -> None:
    with pytest.raises(TimeoutError, match="mine"), Deadline(deadlines(30)):
        raise TimeoutError("mine")

    async def wait() -> None:
        with Deadline(deadlines(30)):
            await asyncio.sleep(30)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_keeps_its_last_turns_shortened_and_forgets_in_time() -> None:
    clock = Clock()
    sessions = Sessions(clock=clock)
    id, turns = sessions.open("", "a")
    assert re.fullmatch("[0-9a-f]{32}", id) and turns == ()
    for number in range(MAX_TURNS + 2):
        sessions.add(id, "a", f"{number}" + "x" * 5000, "y" * 5000)
    same, turns = sessions.open(id, "a")
    assert same == id
    assert len(turns) == 2 * MAX_TURNS
    assert turns[0].text.startswith("2") and len(turns[0].text) == MAX_TURN_CHARS
    clock.now += LIFETIME_S
    assert sessions.open(id, "a") == (id, ())
    sessions.add(id, "a", "neu", "ja")
    assert [turn.text for turn in sessions.open(id, "a")[1]] == ["neu", "ja"]


def test_a_session_is_of_no_use_to_anyone_else() -> None:
    sessions = Sessions(clock=Clock())
    id, _ = sessions.open("", "a")
    sessions.add(id, "a", "secret", "secret")
    other, turns = sessions.open(id, "b")
    assert other != id and turns == ()


def test_sessions_are_bounded_in_number() -> None:
    sessions = Sessions(clock=Clock(), max_sessions=2)
    ids = [sessions.open("", "a")[0] for _ in range(3)]
    for id in ids:
        sessions.add(id, "a", "q", "a")
    assert len(sessions) == 2
    assert [bool(sessions.open(id, "a")[1]) for id in ids] == [False, True, True]


def test_a_vendors_session_belongs_to_who_got_it_first() -> None:
    sessions = VendorSessions(max_sessions=2)
    sessions.note("s", "a")
    sessions.note("s", "b")
    assert sessions.allows("s", "a") and not sessions.allows("s", "b")
    assert sessions.allows("unknown", "b")
    sessions.note("t", "a")
    sessions.note("u", "a")
    assert sessions.allows("s", "b"), "forgotten: bounded"


# --- visitors ------------------------------------------------------------------------------------


def test_a_visitors_hash_holds_for_a_day_and_then_cannot_be_made_again(tmp_path: Path) -> None:
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)
    times = [now]
    folder = tmp_path / "data"
    visitors = Visitors(folder, ZoneInfo("Asia/Shanghai"), lambda: times[0])
    first = visitors.hash("203.0.113.9")
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert visitors.hash("203.0.113.9") == first != visitors.hash("203.0.113.8")
    again = Visitors(folder, ZoneInfo("Asia/Shanghai"), lambda: times[0])
    assert again.hash("203.0.113.9") == first, "another server of the same home agrees"
    (salt,) = folder.iterdir()
    assert salt.stat().st_mode & 0o777 == 0o600
    times[0] = now + timedelta(hours=4)
    assert visitors.hash("203.0.113.9") != first, "midnight in Shanghai has passed"
    (next_salt,) = folder.iterdir()
    assert next_salt.name == "visitor_salt.2026-11-24"


def test_a_folder_that_cannot_be_written_does_not_stop_an_answer(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    visitors = Visitors(tmp_path / "data", ZoneInfo("UTC"))
    assert visitors.hash("a") == visitors.hash("a") != visitors.hash("b")


def test_a_damaged_salt_does_not_stop_an_answer(tmp_path: Path) -> None:
    day = datetime(2026, 11, 23, tzinfo=UTC)
    for content in ("", "zz", "00"):
        (tmp_path / "visitor_salt.2026-11-23").write_text(content)
        visitors = Visitors(tmp_path, ZoneInfo("UTC"), lambda: day)
        assert visitors.hash("a") == visitors.hash("a")
