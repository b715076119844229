"""What holds for every file of the pages, read as text."""

import re

from tests.web.conftest import WEB


def test_no_page_names_another_host_or_parses_html() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\bon\w+=|\bstyle=|"
        r"(?:src|href)=\"(?:https?:)?//|(?:src|href)=\"/|@import|url\("
    )
    files = [path for path in WEB.rglob("*") if path.suffix in (".js", ".html", ".css")]
    assert len(files) >= 7
    found = [(path.name, m[0]) for path in files for m in forbidden.finditer(path.read_text("utf-8"))]
    assert found == []
