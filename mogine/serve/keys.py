"""Every key under which a handler reaches something: the application's and the request's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NewType, Protocol

from aiohttp import web

from mogine.errors import MogineError
from mogine.serve.metrics import Meters
from mogine.settings import Settings, Site

RequestId = NewType("RequestId", str)
Readiness = Callable[[web.Application], Mapping[str, str]]


class Answering(Protocol):
    """An answer that is being given to a visitor."""

    def stop(self, error: MogineError) -> None:
        """End it with `error`, which the visitor is told."""


@dataclass(slots=True)
class ServerState:
    """What changes while a server runs. `draining` is set by the runner when a stop was asked for, `refusing`
    when no new question may be answered any more, and it calls all of `on_hangup` at SIGHUP."""

    draining: bool = False
    refusing: bool = False
    running: set[Answering] = field(default_factory=set)
    on_hangup: list[Callable[[], None]] = field(default_factory=list)


SETTINGS = web.AppKey("SETTINGS", Settings)
SITE = web.AppKey("SITE", Site)
STATE = web.AppKey("STATE", ServerState)
METERS = web.AppKey("METERS", Meters)
REQUEST_ID = web.RequestKey("REQUEST_ID", str)
# What went wrong after an answer had begun, for the line in the log: its status was 200 by then.
NOTE = web.RequestKey("NOTE", str)
