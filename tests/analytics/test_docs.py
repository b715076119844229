"""The page about analytics tells the same as the program."""

from mogine.analytics.reports import DEFINITIONS
from tests.conftest import ROOT


def test_every_number_is_defined_in_the_docs_as_in_the_answer() -> None:
    page = (ROOT / "docs/analytics.md").read_text("utf-8")
    missing = [
        name
        for name, text in DEFINITIONS.items()
        if f"| `{name}` | {text.replace('|', chr(92) + '|')} |" not in page
    ]
    assert missing == []
