"""Vectors on a real Chroma server: the answers of a folder, one collection a generation, and faults."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings as ChromaSettings

import mogine
from mogine.errors import Unavailable
from mogine.ingest.pipeline import Summary, ingest
from mogine.kb.chroma import REST_S, Chroma, ChromaServer, Collection, Missing
from mogine.kb.embedders import CachedEmbedder, Embedder, NoEmbedder, open_embedder
from mogine.kb.generations import GRACE_S, Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.manifest import Generation
from mogine.kb.verify import verify
from mogine.settings import Settings
from tests.kb.conftest import CharacterEmbedder, make_document, take_in
from tests.upstreams.chroma import ChromaProcess

SAMPLES = Path(mogine.__file__).with_name("samples")
QUESTIONS = (
    "怎么退款", "保修多久", "how long is the warranty", "运费多少", "when do you ship", "怎么安装",
    "发票怎么开", "is there a store in Shanghai", "设备掉线了怎么办", "what does it cost", "招聘", "hours",
)  # fmt: skip


@pytest.fixture
def far(tmp_path: Path, chroma: ChromaProcess) -> Generations:
    """A home whose vectors are on the server."""
    return Generations(tmp_path / "far" / "kb", chroma.chroma)


def serving(generations: Generations) -> Generation:
    current = generations.current()
    assert current is not None
    return current


@pytest.fixture
def opened() -> Iterator[Callable[[Generations, Embedder], KnowledgeBase]]:
    bases: list[KnowledgeBase] = []

    def start(generations: Generations, embedder: Embedder) -> KnowledgeBase:
        bases.append(KnowledgeBase(serving(generations), embedder))
        return bases[-1]

    yield start
    for base in bases:
        base.close()


Opened = Callable[[Generations, Embedder], KnowledgeBase]


def test_answers_are_those_of_a_folder(
    tmp_path: Path, far: Generations, settings: Settings, opened: Opened
) -> None:
    """The same ten passages in the same order, with the bundled model, on the sample documents."""
    near = Generations(tmp_path / "near" / "kb")
    with closing(open_embedder(settings)) as embedder:
        for generations in (near, far):
            *_, summary = ingest([SAMPLES / "docs"], generations, embedder, base=SAMPLES)
            assert isinstance(summary, Summary) and summary.passages_in_all > 100
        one, other = opened(near, embedder), opened(far, embedder)
        for question in QUESTIONS:
            for mode in ("hybrid", "vector"):
                here, there = (base.search(question, 10, mode) for base in (one, other))
                assert [hit.passage.id for hit in here] == [hit.passage.id for hit in there], (question, mode)
                assert [hit.score for hit in here] == pytest.approx([hit.score for hit in there], abs=1e-4)
    assert not (serving(far).path / "chroma").exists(), "no vectors lie in the folder"
    assert verify(serving(far), sample=None) == []


def test_chromas_own_client_finds_the_collection(
    far: Generations, chroma: ChromaProcess, embedder: CharacterEmbedder
) -> None:
    take_in(far, embedder, make_document("a.md", "退款", "发票"))
    (name,) = chroma.names()
    assert name == serving(far).manifest.collection
    host, _, port = chroma.url.removeprefix("http://").partition(":")
    settings = ChromaSettings(_env_file=None, anonymized_telemetry=False)  # type: ignore[call-arg]
    client: Any = chromadb.HttpClient(host, int(port), settings=settings)
    collection = client.get_collection(name, embedding_function=None)
    assert (collection.count(), collection.configuration["hnsw"]["space"]) == (2, "cosine")
    for each in (client._admin_client, client):
        each._server._session.close()  # which their own `close` leaves open
    client.close()


def test_each_generation_has_a_collection_until_it_is_swept(
    tmp_path: Path, chroma: ChromaProcess, embedder: CharacterEmbedder, opened: Opened
) -> None:
    now = 1000.0
    generations = Generations(tmp_path / "kb", chroma.chroma, clock=lambda: now)
    for number in range(6):
        take_in(generations, embedder, make_document("a.md", f"text {number}"))
        now += GRACE_S
    kept = sorted(generation.manifest.collection for generation in generations.kept())
    assert len(kept) == 3 and set(kept) <= set(chroma.names())
    with generations.begin(embedder):
        pass
    assert set(kept) <= set(chroma.names()) and len(chroma.names()) <= 4
    generations.forget_others()
    assert chroma.names() == [serving(generations).manifest.collection]
    assert opened(generations, embedder).search("text 5", 1, "vector")[0].passage.text == "text 5"


def test_change_carries_the_other_vectors_over(
    far: Generations, embedder: CharacterEmbedder, opened: Opened
) -> None:
    take_in(far, embedder, make_document("a.md", "old words"), make_document("b.md", "other", "more"))
    embedder.passages = 0
    with far.begin(embedder) as draft:
        draft.replace(*make_document("a.md", "new words"))
        draft.replace(*make_document("a.md", "newer words"))
        draft.replace(*make_document("c.md", "third"))
        draft.remove("c.md")
        draft.commit()
    assert embedder.passages <= 3, "only what is new is embedded"
    base = opened(far, embedder)
    texts = {hit.passage.text for hit in base.search("words", 9, "vector")}
    assert texts == {"newer words", "other", "more"}
    assert verify(serving(far), sample=None) == []


def test_draft_that_is_left_leaves_no_collection(
    far: Generations, chroma: ChromaProcess, embedder: CharacterEmbedder
) -> None:
    with pytest.raises(RuntimeError, match="stop"), far.begin(embedder) as draft:
        draft.replace(*make_document("a.md", "text"))
        raise RuntimeError("stop")
    assert chroma.names() == []


def test_collection_of_a_killed_ingest_is_swept_and_those_of_others_stay(
    tmp_path: Path, far: Generations, chroma: ChromaProcess, embedder: CharacterEmbedder
) -> None:
    other = Generations(tmp_path / "other" / "kb", chroma.chroma)
    take_in(far, embedder, make_document("a.md", "text"))
    take_in(other, embedder, make_document("b.md", "text"))
    mine, others = serving(far).manifest.collection, serving(other).manifest.collection
    with closing(ChromaServer(chroma.chroma)) as server:
        left = mine.replace("g000001", "g000002")
        server.create(left)
        server.create("mogine")  # somebody else's, with a name like ours
    # A copy of a home is another home: it must not take the first one's collections away.
    copy = Generations(tmp_path / "copy" / "kb", chroma.chroma)
    shutil.copytree(tmp_path / "far", tmp_path / "copy")
    take_in(copy, embedder, make_document("c.md", "text"))
    assert left in chroma.names()
    with far.begin(embedder):
        pass
    assert set(chroma.names()) == {mine, others, serving(copy).manifest.collection}
    with closing(ChromaServer(chroma.chroma)) as server:
        assert "mogine" in server.names("mogine")


def test_vectors_move_to_the_server_and_back(tmp_path: Path, chroma: ChromaProcess, opened: Opened) -> None:
    """By the next ingest, though no document has changed; nothing is embedded again."""
    inner = CharacterEmbedder()
    embedder = CachedEmbedder(inner, tmp_path / "kb" / "vectors.db")
    near, far = Generations(tmp_path / "kb"), Generations(tmp_path / "kb", chroma.chroma)
    take_in(near, embedder, make_document("a.md", "退款", "发票"))
    inner.passages = 0
    for generations, is_far in ((far, True), (near, False)):
        with generations.begin(embedder) as draft:
            assert draft.renews
            draft.commit()
        assert bool(serving(generations).manifest.collection) is is_far
        assert opened(generations, embedder).search("退款", 1, "vector")[0].passage.text == "退款"
        assert verify(serving(generations)) == []
        with generations.begin(embedder) as draft:
            assert not draft.renews
    assert inner.passages == 0


def test_without_the_setting_the_remedy_is_told(
    tmp_path: Path, far: Generations, embedder: CharacterEmbedder
) -> None:
    take_in(far, embedder, make_document("a.md", "text"))
    here = Generations(tmp_path / "far" / "kb")
    with pytest.raises(Unavailable, match="MOGINE_CHROMA_URL") as caught:
        KnowledgeBase(serving(here), embedder)
    assert caught.value.reason == "kb_unavailable"
    with closing(KnowledgeBase(serving(here), NoEmbedder())) as words:
        assert words.search("text", 1, "keyword")


def test_verify_tells_what_the_server_lacks(
    far: Generations, chroma: ChromaProcess, embedder: CharacterEmbedder
) -> None:
    take_in(far, embedder, make_document("a.md", "退款", "发票", "保修"))
    with closing(ChromaServer(chroma.chroma)) as server:
        id = server.id_of(serving(far).manifest.collection)
        server.ask(id, "delete", {"ids": ["2"]})
    (finding,) = verify(serving(far))
    assert (finding.part, finding.detail) == ("vectors", "1 passages are missing, such as number 2")
    with far.begin(embedder) as draft:
        assert draft.renews, "an ingest puts it right"
        draft.commit()
    assert verify(serving(far)) == []
    chroma.kill()
    assert [finding.part for finding in verify(serving(far))] == ["vectors"]


def test_paused_server_is_waited_for_once_and_noticed_when_it_is_back(
    far: Generations, chroma: ChromaProcess, embedder: CharacterEmbedder
) -> None:
    """P43, F28: one search waits for the time limit; the next ones are told at once, until it answers."""
    take_in(far, embedder, make_document("a.md", "text"))
    now = 0.0
    patience = Chroma(chroma.url, timeout_s=0.3)
    vector = embedder.embed_questions(["text"])[0]
    name = serving(far).manifest.collection
    with closing(Collection(patience, name, clock=lambda: now)) as collection:
        assert list(collection.search(vector, 3)) == [1]
        chroma.pause()
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            collection.search(vector, 3)
        assert 0.25 < time.monotonic() - began < 3
        chroma.resume()
        with pytest.raises(Unavailable, match="does not answer"):
            collection.search(vector, 3)
        assert "does not answer" in collection.problem
        collection.look_again()
        assert collection.problem, "it rests"
        now += REST_S
        collection.look_again()
        assert collection.problem == ""
        assert list(collection.search(vector, 3)) == [1]


def test_server_that_comes_back_empty_is_filled_from_the_cache(
    tmp_path: Path, far: Generations, chroma: ChromaProcess, opened: Opened
) -> None:
    """F28: the remedy is told, an ingest of the same documents is enough, and nothing is embedded again."""
    inner = CharacterEmbedder()
    embedder = CachedEmbedder(inner, tmp_path / "vectors.db")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("七天内可以退款。\n")

    def again() -> Summary:
        *_, summary = ingest([docs], far, embedder, base=tmp_path)
        assert isinstance(summary, Summary)
        return summary

    again()
    base = opened(far, embedder)
    assert base.search("退款", 1, "vector")
    chroma.kill()
    with pytest.raises(Unavailable):
        base.search("退款", 1, "vector")
    with pytest.raises(Unavailable), far.begin(embedder) as draft:
        draft.replace(*make_document("b.md", "text"))
    with pytest.raises(Unavailable):
        again()
    chroma.start_empty()
    with (
        closing(Collection(chroma.chroma, serving(far).manifest.collection)) as collection,
        pytest.raises(Missing, match="mogine kb ingest"),
    ):
        collection.count()
    inner.passages = 0
    summary = again()
    assert (summary.generation, inner.passages) == ("g000002", 0)
    assert opened(far, embedder).search("退款", 1, "vector")[0].passage.source == "docs/a.md"


def test_program_that_is_no_chroma_server_is_told(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    with pytest.raises(Unavailable, match="MOGINE_CHROMA_URL"):
        take_in(
            Generations(tmp_path / "kb", Chroma("http://127.0.0.1:1")), embedder, make_document("a.md", "x")
        )
