"""The model of large sites agrees with what queueing theory says where theory has an answer."""

import json
import math
import random
import statistics

import pytest
import simpy

from benchmarks.scale.simulate import (
    BUSY_AT_MOST,
    COSTS,
    SERVICES,
    Costs,
    Layout,
    Site,
    Visitors,
    Work,
    cpu_per_question_us,
    play,
    size,
)

ROUND = Costs(
    nginx_question=200,
    nginx_token=20,
    proxy_question=2_000,
    proxy_token=100,
    kb_search=10_000,
    record_row=200,
    redis_check=50,
    proxy_mb=70,
    kb_mb=250,
    stream_kib=25,
)


def layout(processes: int, cores: int) -> Layout:
    return Layout(
        dict.fromkeys(SERVICES, processes), {"one": cores}, dict.fromkeys(SERVICES, "one"), shared=False
    )


def erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that wait in a queue with so many servers and `load` of them busy on average."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**count / math.factorial(count) for count in range(servers)) + last)


@pytest.mark.parametrize(
    ("processes", "cores"), [(2, 4), (4, 2)], ids=["processes are short", "cores are short"]
)
def test_waiting_is_that_of_a_queue_with_two_servers(processes: int, cores: int) -> None:
    """Arrivals at random, work of random length: Erlang's formula tells the mean waiting time."""
    env, chance = simpy.Environment(), random.Random(11)
    site = Site(env, layout(processes, cores), ROUND, Visitors(), until_s=4_000)
    mean_s, rate, waited = 0.01, 150.0, []

    def piece() -> Work:
        began, length_s = env.now, chance.expovariate(1 / mean_s)
        yield from site.work("kb", length_s * 1e6)
        waited.append(env.now - began - length_s)

    def arrive() -> Work:
        for _ in range(100_000):
            yield env.timeout(chance.expovariate(rate))
            env.process(piece())

    env.process(arrive())
    env.run()
    load = rate * mean_s
    expected_s = erlang_c(2, load) * mean_s / (2 - load)
    assert statistics.fmean(waited) == pytest.approx(expected_s, rel=0.1)


def test_a_site_that_is_sized_by_arithmetic_is_as_busy_as_the_arithmetic_says() -> None:
    visitors = Visitors(tokens=50)
    sized = size(100, ROUND, visitors)
    outcome = play(100, sized, ROUND, visitors, seconds=60)
    assert outcome.questions == pytest.approx(6_000, rel=0.05)
    for name, us in cpu_per_question_us(ROUND, visitors, shared=True).items():
        expected = 100 * us / 1e6 / sized.processes[name]
        assert expected <= BUSY_AT_MOST
        assert outcome.busy[name] == pytest.approx(expected, rel=0.12), name


def test_a_small_site_stays_on_one_machine_without_engines() -> None:
    sized = size(1, ROUND, Visitors())
    assert set(sized.on.values()) == {"one"}
    assert not sized.shared
    assert size(100, ROUND, Visitors()).shared


def test_the_first_token_waits_longer_when_the_knowledge_base_is_nearly_busy() -> None:
    calm, busy = (play(rate, layout(1, 4), ROUND, Visitors(tokens=5), seconds=60) for rate in (5, 90))
    assert statistics.median(calm.first_ms) < 14 < statistics.median(busy.first_ms)


def test_the_costs_that_are_kept_are_measured_ones() -> None:
    """benchmarks.scale.question --write has written them, with the machine that they hold for."""
    kept = json.loads(COSTS.read_text())
    assert kept["machine"]["cores"] >= 1
    assert kept["questions"] >= 100
    costs = Costs.read(COSTS)
    assert 0 < costs.nginx_token < costs.proxy_token < costs.proxy_question < costs.kb_search
