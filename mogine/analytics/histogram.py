"""How long visitors waited, as counts in buckets that each span two percent: small, exact to add up."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping

# A bucket reaches from BASE^(n-1) to BASE^n ms, and speaks through its middle: a percentile is at most
# one percent away from the value at its rank, and below 50 ms it is that value.
BASE = 1.02
ERROR = (BASE - 1) / (BASE + 1)
_LOG_BASE = math.log(BASE)
_COUNT_BITS = 48


def bucket(value_ms: int) -> int:
    """The bucket of `value_ms`; 0 is for nothing at all."""
    return 1 + math.ceil(math.log(value_ms) / _LOG_BASE - 1e-9) if value_ms >= 1 else 0


def middle_ms(number: int) -> int:
    """What a value of this bucket is taken for."""
    return round(2 * BASE ** (number - 1) / (1 + BASE)) if number else 0


def add(packed: bytes, counts: Mapping[int, int]) -> bytes:
    """`packed` with `counts` added to it."""
    total = unpack([packed])
    for number, count in counts.items():
        total[number] += count
    return array("Q", [number << _COUNT_BITS | count for number, count in sorted(total.items())]).tobytes()


def unpack(packed: Iterable[bytes]) -> Counter[int]:
    """The sum of any number of packed histograms."""
    total: Counter[int] = Counter()
    mask = (1 << _COUNT_BITS) - 1
    for blob in packed:
        for entry in array("Q", blob):
            total[entry >> _COUNT_BITS] += entry & mask
    return total


def percentile(counts: Mapping[int, int], percent: int) -> int | None:
    """The value at that rank (nearest rank) of the ordered values; None without any."""
    total = sum(counts.values())
    rank = -(-total * percent // 100)
    seen = 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= rank:
            return middle_ms(number)
    return None
