"""The event-stream parser of the pages: any split of the bytes gives the same events."""

import random
from itertools import pairwise
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.web.conftest import PageServer, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

PARSE = """async (pieces) => {
  const { EventStreamParser } = await import(document.querySelector("[href$='stream.js']").href);
  const parser = new EventStreamParser();
  return pieces.flatMap((piece) => parser.push(Uint8Array.from(piece)));
}"""

STREAM = (
    b"\xef\xbb\xbf: hello\n\n"
    b'event: delta\r\ndata: {"text": "\xe9\x80\x80\xe6\xac\xbe \xf0\x9f\x98\x80"}\r\n\r\n'
    b"retry: 10\nid: 4\nunknown: x\ndata:first\ndata:  second\n\n"
    b"event: nothing\n\n"
    b"data\n\n"
    b"event:a\rdata:\xe2\x80\xa8x\r\r"
    b"data: never ended\n"
)
EVENTS = [
    {"event": "delta", "data": '{"text": "退款 😀"}', "id": ""},
    {"event": "message", "data": "first\n second", "id": "4"},
    {"event": "message", "data": "", "id": "4"},
    {"event": "a", "data": "\u2028x", "id": "4"},
]


def pieces(data: bytes, cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(cuts), len(data)]
    return [list(data[a:b]) for a, b in pairwise(bounds)]


async def parse(browser: Browser, server: PageServer, splits: list[list[list[int]]]) -> list[Any]:
    async with visit(browser, server) as v:
        return [await v.page.evaluate(PARSE, split) for split in splits]


async def test_every_cut_in_two_gives_the_same_events(browser: Browser, server: PageServer) -> None:
    splits = [pieces(STREAM, [cut]) for cut in range(len(STREAM) + 1)]
    for events in await parse(browser, server, splits):
        assert events == EVENTS


async def test_single_bytes_and_random_splits_give_the_same_events(
    browser: Browser, server: PageServer
) -> None:
    rng = random.Random(7)
    splits = [pieces(STREAM, rng.choices(range(len(STREAM)), k=rng.randint(2, 40))) for _ in range(60)]
    splits.append([[byte] for byte in STREAM])
    for events in await parse(browser, server, splits):
        assert events == EVENTS


async def test_bytes_that_are_no_utf8_become_replacement_characters(
    browser: Browser, server: PageServer
) -> None:
    [events] = await parse(browser, server, [[list(b"data: a\xff\xc3\n\n")]])
    assert events == [{"event": "message", "data": "a\ufffd\ufffd", "id": ""}]


async def test_endless_line_is_refused(browser: Browser, server: PageServer) -> None:
    script = """async () => {
      const { EventStreamParser } = await import(document.querySelector("[href$='stream.js']").href);
      const parser = new EventStreamParser();
      const block = new Uint8Array(256 * 1024).fill(97);
      try { for (let i = 0; i < 8; i += 1) parser.push(block); } catch (error) { return error.message; }
      return "";
    }"""
    async with visit(browser, server) as v:
        assert await v.page.evaluate(script) == "a line of the stream is too long"
