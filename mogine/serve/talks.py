"""Conversations that go on whichever machine gets the next question: their turns, for an hour, in Redis.

Each process also remembers what it has heard itself, which is what there is while Redis is away.
"""

from hashlib import blake2b
from secrets import token_hex
from typing import TYPE_CHECKING

import orjson

from mogine.chat import ChatMessage
from mogine.serve import scripts
from mogine.serve.sessions import LIFETIME_S, MAX_TURN_CHARS, MAX_TURNS

if TYPE_CHECKING:
    from mogine.serve.fleet import Fleet

MAX_TALKS = 100_000  # a turn takes about 1 KB, at most 9
VENDOR_SESSION_S = 86_400
NONE, THEIRS, FOREIGN = 0, 1, 2

Turns = tuple[ChatMessage, ...]


class Talks:
    """The conversations, and vendors' session ids, of all who use one Redis."""

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet = fleet

    async def open(self, known: tuple[str, Turns], visitor: str) -> tuple[str, Turns]:
        """As `Sessions.open`, which has given `known` from what this process remembers."""
        id, turns = known
        found = await self._fleet.call(scripts.TALK, _keys(id), _digest("visitor", visitor))
        if found is None or found[0] == NONE:
            return known
        if found[0] == FOREIGN:
            return token_hex(16), ()
        told: list[ChatMessage] = []
        for turn in found[1:]:
            question, answer = orjson.loads(turn)
            told += (ChatMessage("user", question), ChatMessage("assistant", answer))
        # What was said while Redis was away is known here alone.
        return id, max((tuple(told), turns), key=len)

    def add(self, id: str, visitor: str, question: str, answer: str) -> None:
        """As `Sessions.add`, for all."""
        turn = orjson.dumps([question[:MAX_TURN_CHARS], answer[:MAX_TURN_CHARS]]).decode()
        self._fleet.tell(
            scripts.TURN,
            _keys(id),
            *(_digest("visitor", visitor), turn, MAX_TURNS, round(LIFETIME_S), MAX_TALKS),
        )

    async def allows(self, id: str, visitor: str) -> bool:
        """As `VendorSessions.allows`; who cannot be asked objects to nobody."""
        found = await self._fleet.call(scripts.ALLOWS, (_vendor_key(id),), _digest("visitor", visitor))
        return bool(found != 0)

    def note(self, id: str, visitor: str) -> None:
        """As `VendorSessions.note`, for all."""
        self._fleet.tell(scripts.NOTE, (_vendor_key(id),), _digest("visitor", visitor), VENDOR_SESSION_S)


def _digest(kind: str, text: str) -> str:
    """An id of a conversation is a secret, and an address is nobody's business: neither lies in Redis."""
    return blake2b(text.encode("utf-8", "replace"), digest_size=16, person=kind.encode()).hexdigest()


def _keys(id: str) -> tuple[str, str]:
    turns = f"talk:{_digest('talk', id)}"
    return turns, f"{turns}:visitor"


def _vendor_key(id: str) -> str:
    return f"vendor:{_digest('vendor', id)}"
