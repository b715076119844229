"""Generations: whole changes or none, one writer, a way back; also when the writer is killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mogine.errors import Locked, NotFound, StoreError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import GRACE_S, Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.manifest import Generation
from mogine.kb.vectors import VectorIndex
from mogine.kb.verify import verify
from tests.conftest import ROOT, clean_environ
from tests.kb.conftest import CharacterEmbedder, make_document, take_in


@contextmanager
def opened(generations: Generations, embedder: CharacterEmbedder) -> Iterator[KnowledgeBase]:
    generation = generations.current()
    assert generation is not None
    knowledge = KnowledgeBase(generation, embedder)
    yield knowledge
    knowledge.close()


def folders(generations: Generations) -> set[str]:
    generation = generations.current()
    assert generation is not None
    return {path.name for path in generation.path.parent.iterdir()}


def test_nothing_is_there_before_the_first_ingest(tmp_path: Path) -> None:
    generations = Generations(tmp_path / "kb")
    assert generations.current_name() is None
    assert generations.current() is None
    assert generations.kept() == []
    assert not (tmp_path / "kb").exists(), "looking creates nothing"


def test_committed_documents_serve(generations: Generations, embedder: CharacterEmbedder) -> None:
    name = take_in(
        generations, embedder, make_document("a.md", "退款要七天"), make_document("b.md", "发票", "门店")
    )
    current = generations.current()
    assert current is not None
    assert (current.name, generations.current_name()) == (name, name)
    assert (current.manifest.documents, current.manifest.passages) == (2, 3)
    assert (current.manifest.embedder, current.manifest.dimensions) == ("characters", 64)
    with opened(generations, embedder) as knowledge:
        for mode in ("hybrid", "vector", "keyword"):
            assert knowledge.search("退款", 1, mode)[0].passage.source == "a.md"


def test_folders_are_for_the_owner_alone(generations: Generations, embedder: CharacterEmbedder) -> None:
    """P37"""
    take_in(generations, embedder, make_document("a.md", "text"))
    current = generations.current()
    assert current is not None
    for folder in (current.path, current.path.parent, current.path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_change_carries_the_other_documents_over(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "old words"), make_document("b.md", "other"))
    first = generations.current()
    embedder.passages = 0
    with generations.begin(embedder) as draft:
        assert set(draft.sources()) == {"a.md", "b.md"}
        draft.replace(*make_document("a.md", "new words"))
        assert draft.remove("b.md")
        assert not draft.remove("b.md")
        draft.replace(*make_document("c.md", "third"))
        assert set(draft.sources()) == {"a.md", "c.md"}
        draft.commit()
    assert embedder.passages == 2, "only what is new is embedded"
    with opened(generations, embedder) as knowledge:
        assert [d.source for d in knowledge.documents()] == ["a.md", "c.md"]
        assert {h.passage.text for h in knowledge.search("old words other", 9, "vector")} == {
            "new words",
            "third",
        }
        assert [h.passage.text for h in knowledge.search("words", 9, "keyword")] == ["new words"]
        assert knowledge.search("old", 9, "keyword") == []
    assert first is not None
    before = KnowledgeBase(first, embedder)
    assert before.search("old", 1, "keyword")[0].passage.text == "old words", (
        "the old generation is as it was"
    )
    before.close()


def test_source_replaced_twice_in_one_draft_is_there_once(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "one"), make_document("a.md", "two", "three"))
    with opened(generations, embedder) as knowledge:
        assert [h.passage.text for h in knowledge.search("one", 9, "vector")].count("one") == 0
        assert generations.current().manifest.passages == 2  # type: ignore[union-attr]


def test_draft_without_commit_leaves_nothing(generations: Generations, embedder: CharacterEmbedder) -> None:
    name = take_in(generations, embedder, make_document("a.md", "text"))
    with pytest.raises(RuntimeError, match="stop"), generations.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "text"))
        raise RuntimeError("stop")
    with generations.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "text"))
    assert generations.current_name() == name
    assert folders(generations) == {name}


def test_commit_without_a_change_makes_no_generation(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    name = take_in(generations, embedder, make_document("a.md", "text"))
    with generations.begin(embedder) as draft:
        assert draft.sources().keys() == {"a.md"}
        assert draft.commit() == name
    assert folders(generations) == {name}


def test_only_one_writes_at_a_time(generations: Generations, embedder: CharacterEmbedder) -> None:
    with generations.begin(embedder):
        with pytest.raises(Locked, match=str(os.getpid())), generations.begin(embedder):
            pass
        with pytest.raises(Locked):
            generations.rollback()
    with generations.begin(embedder) as draft:
        draft.commit()


def test_writer_is_locked_out_by_another_process(
    generations: Generations, embedder: CharacterEmbedder, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    with generations.begin(embedder):
        child = context.Process(target=_try_to_begin, args=(tmp_path / "data" / "kb", result))
        child.start()
        assert result.get(timeout=60) == "locked"
        child.join(60)
    result.close()
    result.join_thread()


def _try_to_begin(path: Path, result: "multiprocessing.Queue[str]") -> None:
    try:
        with Generations(path).begin(CharacterEmbedder()):
            result.put("writes")
    except Locked:
        result.put("locked")


def test_last_three_are_kept_and_older_ones_removed(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    now = 1000.0
    generations = Generations(tmp_path / "kb", clock=lambda: now)
    names = []
    for number in range(6):
        names.append(take_in(generations, embedder, make_document("a.md", f"text {number}")))
        now += GRACE_S
    assert [g.name for g in generations.kept()] == names[:-4:-1]
    assert folders(generations) == {*names[-4:]}, (
        "the last one to leave stays for servers that are a moment behind"
    )
    with generations.begin(embedder):
        pass
    assert names[-4] in folders(generations)
    take_in(generations, embedder, make_document("a.md", "text"))
    assert names[-4] not in folders(generations)


def test_rollback_goes_back_and_the_next_change_starts_from_there(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    first = take_in(generations, embedder, make_document("a.md", "first"))
    second = take_in(generations, embedder, make_document("b.md", "second"))
    assert generations.rollback().name == first
    assert generations.current_name() == first
    assert [g.name for g in generations.kept()] == [second, first]
    third = take_in(generations, embedder, make_document("c.md", "third"))
    with opened(generations, embedder) as knowledge:
        assert [d.source for d in knowledge.documents()] == ["a.md", "c.md"]
    assert third not in (first, second)
    assert generations.rollback(second).name == second
    with pytest.raises(NotFound, match="g999999"):
        generations.rollback("g999999")


def test_rollback_past_the_first_says_so(generations: Generations, embedder: CharacterEmbedder) -> None:
    with pytest.raises(NotFound, match="mogine kb ingest"):
        generations.rollback()
    take_in(generations, embedder, make_document("a.md", "first"))
    with pytest.raises(NotFound, match="no generation older"):
        generations.rollback()


def test_way_back_leads_to_what_served_last(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    """Also when it was not the newest."""
    generations = Generations(tmp_path / "kb", clock=lambda: 0.0)
    names = [take_in(generations, embedder, make_document("a.md", f"{n}")) for n in range(3)]
    generations.rollback(names[0])
    newest = take_in(generations, embedder, make_document("b.md", "new"))
    assert [g.name for g in generations.kept()] == [newest, names[0], names[2]]
    assert generations.rollback().name == names[0]


def test_new_embedder_embeds_everything_anew(generations: Generations, embedder: CharacterEmbedder) -> None:
    take_in(generations, embedder, make_document("a.md", "one", "two"), make_document("b.md", "three"))
    other = CharacterEmbedder("other", 32)
    with generations.begin(other) as draft:
        assert draft.re_embeds
        assert set(draft.sources()) == {"a.md", "b.md"}, "unchanged documents need not be read again"
        draft.commit()
    assert other.passages == 3
    with opened(generations, other) as knowledge:
        assert knowledge.search("three", 1, "vector")[0].passage.text == "three"
        assert len(knowledge.documents()) == 2


def test_base_without_vectors_needs_no_chroma(generations: Generations, embedder: CharacterEmbedder) -> None:
    with generations.begin(NoEmbedder()) as draft:
        draft.replace(*make_document("a.md", "退款要七天"))
        draft.commit()
    current = generations.current()
    assert current is not None
    assert {path.name for path in current.path.iterdir()} == {"manifest.json", "texts.db"}
    with generations.begin(embedder) as draft:
        draft.commit()
    with opened(generations, embedder) as knowledge:
        assert knowledge.search("退款", 1, "vector")[0].passage.text == "退款要七天"


def test_document_is_removed_while_the_embedder_cannot_be_reached(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    class Gone(CharacterEmbedder):
        @property
        def dimensions(self) -> int:
            raise AssertionError("an endpoint would be asked")

        @dimensions.setter
        def dimensions(self, value: int) -> None:
            """The name is all that is known without asking."""

    take_in(generations, embedder, make_document("a.md", "one"), make_document("b.md", "two"))
    with generations.begin(Gone()) as draft:
        draft.remove("a.md")
        draft.commit()
    current = generations.current()
    assert current is not None
    assert (current.manifest.documents, current.manifest.dimensions) == (1, 64)


def test_document_of_many_passages_is_embedded_whole(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", *(f"passage number {n}" for n in range(100))))
    current = generations.current()
    assert current is not None
    index = VectorIndex(current.path)
    assert index.count() == 100
    index.close()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("no json", "current.json"),
        ('{"current": "g1"}', "current.json"),
        ('{"current": "g1", "kept": []}', "current.json"),
        ('{"current": "g000099", "kept": ["g000099"]}', "rollback"),
    ],
)
def test_damaged_pointer_names_file_and_remedy(
    generations: Generations, embedder: CharacterEmbedder, tmp_path: Path, damage: str, named: str
) -> None:
    take_in(generations, embedder, make_document("a.md", "text"))
    (tmp_path / "data" / "kb" / "current.json").write_text(damage)
    with pytest.raises(StoreError, match=named):
        generations.current()


def test_generation_of_another_format_is_refused(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "text"))
    path = generations.current().path / "manifest.json"  # type: ignore[union-attr]
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        generations.current()


def test_damaged_texts_are_told_when_the_next_change_begins(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "text"))
    (generations.current().path / "texts.db").write_bytes(b"x" * 5000)  # type: ignore[union-attr]
    with generations.begin(embedder) as draft, pytest.raises(StoreError, match="mogine kb rollback"):
        draft.sources()


def test_full_disk_leaves_the_old_generation(
    generations: Generations, embedder: CharacterEmbedder, tmp_path: Path
) -> None:
    """F16"""
    name = take_in(generations, embedder, make_document("a.md", "text"))
    child = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path / "data" / "kb")],
        cwd=ROOT,
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.stdout.startswith("StoreError"), child.stderr
    assert "free space" in child.stdout
    assert generations.current_name() == name
    assert folders(generations) == {name}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_disk_that_is_really_full_leaves_the_old_generation_and_heals(
    small_disk: Path, embedder: CharacterEmbedder
) -> None:
    """F16"""
    generations = Generations(small_disk / "kb")
    name = take_in(generations, embedder, make_document("a.md", "退款"))
    big = make_document("big.md", *(f"passage {n} " + "words " * 200 for n in range(3000)))
    with pytest.raises(StoreError, match="free space"):
        take_in(generations, embedder, big)
    assert folders(generations) == {name}
    with opened(generations, embedder) as knowledge:
        assert knowledge.search("退款", 1)[0].passage.source == "a.md"
    take_in(generations, embedder, make_document("b.md", "发票"))
    assert verify(generations.current()) == []  # type: ignore[arg-type]


def test_read_only_file_system_is_told_with_its_remedy(small_disk: Path, embedder: CharacterEmbedder) -> None:
    """F18"""
    # By a child, for no disk is made read-only on which a file is open for writing.
    write = (
        "import sys\nfrom pathlib import Path\nfrom mogine.kb.generations import Generations\n"
        "from tests.kb.conftest import CharacterEmbedder, make_document, take_in\n"
        "take_in(Generations(Path(sys.argv[1])), CharacterEmbedder(), make_document('a.md', '退款'))\n"
    )
    subprocess.run([sys.executable, "-c", write, small_disk / "kb"], check=True, cwd=ROOT)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    generations = Generations(small_disk / "kb")
    with pytest.raises(StoreError, match="cannot be written"):
        take_in(generations, embedder, make_document("b.md", "发票"))
    with pytest.raises(StoreError, match="make it writable"), opened(generations, embedder):
        raise AssertionError("Chroma cannot open it")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    take_in(generations, embedder, make_document("b.md", "发票"))
    with opened(generations, embedder) as knowledge:
        assert knowledge.search("发票", 1)[0].passage.source == "b.md"


# Files may not grow beyond 200 kB: what a full disk looks like to a program.
_FILL = """
import resource, signal, sys
from pathlib import Path
from mogine.errors import StoreError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.kb.conftest import CharacterEmbedder, make_document
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with Generations(Path(sys.argv[1])).begin(CharacterEmbedder()) as draft:
        draft.replace(*make_document("big.md", *(f"passage {n} " + "words " * 200 for n in range(300))))
        draft.commit()
        print("committed")
except StoreError as error:
    print("StoreError", error.message)
"""

# Takes in one document set after the other; in each, all documents bear the same mark.
_WRITE = """
import sys
from pathlib import Path
from mogine.kb.generations import Generations
from tests.kb.conftest import CharacterEmbedder, make_document, take_in
generations, embedder = Generations(Path(sys.argv[1])), CharacterEmbedder()
for mark in range(10_000):
    documents = [
        make_document(f"{n}.md", f"mark{sys.argv[2]}x{mark} words of document {n}", "发票和退款")
        for n in range(12)
    ]
    name = take_in(generations, embedder, *documents)
    print(name, flush=True)
"""


def test_killed_writer_leaves_a_whole_generation(
    generations: Generations, embedder: CharacterEmbedder, tmp_path: Path
) -> None:
    """P37, F14"""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "data" / "kb"
    for round in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITE, str(path), str(round)],
            cwd=ROOT,
            env=clean_environ(),
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            assert child.stdout is not None
            acknowledged = ""
            for _ in range(chance.randint(1, 4)):
                acknowledged = child.stdout.readline().strip()
            time.sleep(chance.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
        current = generations.current()
        assert current is not None
        assert current.name >= acknowledged != ""
        _assert_whole(current, embedder)
        with generations.begin(embedder) as draft:
            assert len(draft.sources()) == 12
        assert folders(generations) >= {g.name for g in generations.kept()}
        assert not [name for name in folders(generations) if name.startswith("draft-")], "debris is swept"


def _assert_whole(generation: Generation, embedder: CharacterEmbedder) -> None:
    """Catalogue, keywords and vectors agree, and all documents are of one ingest."""
    knowledge = KnowledgeBase(generation, embedder)
    texts = [knowledge.passages_of(d.id)[0].text for d in knowledge.documents()]
    marks = {text.split()[0] for text in texts}
    assert (len(texts), len(marks)) == (12, 1)
    mark = marks.pop()
    assert len(knowledge.search(mark, 50, "keyword")) == 12
    assert len(knowledge.search(mark, 50, "vector")) == 24
    assert {h.passage.text.split()[0] for h in knowledge.search(f"{mark} words", 12, "hybrid")} <= {
        mark,
        "发票和退款",
    }
    knowledge.close()


def test_debris_of_a_killed_commit_is_swept(
    generations: Generations, embedder: CharacterEmbedder, tmp_path: Path
) -> None:
    """Killed between the folder's last name and the pointer."""
    name = take_in(generations, embedder, make_document("a.md", "text"))
    current = generations.current()
    assert current is not None
    shutil.copytree(current.path, current.path.parent / "g000002")
    (tmp_path / "data" / "kb" / "current.new").write_text("{")
    assert take_in(generations, embedder, make_document("b.md", "text")) == "g000002"
    with opened(generations, embedder) as knowledge:
        assert [d.source for d in knowledge.documents()] == ["a.md", "b.md"]
    assert folders(generations) == {name, "g000002"}


# --- written anew, looked at, listed ---------------------------------------------------------------


def test_rebuilt_base_is_the_same_without_what_was_removed(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    documents = [make_document(f"{n}.md", f"secretword {n}", f"退款 {n}") for n in range(30)]
    take_in(generations, embedder, *documents)
    with generations.begin(embedder) as draft:
        for n in range(29):
            draft.remove(f"{n}.md")
        draft.commit()
    embedder.passages = 0
    with generations.begin(embedder) as draft:
        draft.rebuild()
        name = draft.commit()
    assert embedder.passages == 0, "vectors are taken over"
    current = generations.current()
    assert current is not None and current.name == name
    assert (current.manifest.documents, current.manifest.passages) == (1, 2)
    assert verify(current) == []
    assert b"secretword 7" not in (current.path / "texts.db").read_bytes()
    with opened(generations, embedder) as knowledge:
        assert knowledge.search("secretword 29", 1, "vector")[0].passage.text == "secretword 29"
        assert knowledge.search("secretword", 9, "keyword")[0].passage.source == "29.md"
    with generations.begin(embedder) as draft:
        draft.remove("29.md")
        draft.replace(*make_document("a.md", "new"))
        draft.commit()
    assert verify(generations.current()) == []  # type: ignore[arg-type]


def test_vectors_that_are_missing_are_embedded_when_the_base_is_rebuilt(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "one", "two"))
    index = VectorIndex(generations.current().path)  # type: ignore[union-attr]
    index.remove([1])
    index.close()
    embedder.passages = 0
    with generations.begin(embedder) as draft:
        draft.rebuild()
        draft.commit()
    assert embedder.passages == 1
    assert verify(generations.current()) == []  # type: ignore[arg-type]


def test_forgetting_leaves_the_current_generation_alone(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    names = [take_in(generations, embedder, make_document("a.md", f"{n}")) for n in range(3)]
    generations.rollback(names[1])
    assert generations.forget_others() == [names[0], names[2]]
    assert folders(generations) == {names[1]}
    with pytest.raises(NotFound):
        generations.rollback()


def test_finished_draft_that_is_left_is_gone(generations: Generations, embedder: CharacterEmbedder) -> None:
    name = take_in(generations, embedder, make_document("a.md", "text"))
    with generations.begin(embedder) as draft:
        assert draft.finish() is None, "without a change there is nothing to look at"
        draft.replace(*make_document("b.md", "text"))
        finished = draft.finish()
        assert finished is not None and finished.path.is_dir()
        assert (finished.manifest.documents, generations.current_name()) == (2, name)
    assert folders(generations) == {name}


def test_listing_shows_damaged_generations_with_what_is_wrong(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    first = take_in(generations, embedder, make_document("a.md", "one"))
    second = take_in(generations, embedder, make_document("a.md", "two"))
    (generations.current().path.parent / first / "manifest.json").write_text("{")  # type: ignore[union-attr]
    listed = generations.listed()
    assert [(kept.name, kept.is_current) for kept in listed] == [(second, True), (first, False)]
    assert listed[0].generation is not None and listed[0].bytes > 10_000
    assert listed[1].generation is None and "damaged" in listed[1].problem


def test_generation_of_a_newer_chroma_is_refused_with_remedies(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "text"))
    current = generations.current()
    assert current is not None
    assert {"mogine", "chromadb", "sqlite", "terms"} == set(current.manifest.versions)
    path = current.path / "manifest.json"
    fields = json.loads(path.read_text())
    fields["versions"]["chromadb"] = "99.1.0"
    path.write_text(json.dumps(fields))
    with pytest.raises(StoreError, match=r"chromadb 99\.1\.0.*rollback"):
        generations.current()


def test_new_rules_for_words_write_the_keyword_index_anew(
    generations: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(generations, embedder, make_document("a.md", "one"))
    path = generations.current().path / "manifest.json"  # type: ignore[union-attr]
    fields = json.loads(path.read_text())
    fields["versions"]["terms"] = "0"
    path.write_text(json.dumps(fields))
    embedder.passages = 0
    with generations.begin(embedder) as draft:
        assert draft.renews and not draft.re_embeds
        assert draft.commit() == "g000002"
    assert embedder.passages == 0
    with generations.begin(embedder) as draft:
        assert not draft.renews
