"""What is taken from a folder and what is passed over, each with its reason."""

import os
from pathlib import Path

import pytest

from mogine.errors import RequestError, TooLarge, UnreadableDocument
from mogine.ingest.find import find, is_below, read, source_of
from mogine.ingest.load import MAX_BYTES


def reasons(root: Path, base: Path, **options: list[Path]) -> dict[str, str]:
    return {entry.source: entry.reason for entry in find([root], base, **options).skipped}


def test_folders_are_walked_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.pdf", "a/b/c.TXT", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(find([tmp_path], tmp_path).files) == ["b.md", "c.md", "a/z.pdf", "a/b/c.TXT"]


def test_what_is_passed_over_has_a_reason(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / ".git").mkdir(parents=True)
    (docs / "data").mkdir()
    for name in (".env", "a.md", "photo.png", "old.doc", "~$a.docx", "Makefile", "data/kb.md", ".git/x.md"):
        (docs / name).touch()
    (docs / "passwd.md").symlink_to("/etc/passwd")
    (docs / "etc").symlink_to("/etc")
    os.mkfifo(docs / "pipe.md")
    found = reasons(docs, docs, own=[docs / "data"])
    assert found.keys() == {
        ".env", ".git", "data", "photo.png", "old.doc", "~$a.docx", "Makefile", "passwd.md", "etc", "pipe.md",
    }  # fmt: skip
    assert found[".git"] == "is hidden"
    assert found["data"] == "is mogine's own data"
    assert "symbolic link" in found["passwd.md"] and "symbolic link" in found["etc"]
    assert "save it as DOCX" in found["old.doc"]
    assert "(.png)" in found["photo.png"] and "(no suffix)" in found["Makefile"]
    assert found["pipe.md"] == "is no regular file"
    assert list(find([docs], docs, [docs / "data"]).files) == ["a.md"]


def test_a_named_file_is_taken_whatever_its_suffix_and_a_named_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("text")
    (tmp_path / "link.md").symlink_to("README")
    found = find([tmp_path / "README", tmp_path / "link.md"], tmp_path)
    assert set(found.files) == {"README", "link.md"}
    assert read(found.files["link.md"]) == b"text"


def test_a_path_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere.*kb remove"):
        find([tmp_path / "nowhere"], tmp_path)


def test_names_that_are_no_utf8_are_reported(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xcd\xcb.md")).touch()
    ((source, reason),) = reasons(tmp_path, tmp_path).items()
    assert "not UTF-8" in reason
    source.encode()


def test_a_source_is_the_same_from_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").touch()
    monkeypatch.chdir(tmp_path / "docs")
    for path in (Path("."), Path("a.md"), Path("../docs"), tmp_path, tmp_path / "docs" / "a.md"):
        assert list(find([path], tmp_path).files) == ["docs/a.md"]
    assert source_of(Path("/srv/a.md"), Path("/srv/home")) == "../a.md"


def test_below_means_below(tmp_path: Path) -> None:
    assert is_below("docs/a.md", tmp_path, [tmp_path / "docs"])
    assert is_below("docs/a.md", tmp_path, [tmp_path / "docs" / "a.md"])
    assert not is_below("docs2/a.md", tmp_path, [tmp_path / "docs"])


def test_roots_without_documents_are_told(tmp_path: Path) -> None:
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a.md").touch()
    found = find([tmp_path / "full", tmp_path / "empty"], tmp_path)
    assert found.roots == (tmp_path / "full",)
    assert found.empty_roots == (tmp_path / "empty",)


def test_reading_neither_waits_nor_follows_nor_takes_too_much(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, error in (("pipe", UnreadableDocument), ("link", UnreadableDocument), ("huge", TooLarge)):
        with pytest.raises(error):
            read(tmp_path / name)
    with pytest.raises(UnreadableDocument, match="cannot be read"):
        read(tmp_path / "gone")
