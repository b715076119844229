"""Every key under which a handler reaches something: the application's and the request's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NewType

from aiohttp import web

from mogine.settings import Settings, Site

RequestId = NewType("RequestId", str)
Readiness = Callable[[web.Application], Mapping[str, str]]


@dataclass(slots=True)
class ServerState:
    """What changes while a server runs. `draining` is set by the runner when a stop was asked for."""

    draining: bool = False


SETTINGS = web.AppKey("SETTINGS", Settings)
SITE = web.AppKey("SITE", Site)
STATE = web.AppKey("STATE", ServerState)
REQUEST_ID = web.RequestKey("REQUEST_ID", str)
