"""An ingest takes what is new, leaves what is not, and never leaves anything half done."""

import threading
from pathlib import Path

import pytest

from mogine.errors import Locked, RequestError, UpstreamUnavailable
from mogine.ingest.find import Skipped
from mogine.ingest.pipeline import Progress, ingest
from mogine.ingest.readahead import MAX_PASSAGES, load
from mogine.ingest.worker import Parser
from mogine.kb.embedders import NoEmbedder
from tests.ingest.conftest import Base, CountingEmbedder
from tests.ingest.files import SENTENCE, docx, pdf, scan, xlsx

ONE = "# 退款\n\n七天内可以退款。"
TWO = "# Shipping\n\nFree of charge."


def test_documents_of_every_kind_are_found_afterwards(base: Base) -> None:
    base.write(
        {
            "a.md": ONE,
            "b.txt": "运费说明\n\n满 99 元包邮。".encode("gb18030"),
            "c.html": "<h1>Hours</h1><p>Open at nine.",
            "d.pdf": pdf([[(SENTENCE, 11)]]),
            "e.docx": docx(("Heading 1", "保修"), ("Normal", "保修两年。")),
            "f.xlsx": xlsx({"价格": [["型号", "价格"], ["S600", 1999]]}),
            "sub/g.csv": "问题,答案\n怎么安装？,师傅上门。\n",
        }
    )
    summary = base.ingest()
    assert summary.added == tuple(base.sources())
    assert len(summary.added) == 7
    assert (summary.documents_in_all, summary.passages_in_all) == (7, summary.passages)
    assert summary.generation == "g000001"
    kb = base.open()
    for question, source in [
        ("退款", "docs/a.md"), ("包邮", "docs/b.txt"), ("open", "docs/c.html"), ("到账", "docs/d.pdf"),
        ("保修", "docs/e.docx"), ("S600", "docs/f.xlsx"), ("安装", "docs/sub/g.csv"),
    ]:  # fmt: skip
        assert source in [hit.passage.source for hit in kb.search(question, 3)], question


def test_nothing_changed_makes_no_generation_and_embeds_nothing(
    base: Base, embedder: CountingEmbedder
) -> None:
    base.write({"a.md": ONE, "b.md": TWO})
    base.ingest(embedder=embedder)
    embedder.texts.clear()
    summary = base.ingest(embedder=embedder)
    assert summary.unchanged == ("docs/a.md", "docs/b.md")
    assert (summary.generation, summary.passages, embedder.texts) == ("g000001", 0, [])


def test_changed_added_and_removed_files_are_told_apart(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE, "b.md": TWO, "c.md": "stays"})
    base.ingest(embedder=embedder)
    embedder.texts.clear()
    base.write({"a.md": "# 退款\n\n三十天内可以退款。", "d.md": "new one"})
    (base.docs / "b.md").unlink()
    summary = base.ingest(embedder=embedder)
    assert (summary.added, summary.changed) == (("docs/d.md",), ("docs/a.md",))
    assert (summary.unchanged, summary.removed) == (("docs/c.md",), ("docs/b.md",))
    assert len(embedder.texts) == 2
    assert base.sources() == ["docs/a.md", "docs/c.md", "docs/d.md"]
    assert base.text_of("docs/a.md") == "三十天内可以退款。"


def test_only_what_lies_below_the_given_paths_is_taken_out(base: Base) -> None:
    base.write({"one/a.md": ONE, "two/b.md": TWO, "two/c.md": "text"})
    base.ingest()
    (base.docs / "one" / "a.md").unlink()
    (base.docs / "two" / "b.md").unlink()
    assert base.ingest(base.docs / "two").removed == ("docs/two/b.md",)
    assert base.sources() == ["docs/one/a.md", "docs/two/c.md"]


def test_a_folder_that_lost_everything_keeps_its_documents(base: Base) -> None:
    """It is more often not mounted than meant to be forgotten."""
    base.write({"one/a.md": ONE, "two/b.md": TWO})
    base.ingest()
    (base.docs / "one" / "a.md").unlink()
    summary = base.ingest(base.docs / "one", base.docs / "two")
    assert summary.removed == ()
    assert any("holds no document" in entry.reason for entry in summary.skipped)
    assert not base.ingest(base.docs / "one").took_anything
    assert base.sources() == ["docs/one/a.md", "docs/two/b.md"]


def test_a_moved_file_is_known_under_its_new_name_only(base: Base) -> None:
    base.write({"a.md": ONE, "z.md": TWO})
    base.ingest()
    (base.docs / "a.md").rename(base.docs / "b.md")
    summary = base.ingest()
    assert (summary.added, summary.removed, summary.skipped) == (("docs/b.md",), ("docs/a.md",), ())
    assert base.sources() == ["docs/b.md", "docs/z.md"]


def test_the_same_content_is_taken_once_and_the_known_name_stays(base: Base) -> None:
    base.write({"b.md": ONE})
    base.ingest()
    base.write({"a.md": ONE, "c.md": ONE})
    summary = base.ingest()
    assert summary.skipped == tuple(
        Skipped(source, "has the same content as docs/b.md") for source in ("docs/a.md", "docs/c.md")
    )
    (base.docs / "b.md").unlink()
    assert base.ingest().added == ("docs/a.md",)
    assert base.sources() == ["docs/a.md"]


def test_a_file_that_became_a_copy_leaves(base: Base) -> None:
    base.write({"a.md": ONE, "b.md": TWO})
    base.ingest()
    base.write({"b.md": ONE})
    assert base.ingest().removed == ("docs/b.md",)
    assert base.sources() == ["docs/a.md"]


def test_unreadable_files_are_reported_one_by_one_and_the_rest_goes_on(base: Base) -> None:
    base.write(
        {
            "a.md": ONE,
            "bomb.html": b"<div>" * 100_000,
            "broken.pdf": b"%PDF-1.7 nothing",
            "empty.md": "",
            "locked.pdf": pdf([[(SENTENCE, 11)]], password="geheim"),
            "picture.png": b"\x89PNG",
            "scan.pdf": scan(),
        }
    )
    summary = base.ingest()
    assert summary.added == ("docs/a.md",)
    reasons = {entry.source: entry.reason for entry in summary.skipped}
    assert {source: next(word for word in words if word in reasons[source]) for source, words in {
        "docs/bomb.html": ["2,048 levels"], "docs/broken.pdf": ["damaged"], "docs/empty.md": ["is empty"],
        "docs/locked.pdf": ["password"], "docs/picture.png": ["not read"], "docs/scan.pdf": ["a scan"],
    }.items()}.keys() == reasons.keys()  # fmt: skip


def test_a_document_that_broke_keeps_the_version_taken_in_before(base: Base) -> None:
    base.write({"a.pdf": pdf([[(SENTENCE, 11)]])})
    base.ingest()
    base.write({"a.pdf": b"%PDF-1.7 torn"})
    summary = base.ingest()
    assert summary.skipped[0].reason.endswith("the version taken in before stays")
    assert base.text_of("docs/a.pdf") == SENTENCE


def test_pages_without_text_are_noted_and_the_rest_is_taken(base: Base) -> None:
    base.write({"a.pdf": pdf([[(SENTENCE, 11)], []])})
    summary = base.ingest()
    assert summary.added == ("docs/a.pdf",)
    assert summary.notes == (Skipped("docs/a.pdf", "pages without text (scanned?): 2"),)


def test_nothing_readable_creates_nothing(base: Base) -> None:
    base.write({"a.png": b"\x89PNG"})
    summary = base.ingest()
    assert not summary.took_anything
    assert summary.generation == ""
    assert not (base.home / "data").exists()


def test_nothing_readable_among_documents_makes_no_generation(base: Base) -> None:
    base.write({"a.pdf": scan()})
    assert not base.ingest().took_anything
    assert base.generations.current() is None


def test_a_path_that_is_not_there_changes_nothing(base: Base) -> None:
    with pytest.raises(RequestError):
        base.ingest(base.docs, base.docs / "nowhere")
    assert not (base.home / "data").exists()


def test_an_interrupted_run_leaves_everything_as_it_was(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE})
    base.ingest(embedder=embedder)
    base.write({f"{n}.md": f"document {n}" for n in range(50)} | {"a.md": TWO})
    embedder.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        base.ingest(embedder=embedder)
    assert base.sources() == ["docs/a.md"]
    assert base.text_of("docs/a.md") == "七天内可以退款。"
    embedder.failure = None
    assert len(base.ingest(embedder=embedder).added) == 50


def test_a_run_that_is_left_half_way_gives_the_lock_back(base: Base) -> None:
    base.write({"a.md": ONE, "b.md": TWO})
    steps = ingest([base.docs], base.generations, NoEmbedder(), base=base.home)
    assert isinstance(next(steps), Progress)
    with pytest.raises(Locked):
        base.ingest()
    steps.close()
    assert base.generations.current() is None
    assert len(base.ingest().added) == 2


def test_an_embedder_that_fails_leaves_everything_as_it_was(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE})
    embedder.failure = UpstreamUnavailable("the embeddings endpoint cannot be reached")
    with pytest.raises(UpstreamUnavailable):
        base.ingest(embedder=embedder)
    assert base.generations.current() is None


def test_another_embedder_embeds_everything_anew(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": ONE, "b.md": TWO})
    base.ingest(embedder=embedder)
    other = CountingEmbedder("other")
    summary = base.ingest(embedder=other)
    assert (len(other.texts), summary.generation) == (2, "g000002")
    assert (len(summary.unchanged), summary.re_embedded) == (2, True)
    assert not base.ingest(embedder=other).re_embedded


def test_progress_names_every_file_and_counts_every_embedding(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": "\n\n".join([SENTENCE * 10] * 100), "b.md": TWO})
    heard: list[int] = []
    steps = list(ingest([base.docs], base.generations, embedder, base=base.home, on_embedded=heard.append))
    progress = [step for step in steps if isinstance(step, Progress)]
    assert [(step.done, step.total, step.source) for step in progress] == [
        (0, 2, "docs/a.md"), (1, 2, "docs/b.md"), (2, 2, ""),
    ]  # fmt: skip
    assert sum(heard) == len(embedder.texts) == 101
    assert max(heard) <= 32


def test_title_and_headings_are_embedded_with_the_text(base: Base, embedder: CountingEmbedder) -> None:
    base.write({"a.md": "---\ntitle: 售后\n---\n## 退款\n\n七天内可以。"})
    base.ingest(embedder=embedder)
    assert embedder.texts == ["售后\n退款\n七天内可以。"]


def test_uploads_are_not_taken_for_files_that_are_gone(base: Base) -> None:
    base.write({"a.md": ONE})
    base.ingest()
    with base.generations.begin(NoEmbedder()) as draft:
        with Parser() as parser:
            loaded = load("upload:b.md", TWO.encode(), parser)
        draft.replace(loaded.document, loaded.passages)
        draft.commit()
    assert loaded.notes == ()
    assert base.ingest(base.home).removed == ()
    assert base.sources() == ["docs/a.md", "upload:b.md"]


def test_a_document_of_endless_headings_is_refused(base: Base) -> None:
    base.write({"a.md": "".join(f"# {n}\n\nb\n\n" for n in range(MAX_PASSAGES + 1)), "b.md": TWO})
    summary = base.ingest()
    assert summary.added == ("docs/b.md",)
    assert "50,000 passages" in summary.skipped[0].reason


def test_two_runs_at_once_do_not_mix(base: Base) -> None:
    base.write({f"{n}.md": f"document {n}" for n in range(10)})
    outcomes: list[str] = []

    def run() -> None:
        try:
            base.ingest()
            outcomes.append("done")
        except Locked:
            outcomes.append("locked")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes
    assert len(base.sources()) == 10


def test_files_outside_the_home_have_sources_that_lead_to_them(base: Base, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "a.md").write_text(ONE)
    (outside / "b.md").write_text(TWO)
    assert base.ingest(outside).added == ("../elsewhere/a.md", "../elsewhere/b.md")
    (outside / "a.md").unlink()
    assert base.ingest(outside).removed == ("../elsewhere/a.md",)
