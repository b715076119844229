"""Plain text and Markdown: decoded, front matter taken off and used."""

import re

from mogine.ingest.loaders.encoding import decode
from mogine.ingest.loaders.parsed import PAGE_END, Parsed, title_of, web_address

_FRONT_MATTER = re.compile(r"\A\s*(---|\+\+\+)[ \t]*\n(.*?)\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.S)
_FIELD = re.compile(r"^(title|url|updated|lastmod|date)[ \t]*[:=][ \t]*(.*?)[ \t]*$", re.M | re.I)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_PICTURE = re.compile(r"!\[([^\]\n]*)\]\([^)\n]*\)")
_CHAPTER = re.compile(
    r"^[ \u3000]*(第[0-9一二三四五六七八九十百零〇]{1,6}[章节篇]"
    r"[ \u3000:：]?.{0,40}[^。！？；，\n])[ \u3000]*$",
    re.M,
)


def load_text(data: bytes) -> Parsed:
    """A text file. Lines such as 第三章 are its headings."""
    text = _unpaged(decode(data))
    return Parsed(_CHAPTER.sub(r"\n## \1\n", text), title=title_of(text))


def load_markdown(data: bytes) -> Parsed:
    """A Markdown file; `title`, `url` and `updated` (also `lastmod`, `date`) of its front matter count."""
    text = _unpaged(decode(data))
    fields: dict[str, str] = {}
    if front := _FRONT_MATTER.match(text):
        fields = {name.lower(): _unquoted(value) for name, value in _FIELD.findall(front[2])}
        text = text[front.end() :]
    text = _PICTURE.sub(r"\1", _COMMENT.sub("", text))
    return Parsed(
        text,
        title=fields.get("title") or _first_heading(text),
        url=web_address(fields.get("url", "")),
        updated=(fields.get("updated") or fields.get("lastmod") or fields.get("date", ""))[:40],
    )


def _unpaged(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace(PAGE_END, "\n")


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1].strip()
    return re.sub(r"\s+#.*$", "", value).strip()


def _first_heading(text: str) -> str:
    """The heading that opens the text, else the first one of the first level, else a line like a title."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    if match := re.match(r"#{1,2}[ \t]+(.+?)[ \t#]*$", first):
        return match[1].strip("*_ ")
    top = re.search(r"^#[ \t]+(.+?)[ \t#]*$", text, re.M)
    return top[1].strip("*_ ") if top else title_of(text)
