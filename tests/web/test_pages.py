"""What holds for every file of the pages, read as text."""

import hashlib
import re

from tests.web.conftest import WEB


def test_no_page_names_another_host_or_parses_html() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\bon\w+=|\bstyle=|"
        r"(?:src|href)=\"(?:https?:)?//|(?:src|href)=\"/|@import|url\("
    )
    files = [path for path in WEB.rglob("*") if path.suffix in (".js", ".html", ".css")]
    files = [path for path in files if "vendor" not in path.parts]
    assert len(files) >= 20
    found = [(path.name, m[0]) for path in files for m in forbidden.finditer(path.read_text("utf-8"))]
    assert found == []


def test_vendored_files_are_the_released_ones_with_their_licence() -> None:
    folders = sorted(path for path in (WEB / "vendor").iterdir() if path.is_dir())
    assert folders
    for folder in folders:
        lines = (folder / "SOURCE.txt").read_text("utf-8").splitlines()[1:]
        written = {line[66:].removeprefix("./"): line[:64] for line in lines}
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        assert found.pop("SOURCE.txt")
        assert found == written, "run scripts/vendor-web"
        assert "LICENSE.txt" in found


def test_every_import_and_address_names_a_file_that_is_there() -> None:
    for path in WEB.rglob("*.js"):
        if "vendor" in path.parts:
            continue
        for name in re.findall(r"""(?:from|import\()\s*["'](\.[^"']+)["']""", path.read_text("utf-8")):
            assert (path.parent / name).is_file(), f"{path.name} imports {name}"
    for page in WEB.rglob("*.html"):
        for name in re.findall(r"\.\./assets/([^\"]+)", page.read_text("utf-8")):
            assert (WEB / name).is_file(), f"{page} names {name}"
