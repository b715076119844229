"""`POST /api/feedback`: a thumb of the visitor who asked, or the wish for a person, tied to the row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mogine.analytics.records import RATINGS
from mogine.analytics.store import Asker
from mogine.errors import NotFound, RequestError
from mogine.serve.app import json_response, read_json
from mogine.serve.desk import DESK
from mogine.serve.dialects import session_id

MAX_BODY_BYTES = 16 * 1024
MAX_REASON_CHARS = 100
MAX_COMMENT_CHARS = 1000
REQUEST_ID_FORM = re.compile(r"[0-9A-Za-z._-]{8,128}")


@dataclass(frozen=True, slots=True)
class Thumb:
    """What a visitor may say in the body; everything else in it is left alone."""

    request_id: str
    rating: str
    handoff: bool
    reason: str
    comment: str
    session_id: str

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Thumb":
        """Raises RequestError that names the field."""
        request_id = body.get("request_id")
        if not isinstance(request_id, str) or not REQUEST_ID_FORM.fullmatch(request_id):
            raise RequestError('"request_id" must be the one that came with the answer', param="request_id")
        handoff = body.get("handoff", False)
        if not isinstance(handoff, bool):
            raise RequestError('"handoff" must be true or false', param="handoff")
        rating = body.get("rating")
        if rating not in RATINGS and not (handoff and rating is None):
            raise RequestError('"rating" must be "up" or "down", or "handoff" true', param="rating")
        return cls(
            request_id,
            rating or "",
            handoff,
            _words(body, "reason", MAX_REASON_CHARS),
            _words(body, "comment", MAX_COMMENT_CHARS),
            session_id(body.get("session_id")),
        )


async def feedback(request: web.Request) -> web.Response:
    """The handler. Only who asked may rate: the same address on the same day, or who knows the session."""
    desk = request.app[DESK]
    bucket = desk.bucket(request)
    desk.limits.take_thumb(bucket)
    thumb = Thumb.of(await read_json(request, MAX_BODY_BYTES))
    asker = Asker(desk.visitors.hash(bucket), thumb.session_id)
    known = await desk.recorder.give_feedback(
        thumb.request_id, thumb.rating, thumb.reason, thumb.comment, asker, handoff=thumb.handoff
    )
    if not known:
        # The same words for what never was, what is too old, and what somebody else asked.
        raise NotFound("there is no question of yours with this request_id of the last day")
    told = {"request_id": thumb.request_id, "rating": thumb.rating, "handoff": thumb.handoff}
    return json_response({name: value for name, value in told.items() if value})


def _words(body: Mapping[str, Any], name: str, limit: int) -> str:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > limit:
        raise RequestError(f'"{name}" must be a text of at most {limit} characters', param=name)
    return value.strip()
