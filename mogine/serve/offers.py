"""What the knowledge base server hands to other machines that pull its generations."""

import asyncio
import re

from aiohttp import hdrs, web

from mogine.errors import RequestError
from mogine.kb.offers import Offers
from mogine.serve.access import Access
from mogine.serve.app import Route

OFFERS = web.AppKey("OFFERS", Offers)


async def publication(request: web.Request) -> web.Response:
    """GET /api/kb/publication: the files of the current generation in blocks, for machines that pull it."""
    found = await asyncio.to_thread(request.app[OFFERS].publication)
    headers = {hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=found.to_json(), content_type="application/json", headers=headers)


async def publication_block(request: web.Request) -> web.Response:
    """GET /api/kb/publication/block?generation=&file=&number=: the bytes of one of them."""
    generation, file, number = (request.query.get(name, "") for name in ("generation", "file", "number"))
    if not re.fullmatch("[0-9]{1,9}", number):
        raise RequestError("number must be that of a block, from 0", param="number")
    block = await asyncio.to_thread(request.app[OFFERS].block, generation, file, int(number))
    headers = {hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=block, content_type="application/octet-stream", headers=headers)


OFFER_ROUTES = (
    Route("GET", "/api/kb/publication", publication, Access.ADMIN),
    Route("GET", "/api/kb/publication/block", publication_block, Access.ADMIN),
)
