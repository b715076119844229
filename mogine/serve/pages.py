"""What visitors' pages are made of beside files: their configuration, `widget.js`, the hand-off's picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from aiohttp import hdrs, web

from mogine.errors import NotFound
from mogine.serve.app import json_response
from mogine.serve.assets import Asset, Library, conditional
from mogine.serve.colours import palette
from mogine.serve.desk import DESK
from mogine.settings import Site

# Long enough that a visitor who reads several pages asks once, short enough for a change of site.toml.
WIDGET_AGE_S = 300
MAX_PICTURE_BYTES = 512 * 1024
PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
SETUP = b"/*setup*/ {}"
LANGUAGES = ("zh", "en")

LIBRARY = web.AppKey("LIBRARY", Library)
WIDGETS = web.AppKey("WIDGETS", dict[bytes, Asset])


async def config(request: web.Request) -> web.Response:
    """`GET /api/chat/config?lang=`: what a page needs to know before the first question."""
    desk = request.app[DESK]
    site = desk.site.now()
    language = _language(site) or request.query.get("lang", "")[:2].lower()
    assistant = _spoken(site.assistant, language)
    return json_response(
        {
            **_look(site),
            "title": _title(site, language),
            "name": _text(assistant, "name"),
            "greeting": _text(assistant, "greeting"),
            "starters": _texts(assistant.get("starter_questions")),
            "ai_notice": _text(assistant, "ai_notice"),
            "privacy": {
                "text": _text(assistant, "privacy_notice"),
                "url": _text(assistant, "privacy_url"),
            },
            "handoff": {
                "text": _text(assistant, "handoff_text"),
                "contacts": _texts(assistant.get("handoff_contacts")),
                "picture": "api/chat/handoff.picture" if _text(assistant, "handoff_wechat_qr") else "",
            },
            "providers": [p.name for p in desk.in_order()],
            "max_question_chars": desk.settings.proxy.max_question_chars,
        }
    )


async def widget(request: web.Request) -> web.Response:
    """`GET /widget.js`: the bubble, with what it must know before anything else is loaded."""
    library, known = request.app[LIBRARY], request.app[WIDGETS]
    site = request.app[DESK].site.now()
    titles = {language: _title(site, language) for language in LANGUAGES}
    setup = orjson.dumps({**_look(site), "titles": titles, "build": library.build})
    setup = setup.replace(b"<", b"\\u003c")
    if (asset := known.get(setup)) is None:
        known.clear()
        asset = known[setup] = Asset.of(library.source("widget/loader.js").replace(SETUP, setup, 1), ".js")
    return conditional(request, asset, {hdrs.CACHE_CONTROL: f"public, max-age={WIDGET_AGE_S}"})


async def picture(request: web.Request) -> web.Response:
    """`GET /api/chat/handoff.picture`: the file that `handoff_wechat_qr` of site.toml names."""
    desk = request.app[DESK]
    name = _text(desk.site.now().assistant, "handoff_wechat_qr")
    home = desk.settings.home.resolve()
    try:
        path = (home / name).resolve()
        if not name or not path.is_relative_to(home) or path.stat().st_size > MAX_PICTURE_BYTES:
            raise NotFound("there is no picture for the hand-off")
        body = _read(path)
    except OSError as error:
        raise NotFound("the picture for the hand-off cannot be read") from error
    kind = next((kind for mark, kind in PICTURES.items() if body.startswith(mark)), None)
    if kind is None:
        raise NotFound("the picture for the hand-off is no PNG, JPEG or WebP file")
    headers: dict[str, str] = {
        hdrs.CONTENT_TYPE: kind,
        hdrs.CACHE_CONTROL: "public, max-age=300",
        "Content-Security-Policy": "default-src 'none'",
    }
    return web.Response(body=body, headers=headers)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PICTURE_BYTES)


def _look(site: Site) -> dict[str, Any]:
    widget = site.widget
    position = _text(widget, "position")
    theme = _text(widget, "theme")
    return {
        "language": _language(site) or "auto",
        "colour": _text(widget, "colour"),
        "colours": palette(_text(widget, "colour")),
        "position": position if position in ("left", "right") else "right",
        "theme": theme if theme in ("light", "dark") else "auto",
    }


def _language(site: Site) -> str:
    """The one language of the site's pages; "" where the visitor decides."""
    language = _text(site.widget, "language")
    return language if language in LANGUAGES else ""


def _spoken(table: Mapping[str, Any], language: str) -> Mapping[str, Any]:
    """`[assistant]` or `[widget]` with what `[assistant.en]` and the like say otherwise."""
    own = table.get(language) if language in LANGUAGES else None
    return {**table, **own} if isinstance(own, dict) else table


def _title(site: Site, language: str) -> str:
    return _text(_spoken(site.widget, language), "title") or _text(_spoken(site.assistant, language), "name")


def _text(table: Mapping[str, Any], name: str) -> str:
    return str(table.get(name) or "").strip()


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
