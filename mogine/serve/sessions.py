"""What was said before: the last turns of each conversation, in memory, for its own visitor alone."""

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mogine.chat import ChatMessage

MAX_SESSIONS = 2_000
MAX_TURNS = 6
MAX_TURN_CHARS = 1_500  # with the two above: at most some 70 MB, whatever visitors do
LIFETIME_S = 3_600.0
RANDOM_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f-]{36}|[0-9A-Za-z_-]{22,64}")
MAX_VENDOR_SESSIONS = 20_000


@dataclass(slots=True)
class _Session:
    visitor: str
    used_at: float
    messages: tuple[ChatMessage, ...] = ()


class Sessions:
    """Conversations by id: 128 random bits, of use in the hands of one visitor alone."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self._clock = clock
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session_id: str, visitor: str) -> tuple[str, tuple[ChatMessage, ...]]:
        """The id to go on with, and the turns so far.

        A page may make its own id, if it is long enough to be random; one that belongs to somebody else is
        replaced by a new one, without a word of what was said there.
        """
        session = self._sessions.get(session_id)
        if session is not None and session.visitor == visitor:
            return session_id, session.messages if self._is_open(session) else ()
        if session is None and RANDOM_ID.fullmatch(session_id):
            return session_id, ()
        return secrets.token_hex(16), ()

    def add(self, session_id: str, visitor: str, question: str, answer: str) -> None:
        """Remember one turn of a conversation that `open` gave; its oldest is forgotten beyond MAX_TURNS."""
        session = self._sessions.get(session_id)
        if session is None or session.visitor != visitor or not self._is_open(session):
            session = self._sessions[session_id] = _Session(visitor, 0.0)
        turn = (
            ChatMessage("user", question[:MAX_TURN_CHARS]),
            ChatMessage("assistant", answer[:MAX_TURN_CHARS]),
        )
        session.messages = (*session.messages, *turn)[-2 * MAX_TURNS :]
        session.used_at = self._clock()
        self._sessions.move_to_end(session_id)
        if len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def _is_open(self, session: _Session) -> bool:
        return self._clock() - session.used_at < LIFETIME_S


class VendorSessions:
    """Which visitor a vendor's session id was given to; the vendor itself would take it from anyone."""

    def __init__(self, max_sessions: int = MAX_VENDOR_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._owners: OrderedDict[str, str] = OrderedDict()

    def note(self, session_id: str, visitor: str) -> None:
        """The vendor has given `session_id` in an answer to `visitor`; the first owner stays."""
        self._owners.setdefault(session_id, visitor)
        if len(self._owners) > self._max_sessions:
            self._owners.popitem(last=False)

    def allows(self, session_id: str, visitor: str) -> bool:
        """False when the id was given to someone else; ids from before a restart are taken on trust."""
        return self._owners.get(session_id, visitor) == visitor
