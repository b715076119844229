"""What processes on one port must agree on, kept by their parent: rates, open answers, sessions, sums."""

from collections.abc import Mapping
from typing import Any

from mogine.errors import MogineError
from mogine.serve.keys import ServerState
from mogine.serve.limits import Limits, Place
from mogine.serve.metrics import Snapshot
from mogine.serve.sessions import Sessions, VendorSessions
from mogine.serve.shared import Message, encode_error
from mogine.settings import AccessSettings


class Keeper:
    """Answers the messages of workers, who are told apart by a number.

    The very classes that one process uses, so the limits are as exact with many as with one.
    """

    def __init__(self, access: AccessSettings) -> None:
        self._limits = Limits(access, ServerState())
        self._sessions = Sessions()
        self._vendor_sessions = VendorSessions()
        self._places: dict[int, dict[int, Place]] = {}
        self._reports: dict[int, Snapshot] = {}
        self._gone = Snapshot()
        self.workers = 0
        self.restarts = 0

    def handle(self, worker: int, message: Message) -> Mapping[str, Any]:
        """The answer to one message."""
        match message["do"]:
            case "admit":
                return self._admit(worker, int(message["ticket"]), str(message["visitor"]))
            case "leave":
                self._leave(self._places.get(worker, {}).pop(int(message["ticket"]), None))
            case "refund":
                self._limits.refund(str(message["visitor"]))
            case "open_session":
                id, turns = self._sessions.open(message["id"], message["visitor"])
                return {"id": id, "messages": [(turn.role, turn.text) for turn in turns]}
            case "add_turn":
                self._sessions.add(
                    message["id"], message["visitor"], message["question"], message["answer_text"]
                )
            case "allows":
                return {"allowed": self._vendor_sessions.allows(message["id"], message["visitor"])}
            case "note":
                self._vendor_sessions.note(message["id"], message["visitor"])
            case "report":
                self._reports[worker] = Snapshot.from_json(message["snapshot"])
            case "metrics":
                self._reports[worker] = Snapshot.from_json(message["snapshot"])
                return self._total().to_json()
        return {}

    def gone(self, worker: int) -> None:
        """The worker has ended: its answers are over, and what it has counted stays counted."""
        for place in self._places.pop(worker, {}).values():
            self._leave(place)
        report = self._reports.pop(worker, None)
        if report is not None:
            self._gone.merge(report, counters_only=True)

    @property
    def open_answers(self) -> dict[str, int]:
        """How many answers each visitor has open."""
        return self._limits.open_by_visitor

    def _admit(self, worker: int, ticket: int, visitor: str) -> Mapping[str, Any]:
        try:
            place = self._limits.open(visitor)
        except MogineError as error:
            return {"error": encode_error(error)}
        self._limits.enter(place)
        self._places.setdefault(worker, {})[ticket] = place
        return {}

    def _leave(self, place: Place | None) -> None:
        if place is not None:
            self._limits.leave(place)

    def _total(self) -> Snapshot:
        total = Snapshot()
        for report in (self._gone, *self._reports.values()):
            total.merge(report)
        total.values[("mogine_visitors_tracked", ())] = self._limits.tracked
        total.values[("mogine_workers", ())] = self.workers
        total.values[("mogine_worker_restarts", ())] = self.restarts
        return total
