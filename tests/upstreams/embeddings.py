"""A fake of every embeddings address: OpenAI's, DashScope's two, Ark's two; with vectors that mean something.

    async with EmbeddingsFake() as fake:       # or EmbeddingsFake(script(refuse(429)), script())
        fake.base_url          # .../v1                OpenAI
        fake.compatible_url    # .../compatible-mode/v1  DashScope, OpenAI shape, few inputs a call
        fake.dashscope_url     # .../api/v1            DashScope's own shape
        fake.ark_url           # .../api/v3            Ark: one vector for the whole input

`vector(text, dimensions)` is what comes back for a text: deterministic, of length 1, and near for texts that
share characters. Keyword arguments: `keys`, `dimensions` (64), `models` (any by default).
Scripts may pause, hang, refuse, reply, cut, garble; what they say is not used.
"""

import base64
import hashlib
import math
import struct
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from aiohttp import web

from tests.upstreams.doubao import dumps, read_object
from tests.upstreams.player import Meters, Wire, estimate, play, refused
from tests.upstreams.script import Fail, Finish, Refuse, Script
from tests.upstreams.server import Exchange, Fake, Playable, run_standalone

MODEL = "test-embedding"
KEY = "test-key-embeddings"
# Inputs per call on DashScope; 10 where the model is not listed.
BATCH = {"qwen3.7-text-embedding": 20, "qwen3.7-text-embedding-flash": 20, "text-embedding-v2": 25}
ARK_MODEL = "doubao-embedding-vision-251215"


def vector(text: str, dimensions: int = 64) -> list[float]:
    """A bag of characters and pairs of characters, hashed into `dimensions` numbers, normalised."""
    folded = text.casefold()
    total = [0.0] * dimensions
    for piece in [*folded, *(a + b for a, b in pairwise(folded))]:
        digest = hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        place, sign = struct.unpack("<IB", digest[:5])
        total[place % dimensions] += 1.0 if sign % 2 else -1.0
    length = math.sqrt(sum(number * number for number in total))
    if not length:
        return [1.0] + [0.0] * (dimensions - 1)
    return [round(number / length, 6) for number in total]


class EmbeddingsWire(Wire):
    """The body of one embeddings answer, and errors in the address's own envelope."""

    def __init__(self, body: bytes, *, wrapped: bool) -> None:
        super().__init__(Meters(Script(()), ""))
        self._body, self._wrapped = body, wrapped

    def headers(self, *, streaming: bool, failed: bool = False) -> dict[str, str]:
        return {"x-request-id": "req_fake_embeddings"}

    def frame(self, data: bytes) -> bytes:
        return data

    def say(self, piece: str) -> bytes:
        return b""

    def think(self, piece: str) -> bytes:
        return b""

    def finish(self, step: Finish) -> bytes:
        return b""

    def failure(self, step: Fail) -> bytes:
        return self.error_body(step)[0]

    def error_body(self, step: Refuse | Fail) -> tuple[bytes, str]:
        code, message = step.code or f"error_{step.status}", step.message or "The request was refused."
        if not self._wrapped:
            return dumps({"code": code, "message": message, "request_id": "req_fake"}), self.json_type
        error = {"code": code, "param": None, "message": message, "type": code}
        return dumps({"error": error, "id": "req_fake", "request_id": "req_fake"}), self.json_type

    def whole(self, step: Finish) -> bytes:
        return self._body


def inputs_of(value: Any) -> list[str] | None:
    """The texts of an OpenAI `input`; None when it is neither a text nor a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or any(not isinstance(one, str) for one in texts):
        return None
    return texts


def encoded(numbers: Sequence[float], encoding: Any) -> Any:
    if encoding != "base64":
        return list(numbers)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


async def embed_openai(
    exchange: Exchange, script: Script, *, dimensions: int = 64, limit: int | None = None
) -> web.StreamResponse:
    """Answer in OpenAI's shape; more than `limit` inputs are refused as DashScope does."""
    body, broken = read_object(exchange.record.body)
    texts = inputs_of(body.get("input"))
    model = body.get("model") or MODEL
    if broken or texts is None:
        wrong = Refuse(400, "invalid_value", "'input' must be a string or an array of strings.")
        return await refused(exchange, EmbeddingsWire(b"", wrapped=True), wrong)
    if limit is not None and len(texts) > limit:
        return await refused(exchange, EmbeddingsWire(b"", wrapped=True), too_many(limit))
    size = body.get("dimensions") or dimensions
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoded(vector(text, size), body.get("encoding_format")),
        }
        for index, text in enumerate(texts)
    ]
    tokens = sum(estimate(text) for text in texts)
    told = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = dumps({"object": "list", "data": rows, "model": model, "usage": told})
    return await play(exchange, script, EmbeddingsWire(answer, wrapped=True), streaming=False)


def too_many(limit: int) -> Refuse:
    text = "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, "
    return Refuse(400, "InvalidParameter", f"{text}it should not be larger than {limit}.: input.contents")


class EmbeddingsFake(Fake):
    """Embeddings on loopback; see the module's docstring."""

    prefix = "/v1"

    def __init__(
        self,
        *scripts: Playable,
        keys: Collection[str] = (),
        dimensions: int = 64,
        models: Collection[str] = (),
        tls: bool = False,
        port: int = 0,
    ) -> None:
        super().__init__(*scripts, tls=tls, port=port)
        self.keys, self.dimensions, self.models = frozenset(keys), dimensions, frozenset(models)

    @property
    def compatible_url(self) -> str:
        return self.origin + "/compatible-mode/v1"

    @property
    def dashscope_url(self) -> str:
        return self.origin + "/api/v1"

    @property
    def ark_url(self) -> str:
        return self.origin + "/api/v3"

    @property
    def environ(self) -> dict[str, str]:
        where = {"MOGINE_EMBEDDER": "http", "MOGINE_EMBED_BASE_URL": self.base_url}
        return where | {"MOGINE_EMBED_MODEL": MODEL, "MOGINE_EMBED_API_KEY": KEY}

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        path = exchange.request.path
        wrapped = not path.startswith("/api/v1/")
        body, _ = read_object(exchange.record.body)
        if self.keys and exchange.record.bearer not in self.keys:
            wrong = Refuse(401, "InvalidApiKey", "Invalid API-key provided.")
            return await refused(exchange, EmbeddingsWire(b"", wrapped=wrapped), wrong)
        if self.models and body.get("model") not in self.models:
            missing = Refuse(404, "model_not_found", f"The model '{body.get('model')}' does not exist.")
            return await refused(exchange, EmbeddingsWire(b"", wrapped=wrapped), missing)
        match path:
            case "/v1/embeddings":
                return await embed_openai(exchange, self.next_script(), dimensions=self.dimensions)
            case "/compatible-mode/v1/embeddings":
                limit = BATCH.get(str(body.get("model")), 10)
                return await embed_openai(
                    exchange, self.next_script(), dimensions=self.dimensions, limit=limit
                )
            case "/api/v1/services/embeddings/text-embedding/text-embedding":
                return await self._native(exchange, body)
            case "/api/v3/embeddings/multimodal":
                return await self._multimodal(exchange, body)
            case "/api/v3/embeddings":
                return await self._plain_ark(exchange, body)
        return web.Response(status=404)

    async def _native(self, exchange: Exchange, body: dict[str, Any]) -> web.StreamResponse:
        texts = inputs_of((body.get("input") or {}).get("texts"))
        limit = BATCH.get(str(body.get("model")), 10)
        if texts is None or len(texts) > limit:
            wrong = too_many(limit) if texts else Refuse(400, "InvalidParameter", "input.texts is missing.")
            return await refused(exchange, EmbeddingsWire(b"", wrapped=False), wrong)
        size = (body.get("parameters") or {}).get("dimension") or self.dimensions
        rows = [{"embedding": vector(one, size), "text_index": index} for index, one in enumerate(texts)]
        told = {"total_tokens": sum(estimate(text) for text in texts)}
        answer = dumps({"output": {"embeddings": rows}, "usage": told, "request_id": "req_fake"})
        wire = EmbeddingsWire(answer, wrapped=False)
        return await play(exchange, self.next_script(), wire, streaming=False)

    async def _multimodal(self, exchange: Exchange, body: dict[str, Any]) -> web.StreamResponse:
        """Ark makes ONE vector of all parts, and calls the object that holds it a list."""
        parts = body.get("input")
        if not isinstance(parts, list) or any(not isinstance(one, dict) for one in parts):
            wrong = Refuse(
                400, "InvalidParameter", "The parameter `input` specified in the request is not valid."
            )
            return await refused(exchange, EmbeddingsWire(b"", wrapped=True), wrong)
        text = "\n".join(str(part.get("text") or "") for part in parts)
        numbers = vector(text, body.get("dimensions") or self.dimensions)
        tokens = estimate(text)
        answer = {
            "created": 1795337200,
            "data": {
                "embedding": encoded(numbers, body.get("encoding_format")),
                "object": "embedding",
            },
            "id": "02fake",
            "model": body.get("model"),
            "object": "list",
            "usage": {
                "prompt_tokens": tokens,
                "prompt_tokens_details": {"image_tokens": 0, "text_tokens": tokens},
                "total_tokens": tokens,
            },
        }
        wire = EmbeddingsWire(dumps(answer), wrapped=True)
        return await play(exchange, self.next_script(), wire, streaming=False)

    async def _plain_ark(self, exchange: Exchange, body: dict[str, Any]) -> web.StreamResponse:
        model = str(body.get("model"))
        if "vision" in model:
            text = (
                f"The parameter `model` specified in the request are not valid: the requested model {model} "
            )
            wrong = Refuse(400, "InvalidParameter", text + "does not support this api.")
            return await refused(exchange, EmbeddingsWire(b"", wrapped=True), wrong)
        return await embed_openai(exchange, self.next_script(), dimensions=self.dimensions)


if __name__ == "__main__":
    run_standalone(EmbeddingsFake, knobs={"keys": "an accepted key", "models": "a known model"})
