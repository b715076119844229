"""Generations on their way to other machines: only what is missing, checked, all of it or nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kb.generated import GeneratedEmbedder, build, document
from mogine.errors import Locked, NotFound, SettingsError, StoreError
from mogine.kb.chroma import Chroma
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import GRACE_S, Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.offers import Offers, publish
from mogine.kb.publication import Publication, block_path
from mogine.kb.pull import FolderSource, Pulled, pull
from mogine.kb.verify import verify
from tests.conftest import ROOT, clean_environ
from tests.kb.conftest import CharacterEmbedder, make_document, take_in
from tests.upstreams.chroma import ChromaProcess


class Pair:
    """A home that writes, a folder between, and a home that reads."""

    def __init__(self, path: Path, chroma: Chroma | None = None) -> None:
        self.writer = Generations(path / "writer" / "kb", chroma)
        self.reader = Generations(path / "reader" / "kb", chroma)
        self.share = path / "share"
        self.offers = Offers(self.writer, path / "writer" / "kb")
        self.embedder = CharacterEmbedder()

    def take_in(self, *texts: str) -> str:
        return take_in(self.writer, self.embedder, *(make_document(f"{t[:9]}.md", t) for t in texts))

    def publish(self) -> int:
        return publish(self.offers, self.share).written_bytes

    def pull(self, *, is_forced: bool = False, embedder: str = "characters") -> Pulled:
        return pull(self.reader, FolderSource(self.share), embedder=embedder, is_forced=is_forced)

    def texts(self) -> set[str]:
        current = self.reader.current()
        assert current is not None
        assert verify(current, sample=None) == []
        with closing(KnowledgeBase(current, self.embedder)) as base:
            return {hit.passage.text for hit in base.search("text", 50, "vector")}

    def publication(self) -> Publication:
        return FolderSource(self.share).publication()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_documents_of_one_machine_serve_on_the_other(pair: Pair) -> None:
    name = pair.take_in("text one", "text two")
    assert pair.publish() > 0 and pair.publish() == 0
    pulled = pair.pull()
    assert (pulled.generation, pulled.is_new) == (name, True)
    assert pulled.fetched_bytes == pulled.size_bytes > 0
    assert pair.texts() == {"text one", "text two"}
    again = pair.pull()
    assert (again.generation, again.is_new, again.fetched_bytes) == (name, False, 0)
    assert pair.reader.folder_of(name).stat().st_mode & 0o077 == 0, "documents are for the owner alone"


def test_keyword_index_comes_along(pair: Pair) -> None:
    take_in(pair.writer, NoEmbedder(), make_document("a.md", "七天内可以退款"))
    pair.publish()
    pair.pull(embedder="none")
    with closing(KnowledgeBase(pair.reader.current(), NoEmbedder())) as base:  # type: ignore[arg-type]
        assert base.search("退款", 1)[0].passage.source == "a.md"


def test_only_what_has_changed_comes_over(tmp_path: Path) -> None:
    """A document of ten passages in a base of 4,000: a few blocks, where all would be dozens."""
    pair = Pair(tmp_path)
    build(pair.writer, 4000)
    pair.publish()
    first = pair.pull(embedder="generated")
    with pair.writer.begin(GeneratedEmbedder()) as draft:
        draft.replace(*document(42, 10, 1))
        draft.commit()
    written = pair.publish()
    second = pair.pull(embedder="generated")
    assert second.fetched_bytes == written
    assert second.fetched_bytes < first.fetched_bytes / 2
    current = pair.reader.current()
    assert current is not None and current.name == "g000002"
    assert verify(current) == []


def test_a_rollback_of_the_writer_is_followed_without_fetching(pair: Pair) -> None:
    pair.take_in("text one")
    pair.publish()
    pair.pull()
    pair.take_in("text two")
    pair.publish()
    pair.pull()
    pair.writer.rollback()
    pair.publish()
    pulled = pair.pull()
    assert pulled.generation == pair.reader.current_name() == "g000001"
    assert pulled.fetched_bytes < 10_000, "the manifest alone"
    assert pair.texts() == {"text one"}


def test_last_three_stay_here_and_in_the_folder(tmp_path: Path) -> None:
    now = 1000.0
    pair = Pair(tmp_path)
    pair.reader = Generations(tmp_path / "reader" / "kb", clock=lambda: now)
    for number in range(6):
        pair.take_in(f"text {number}")
        pair.publish()
        pair.pull()
        now += GRACE_S
    assert [g.name for g in pair.reader.kept()] == ["g000006", "g000005", "g000004"]
    published = sorted(pair.share.glob("g*.json"))
    assert [path.name[:7] for path in published] == ["g000004", "g000005", "g000006"]
    used = {
        block
        for path in published
        for file in Publication.from_json(path.read_bytes(), "").files
        for block in file.blocks
    }
    assert {path.name for path in pair.share.glob("blocks/*/*")} == used
    pair.reader.rollback("g000004")
    assert pair.texts() == {f"text {number}" for number in range(4)}


def test_documents_taken_in_here_are_not_replaced_unasked(pair: Pair) -> None:
    take_in(pair.reader, pair.embedder, make_document("mine.md", "text of mine"))
    pair.take_in("text one")
    pair.publish()
    with pytest.raises(SettingsError, match="--force"):
        pair.pull()
    assert pair.texts() == {"text of mine"}
    pulled = pair.pull(is_forced=True)
    assert pulled.generation == "g000002", "its name was taken by another"
    assert pair.texts() == {"text one"}
    assert not pair.pull().is_new
    pair.take_in("text two")
    pair.publish()
    assert pair.pull().is_new
    pair.reader.rollback("g000001")
    assert pair.texts() == {"text of mine"}


@pytest.mark.parametrize("how", ["changed", "short", "missing"])
def test_damaged_transfer_is_refused_with_the_name_of_the_file(pair: Pair, how: str) -> None:
    pair.take_in("text one")
    pair.publish()
    pair.pull()
    pair.take_in("text two")
    pair.publish()
    file = next(file for file in pair.publication().files if file.name == "texts.db")
    path = block_path(pair.share, file.blocks[0])
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "short" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StoreError, match=r"texts\.db"):
        pair.pull()
    assert pair.reader.current_name() == "g000001"
    assert pair.texts() == {"text one"}
    path.write_bytes(data)
    rest = pair.pull()
    assert rest.generation == "g000002"
    assert pair.texts() == {"text one", "text two"}


def test_pull_that_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """What the first try fetched is not fetched again."""
    pair = Pair(tmp_path)
    build(pair.writer, 2000)
    pair.publish()
    last = pair.publication().files[-1]
    path = block_path(pair.share, last.blocks[-1])
    assert len(last.blocks) > 3
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match=last.name):
        pair.pull(embedder="generated")
    assert (tmp_path / "reader" / "kb" / "incoming").is_dir()
    path.write_bytes(data)
    pulled = pair.pull(embedder="generated")
    assert pulled.fetched_bytes < pulled.size_bytes / 2
    assert verify(pair.reader.current()) == []  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "reader" / "kb").iterdir()) == [
        "current.json", "generations", "lock",
    ]  # fmt: skip


def test_folder_that_is_half_copied_is_refused(pair: Pair) -> None:
    pair.take_in("text one")
    pair.publish()
    with pytest.raises(NotFound, match="mogine kb publish"):
        pull(pair.reader, FolderSource(pair.share / "nowhere"), embedder="characters")
    next(pair.share.glob("g*.json")).unlink()
    with pytest.raises(StoreError, match="let the copy finish"):
        pair.pull()
    (pair.share / "current.json").write_text("{")
    with pytest.raises(StoreError, match=r"current\.json"):
        pair.pull()
    assert pair.reader.current_name() is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "update mogine"),
        ({"generation": "../x"}, "names, sizes and blocks"),
        ({"files": []}, "names, sizes and blocks"),
        ({"name": "../../escape"}, "names, sizes and blocks"),
        ({"name": "/etc/passwd"}, "names, sizes and blocks"),
        ({"name": "chroma/.hidden"}, "names, sizes and blocks"),
        ({"bytes": -1}, "names, sizes and blocks"),
        ({"bytes": 10**9}, "names, sizes and blocks"),
        ({"blocks": ["../../../x"]}, "names, sizes and blocks"),
        ({"blocks": [7]}, "names, sizes and blocks"),
        ({"blocks": 7}, "can be read"),
    ],
)
def test_publication_with_odd_names_or_sizes_is_refused(
    pair: Pair, change: dict[str, object], told: str
) -> None:
    """B25: what another machine says names no path outside the folder."""
    pair.take_in("text one")
    fields = json.loads(pair.offers.publication().to_json())
    for key, value in change.items():
        target = fields if key in fields else fields["files"][0]
        target[key] = value
    with pytest.raises(StoreError, match=told):
        Publication.from_json(json.dumps(fields).encode(), "somewhere")


def test_generation_that_does_not_fit_is_refused_before_it_comes(pair: Pair) -> None:
    name = pair.take_in("text one")
    with pytest.raises(SettingsError, match="MOGINE_EMBEDDER"):
        pair.publish()
        pair.pull(embedder="e5/other")
    manifest = pair.writer.folder_of(name) / "manifest.json"
    fields = json.loads(manifest.read_bytes())
    for change, told in (
        ({"format": 9}, "reads format"),
        ({"versions": {"chromadb": "99.0"}}, "chromadb 99.0"),
    ):
        manifest.write_text(json.dumps({**fields, **change}))
        shutil.rmtree(pair.share)
        # The writer is a newer mogine, which reads what it wrote.
        newer = Newer(pair.writer)
        publish(Offers(newer, pair.writer.folder_of(name).parent.parent), pair.share)
        with pytest.raises(StoreError, match=told):
            pair.pull()
        assert pair.reader.current_name() is None


class Newer(Generations):
    """Generations as a mogine of next year reads them: any format, any version."""

    def __init__(self, of: Generations) -> None:
        self.current = lambda: generation  # type: ignore[method-assign]
        path = of.folder_of("g000001")
        fields = json.loads((path / "manifest.json").read_bytes())
        (path / "manifest.json").write_text(json.dumps({**fields, "format": 1, "versions": {}}))
        generation = replace(of.current())  # type: ignore[type-var]
        (path / "manifest.json").write_text(json.dumps(fields))


def test_only_one_writes_and_an_ingest_is_one_of_them(pair: Pair) -> None:
    pair.take_in("text one")
    pair.publish()
    with pair.reader.begin(pair.embedder), pytest.raises(Locked, match=str(os.getpid())):
        pair.pull()
    with pair.reader.receive(), pytest.raises(Locked), pair.reader.begin(pair.embedder):
        pass
    pair.pull()
    assert pair.texts() == {"text one"}


def test_damaged_generation_is_not_published(pair: Pair) -> None:
    name = pair.take_in("text one")
    path = pair.writer.folder_of(name) / "texts.db"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"texts\.db is not as it was written"):
        pair.publish()
    assert not (pair.share / "current.json").exists()


def test_database_that_changes_while_it_serves_is_offered_as_it_was(pair: Pair) -> None:
    """Chroma notes each opening in its own file; who pulls meanwhile gets one state of it."""
    pair.take_in("text one", "text two")
    source = FolderSource(pair.share)
    pair.publish()
    publication = source.publication()
    for _ in range(3):
        with closing(KnowledgeBase(pair.writer.current(), pair.embedder)) as base:  # type: ignore[arg-type]
            base.search("text", 1, "vector")
    assert pair.offers.publication() == publication
    assert Offers(pair.writer, pair.writer.folder_of("g000001").parent.parent).publication() == publication
    pair.pull()
    assert pair.texts() == {"text one", "text two"}


@pytest.mark.parametrize("found", ["{", '{"format": 9}', ""])
def test_offer_of_another_mogine_is_made_anew(pair: Pair, found: str) -> None:
    pair.take_in("text one")
    home = pair.writer.folder_of("g000001").parent.parent
    (home / "offers" / "g000001").mkdir(parents=True)
    (home / "offers" / "g000001" / "offer.json").write_text(found)
    pair.publish()
    pair.pull()
    assert pair.texts() == {"text one"}


def test_offers_go_with_their_generations(pair: Pair) -> None:
    for number in range(8):
        pair.take_in(f"text {number}")
        pair.publish()
    home = pair.writer.folder_of("g000001").parent.parent
    names = {path.name for path in (home / "offers").glob("g*")}
    assert names == {path.name for path in (home / "generations").iterdir()}
    pair.writer.forget_others()
    assert {path.name for path in (home / "offers").glob("g*")} == {"g000008"}, "nothing removed is left"
    with pytest.raises(NotFound, match="pull again"):
        pair.offers.block("g000001x", "texts.db", 0)
    with pytest.raises(NotFound, match="pull again"):
        pair.offers.block("g000008", "../../../lock", 0)
    with pytest.raises(NotFound, match="pull again"):
        pair.offers.block("g000008", "texts.db", 10**6)


def test_vectors_on_a_shared_server_are_not_copied(tmp_path: Path, chroma: ChromaProcess) -> None:
    """Documents and keyword index come by pull, vectors from the server; the writer alone deletes them."""
    pair = Pair(tmp_path, chroma.chroma)
    for number in range(5):
        pair.take_in(f"text {number}")
        pair.publish()
        pulled = pair.pull()
    assert pulled.generation == "g000005"
    assert pair.texts() == {f"text {number}" for number in range(5)}
    assert not list(pair.reader.folder_of("g000005").rglob("*.sqlite3"))
    here = Generations(tmp_path / "third" / "kb")
    with pytest.raises(SettingsError, match="MOGINE_CHROMA_URL"):
        pull(here, FolderSource(pair.share), embedder="characters")


# --- killed --------------------------------------------------------------------------------------

_PULL = """
import sys
from pathlib import Path
from mogine.kb.generations import Generations
from mogine.kb.pull import FolderSource, pull
reader, share = map(Path, sys.argv[1:])
print("go", flush=True)
print(pull(Generations(reader), FolderSource(share), embedder="generated").generation, flush=True)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    build(pair.writer, 1500)
    pair.publish()
    pull(pair.reader, FolderSource(pair.share), embedder="generated")
    yield pair


def test_pull_killed_at_any_moment_leaves_a_whole_generation(killed: Pair, tmp_path: Path) -> None:
    """F14: SIGKILL at moments drawn by lot; what serves is the old generation or the new one, whole."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    usual_s, cut = 0.2, 0
    for version in range(1, 9):
        with killed.writer.begin(GeneratedEmbedder()) as draft:
            draft.replace(*document(version, 10, version))
            new = draft.commit()
        killed.publish()
        old = killed.reader.current_name()
        child = subprocess.Popen(
            [sys.executable, "-c", _PULL, tmp_path / "reader" / "kb", killed.share],
            cwd=ROOT, env=clean_environ(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        began = time.monotonic()
        if version > 1:  # the first one tells how long it takes
            time.sleep(chance.random() * usual_s)
            child.send_signal(signal.SIGKILL)
        child.communicate()
        usual_s = time.monotonic() - began if version == 1 else usual_s
        current = killed.reader.current()
        assert current is not None and current.name in (old, new)
        cut += current.name == old
        assert verify(current, sample=20) == []
    pull(killed.reader, FolderSource(killed.share), embedder="generated")
    assert killed.reader.current_name() == killed.writer.current_name()
    assert verify(killed.reader.current()) == []  # type: ignore[arg-type]
    print(f"{cut} of 7 kills came before the swap")
