"""Writes ONNX models: as much of their protobuf format as one encoder needs, instead of a heavy package."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# The operators that onnxruntime adds to the standard ones.
MICROSOFT = "com.microsoft"

_IR_VERSION = 9
_OPSET = 18
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int8): 3, np.dtype(np.int64): 7}
_FLOAT, _INT = 1, 2


class Graph:
    """A graph while it is put together; `model` is what onnxruntime reads."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []
        self._names: set[str] = set()

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        """A named array of float32, int8 or int64; gives its name back."""
        if name not in self._names:
            self._names.add(name)
            values = np.ascontiguousarray(values)
            shape = b"".join(_number(1, length) for length in values.shape)
            self._constants.append(
                shape
                + _number(2, _TYPES[values.dtype])
                + _bytes(8, name.encode())
                + _bytes(9, values.tobytes())
            )
        return name

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: float,
    ) -> str:
        """One operation; gives the name of its first output."""
        self._nodes.append(
            b"".join(_bytes(1, name.encode()) for name in inputs)
            + b"".join(_bytes(2, name.encode()) for name in outputs)
            + _bytes(4, operator.encode())
            + b"".join(_bytes(5, _attribute(name, value)) for name, value in attributes.items())
            + _bytes(7, domain.encode())
        )
        return outputs[0]

    def permuted(self, source: str, target: str, order: Sequence[int]) -> str:
        """Transpose is the one operator here with a list for an attribute."""
        order_ = _bytes(1, b"perm") + b"".join(_number(8, axis) for axis in order) + _number(20, 7)
        self._nodes.append(
            _bytes(1, source.encode())
            + _bytes(2, target.encode())
            + _bytes(4, b"Transpose")
            + _bytes(5, order_)
        )
        return target

    def model(
        self, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]]
    ) -> bytes:
        """The finished model; inputs and outputs are float32, a length given by name may vary."""
        graph = b"".join(
            [
                *(_bytes(1, node) for node in self._nodes),
                _bytes(2, b"graph"),
                *(_bytes(5, constant) for constant in self._constants),
                *(_bytes(11, _value(name, shape)) for name, shape in inputs.items()),
                *(_bytes(12, _value(name, shape)) for name, shape in outputs.items()),
            ]
        )
        standard = _bytes(1, b"") + _number(2, _OPSET)
        microsoft = _bytes(1, MICROSOFT.encode()) + _number(2, 1)
        return _number(1, _IR_VERSION) + _bytes(8, standard) + _bytes(8, microsoft) + _bytes(7, graph)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _attribute(name: str, value: float) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name.encode()) + _number(3, value) + _number(20, _INT)
    return _bytes(1, name.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, _FLOAT)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    axes = [_number(1, axis) if isinstance(axis, int) else _bytes(2, axis.encode()) for axis in shape]
    tensor = _number(1, _TYPES[np.dtype(np.float32)]) + _bytes(2, b"".join(_bytes(1, axis) for axis in axes))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))
