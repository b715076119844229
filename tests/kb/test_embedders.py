"""Embedders: the bundled model, an endpoint elsewhere, the cache, and the languages' means."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mogine.errors import (
    SettingsError,
    StoreError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mogine.kb.embedders import (
    CACHE_DAYS,
    MEANS_PATH,
    CachedEmbedder,
    CentredEmbedder,
    CheckedEmbedder,
    E5Embedder,
    HttpEmbedder,
    NoEmbedder,
    Vectors,
    open_embedder,
)
from mogine.kb.fit import reads_chinese
from mogine.settings import Settings, load_settings
from tests.kb.conftest import CharacterEmbedder
from tests.upstreams.embeddings import ARK_MODEL, MODEL, EmbeddingsFake, vector
from tests.upstreams.script import cut, hang, refuse, reply, script

Connect = Callable[..., HttpEmbedder]
FIXTURES = Path(__file__).parent.parent / "fixtures" / "protocols"


def lengths(rows: Vectors) -> Vectors:
    norms: Vectors = np.linalg.norm(rows, axis=1)
    return norms


# --- the bundled model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CentredEmbedder:
    cached = CachedEmbedder(E5Embedder(), tmp_path_factory.mktemp("model") / "vectors.db")
    return CentredEmbedder(cached, np.load(MEANS_PATH))


def test_model_tells_meanings_apart_within_and_across_languages(model: CentredEmbedder) -> None:
    passages = [
        "您可以在收货后七天内申请退款，款项将原路退回。",
        "Our office in Shanghai is open from nine to five.",
        "Goods can be sent back within seven days, and we pay the money back to your card.",
        "公司总部位于深圳市南山区。",
    ]
    rows = model.embed_passages(passages)
    assert rows.shape == (4, model.dimensions)
    assert lengths(rows) == pytest.approx(np.ones(4), abs=1e-5)
    chinese, english = model.embed_questions(["怎么退款？", "How do I get my money back?"])
    assert set(np.argsort(rows @ chinese)[-2:]) == {0, 2}
    assert set(np.argsort(rows @ english)[-2:]) == {0, 2}


def test_model_reads_texts_that_its_engine_cannot(model: CentredEmbedder) -> None:
    """It ends a text at NUL and raises on lone surrogates."""
    plain, nul, surrogate, empty = model.embed_questions(["发票 退款", "发票\0退款", "发票 \ud800退款", ""])
    assert plain == pytest.approx(nul, abs=0.02)
    assert plain == pytest.approx(surrogate, abs=1e-5)
    assert np.isfinite(empty).all()


def test_model_gives_questions_and_passages_their_own_prefix() -> None:
    embedder = E5Embedder()
    question, passage = embedder.embed_questions(["退款"])[0], embedder.embed_passages(["退款"])[0]
    assert 0.5 < float(question @ passage) < 0.999


def test_end_of_a_very_long_question_costs_nothing(model: CentredEmbedder) -> None:
    long = "退款" * 250
    assert model.embed_questions([long])[0] == pytest.approx(model.embed_questions([long + "x" * 90_000])[0])


async def test_model_serves_many_threads(model: CentredEmbedder) -> None:
    texts = [f"问题 {number}" for number in range(8)]
    alone = [model.embed_questions([text])[0] for text in texts]
    together = await asyncio.gather(*(asyncio.to_thread(model.embed_questions, [text]) for text in texts))
    for expected, rows in zip(alone, together, strict=True):
        assert rows[0] == pytest.approx(expected, abs=1e-5)


def test_centring_takes_the_mean_of_kind_and_language_away() -> None:
    class Fixed(CharacterEmbedder):
        def embed_questions(self, texts: object) -> Vectors:
            return np.tile(np.array([3.0, 4.0], dtype=np.float32), (2, 1))

    means = np.array([[[3, 0], [0, 4]], [[3, 4], [1, 4]]], dtype=np.float32)
    embedder = CentredEmbedder(Fixed(dimensions=2), means)
    assert embedder.embed_passages(["中文", "English"]).tolist() == [[0, 1], [1, 0]]
    assert embedder.embed_questions(["中文", "English"]).tolist() == [[0, 0], [1, 0]], "zeros stay zeros"


def test_other_means_are_another_embedder(embedder: CharacterEmbedder) -> None:
    ones, zeros = np.ones((2, 2, 64), dtype=np.float32), np.zeros((2, 2, 64), dtype=np.float32)
    assert CentredEmbedder(embedder, ones).name != CentredEmbedder(embedder, zeros).name


async def test_model_that_reads_no_chinese_is_told_once_when_there_is_chinese(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The fake knows characters, not meanings."""
    async with EmbeddingsFake() as fake:
        embedder = CheckedEmbedder(HttpEmbedder(fake.base_url, MODEL))
        await asyncio.to_thread(embedder.embed_passages, ["English only", "more (中文) of it"])
        assert "Chinese" not in caplog.text
        for _ in range(2):
            await asyncio.to_thread(embedder.embed_passages, ["中文的资料"])
        embedder.close()
    assert caplog.text.count("does not seem to read Chinese") == 1 and MODEL in caplog.text


def test_bundled_model_is_seen_to_read_chinese() -> None:
    assert reads_chinese(E5Embedder().embed_passages)


# --- the cache -----------------------------------------------------------------------------------


def test_known_passages_are_not_embedded_again(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    path = tmp_path / "kb" / "vectors.db"
    first = CachedEmbedder(embedder, path).embed_passages(["a", "b", "a"])
    assert embedder.passages == 2
    again = CachedEmbedder(embedder, path).embed_passages(["b", "c", "a"])
    assert embedder.passages == 3
    assert again[[0, 2]].tolist() == first[[1, 0]].tolist()
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_vectors_of_another_embedder_are_not_taken(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    path = tmp_path / "vectors.db"
    CachedEmbedder(embedder, path).embed_passages(["a"])
    other = CharacterEmbedder("other", 8)
    assert CachedEmbedder(other, path).embed_passages(["a"]).shape == (1, 8)
    assert other.passages == 1


def test_questions_are_not_kept(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    path = tmp_path / "vectors.db"
    CachedEmbedder(embedder, path).embed_questions(["身份证号 110101199003070000"])
    assert not path.exists()


def test_vectors_that_nobody_used_are_forgotten(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    path = tmp_path / "vectors.db"
    CachedEmbedder(embedder, path, now=lambda: 0).embed_passages(["old"])
    CachedEmbedder(embedder, path, now=lambda: 86400 * (CACHE_DAYS + 1)).embed_passages(["new"])
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM vectors").fetchone() == (1,)


def test_broken_cache_says_that_it_may_be_removed(tmp_path: Path, embedder: CharacterEmbedder) -> None:
    path = tmp_path / "vectors.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"vectors\.db .*remove it"):
        CachedEmbedder(embedder, path).embed_passages(["a"])


# --- an endpoint elsewhere -----------------------------------------------------------------------


async def embed(embedder: HttpEmbedder, *texts: str) -> Vectors:
    return await asyncio.to_thread(embedder.embed_passages, texts)


@pytest.fixture
def waits() -> list[float]:
    """What an embedder of `connect` has slept."""
    return []


@pytest.fixture
def connect(waits: list[float]) -> Iterator[Connect]:
    """Makes embedders that do not sleep, and closes them."""
    opened = []

    def make(base_url: str, model: str = MODEL, key: str = "", timeout_s: float = 10) -> HttpEmbedder:
        opened.append(HttpEmbedder(base_url, model, key, timeout_s=timeout_s, sleep=waits.append))
        return opened[-1]

    yield make
    for embedder in opened:
        embedder.close()


async def test_endpoint_gives_one_vector_per_text_in_order(connect: Connect) -> None:
    async with EmbeddingsFake(keys=["test-key-embeddings"]) as fake:
        embedder = connect(fake.base_url, key="test-key-embeddings")
        texts = [f"text {number}" for number in range(100)]
        rows = await embed(embedder, *texts)
        assert rows == pytest.approx(np.array([vector(text) for text in texts]), abs=1e-4)
        assert lengths(rows) == pytest.approx(np.ones(100), abs=1e-5)
        assert await asyncio.to_thread(lambda: embedder.dimensions) == 64
        assert len(fake.requests) == 2, "64 texts a call"


async def test_endpoint_that_takes_few_texts_gets_few(connect: Connect) -> None:
    """DashScope answers 400 above 10 texts."""
    async with EmbeddingsFake() as fake:
        embedder = connect(fake.compatible_url, "text-embedding-v4")
        rows = await embed(embedder, *(f"text {number}" for number in range(30)))
        assert rows.shape == (30, 64)
        refused = len(fake.requests)
        await embed(embedder, *(f"more {number}" for number in range(8)))
        assert len(fake.requests) == refused + 1, "the size that worked is remembered"


async def test_multimodal_model_gets_one_text_a_call(connect: Connect) -> None:
    """Ark makes one vector of a whole list."""
    async with EmbeddingsFake() as fake:
        rows = await embed(connect(fake.ark_url, ARK_MODEL), "退款", "发票")
        assert rows == pytest.approx(np.array([vector("退款"), vector("发票")]), abs=1e-4)
        assert len(fake.requests) == 2


async def test_dimensions_are_asked_from_the_endpoint(connect: Connect) -> None:
    async with EmbeddingsFake(dimensions=32) as fake:
        embedder = connect(fake.base_url)
        assert await asyncio.to_thread(lambda: embedder.dimensions) == 32


async def test_busy_endpoint_is_asked_again(connect: Connect, waits: list[float]) -> None:
    async with EmbeddingsFake(
        script(refuse(429, headers={"Retry-After": "2"})), script(refuse(503)), script()
    ) as fake:
        rows = await embed(connect(fake.base_url), "a")
        assert rows.shape == (1, 64)
    assert waits == [2.0, 2.0]


async def test_question_is_asked_once(connect: Connect, waits: list[float]) -> None:
    """A visitor waits for it."""
    async with EmbeddingsFake(script(refuse(503)), script()) as fake:
        embedder = connect(fake.base_url)
        with pytest.raises(UpstreamUnavailable):
            await asyncio.to_thread(embedder.embed_questions, ["a"])
        assert (await asyncio.to_thread(embedder.embed_questions, ["a"])).shape == (1, 64)
    assert waits == []


@pytest.mark.parametrize(
    ("status", "error", "named"),
    [
        (401, UpstreamRefused, "MOGINE_EMBED_API_KEY"),
        (403, UpstreamRefused, "MOGINE_EMBED_API_KEY"),
        (404, UpstreamRefused, "MOGINE_EMBED_MODEL"),
        (400, UpstreamError, "MOGINE_EMBED_MODEL"),
        (429, UpstreamBusy, "429"),
        (500, UpstreamUnavailable, "500"),
    ],
)
async def test_refusal_names_the_setting_and_tells_nothing_of_the_vendor(
    status: int, error: type[UpstreamError], named: str, connect: Connect
) -> None:
    async with EmbeddingsFake(script(refuse(status, message="key test-key-embeddings is bad"))) as fake:
        embedder = connect(fake.base_url, key="test-key-embeddings")
        with pytest.raises(error, match=named) as caught:
            await embed(embedder, "a")
    assert caught.value.upstream_status == status
    assert "test-key" not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        "no json",
        "[]",
        '{"data": []}',
        '{"data": [{"index": 0, "embedding": "!!"}]}',
        '{"data": [{"index": 0, "embedding": []}, {"index": 1, "embedding": [1]}]}',
        '{"data": [{"index": 0, "embedding": [1, NaN]}]}',
        '{"data": [{"index": 0, "embedding": [1, "x"]}]}',
        '{"data": [{"index": 0}]}',
        '{"data": {"embedding": {"a": 1}}}',
    ],
)
async def test_answer_without_vectors_is_a_bad_response(body: str, connect: Connect) -> None:
    async with EmbeddingsFake(script(reply(200, body.encode()))) as fake:
        with pytest.raises(UpstreamBadResponse):
            await embed(connect(fake.base_url), "a")


async def test_endpoint_that_changes_its_dimensions_is_a_bad_response(connect: Connect) -> None:
    async with EmbeddingsFake() as fake:
        embedder = connect(fake.base_url)
        await embed(embedder, "a")
        fake.dimensions = 32
        with pytest.raises(UpstreamBadResponse):
            await embed(embedder, "b")


async def test_silent_and_cut_and_absent_endpoints_are_told_apart(connect: Connect) -> None:
    async with EmbeddingsFake(script(hang())) as fake:
        with pytest.raises(UpstreamTimeout):
            await embed(connect(fake.base_url, timeout_s=0.1), "a")
    async with EmbeddingsFake(script(cut())) as fake:
        with pytest.raises(UpstreamUnavailable, match="MOGINE_EMBED_BASE_URL"):
            await embed(connect(fake.base_url), "a")
        gone = fake.base_url
    with pytest.raises(UpstreamUnavailable, match="MOGINE_EMBED_BASE_URL"):
        await embed(connect(gone), "a")


@pytest.mark.parametrize(
    "name", ["openai_embeddings_base64", "openai_embeddings_float", "dashscope_embeddings_compatible"]
)
async def test_recorded_answers_of_vendors_are_read(name: str, connect: Connect) -> None:
    body = (FIXTURES / f"{name}.json").read_bytes()
    texts = [f"text {number}" for number in range(len(json.loads(body)["data"]))]
    async with EmbeddingsFake(script(reply(200, body))) as fake:
        rows = await embed(connect(fake.base_url), *texts)
    assert lengths(rows) == pytest.approx(np.ones(len(texts)), abs=1e-5)


# --- the setting ---------------------------------------------------------------------------------


def test_setting_chooses_the_embedder(settings: Settings, home: Path) -> None:
    assert open_embedder(settings).name.startswith("e5-small-int8/centred-")
    none = open_embedder(load_settings({"MOGINE_EMBEDDER": "none"}, home))
    assert (none.name, none.dimensions) == (NoEmbedder.name, 0)
    assert none.embed_passages(["a", "b"]).shape == (2, 0)
    http = {
        "MOGINE_EMBEDDER": "http",
        "MOGINE_EMBED_BASE_URL": "http://127.0.0.1:9",
        "MOGINE_EMBED_MODEL": "m",
    }
    assert open_embedder(load_settings(http, home)).name == "http/m"


def test_endpoint_without_address_or_model_is_a_wrong_setting(home: Path) -> None:
    with pytest.raises(SettingsError, match="MOGINE_EMBED_BASE_URL"):
        open_embedder(load_settings({"MOGINE_EMBEDDER": "http", "MOGINE_EMBED_MODEL": "m"}, home))


def test_opening_an_embedder_writes_nothing(settings: Settings) -> None:
    open_embedder(settings)
    assert not settings.data_path.exists()
