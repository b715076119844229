"""Keys that rest, and a vendor that is left alone."""

import logging

import pytest

from mogine.errors import (
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from mogine.providers import doubao
from mogine.providers.care import Breaker, Care, Keys, kind_of, shown
from mogine.settings import DoubaoSettings
from mogine.upstream import Client
from tests.providers.conftest import retries
from tests.providers.outcome import ask, question
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import refuse, say, script


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- keys --------------------------------------------------------------------------------------------


def test_keys_take_turns(clock: Clock) -> None:
    keys = Keys(("a", "b"), clock=clock)
    assert [keys.take() for _ in range(5)] == ["a", "b", "a", "b", "a"]
    assert Keys(()).take() == ""


def test_a_resting_key_is_passed_over_until_it_has_rested(clock: Clock) -> None:
    keys = Keys(("a", "b", "c"), clock=clock)
    assert keys.rest("b", 10) and not keys.rest("b", 10)
    assert {keys.take() for _ in range(6)} == {"a", "c"} and keys.resting == 1
    clock.now += 11
    assert {keys.take() for _ in range(6)} == {"a", "b", "c"} and keys.resting == 0


def test_when_all_keys_rest_the_first_to_wake_is_taken(clock: Clock) -> None:
    keys = Keys(("a", "b"), clock=clock)
    keys.rest("a", 20)
    keys.rest("b", 10)
    assert keys.take() == "b"


def test_new_keys_start_rested_and_old_ones_are_forgotten(clock: Clock) -> None:
    keys = Keys(("a", "b"), clock=clock)
    keys.rest("a", 20)
    keys.rest("b", 20)
    keys.replace(("c", "a"))
    assert keys.take() == "c" and keys.resting == 1
    assert not keys.rest("b", 20), "a key that is gone cannot rest"


@pytest.mark.parametrize(("key", "seen"), [("sk-0123456789abcdef", "...cdef"), ("short-key", "...")])
def test_little_of_a_key_is_ever_shown(key: str, seen: str) -> None:
    assert shown(key) == seen


@pytest.mark.parametrize(
    "refusal",
    [(401, None), (403, "AccessDenied"), (403, "AccountOverdueError"), (429, "QuotaExceeded")],
    ids=lambda refusal: str(refusal[0]),
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refused_key_gives_way_within_the_same_question(
    refusal: tuple[int, str | None], stream: bool, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("bad-key-0123456789", "good-key-0123456789")
    async with DoubaoFake(refuse(*refusal, leak=True), script(say("好"))) as fake:
        provider = doubao.provider(DoubaoSettings(keys, fake.base_url, MODEL), client, retries())
        with caplog.at_level(logging.ERROR):
            texts = [(await ask(provider, question(stream=stream))).text for _ in range(4)]
    assert texts == ["好"] * 4
    assert [r.bearer for r in fake.requests] == [keys[0], *[keys[1]] * 4]
    assert (provider.care.keys.resting, provider.care.key_changes) == (1, 1)
    assert len(caplog.records) == 1 and "...6789" in caplog.text and keys[0] not in caplog.text


async def test_when_every_key_is_refused_the_refusal_is_told_once(client: Client) -> None:
    async with DoubaoFake(refuse(401)) as fake:
        settings = DoubaoSettings(("key-a", "key-b", "key-c"), fake.base_url, MODEL)
        provider = doubao.provider(settings, client, retries())
        outcome = await ask(provider)
        again = await ask(provider)
    assert isinstance(outcome.error, UpstreamRefused) and isinstance(again.error, UpstreamRefused)
    assert len(fake.requests) == 4, "each key once; then only the one that wakes first"


async def test_a_wrong_model_is_no_fault_of_the_key(client: Client) -> None:
    async with DoubaoFake(refuse(404)) as fake:
        provider = doubao.provider(DoubaoSettings(("a", "b"), fake.base_url, MODEL), client, retries())
        assert isinstance((await ask(provider)).error, UpstreamRefused)
    assert (len(fake.requests), provider.care.keys.resting) == (1, 0)


# --- the breaker -------------------------------------------------------------------------------------


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(clock=clock)
    assert [breaker.failed() for _ in range(5)] == [False] * 4 + [True]
    return breaker


def test_five_failures_within_half_a_minute_open_it(clock: Clock) -> None:
    breaker = broken(clock)
    assert (breaker.state, breaker.wait_s()) == ("open", 10.0)


def test_slow_failures_do_not_open_it(clock: Clock) -> None:
    breaker = Breaker(clock=clock)
    for _ in range(20):
        assert not breaker.failed()
        clock.now += 8


def test_answers_make_up_for_failures(clock: Clock) -> None:
    breaker = Breaker(clock=clock)
    for _ in range(50):
        assert not breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"


def test_one_question_every_ten_seconds_tries_it(clock: Clock) -> None:
    breaker = broken(clock)
    for _ in range(3):
        clock.now += 10
        assert breaker.state == "half_open"
        assert [breaker.wait_s() for _ in range(3)] == [0.0, 10.0, 10.0]
        assert not breaker.failed()
        assert breaker.state == "open"


def test_a_trial_that_hangs_does_not_keep_the_next_from_being_made(clock: Clock) -> None:
    breaker = broken(clock)
    clock.now += 10
    assert breaker.wait_s() == 0.0
    clock.now += 10
    assert breaker.wait_s() == 0.0


def test_the_first_answer_closes_it(clock: Clock) -> None:
    breaker = broken(clock)
    clock.now += 10
    assert breaker.wait_s() == 0.0
    assert breaker.taken() and not breaker.taken()
    assert (breaker.state, breaker.wait_s()) == ("closed", 0.0)
    assert not breaker.failed(), "old failures are forgotten"


def test_failures_of_questions_asked_before_it_opened_change_nothing(clock: Clock) -> None:
    breaker = broken(clock)
    clock.now += 9
    assert not breaker.failed()
    clock.now += 1
    assert breaker.wait_s() == 0.0


def test_what_others_know_counts_and_only_who_may_makes_the_trial(clock: Clock) -> None:
    breaker = Breaker(clock=clock)
    breaker.hear(7.0)
    assert (breaker.state, breaker.wait_s()) == ("open", 7.0)
    clock.now += 7
    assert breaker.state == "half_open" and breaker.wait_s() > 0, "the trial is another's"
    breaker.hear(0.0, granted=True)
    breaker.hear(9.9)  # the next question does not take away what was granted
    assert breaker.wait_s() == 0.0 and breaker.wait_s() == 10.0
    assert not breaker.failed() and breaker.state == "open"
    breaker.hear(None)
    assert (breaker.state, breaker.wait_s()) == ("closed", 0.0)


def test_a_trial_that_was_granted_and_not_made_is_another_s_after_a_while(clock: Clock) -> None:
    breaker = Breaker(clock=clock)
    breaker.hear(0.0, granted=True)
    clock.now += 10
    breaker.hear(10.0)
    assert breaker.wait_s() == 10.0


def test_when_others_are_out_of_reach_it_decides_by_itself(clock: Clock) -> None:
    breaker = Breaker(clock=clock)
    breaker.hear(5.0)
    breaker.hear_nothing()
    clock.now += 5
    assert breaker.wait_s() == 0.0


def test_a_vendor_that_only_this_machine_cannot_reach_is_left_alone_here_only(clock: Clock) -> None:
    breaker = broken(clock)
    assert not breaker.is_apart
    breaker.hear(10.0)
    breaker.hear(None)
    assert breaker.state == "closed" and breaker.is_apart
    assert [breaker.failed() for _ in range(5)] == [False] * 4 + [True]
    breaker.hear(None)
    assert breaker.state == "open", "what others find does not count here"
    clock.now += 60
    assert not breaker.is_apart


@pytest.mark.parametrize(
    ("error", "kind", "opens"),
    [
        (UpstreamUnreachable("x"), "unreachable", True),
        (UpstreamTimeout("x"), "timeout", True),
        (UpstreamBadResponse("x"), "bad_response", True),
        (UpstreamError("x", upstream_status=500), "error", True),
        (UpstreamError("x", upstream_status=400), "error", False),
        (UpstreamRefused("x", upstream_status=401), "refused", False),
        (UpstreamBusy("x", upstream_status=429), "busy", False),
    ],
)
def test_only_a_vendor_in_trouble_is_left_alone(
    error: UpstreamError, kind: str, opens: bool, clock: Clock
) -> None:
    care = Care("Vendor", "VENDOR_API_KEY", ("k",), clock=clock)
    for _ in range(5):
        turn = care.turn()
        turn.admit()
        turn.ended(error, begun=False)
    assert (kind_of(error), care.errors[kind]) == (kind, 5)
    assert care.breaker.state == ("open" if opens else "closed")
    if opens:
        with pytest.raises(UpstreamUnavailable) as refused:
            care.turn().admit()
        assert 0 < (refused.value.retry_after_s or 0) <= 10
        assert care.errors["unavailable"] == 1


def test_answers_that_break_off_do_not_open_it(clock: Clock) -> None:
    care = Care("Vendor", "VENDOR_API_KEY", ("k",), clock=clock)
    for _ in range(9):
        care.turn().ended(UpstreamBadResponse("cut"), begun=True)
    assert care.breaker.state == "closed"


async def test_a_vendor_that_returns_is_asked_again(client: Client, clock: Clock) -> None:
    async with DoubaoFake(refuse(500)) as fake:
        provider = doubao.provider(DoubaoSettings(("k",), fake.base_url, MODEL), client, retries())
        provider.care = Care("Ark", "DOUBAO_API_KEY", ("k",), clock=clock)
        for _ in range(5):
            assert type((await ask(provider)).error) is UpstreamError
        asked = len(fake.requests)
        assert isinstance((await ask(provider)).error, UpstreamUnavailable)
        assert len(fake.requests) == asked, "nothing was sent"
        fake.play(script(say("好")))
        clock.now += 10
        assert (await ask(provider)).text == "好"
        assert (await ask(provider)).text == "好"
