"""axe-core in a page: which rules of accessibility it breaks."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from playwright.async_api import Page

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SOURCE = (resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")


async def violations(page: Page, *, within: str = "") -> list[str]:
    """One line for each broken rule, with the nodes that break it; [] when all is well.

    All rules are asked in the light, and those about colours once more in the dark.
    """
    await page.evaluate(SOURCE)
    light = await _broken(page, within, {"type": "tag", "values": RULES})
    await page.emulate_media(color_scheme="dark")
    dark = await _broken(page, within, {"type": "rule", "values": ["color-contrast"]})
    await page.emulate_media(color_scheme="light")
    return [*light, *(f"in the dark: {line}" for line in dark)]


async def _broken(page: Page, within: str, rules: Mapping[str, Any]) -> list[str]:
    context = {"include": [[within]]} if within else None
    script = "([context, how]) => axe.run(context ?? document, how)"
    how = {"runOnly": rules, "resultTypes": ["violations"]}
    found: dict[str, Any] = await page.evaluate(script, [context, how])
    return [
        f"{broken['id']}: {broken['help']} ({', '.join(str(node['target']) for node in broken['nodes'])})"
        for broken in found["violations"]
    ]
