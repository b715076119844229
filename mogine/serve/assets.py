"""The files of `mogine/web`: read at the start and sent compressed; no path of a visitor is ever opened."""

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Self

from aiohttp import hdrs, web

from mogine.errors import NotFound
from mogine.serve.access import Access
from mogine.serve.app import Route, RouteHandler

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
COMPRESSED = (".css", ".html", ".js", ".svg", ".txt")
SMALLEST_COMPRESSED = 600
# Our pages load nothing from elsewhere; `style-src` without 'unsafe-inline' keeps out injected styles too.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action {forms}; frame-ancestors {ancestors}"
)
FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"  # asked for again each time, answered 304 while it is the same
FOLDER = "assets/"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it goes out, also compressed where that is worth it."""

    type: str
    body: bytes
    packed: bytes | None
    etag: str

    @classmethod
    def of(cls, body: bytes, suffix: str) -> Self:
        """`suffix` is the file's, as in TYPES."""
        etag = hashlib.sha256(body).hexdigest()[:32]
        packed = gzip.compress(body, 9, mtime=0) if suffix in COMPRESSED else None
        if packed is not None and (len(body) < SMALLEST_COMPRESSED or len(packed) >= len(body)):
            packed = None
        return cls(TYPES[suffix], body, packed, etag)


class Library:
    """Every file of `mogine/web` by its path there; `build` is one hash of them all.

    Files lie at `assets/BUILD/...` and may be kept for ever; their imports of each other are relative and so
    stay within one build. A page names its files as `assets/...`, which becomes `assets/BUILD/...`.
    """

    def __init__(self) -> None:
        files = dict(_files(resources.files("mogine") / "web", ""))
        digest = hashlib.sha256()
        for path, body in files.items():
            digest.update(b"%b\0%d\0%b" % (path.encode(), len(body), body))
        self.build = digest.hexdigest()[:12]
        self._sources = files
        self._assets: dict[str, Asset] = {}

    def source(self, path: str) -> bytes:
        """The file as it lies there. Raises KeyError."""
        return self._sources[path]

    def asset(self, path: str) -> Asset:
        """The file ready to go out. Raises KeyError."""
        asset = self._assets.get(path)
        if asset is None:
            asset = self._assets[path] = Asset.of(self._sources[path], path[path.rfind(".") :])
        return asset

    def page(self, path: str) -> bytes:
        """An HTML file with the addresses of this build."""
        names = (f"../{FOLDER}".encode(), f"../{FOLDER}{self.build}/".encode())
        return self._sources[path].replace(*names)


def asset_route(library: Library) -> Route:
    """GET and HEAD of `/assets/BUILD/PATH`; of another build too, for a page that was open at an upgrade."""

    async def asset(request: web.Request) -> web.Response:
        try:
            found = library.asset(request.match_info["path"])
        except KeyError:
            raise NotFound("there is nothing at this address") from None
        is_ours = request.match_info["build"] == library.build
        headers: dict[str, str] = {hdrs.CACHE_CONTROL: FOREVER if is_ours else ASK_AGAIN}
        if found.type.startswith(("image/svg", "text/html")):
            headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
        return conditional(request, found, headers)

    return Route(hdrs.METH_GET, "/" + FOLDER + "{build:[0-9a-f]{12}}/{path:.+}", asset, Access.PUBLIC)


def page_routes(
    library: Library, folder: str, *, ancestors: Sequence[str] = (), forms: str = "'none'"
) -> list[Route]:
    """The page `FOLDER/index.html` at `/FOLDER/`, and a redirect from `/FOLDER`.

    `ancestors` are the origins that may show it in a frame, `forms` where its forms may go.
    """
    asset = Asset.of(library.page(f"{folder}/index.html"), ".html")
    headers = {
        hdrs.CACHE_CONTROL: ASK_AGAIN,
        "Content-Security-Policy": policy(ancestors=ancestors, forms=forms),
    }

    async def page(request: web.Request) -> web.Response:
        return conditional(request, asset, headers)

    return [
        Route(hdrs.METH_GET, f"/{folder}/", page, Access.PUBLIC),
        Route(hdrs.METH_GET, f"/{folder}", redirect(f"{folder}/"), Access.PUBLIC),
    ]


def policy(*, ancestors: Sequence[str] = (), forms: str = "'none'") -> str:
    """The Content-Security-Policy of a page."""
    return POLICY.format(ancestors=" ".join(ancestors) or "'none'", forms=forms)


def redirect(location: str) -> RouteHandler:
    """A handler that sends the browser to an address relative to this one, so that any prefix will do."""

    async def moved(request: web.Request) -> web.Response:
        # What was typed behind the address (`?q=`) goes along.
        query = f"?{raw}" if (raw := request.rel_url.raw_query_string) else ""
        return web.Response(status=302, headers={hdrs.LOCATION: location + query})

    return moved


def conditional(request: web.Request, asset: Asset, headers: Mapping[str, str]) -> web.Response:
    """`asset`, compressed for who takes that; 304 for who has it."""
    packed = asset.packed is not None and "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, "")
    etag = f"{asset.etag}-gz" if packed else asset.etag
    sent = {**headers, hdrs.CONTENT_TYPE: asset.type, hdrs.ETAG: f'"{etag}"'}
    if asset.packed is not None:
        sent[hdrs.VARY] = hdrs.ACCEPT_ENCODING
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=sent)
    if packed:
        return web.Response(body=asset.packed, headers={**sent, hdrs.CONTENT_ENCODING: "gzip"})
    return web.Response(body=asset.body, headers=sent)


def _files(folder: Traversable, path: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for item in sorted(folder.iterdir(), key=lambda each: each.name):
        if item.is_dir():
            found += _files(item, f"{path}{item.name}/")
        elif item.name[item.name.rfind(".") :] in TYPES:
            found.append((f"{path}{item.name}", item.read_bytes()))
    return found
