"""Whether a crawler asks, by the name it gives itself; the name is not kept."""

import re
from functools import lru_cache

from crawleruseragents import CRAWLER_USER_AGENTS_DATA

MAX_NAME_CHARS = 400
CHUNK = 50
# Programs of the owner and of developers call themselves so: what they ask is a question like any other.
NO_CRAWLERS = {"http-library", "browser-automation"}


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], ...]:
    known = [
        entry["pattern"]
        for entry in CRAWLER_USER_AGENTS_DATA
        if NO_CRAWLERS.isdisjoint(entry.get("tags", ()))
    ]
    return tuple(re.compile("|".join(known[i : i + CHUNK])) for i in range(0, len(known), CHUNK))


@lru_cache(maxsize=4096)
def is_bot(user_agent: str) -> bool:
    """True for the search engines', shops' and models' crawlers that say who they are."""
    name = user_agent[:MAX_NAME_CHARS]
    return any(pattern.search(name) for pattern in _patterns())
