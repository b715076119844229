"""The company's one colour as the pages' few, each readable on light and on dark paper."""

import re
from functools import lru_cache

LIGHT, DARK = (255, 255, 255), (0x14, 0x16, 0x1B)
CONTRAST = 4.6  # a little above the 4.5 of WCAG AA, for the rounding of browsers
RGB = tuple[int, int, int]


@lru_cache(maxsize=8)
def palette(colour: str) -> dict[str, dict[str, str]]:
    """Accents for both themes from `#rrggbb` or `#rgb`; nothing for anything else.

    Each accent keeps its hue and is moved towards black or white until text in it can be read on the page
    and on its own soft tint, and text on it can be read too.
    """
    match = re.fullmatch(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})", colour)
    if match is None:
        return {}
    digits = match[1] if len(match[1]) == 6 else "".join(digit * 2 for digit in match[1])
    rgb = (int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16))
    return {"light": _theme(rgb, LIGHT), "dark": _theme(rgb, DARK)}


def contrast(a: RGB, b: RGB) -> float:
    """The ratio of WCAG 2, from 1 to 21."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _theme(colour: RGB, paper: RGB) -> dict[str, str]:
    away: RGB = (0, 0, 0) if paper == LIGHT else (255, 255, 255)
    accent = colour
    for step in range(101):
        accent = _mix(colour, away, step / 100)
        if contrast(accent, _soft(accent, paper)) >= CONTRAST and contrast(accent, paper) >= CONTRAST:
            break
    ink = LIGHT if contrast(accent, LIGHT) >= contrast(accent, DARK) else DARK
    return {
        "accent": _hex(accent),
        "accent-strong": _hex(_mix(accent, away, 0.18)),
        "accent-soft": _hex(_soft(accent, paper)),
        "on-accent": _hex(ink),
    }


def _soft(accent: RGB, paper: RGB) -> RGB:
    return _mix(paper, accent, 0.1 if paper == LIGHT else 0.16)


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _luminance(colour: RGB) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
