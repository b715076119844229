"""Gaps over HTTP: what visitors asked and the documents did not answer, for the owner's dashboard."""

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from mogine.analytics.records import time_text
from mogine.analytics.unanswered import STATUSES
from mogine.children import import_path
from mogine.errors import RequestError
from mogine.gaps import look
from mogine.gaps.loop import Detail, Gaps, open_gaps
from mogine.kb.gate import DEFAULT_TOP_K
from mogine.serve.app import json_response, read_json
from mogine.settings import Settings

log = logging.getLogger(__name__)

# How long is waited for a look; one that takes longer goes on, and the next list has what it found.
LIST_PATIENCE_S = 0.3
ACCEPT_PATIENCE_S = 8.0
LOOK_S = 120.0
REST_S = 5.0
DEADLINE_S = 2.0
MAX_LISTED = 500
CHOICES: Mapping[str, tuple[str, ...]] = {
    "todo": ("open", "accepted"),
    **{status: (status,) for status in STATUSES},
    "all": STATUSES,
}
DEFINITIONS: Mapping[str, str] = {
    "gap": "Questions of the last 30 days to the assistant that ask for the same and went unanswered. "
    "Crawlers are left out.",
    "signals": "no_passage: no passage was near enough. declined: the answer said that it is not in the "
    "documents. thumbs_down: the visitor's last thumb. rephrased: the same visitor asked the same again "
    "within two minutes of the answer; after an answer with a source only when the words are nearly the "
    "same. handoff: the visitor asked for a person.",
    "weight": "Visitors, each counting half as much for every 14 days since the gap was last met.",
    "status": "open; accepted: its test waits for the document; closed: its test passes in a generation made "
    "after the last unanswered question, with that generation and the rank as evidence; ignored, with a "
    "reason. A closed gap is open again when its test fails or the question goes unanswered once more.",
}


class Lookout:
    """Looks for gaps in a child process: one at a time, and only when there may be something new."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._task: asyncio.Task[str] | None = None
        self._ended_at = float("-inf")
        self._problem = ""

    async def look(self, patience_s: float, *, now: bool = False) -> tuple[bool, str]:
        """Whether a look still runs after `patience_s`; what hindered the last. `now` looks in any case."""
        if self._task is None:
            rested = time.monotonic() - self._ended_at > REST_S
            if not now and not (rested and await asyncio.to_thread(open_gaps(self._settings).is_stale)):
                return False, self._problem
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        with contextlib.suppress(TimeoutError):
            return False, await asyncio.wait_for(asyncio.shield(self._task), patience_s)
        return True, self._problem

    async def close(self) -> None:
        """Ends the child."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[str]") -> None:
        self._task, self._ended_at = None, time.monotonic()
        if not task.cancelled():
            self._problem = task.result()

    async def _run(self) -> str:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-B", "-X", "utf8", "-c", look.START, *import_path()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which then ends the child
        )
        try:
            async with asyncio.timeout(LOOK_S):
                reply, _ = await child.communicate(look.job(self._settings))
            problem = str(json.loads(reply)["problem"])
        except (TimeoutError, ValueError, KeyError):
            problem = "the look at the gaps broke off; it begins anew with the next one"
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await asyncio.shield(child.wait())
        if problem and problem != self._problem:
            log.warning("gaps: %s", problem)
        return problem


LOOKOUT = web.AppKey("LOOKOUT", Lookout)
GAPS = web.AppKey("GAPS", Gaps)


async def keep_lookout(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context."""
    yield
    await app[LOOKOUT].close()


async def list_gaps(request: web.Request) -> web.Response:
    """Gaps, the weightiest first. `status` is one of theirs, `todo` (open and accepted) or `all`."""
    wanted = request.query.get("status", "todo")
    if wanted not in CHOICES:
        raise RequestError(f"status must be one of {', '.join(CHOICES)}", reason="bad_filter", param="status")
    limit = request.query.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= MAX_LISTED):
        raise RequestError(
            f"limit must be a whole number from 1 to {MAX_LISTED}", reason="bad_filter", param="limit"
        )
    if unknown := next((name for name in request.query if name not in ("status", "limit")), None):
        raise RequestError(
            f"{unknown[:40]} is no filter here; there are status, limit",
            reason="bad_filter",
            param=unknown[:40],
        )
    looking, problem = await request.app[LOOKOUT].look(LIST_PATIENCE_S)
    found, counts = await asyncio.to_thread(request.app[GAPS].listed, CHOICES[wanted], deadline_s=DEADLINE_S)
    return json_response(
        {
            "gaps": [gap.to_dict() for gap in found[: int(limit)]],
            "counts": counts,
            "looking": looking,
            "problem": problem or None,
            "definitions": dict(DEFINITIONS),
        }
    )


async def show_gap(request: web.Request) -> web.Response:
    """One gap with its newest questions and how it came to its status."""
    return await _told(request, _id(request))


async def accept_gap(request: web.Request) -> web.Response:
    """`{"expect": "docs/refund.md", "contains"?, "question"?, "top_k"?}`: writes the test that closes it."""
    body = await _body(request, "expect", "contains", "question", "top_k")
    words = {name: _text(body, name) for name in ("expect", "contains", "question")}
    if not words["expect"].strip():
        raise RequestError('"expect" must name the document that shall answer it', param="expect")
    top_k = body.get("top_k", DEFAULT_TOP_K)  # checked where tests are
    id = _id(request)
    await asyncio.to_thread(lambda: request.app[GAPS].accept(id, **words, top_k=top_k))
    await request.app[LOOKOUT].look(ACCEPT_PATIENCE_S, now=True)
    return await _told(request, id)


async def ignore_gap(request: web.Request) -> web.Response:
    """`{"reason": "..."}`."""
    reason = _text(await _body(request, "reason"), "reason")
    id = _id(request)
    await asyncio.to_thread(request.app[GAPS].ignore, id, reason)
    return await _told(request, id)


async def reopen_gap(request: web.Request) -> web.Response:
    """`{}`: whatever it was, it is open again."""
    await _body(request)
    id = _id(request)
    await asyncio.to_thread(request.app[GAPS].reopen, id)
    return await _told(request, id)


async def _told(request: web.Request, id: int) -> web.Response:
    return json_response(_detail(await asyncio.to_thread(request.app[GAPS].detail, id)))


def _detail(detail: Detail) -> dict[str, Any]:
    return {
        **detail.gap.to_dict(),
        "questions": [
            {
                "id": question.id,
                "at": time_text(question.at),
                "question": question.question,
                "signals": list(question.signals),
                "top_score": question.top_score,
            }
            for question in detail.questions
        ],
        "history": [
            {"at": time_text(step.at), "status": step.status, "detail": step.detail}
            for step in detail.history
        ],
    }


def _id(request: web.Request) -> int:
    return int(request.match_info["id"])  # the route takes digits alone


async def _body(request: web.Request, *known: str) -> dict[str, Any]:
    body = await read_json(request)
    if unknown := next((name for name in body if name not in known), None):
        raise RequestError(f'"{unknown[:40]}" is nothing that this takes', param=unknown[:40])
    return body


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise RequestError(f'"{name}" must be a text', param=name)
    return value
