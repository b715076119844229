"""What an ingest is asked beyond its files: tests before the swap, pages of the web, dry runs."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from mogine.errors import NotFound, UnreadableDocument
from mogine.ingest.pipeline import Gate, take_out, take_uploads
from mogine.ingest.readahead import Item
from mogine.ingest.web import Web
from mogine.kb.embedders import NoEmbedder
from mogine.kb.gate import KbTest
from tests.ingest.conftest import Base, CountingEmbedder
from tests.ingest.site import Reply, Site, serving

ONE = "# 退款\n\n七天内可以退款。"
STRICT = Gate((KbTest("退款", contains="七天"),), "strict")

# --- the gate ------------------------------------------------------------------------------------


def test_strict_gate_keeps_the_old_documents_when_a_test_gets_worse(base: Base) -> None:
    base.write({"a.md": ONE})
    assert base.ingest(gate=STRICT).generation == "g000001"
    base.write({"a.md": "# 退款\n\n不可以退款。"})
    summary = base.ingest(gate=STRICT)
    assert summary.is_held_back
    assert (summary.generation, summary.changed) == ("g000001", ("docs/a.md",))
    assert "七天" in base.text_of("docs/a.md")
    assert [path.name for path in base.generations.current().path.parent.iterdir()] == ["g000001"]  # type: ignore[union-attr]


def test_warning_gate_tells_and_lets_the_new_ones_serve(base: Base) -> None:
    base.write({"a.md": ONE})
    base.ingest()
    base.write({"a.md": "# 退款\n\n不可以退款。"})
    summary = base.ingest(gate=Gate(STRICT.tests, "warn"))
    assert summary.verdict is not None
    assert [change.after.test.question for change in summary.verdict.worse] == ["退款"]
    assert (summary.generation, summary.is_held_back) == ("g000002", False)


def test_without_a_change_no_test_is_asked(base: Base) -> None:
    base.write({"a.md": ONE})
    base.ingest(gate=STRICT)
    assert base.ingest(gate=STRICT).verdict is None


def test_new_embedder_is_weighed_with_its_own_vectors(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE})
    base.ingest(embedder=embedder, gate=STRICT)
    other = CountingEmbedder("other")
    summary = base.ingest(embedder=other, gate=STRICT)
    assert (summary.re_embedded, summary.generation, summary.is_held_back) == (True, "g000002", False)


# --- unchanged files, dry runs, several at once ----------------------------------------------------


def age(base: Base) -> None:
    for path in base.docs.rglob("*"):
        os.utime(path, ns=(10**15, 10**15))


def test_unchanged_files_are_not_even_opened(base: Base) -> None:
    """A file that cannot be opened any more still counts as unchanged."""
    base.write({"a.md": ONE, "b.md": "text"})
    age(base)
    base.ingest(seen_path=base.home / "data" / "kb" / "files.db")
    (base.docs / "a.md").write_text("x" * len(ONE.encode()))
    age(base)
    summary = base.ingest(seen_path=base.home / "data" / "kb" / "files.db")
    assert summary.unchanged == ("docs/a.md", "docs/b.md")
    assert base.ingest().changed == ("docs/a.md",), "which is the price of not looking"


def test_a_rolled_back_change_is_seen_though_the_file_is_as_it_was(base: Base) -> None:
    seen_path = base.home / "data" / "kb" / "files.db"
    base.write({"a.md": ONE})
    base.ingest(seen_path=seen_path)
    base.write({"a.md": "another text"})
    age(base)
    base.ingest(seen_path=seen_path)
    base.generations.rollback()
    assert base.ingest(seen_path=seen_path).changed == ("docs/a.md",)


def test_dry_run_tells_what_would_change_and_writes_nothing(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE, "b.md": "text", "c.md": "stays"})
    empty = base.ingest(embedder=embedder, is_dry_run=True, seen_path=base.home / "data" / "kb" / "files.db")
    assert empty.added == ("docs/a.md", "docs/b.md", "docs/c.md")
    assert not (base.home / "data").exists()
    base.ingest(embedder=embedder)
    before = sorted((path, path.stat().st_mtime_ns) for path in (base.home / "data").rglob("*"))
    base.write({"a.md": "# 退款\n\nneu", "d.md": "new", "torn.pdf": b"%PDF-1.7 torn"})
    (base.docs / "b.md").unlink()
    embedder.texts.clear()
    summary = base.ingest(embedder=embedder, is_dry_run=True)
    assert (summary.added, summary.changed) == (("docs/d.md",), ("docs/a.md",))
    assert (summary.removed, summary.unchanged) == (("docs/b.md",), ("docs/c.md",))
    assert [entry.source for entry in summary.skipped] == ["docs/torn.pdf"]
    assert (summary.generation, summary.passages, embedder.texts) == ("g000001", 2, [])
    assert sorted((path, path.stat().st_mtime_ns) for path in (base.home / "data").rglob("*")) == before


def test_several_readers_give_what_one_gives(base: Base) -> None:
    base.write({f"{n:02}.md": f"# Title {n}\n\ntext {n}" for n in range(30)})
    base.write({"15.md": ""})
    summary = base.ingest(jobs=3)
    assert summary.added == tuple(f"docs/{n:02}.md" for n in range(30) if n != 15)
    assert [entry.source for entry in summary.skipped] == ["docs/15.md"]


def test_a_run_that_ends_early_leaves_no_reader(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": "word " * 3000, **{f"x{n}.md": f"text {n}" for n in range(60)}})
    embedder.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        base.ingest(embedder=embedder, jobs=2)
    assert base.generations.current_name() is None
    assert list((base.home / "data" / "kb" / "generations").iterdir()) == []


# --- the web -------------------------------------------------------------------------------------


def open_web() -> Web:
    return Web(hosts=["127.0.0.1"], pause_s=0.0)


def test_pages_are_documents_cited_by_their_address(base: Base) -> None:
    base.write({"a.md": ONE})
    base.ingest()
    page = '<title>Hours</title><link rel="canonical" href="https://evil.test/"><p>We open at nine.'
    site = Site({"/hours": page, "/copy.md": Reply(ONE.encode(), content_type="text/markdown")})
    with serving(site), closing(open_web()) as web:
        root = f"http://127.0.0.1:{site.port}"
        urls = [f"{root}/hours", f"{root}/copy.md", f"{root}/none"]
        summary = base.ingest(urls=urls, web=web)
        again = base.ingest(urls=urls[:1], web=web)
        site.pages["/hours"] = "<title>Hours</title><p>We open at ten."
        changed = base.ingest(urls=urls[:1], web=web)
        site.pages["/hours"] = Reply(status=500)
        failing = base.ingest(urls=urls[:1], web=web)
        del site.pages["/hours"]
        gone = base.ingest(urls=urls[:1], web=web)
    assert summary.added == (f"{root}/hours",)
    assert [entry.reason for entry in summary.skipped] == [
        "has the same content as docs/a.md", "is not there (status 404)",
    ]  # fmt: skip
    assert (again.unchanged, changed.changed) == ((f"{root}/hours",), (f"{root}/hours",))
    assert failing.skipped[0].reason == "was answered with status 500; the version taken in before stays"
    assert (gone.removed, base.sources()) == ((f"{root}/hours",), ["docs/a.md"])
    assert summary.documents_in_all == 2


def test_a_page_is_cited_by_where_it_was_fetched(base: Base) -> None:
    page = '<title>Hours</title><link rel="canonical" href="https://evil.test/"><p>We open at nine.'
    with serving(Site({"/hours": page})) as site, closing(open_web()) as web:
        url = f"http://127.0.0.1:{site.port}/hours"
        base.ingest(urls=[url], web=web)
    (hit,) = base.open().search("nine", 1)
    assert (hit.passage.url, hit.passage.source, hit.passage.title) == (url, url, "Hours")


def test_files_and_pages_of_one_run_are_one_change(base: Base) -> None:
    base.write({"a.md": ONE})
    with serving(Site({"/x": "<p>text of x"})) as site, closing(open_web()) as web:
        summary = base.ingest(base.docs, urls=[f"http://127.0.0.1:{site.port}/x"], web=web)
    assert (len(summary.added), summary.generation) == (2, "g000001")


# --- one by one ----------------------------------------------------------------------------------


def upload(name: str, data: bytes) -> Item:
    return Item(f"upload:{name}", name, lambda: data)


def test_uploads_are_taken_whole_or_not_at_all(base: Base) -> None:
    with pytest.raises(UnreadableDocument, match=r"^torn\.pdf is damaged"):
        take_uploads(
            [upload("a.md", ONE.encode()), upload("torn.pdf", b"%PDF-")], base.generations, NoEmbedder()
        )
    assert base.generations.current() is None
    summary = take_uploads([upload("a.md", ONE.encode())], base.generations, NoEmbedder())
    assert (summary.added, summary.generation) == (("upload:a.md",), "g000001")
    with pytest.raises(UnreadableDocument, match="same content as upload:a"):
        take_uploads([upload("b.md", ONE.encode())], base.generations, NoEmbedder())


def test_taking_out_what_is_not_there_says_so(base: Base) -> None:
    take_uploads([upload("a.md", ONE.encode())], base.generations, NoEmbedder())
    with pytest.raises(NotFound):
        take_out(["upload:b.md"], base.generations, NoEmbedder())
    assert take_out(["upload:a.md"], base.generations, NoEmbedder()).removed == ("upload:a.md",)


def test_a_folder_named_as_a_page_is_no_page(base: Base, tmp_path: Path) -> None:
    (base.docs / "https:").mkdir()
    base.write({"https:/x.md": ONE})
    assert base.ingest().added == ("docs/https:/x.md",)
