"""What a site's robots.txt allows (RFC 9309): groups, wildcards, the longest rule wins."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

AGENT = "mogine"
MAX_BYTES = 512 * 1024
_MAX_DELAY_S = 10.0


@dataclass(frozen=True, slots=True)
class Robots:
    """The rules for us: (path pattern, allowed), and the seconds to leave between two requests."""

    rules: tuple[tuple[str, bool], ...] = ()
    delay_s: float = 0.0

    @classmethod
    def of(cls, text: str) -> "Robots":
        """The group of our name, else the one of all."""
        groups: dict[str, tuple[list[tuple[str, bool]], list[float]]] = {}
        agents: list[str] = []
        is_naming = False
        for line in text.lstrip("\ufeff").splitlines():
            name, _, value = line.partition("#")[0].partition(":")
            name, value = name.strip().lower(), value.strip()
            if name == "user-agent":
                agents = [*agents, value.lower()] if is_naming else [value.lower()]
                is_naming = True
                for agent in agents:
                    groups.setdefault(agent, ([], []))
            elif name in ("allow", "disallow", "crawl-delay"):
                is_naming = False
                for agent in agents:
                    _add(groups[agent], name, value)
        rules, delays = groups.get(AGENT) or groups.get("*") or ([], [])
        return cls(tuple(rules), max(delays, default=0.0))

    def allows(self, url: str) -> bool:
        """Whether the address may be fetched."""
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        matching = [(len(pattern), allowed) for pattern, allowed in self.rules if _matches(pattern, path)]
        return max(matching)[1] if matching else True


NOTHING = Robots((("/", False),))


def _add(group: tuple[list[tuple[str, bool]], list[float]], name: str, value: str) -> None:
    rules, delays = group
    if name == "crawl-delay":
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value):
            delays.append(min(float(value), _MAX_DELAY_S))
    elif value and len(value) <= 1000 and value.count("*") <= 20:
        rules.append((value, name == "allow"))


def _matches(pattern: str, path: str) -> bool:
    """`*` is any run of characters, `$` at the end the end. Walks once: no pattern makes it slow."""
    is_whole = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    if not rest:
        return not is_whole or at == len(path)
    for piece in rest[:-1]:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    last = rest[-1]
    if is_whole:
        return path.endswith(last) and len(path) - len(last) >= at
    return path.find(last, at) >= 0
