"""A server that repeats recorded vendor bytes: any fixture of `tests/fixtures/protocols/MANIFEST.json`.

    async with ReplayFake("ark_stream_thinking.sse", chop=5) as fake:
        ... any request gets that fixture's status, headers, content type and exact body ...

Several names are served one per request, the last one repeated. `chop` bytes are written at a time (0: all at
once), with `pace_s` between them; `*_truncated.sse` end with the socket closed before the last chunk.
`fixtures(vendor=, kind=)` lists them for parametrized tests; `fixture(name)` is one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.upstreams.player import Cutoff, Pipe
from tests.upstreams.script import Script
from tests.upstreams.server import Exchange, Fake, run_standalone

FOLDER = Path(__file__).parent.parent / "fixtures" / "protocols"
PREFIXES = {"ark": "/api/v3", "dashscope": "/api/v1", "openai": "/v1"}


@dataclass(frozen=True, slots=True)
class Fixture:
    """One row of the manifest. `expect` is what a right parser finds in it (None for a trap), `sdk` what
    each vendor SDK made of it; `content_type` None means that the header is absent."""

    file: str
    vendor: str
    kind: str
    status: int
    content_type: str | None
    headers: Mapping[str, str]
    path: str
    evidence: str
    note: str
    expect: Mapping[str, Any] | None
    sdk: Mapping[str, str]

    @property
    def body(self) -> bytes:
        return (FOLDER / self.file).read_bytes()

    @property
    def is_truncated(self) -> bool:
        return self.file.endswith("_truncated.sse")

    def __str__(self) -> str:
        return self.file


@cache
def _manifest() -> dict[str, Fixture]:
    rows = json.loads((FOLDER / "MANIFEST.json").read_bytes())["fixtures"]
    names = Fixture.__dataclass_fields__
    return {
        row["file"]: Fixture(**{"expect": None, "sdk": {}, **{k: v for k, v in row.items() if k in names}})
        for row in rows
    }


def fixtures(*, vendor: str | None = None, kind: str | None = None) -> list[Fixture]:
    """All fixtures, or those of a vendor (`ark`, `dashscope`, `openai`) or kind (`sse`, `json`, `html`)."""
    rows = _manifest().values()
    return [one for one in rows if vendor in (None, one.vendor) and kind in (None, one.kind)]


def fixture(name: str) -> Fixture:
    """One fixture by its file name; raises KeyError."""
    return _manifest()[name]


class ReplayFake(Fake):
    """Recorded bytes on loopback; see the module's docstring."""

    def __init__(
        self, *names: str | Fixture, chop: int = 5, pace_s: float = 0.0, tls: bool = False, port: int = 0
    ) -> None:
        super().__init__(tls=tls, port=port)
        self._fixtures = [fixture(one) if isinstance(one, str) else one for one in names]
        self._served = 0
        self._script = Script((), chop=chop, pace_s=pace_s)
        self.prefix = PREFIXES[self._fixtures[0].vendor]

    def replay(self, *names: str | Fixture) -> None:
        """From the next request on: these fixtures."""
        self._fixtures = [fixture(one) if isinstance(one, str) else one for one in names]
        self._served = 0

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        chosen = self._fixtures[min(self._served, len(self._fixtures) - 1)]
        self._served += 1
        response = web.StreamResponse(status=chosen.status)
        response.headers.update({**chosen.headers, "Content-Type": chosen.content_type or "-"})
        if exchange.header("X-Client-Request-Id") and chosen.vendor == "ark":
            response.headers["X-Client-Request-Id"] = exchange.header("X-Client-Request-Id")
        pipe = Pipe(exchange, self._script, response)
        pipe.every_s = self._script.pace_s
        try:
            await pipe.write(chosen.body)
            if chosen.is_truncated:
                pipe.cut()
            return await pipe.close()
        except Cutoff:
            return response


if __name__ == "__main__":
    run_standalone(
        lambda *_scripts, fixture, **rest: ReplayFake(*fixture, **rest), knobs={"fixture": "a file name"}
    )
