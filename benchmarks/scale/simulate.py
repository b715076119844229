"""A discrete-event model of mogine on one machine or many, fed with the costs that were measured.

    python -m benchmarks.scale.simulate [--costs FILE] [--rates 1,10,100,1000] [--seconds 60] [--json FILE]

For each rate of questions (Poisson arrivals at the busiest minute of the day) it sizes the services by plain
arithmetic, then plays every question through nginx, a proxy, the shared limits, a knowledge base, the vendor
and the record, with waiting wherever a process or a core is busy. Prints a table on stderr, JSON on stdout.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import simpy

COSTS = Path(__file__).with_name("costs.json")
BUSY_AT_MOST = 0.6  # of a process or a core: above, waiting grows quickly and a lost machine is one too many
BATCH_TOKENS = 10  # tokens that are handled as one piece of work
Work = Generator[simpy.Event, Any, None]
SERVICES = ("nginx", "proxy", "kb", "record", "redis")


@dataclass(frozen=True, slots=True)
class Costs:
    """What a question costs: CPU in microseconds by service, memory in MB and KiB, as measured."""

    nginx_question: float
    nginx_token: float
    proxy_question: float
    proxy_token: float
    kb_search: float
    record_row: float
    redis_check: float
    proxy_mb: float
    kb_mb: float
    stream_kib: float

    @classmethod
    def read(cls, path: Path) -> "Costs":
        return cls(**json.loads(path.read_text())["costs"])


@dataclass(frozen=True, slots=True)
class Visitors:
    """Visitors and the vendor: tokens of an answer (a mean), tokens a second, seconds to the first."""

    tokens: float = 250
    tokens_per_s: float = 50
    first_token_s: float = 0.8

    @property
    def answer_s(self) -> float:
        return self.first_token_s + self.tokens / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes of each service, and the cores of each machine that carries them."""

    processes: dict[str, int]
    cores: dict[str, int]
    on: dict[str, str]  # service: the kind of machine
    shared: bool  # limits in Redis, rows in PostgreSQL


@dataclass(slots=True)
class Outcome:
    """Milliseconds that mogine added, and how busy each service's processes were."""

    questions: int = 0
    first_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    open_streams: list[int] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)


def cpu_per_question_us(costs: Costs, visitors: Visitors, *, shared: bool) -> dict[str, float]:
    """By service: the arithmetic that docs/scaling.md shows."""
    return {
        "nginx": costs.nginx_question + visitors.tokens * costs.nginx_token,
        "proxy": costs.proxy_question + visitors.tokens * costs.proxy_token,
        "kb": costs.kb_search,
        "record": costs.record_row,
        "redis": costs.redis_check if shared else 0.0,
    }


def size(rate: float, costs: Costs, visitors: Visitors, cores: int = 2) -> Layout:
    """As few processes and machines as keep each at most BUSY_AT_MOST busy."""
    each = cpu_per_question_us(costs, visitors, shared=True)
    needed = {name: max(1, math.ceil(rate * us / 1e6 / BUSY_AT_MOST)) for name, us in each.items()}
    alone = cpu_per_question_us(costs, visitors, shared=False)
    if rate * sum(alone.values()) / 1e6 <= BUSY_AT_MOST * cores and needed["proxy"] == needed["kb"] == 1:
        return Layout(
            dict.fromkeys(SERVICES, 1), {"one": cores}, dict.fromkeys(SERVICES, "one"), shared=False
        )
    return Layout(
        needed,
        {"front": needed["nginx"] + needed["proxy"], "kb": needed["kb"], "data": needed["record"] + 1},
        {"nginx": "front", "proxy": "front", "kb": "kb", "record": "data", "redis": "data"},
        shared=True,
    )


class Site:
    """The services of a layout as queues: a piece of work takes a process, then a core of its machine."""

    def __init__(
        self, env: simpy.Environment, layout: Layout, costs: Costs, visitors: Visitors, until_s: float
    ) -> None:
        self._until_s = until_s
        self.env, self.layout, self.costs, self.visitors = env, layout, costs, visitors
        self.outcome = Outcome()
        self._processes = {
            name: simpy.Resource(env, count) for name, count in layout.processes.items() if count
        }
        self._cores = {name: simpy.Resource(env, count) for name, count in layout.cores.items()}
        self._worked: dict[str, float] = dict.fromkeys(layout.processes, 0.0)
        self._open = 0

    def work(self, service: str, us: float) -> Work:
        """Waits for a process and a core, and keeps both for so long."""
        with self._processes[service].request() as process:
            yield process
            with self._cores[self.layout.on[service]].request() as core:
                yield core
                yield self.env.timeout(us / 1e6)
        if self.env.now <= self._until_s:  # while the last answers end, nothing new comes
            self._worked[service] += us / 1e6

    def question(self, chance: random.Random) -> Work:
        """One question from its arrival until the last token."""
        costs, visitors, env = self.costs, self.visitors, self.env
        began = env.now
        self._open += 1
        self.outcome.open_streams.append(self._open)
        yield from self.work("nginx", costs.nginx_question)
        if self.layout.shared:
            yield from self.work("redis", costs.redis_check)
        yield from self.work("proxy", costs.proxy_question)
        yield from self.work("kb", costs.kb_search)
        thinking = chance.lognormvariate(math.log(visitors.first_token_s), 0.5)
        yield env.timeout(thinking)
        left = max(1, round(chance.expovariate(1 / visitors.tokens)))
        first = True
        while left > 0:
            count = 1 if first else min(BATCH_TOKENS, left)
            if not first:
                yield env.timeout(count / visitors.tokens_per_s)
            sent = env.now
            yield from self.work("proxy", count * costs.proxy_token)
            yield from self.work("nginx", count * costs.nginx_token)
            if first:
                self.outcome.first_ms.append((env.now - began - thinking) * 1000)
            else:
                self.outcome.late_ms.append((env.now - sent) * 1000)
            first, left = False, left - count
        self._open -= 1
        self.outcome.questions += 1
        yield from self.work("record", costs.record_row)

    def arrivals(self, rate: float, chance: random.Random) -> Work:
        """Questions at random moments, `rate` a second on average."""
        while self.env.now < self._until_s:
            yield self.env.timeout(chance.expovariate(rate))
            self.env.process(self.question(chance))

    def close(self) -> Outcome:
        """How busy all were while questions came."""
        self.outcome.busy = {
            name: worked / self._until_s / self.layout.processes[name]
            for name, worked in self._worked.items()
            if self.layout.processes[name]
        }
        return self.outcome


def play(
    rate: float, layout: Layout, costs: Costs, visitors: Visitors, *, seconds: float, seed: int = 7
) -> Outcome:
    """Plays so many seconds of visitors, and lets the answers end."""
    env, chance = simpy.Environment(), random.Random(seed)
    site = Site(env, layout, costs, visitors, seconds)
    env.process(site.arrivals(rate, chance))
    env.run()
    return site.close()


def knee(layout: Layout, costs: Costs, visitors: Visitors, *, seconds: float, worst_ms: float = 250) -> float:
    """The highest rate (to 5 %) at which 99 of 100 first tokens come within `worst_ms` of what they must."""
    low, high = 0.1, 1.0

    def holds(rate: float) -> bool:
        played = max(seconds, 200 / rate)
        return quantile(play(rate, layout, costs, visitors, seconds=played).first_ms, 0.99) <= worst_ms

    while holds(high):
        low, high = high, high * 2
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def quantile(values: Sequence[float], share: float) -> float:
    """Of some values; 0 when there are none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def report(rate: float, layout: Layout, outcome: Outcome, costs: Costs, visitors: Visitors) -> dict[str, Any]:
    return {
        "questions_per_s": rate,
        "layout": asdict(layout),
        "cores": sum(layout.cores.values()),
        "played": outcome.questions,
        "busy": {name: round(share, 2) for name, share in outcome.busy.items()},
        "first_token_added_ms": {
            "p50": round(statistics.median(outcome.first_ms), 2),
            "p99": round(quantile(outcome.first_ms, 0.99), 2),
        },
        "batch_late_ms_p99": round(quantile(outcome.late_ms, 0.99), 2),
        "open_streams": {
            "mean_by_arithmetic": round(rate * visitors.answer_s),
            "most": max(outcome.open_streams),
        },
        "proxies_mb": round(
            layout.processes["proxy"] * costs.proxy_mb + max(outcome.open_streams) * costs.stream_kib / 1024
        ),
        "kb_mb_each": round(costs.kb_mb),
    }


def table(reports: Sequence[dict[str, Any]]) -> str:
    head = "q/s | nginx proxy kb | cores | busiest | first p50/p99 ms | late p99 ms | open streams"
    lines = [head, "-" * len(head)]
    for each in reports:
        processes = each["layout"]["processes"]
        busiest = max(each["busy"].items(), key=lambda item: item[1])
        lines.append(
            f"{each['questions_per_s']:g} | {processes['nginx']} {processes['proxy']} {processes['kb']} | "
            f"{each['cores']} | {busiest[0]} {busiest[1]:.0%} | "
            f"{each['first_token_added_ms']['p50']} / {each['first_token_added_ms']['p99']} | "
            f"{each['batch_late_ms_p99']} | {each['open_streams']['most']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--costs", type=Path, default=COSTS, help="what benchmarks.scale.question has measured"
    )
    parser.add_argument("--rates", default="1,10,100,1000", help="questions a second, with commas")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that is played")
    parser.add_argument(
        "--tokens", type=float, default=Visitors().tokens, help="tokens of an answer, on average"
    )
    parser.add_argument("--json", type=Path, help="also writes the JSON here")
    arguments = parser.parse_args()
    costs, visitors = Costs.read(arguments.costs), Visitors(tokens=arguments.tokens)
    one = size(0.1, costs, visitors)
    reports = []
    for rate in (float(text) for text in arguments.rates.split(",")):
        layout = size(rate, costs, visitors)
        outcome = play(rate, layout, costs, visitors, seconds=arguments.seconds)
        reports.append(report(rate, layout, outcome, costs, visitors))
    result = {
        "cpu_us_per_question": {
            name: round(us) for name, us in cpu_per_question_us(costs, visitors, shared=True).items()
        },
        "one_machine_carries_questions_per_s": round(
            knee(one, costs, visitors, seconds=arguments.seconds), 1
        ),
        "sizes": reports,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(table(reports), file=sys.stderr)


if __name__ == "__main__":
    main()
