"""Texts to vectors: the bundled model, any OpenAI-compatible endpoint, or none, and a cache before them."""

import base64
import binascii
import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

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
from mogine.kb.e5 import E5Engine
from mogine.kb.fit import reads_chinese
from mogine.kb.passages import language
from mogine.settings import Settings

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]

# A visitor decides how long a question is, and the model's cost grows with it.
EMBEDDED_QUESTION_CHARS = 500
CACHE_DAYS = 90
MEANS_PATH = Path(__file__).with_name("e5_means.npy")


class Embedder(Protocol):
    """Gives one row of length 1 per text. `name` changes whenever vectors stop being comparable."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> int:
        """0 for an embedder without vectors."""
        ...

    def embed_passages(self, texts: Sequence[str]) -> Vectors: ...

    def embed_questions(self, texts: Sequence[str]) -> Vectors: ...

    def warm(self) -> None:
        """Loads what the first text would otherwise wait for."""
        ...

    def close(self) -> None:
        """Gives back connections; nothing is embedded afterwards."""
        ...


def open_embedder(settings: Settings) -> Embedder:
    """The embedder of MOGINE_EMBEDDER, with the home's cache before it; loads no model yet."""
    kb = settings.kb
    cache_path = settings.kb_path / "vectors.db"
    match kb.embedder:
        case "none":
            return NoEmbedder()
        case "http":
            if not kb.embed_base_url or not kb.embed_model:
                raise SettingsError(
                    "MOGINE_EMBEDDER=http needs MOGINE_EMBED_BASE_URL and MOGINE_EMBED_MODEL; "
                    "set both, or use MOGINE_EMBEDDER=e5"
                )
            chosen = HttpEmbedder(kb.embed_base_url, kb.embed_model, kb.embed_key)
            return CachedEmbedder(CheckedEmbedder(chosen), cache_path)
        case _:
            return CentredEmbedder(CachedEmbedder(E5Embedder(), cache_path), np.load(MEANS_PATH))


class NoEmbedder:
    """Keyword search only."""

    name = "none"
    dimensions = 0

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return np.empty((len(texts), 0), dtype=np.float32)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self.embed_passages(texts)

    def warm(self) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to give back."""


class E5Embedder:
    """multilingual-e5-small, bundled; adds the prefixes that e5 wants. Loaded at the first text."""

    name = "e5-small-int8"
    dimensions = 384

    def __init__(self, *, jobs: int | None = None) -> None:
        """`jobs` threads embed passages; by default as many as there are processors."""
        self._jobs = jobs
        self._loading = threading.Lock()
        self._engine: E5Engine | None = None

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._load().embed([f"passage: {clean(text)}" for text in texts])

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._load().embed([f"query: {clean(text)[:EMBEDDED_QUESTION_CHARS]}" for text in texts])

    def warm(self) -> None:
        self.embed_questions(["?"])

    def close(self) -> None:
        with self._loading:
            self._engine = None

    def _load(self) -> E5Engine:
        with self._loading:
            if self._engine is None:
                self._engine = E5Engine(jobs=self._jobs)
            return self._engine


class HttpEmbedder:
    """Any endpoint that speaks OpenAI's `/embeddings`, and Ark's multimodal one.

    A list that is too long for the endpoint is answered with 400 (DashScope takes 10 texts, others 20
    or 2,048): the batch is then halved, and stays so.
    """

    _TRIES = 3

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str = "",
        *,
        timeout_s: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        self.name = f"http/{model}"
        self._model = model
        # Ark's multimodal endpoint folds a whole list into ONE vector: it gets one text a call.
        self._multimodal = model.startswith("doubao-embedding-vision")
        self._url = base_url.rstrip("/") + ("/embeddings/multimodal" if self._multimodal else "/embeddings")
        self._batch = 1 if self._multimodal else 64
        self._dimensions = 0
        self._sleep = sleep
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            follow_redirects=False,
            trust_env=False,
        )

    @property
    def dimensions(self) -> int:
        """Asked from the endpoint once."""
        if not self._dimensions:
            self.embed_passages(["dimensions"])
        return self._dimensions

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._TRIES)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        """Asks once: a visitor waits, and search can do with words alone."""
        return self._embed(texts, 1)

    def _embed(self, texts: Sequence[str], tries: int) -> Vectors:
        rows: list[Vectors] = []
        rest = [clean(text) for text in texts]
        while rest:
            batch = rest[: self._batch]
            try:
                rows.append(self._ask(batch, tries))
            except _Rejected as error:
                if len(batch) == 1:
                    raise UpstreamError(
                        f"the embeddings endpoint rejected a text of {len(batch[0])} characters "
                        f"(status {error.status}); check MOGINE_EMBED_MODEL and its limits",
                        upstream_status=error.status,
                    ) from error
                self._batch = (len(batch) + 1) // 2
                continue
            rest = rest[len(batch) :]
        return np.concatenate(rows) if rows else np.empty((0, self._dimensions), dtype=np.float32)

    def warm(self) -> None:
        """The endpoint has its own memory; a question is paid, so none is asked for nothing."""

    def close(self) -> None:
        self._client.close()

    def _ask(self, texts: list[str], tries: int) -> Vectors:
        content = [{"type": "text", "text": text} for text in texts] if self._multimodal else texts
        body = {"model": self._model, "input": content, "encoding_format": "float"}
        for attempt in range(1, tries + 1):
            try:
                return self._read(self._post(body), len(texts))
            except (UpstreamBusy, UpstreamUnavailable) as error:
                if attempt == tries:
                    raise
                self._sleep(min(error.retry_after_s or attempt, 10.0))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx

        try:
            response = self._client.post(self._url, json=body)
        except httpx.TimeoutException as error:
            raise UpstreamTimeout("the embeddings endpoint did not answer in time; try again") from error
        except httpx.HTTPError as error:
            raise UpstreamUnavailable(
                "the embeddings endpoint cannot be reached; check MOGINE_EMBED_BASE_URL"
            ) from error
        status = response.status_code
        if status in (400, 413, 422):
            raise _Rejected(status)
        if status in (401, 403, 404):
            setting = (
                "MOGINE_EMBED_BASE_URL and MOGINE_EMBED_MODEL" if status == 404 else "MOGINE_EMBED_API_KEY"
            )
            raise UpstreamRefused(
                f"the embeddings endpoint answered {status}; check {setting}", upstream_status=status
            )
        if status == 429:
            raise UpstreamBusy(
                "the embeddings endpoint is busy (429); try again later",
                retry_after_s=_seconds(response.headers.get("Retry-After")),
                upstream_status=status,
            )
        if status >= 500:
            raise UpstreamUnavailable(
                f"the embeddings endpoint answered {status}; try again later", upstream_status=status
            )
        if status != 200:
            raise UpstreamBadResponse(
                f"the embeddings endpoint answered {status}; check MOGINE_EMBED_BASE_URL",
                upstream_status=status,
            )
        try:
            return response.json()
        except ValueError as error:
            raise UpstreamBadResponse(
                "the embeddings endpoint sent no JSON; check MOGINE_EMBED_BASE_URL"
            ) from error

    def _read(self, answer: Any, count: int) -> Vectors:
        data = answer.get("data") if isinstance(answer, dict) else None
        if isinstance(data, dict):
            data = [data]
        try:
            if not isinstance(data, list) or len(data) != count:
                raise ValueError("not one vector per text")
            ordered = sorted(data, key=lambda item: int(item.get("index", 0)))
            rows = np.array([_vector(item["embedding"]) for item in ordered], dtype=np.float32)
            if rows.ndim != 2 or not np.isfinite(rows).all():
                raise ValueError("not one finite vector per text")
            if self._dimensions and rows.shape[1] != self._dimensions:
                raise ValueError("the number of dimensions has changed")
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise UpstreamBadResponse(
                f"the embeddings endpoint did not send {count} vectors for {count} texts; "
                "check that MOGINE_EMBED_MODEL is a text embedding model"
            ) from error
        self._dimensions = int(rows.shape[1])
        return unit(rows)


class CheckedEmbedder:
    """Warns once, before the first Chinese passage, when the model does not read Chinese."""

    def __init__(self, inner: Embedder) -> None:
        self._inner = inner
        self._is_checked = False

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def dimensions(self) -> int:
        return self._inner.dimensions

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        if not self._is_checked and any(language(text) == "zh" for text in texts):
            self._is_checked = True
            if not reads_chinese(self._inner.embed_passages):
                log.warning(
                    "the embedding model %s does not seem to read Chinese: Chinese documents will be found "
                    "by their words only. Choose a multilingual MOGINE_EMBED_MODEL, or MOGINE_EMBEDDER=e5",
                    self.name,
                )
        return self._inner.embed_passages(texts)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._inner.embed_questions(texts)

    def warm(self) -> None:
        self._inner.warm()

    def close(self) -> None:
        self._inner.close()


class _Rejected(Exception):
    """The endpoint does not take this list: too long, or a text it cannot read."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _vector(value: Any) -> Any:
    return (
        np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
        if isinstance(value, str)
        else value
    )


def _seconds(value: str | None) -> float | None:
    return float(value) if value and value.isascii() and value.isdigit() and len(value) < 6 else None


class CachedEmbedder:
    """Remembers the vectors of passages by content, so that taking in the same text again costs nothing.

    Questions are not remembered: they belong to visitors.
    """

    def __init__(self, inner: Embedder, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._inner = inner
        self._path = path
        self._now = now

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def dimensions(self) -> int:
        return self._inner.dimensions

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._inner.embed_questions(texts)

    def warm(self) -> None:
        self._inner.warm()

    def close(self) -> None:
        self._inner.close()

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        keys = [self._key(text) for text in texts]
        try:
            with closing(self._open()) as db:
                known = self._read(db, keys)
                missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
                if missing:
                    fresh = self._inner.embed_passages(list(missing.values()))
                    known.update(zip(missing, fresh, strict=True))
                    self._write(db, list(zip(missing, fresh, strict=True)))
        except sqlite3.Error as error:
            raise StoreError(
                f"{self._path} cannot be used ({error}); remove it, it only saves time"
            ) from error
        if not keys:
            return np.empty((0, self.dimensions), dtype=np.float32)
        return np.array([known[key] for key in keys], dtype=np.float32)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.name}\0{text}".encode("utf-8", "surrogatepass")).digest()[:16]

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS vectors"
            " (key BLOB PRIMARY KEY, used_on INTEGER, vector BLOB) WITHOUT ROWID"
        )
        return db

    def _read(self, db: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Any]:
        known = {}
        for key in dict.fromkeys(keys):
            row = db.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone()
            if row is not None:
                known[key] = np.frombuffer(row[0], dtype="<f4")
        return known

    def _write(self, db: sqlite3.Connection, rows: Sequence[tuple[bytes, Any]]) -> None:
        today = int(self._now() // 86400)
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)",
            [(key, today, vector.astype("<f4").tobytes()) for key, vector in rows],
        )
        db.execute("DELETE FROM vectors WHERE used_on < ?", (today - CACHE_DAYS,))
        db.execute("COMMIT")


class CentredEmbedder:
    """Takes each language's mean vector away, so that passages of another language can be found.

    e5 prefers the question's own language: of passages in the other one it finds 12 % in a bilingual
    index, and 87 % without the means. `means` has the shape (2, 2, dimensions): passages and questions,
    each for Chinese and for everything else; `benchmarks/retrieval/means.py` makes it.
    """

    def __init__(self, inner: Embedder, means: Vectors) -> None:
        self._inner = inner
        self._means = means.astype(np.float32)
        self.name = f"{inner.name}/centred-{hashlib.sha256(self._means.tobytes()).hexdigest()[:8]}"

    @property
    def dimensions(self) -> int:
        return self._inner.dimensions

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._centre(self._inner.embed_passages(texts), texts, kind=0)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._centre(self._inner.embed_questions(texts), texts, kind=1)

    def warm(self) -> None:
        self._inner.warm()

    def close(self) -> None:
        self._inner.close()

    def _centre(self, rows: Vectors, texts: Sequence[str], *, kind: int) -> Vectors:
        languages = [0 if language(text) == "zh" else 1 for text in texts]
        return unit(rows - self._means[kind][languages])


def unit(rows: Vectors) -> Vectors:
    """Rows of length 1; a row of zeros stays as it is."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length == 0, 1, length)).astype(np.float32)


def clean(text: str) -> str:
    """Without NUL, which SQLite and others take for the end, and lone surrogates, which have no UTF-8."""
    return text.replace("\0", " ").encode("utf-8", "ignore").decode()
