"""The two consoles of the command line, and text from visitors, models and documents made safe for them."""

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    out: Console
    err: Console

# C0 but tab and newline, DEL and C1, marks and overrides of writing direction, lone surrogates: these can
# move the cursor, set the window's title, reorder what a person reads, or fail to encode.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LINE_BREAKS = re.compile(r"[\t\n\u2028\u2029]")


def __getattr__(name: str) -> "Console":
    """`out` and `err`, made when first asked for: rich costs more than all of `mogine --help`."""
    if name not in ("out", "err"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _console(name)


@cache
def _console(name: str) -> "Console":
    from rich.console import Console

    # Nothing that is printed is taken for rich's own markup: a model may well say "[bold]".
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=name == "err")


def safe(text: str) -> str:
    """`text` with every character that could steer a terminal shown escaped; line breaks stay."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))


def safe_line(text: str, limit: int = 500) -> str:
    """`text` safe and on one line, cut at `limit` characters."""
    shown = _LINE_BREAKS.sub(_escaped, safe(text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def safe_json(value: Any) -> str:
    """`value` as JSON that people can read: characters that could steer a terminal are \\u escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    named = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
