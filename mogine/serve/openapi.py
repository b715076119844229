"""The description of all HTTP routes, which every server hands out: `mogine/data/openapi.json`."""

from functools import cache
from importlib import resources

from aiohttp import hdrs, web

from mogine.serve.access import Access
from mogine.serve.app import Route


@cache
def document() -> bytes:
    """The file as it is."""
    return (resources.files("mogine") / "data/openapi.json").read_bytes()


async def openapi(request: web.Request) -> web.Response:
    """`GET /openapi.json`"""
    headers = {hdrs.CACHE_CONTROL: "no-cache"}
    return web.Response(body=document(), content_type="application/json", headers=headers)


OPENAPI_ROUTE = Route(hdrs.METH_GET, "/openapi.json", openapi, Access.PUBLIC)
