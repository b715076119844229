"""axe-core in a page: which rules of accessibility it breaks."""

from importlib import resources
from typing import Any

from playwright.async_api import Page

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SOURCE = (resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")


async def violations(page: Page, *, within: str = "") -> list[str]:
    """One line for each broken rule, with the nodes that break it; [] when all is well."""
    await page.evaluate(SOURCE)
    context = {"include": [[within]]} if within else None
    found: dict[str, Any] = await page.evaluate(
        "([context, rules]) => axe.run(context ?? document, { runOnly: { type: 'tag', values: rules } })",
        [context, RULES],
    )
    return [
        f"{broken['id']}: {broken['help']} ({', '.join(str(node['target']) for node in broken['nodes'])})"
        for broken in found["violations"]
    ]
