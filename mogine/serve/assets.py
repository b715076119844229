"""The files of `mogine/web`: known by name at the start, so that no path of a visitor is ever opened."""

import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import hdrs, web

from mogine.serve.access import Access
from mogine.serve.app import Route, RouteHandler

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
# Our pages load nothing from elsewhere; `style-src` without 'unsafe-inline' keeps out injected styles too.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
)


def asset_routes(folders: Sequence[str], *, ancestors: Sequence[str] = ()) -> list[Route]:
    """GET and HEAD of every file below these folders of `mogine/web`; `index.html` also as its folder.

    `ancestors` are the origins that may show our pages in a frame, beside our own.
    """
    policy = POLICY.format(ancestors=" ".join(("'self'", *ancestors)))
    web_root = resources.files("mogine") / "web"
    routes: list[Route] = []
    for folder in folders:
        for path, file in _files(web_root / folder, f"/{folder}"):
            handler = _serve(file, policy)
            routes.append(Route(hdrs.METH_GET, path, handler, Access.PUBLIC))
            if path.endswith("/index.html"):
                routes.append(Route(hdrs.METH_GET, path.removesuffix("index.html"), handler, Access.PUBLIC))
                routes.append(
                    Route(
                        hdrs.METH_GET,
                        path.removesuffix("/index.html"),
                        redirect(path.split("/")[-2] + "/"),
                        Access.PUBLIC,
                    )
                )
    return routes


def redirect(location: str) -> RouteHandler:
    """A handler that sends the browser to an address relative to this one, so that any prefix will do."""

    async def moved(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={hdrs.LOCATION: location})

    return moved


def _files(folder: Traversable, path: str) -> list[tuple[str, Traversable]]:
    if not folder.is_dir():
        return []
    found: list[tuple[str, Traversable]] = []
    for item in sorted(folder.iterdir(), key=lambda each: each.name):
        if item.is_dir():
            found += _files(item, f"{path}/{item.name}")
        elif item.name[item.name.rfind(".") :] in TYPES:
            found.append((f"{path}/{item.name}", item))
    return found


def _serve(file: Traversable, policy: str) -> RouteHandler:
    body = file.read_bytes()
    etag = hashlib.sha256(body).hexdigest()[:32]
    headers = {
        hdrs.CONTENT_TYPE: TYPES[file.name[file.name.rfind(".") :]],
        hdrs.CACHE_CONTROL: "no-cache",  # asked for again each time, answered 304 while it is the same
        hdrs.ETAG: f'"{etag}"',
        "Content-Security-Policy": policy,
    }

    async def asset(request: web.Request) -> web.Response:
        if any(known.value in (etag, "*") for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    return asset
