"""The LLM proxy: the server that visitors talk to."""

from collections.abc import Mapping

from aiohttp import hdrs, web

from mogine.serve import chat, llm
from mogine.serve.access import Access
from mogine.serve.app import Route, base_app
from mogine.serve.assets import asset_routes, redirect
from mogine.serve.desk import DESK, open_desk
from mogine.settings import Settings

ROUTES = (
    Route(hdrs.METH_POST, "/api/llm/{provider}", llm.llm, Access.VISITOR),
    Route(hdrs.METH_POST, "/api/chat", chat.chat, Access.VISITOR),
    Route(hdrs.METH_GET, "/api/chat/config", chat.config, Access.PUBLIC),
    Route(hdrs.METH_GET, "/", redirect("chat/"), Access.PUBLIC),
)


def create_app(settings: Settings) -> web.Application:
    """The server of contract section 3."""
    origins = settings.access.allowed_origins
    pages = asset_routes(("chat", "shared"), ancestors=origins)
    app = base_app(settings, "proxy", (*ROUTES, *pages), ready=_problems)
    app.cleanup_ctx.append(open_desk)
    return app


def _problems(app: web.Application) -> Mapping[str, str]:
    """The proxy answers as long as it runs; only a record that cannot be written is worth a word."""
    problem = app[DESK].recorder.stats().problem
    return {"record": problem} if problem else {}
