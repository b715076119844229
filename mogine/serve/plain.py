"""The chat page's form for browsers without JavaScript: a question in, a page with the whole answer out."""

import html
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiohttp import hdrs, web
from markdown_it import MarkdownIt

from mogine.errors import Forbidden, MogineError, RequestError, UnsupportedMedia
from mogine.serve.app import read_body
from mogine.serve.assets import TYPES, policy
from mogine.serve.chat import Question, whole
from mogine.serve.keys import SETTINGS
from mogine.serve.middlewares import retry_after_s
from mogine.serve.pages import LIBRARY

FORM = "application/x-www-form-urlencoded"
LINKS = ("http", "https", "mailto")
OUR_OWN = ("same-origin", "none")
# For people, in both languages, since the page is for both.
PROBLEMS = {
    429: "提问太频繁，请稍等片刻再试。 · Too many questions in a short time; please wait a moment.",
    403: "此页面无权使用助手。 · This page may not use the assistant.",
    400: "问题无法处理，请检查后再试。 · The question could not be taken; please check it.",
}
PROBLEM = "暂时无法回答，请稍后再试。 · No answer is possible at the moment; please try again soon."


async def ask(request: web.Request) -> web.Response:
    """`POST /chat/`: the handler. What goes wrong is told on the page, with the error's own status."""
    settings = request.app[SETTINGS]
    fields: dict[str, str] = {}
    try:
        # Browsers too old to send Origin with a form say at least so much.
        if (
            hdrs.ORIGIN not in request.headers
            and request.headers.get("Sec-Fetch-Site", "none") not in OUR_OWN
        ):
            raise Forbidden("forms of other sites may not ask here", reason="origin_not_allowed")
        fields = await _fields(request, settings.proxy.max_body_bytes)
        body = {"question": fields.get("question", ""), "session_id": fields.get("session_id") or None}
        question = Question.of({**body, "stream": False}, request.headers, settings.proxy)
        found = await whole(request, question)
    except MogineError as error:
        return _page(request, fields, f'<p role="alert">{_problem(error)}</p>', error)
    return _page(request, {**fields, "session_id": found["session_id"]}, _answer(question.text, found))


async def _fields(request: web.Request, max_bytes: int) -> dict[str, str]:
    if request.content_type != FORM:
        raise UnsupportedMedia(f"send the form as {FORM}")
    body = await read_body(request, max_bytes)
    try:
        return dict(parse_qsl(body.decode(), max_num_fields=8, errors="strict"))
    except ValueError as error:
        raise RequestError("the form is not readable") from error


def _answer(question: str, found: Mapping[str, Any]) -> str:
    return (
        f'<h2 dir="auto">{html.escape(question)}</h2>\n'
        f'<article class="prose" dir="auto">{render(found["answer"])}</article>\n'
        f"{_sources(found['citations'])}"
    )


def render(text: str) -> str:
    """Markdown as HTML in which nothing runs: no HTML of the text, no pictures, links to the web alone."""
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    markdown.disable("image")
    markdown.validateLink = _is_safe  # type: ignore[method-assign, assignment]
    return str(markdown.render(text)).replace("<a href=", '<a rel="noopener noreferrer nofollow ugc" href=')


def _is_safe(address: str) -> bool:
    try:
        return urlsplit(address).scheme.lower() in LINKS
    except ValueError:
        return False


def _sources(citations: Sequence[Mapping[str, Any]]) -> str:
    if not citations:
        return ""
    items = []
    for citation in citations:
        title = html.escape(citation["title"] or citation["source"])
        if _is_safe(citation["url"]):
            address = html.escape(citation["url"], quote=True)
            title = f'<a rel="noopener noreferrer" href="{address}">{title}</a>'
        items.append(
            f'<li value="{citation["number"]:d}">{title}'
            f'<blockquote dir="auto">{render(citation["excerpt"])}</blockquote></li>'
        )
    return f"<h2>参考资料 · Sources</h2>\n<ol>{''.join(items)}</ol>\n"


def _problem(error: MogineError) -> str:
    return html.escape(PROBLEMS.get(error.status, PROBLEM))


def _page(
    request: web.Request, fields: Mapping[str, str], answer: str, error: MogineError | None = None
) -> web.Response:
    page = request.app[LIBRARY].page("chat/index.html").decode()
    session = html.escape(fields.get("session_id", ""), quote=True)
    page = page.replace("<!--answer-->", answer, 1)
    page = page.replace("<!--session-->", f'<input type="hidden" name="session_id" value="{session}" />', 1)
    if error is not None:
        # The question stands there again, so that nobody has to write it twice.
        page = page.replace("></textarea>", f">\n{html.escape(fields.get('question', ''))}</textarea>", 1)
    headers = {
        hdrs.CONTENT_TYPE: TYPES[".html"],
        hdrs.CACHE_CONTROL: "no-store",
        "Content-Security-Policy": policy(forms="'self'"),
    }
    if error is not None and (wait := retry_after_s(error)) is not None:
        headers[hdrs.RETRY_AFTER] = str(wait)
    return web.Response(status=error.status if error else 200, text=page, headers=headers)
