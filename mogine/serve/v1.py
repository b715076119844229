"""`/v1`, for OpenAI's own client: `model` is a provider, `provider/model`, or `auto` for whoever can."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from mogine.chat import Provider
from mogine.errors import NotFound, RequestError
from mogine.serve.app import json_response, read_json
from mogine.serve.desk import DESK, Desk
from mogine.serve.dialects import max_body_bytes, parse
from mogine.serve.llm import relay
from mogine.serve.requests import Request
from mogine.settings import PROVIDER_NAMES

AUTO = "auto"
STARTED_AT = int(time.time())  # of a model's age nothing is known; clients want a number


async def completions(request: Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    desk = request.app[DESK]
    limits = desk.settings.proxy
    body = await read_json(request, max_body_bytes(limits))
    if "messages" not in body:
        raise RequestError(
            'the body needs "messages": a list of turns, the last one the question', param="messages"
        )
    if body.get("n") not in (None, 1):
        raise RequestError('one answer is given to a question; leave "n" out', param="n")
    providers, model = choose(desk, body.get("model"))
    asked = parse({**body, "model": model}, request.headers, providers[0], limits)
    return await relay(request, "v1", providers, asked)


async def models(request: web.Request) -> web.Response:
    """`GET /v1/models`."""
    return json_response({"object": "list", "data": _models(request.app[DESK])})


async def model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`."""
    wanted = request.match_info["id"]
    for known in _models(request.app[DESK]):
        if known["id"] == wanted:
            return json_response(known)
    raise _unknown()


def choose(desk: Desk, name: Any) -> tuple[Sequence[Provider], str]:
    """Who is asked in turn, and for which model ("": their own)."""
    if name in (None, "", AUTO):
        return desk.in_order(), ""
    if not isinstance(name, str):
        raise RequestError('"model" must be a text', param="model")
    provider, _, wanted = name.partition("/")
    if provider in PROVIDER_NAMES:
        return (desk.provider(provider),), wanted
    for known in desk.in_order():
        if name == known.default_model:
            return (known,), ""
    raise _unknown()


def _models(desk: Desk) -> list[Mapping[str, Any]]:
    found = [_model(AUTO, "mogine")]
    for provider in desk.in_order():
        found.append(_model(provider.name, provider.name))
        names: Sequence[str] = ()
        if provider.dialect and provider.default_model:
            names = tuple(dict.fromkeys((provider.default_model, *desk.settings.proxy.allowed_models)))
        found += [_model(f"{provider.name}/{name}", provider.name) for name in names]
    return found


def _model(name: str, owner: str) -> Mapping[str, Any]:
    return {"id": name, "object": "model", "created": STARTED_AT, "owned_by": owner}


def _unknown() -> NotFound:
    return NotFound("there is no such model here; GET /v1/models lists those that are", param="model")
