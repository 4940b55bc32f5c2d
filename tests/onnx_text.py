"""ONNX's textual syntax -> the bytes of a ModelProto, without the package `onnx`.

Of the syntax, what the tests write: tensors with named axes, and nodes whose attributes are numbers, texts or lists of
whole numbers. `test_onnx_text.py` holds it against onnx's own parser. The fields' numbers are those of onnx.proto.
"""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ELEMENT_TYPES = {"float": 1, "int8": 3, "int32": 6, "int64": 7}  # TensorProto.DataType
EXTERNAL = 1  # TensorProto.DataLocation

_MODEL = re.compile(
    r"<ir_version: (\d+), opset_import: \[(.*?)\]>\s*(\w+) \((.*?)\) => \((.*?)\) \{(.*)\}\s*", re.DOTALL
)
_OPSET = re.compile(r'"([\w.]*)": (\d+)')
_TENSOR = re.compile(r"(\w+)\[([^\]]*)\] ([\w.\"]+)")
_NAMES = r'[\w."]+(?:\s*,\s*[\w."]+)*'
_NODE = re.compile(rf"({_NAMES})\s*=\s*((?:\w+\.)*)(\w+)\s*(?:<([^>]*)>)?\s*\(\s*({_NAMES})?\s*\)")
_ATTRIBUTE = re.compile(r"(\w+) = (\[[^\]]*\]|[^,]+)")


def encode_model(
    text: str, weights: Mapping[str, Array], data_file: str = "", metadata: Mapping[str, str] | None = None
) -> tuple[bytes, bytes]:
    """The ModelProto of `text` with `weights` as initializers, and the content of `data_file`, where that is named.

    `data_file` lies beside the graph and holds the weights one after another; without it they stand in the graph.
    """
    matched = _MODEL.fullmatch(text)
    assert matched is not None, text
    ir_version, opsets, name, inputs, outputs, body = matched.groups()
    data = b""
    graph = b"".join(_field(1, node) for node in _nodes(body)) + _field(2, name)
    for weight_name, array in weights.items():
        content = array.tobytes()
        where = {"location": data_file, "offset": str(len(data)), "length": str(len(content))} if data_file else None
        graph += _field(5, _initializer(weight_name, array, where))
        data += content if data_file else b""
    graph += b"".join(_field(11, value) for value in _values(inputs))
    graph += b"".join(_field(12, value) for value in _values(outputs))
    imports = b"".join(_field(8, _field(1, domain) + _field(2, int(n))) for domain, n in _OPSET.findall(opsets))
    pairs = b"".join(_field(14, _field(1, key) + _field(2, value)) for key, value in (metadata or {}).items())
    return _field(1, int(ir_version)) + _field(7, graph) + imports + pairs, data


def _nodes(body: str) -> Iterator[bytes]:
    rest = _NODE.sub("", body).strip()
    assert not rest, f"not understood: {rest}"
    for outputs, domain, kind, attributes, inputs in _NODE.findall(body):
        node = b"".join(_field(1, name) for name in _split(inputs)) + b"".join(
            _field(2, name) for name in _split(outputs)
        )
        node += _field(4, kind) + b"".join(_field(5, _attribute(*pair)) for pair in _ATTRIBUTE.findall(attributes))
        yield node + _field(7, domain.removesuffix("."))


def _attribute(name: str, literal: str) -> bytes:
    value = ast.literal_eval(literal.strip())
    if isinstance(value, list):
        return _field(1, name) + b"".join(_field(8, item) for item in value) + _field(20, 7)  # INTS
    if isinstance(value, str):
        return _field(1, name) + _field(4, value) + _field(20, 3)  # STRING
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, 2)  # INT
    return _field(1, name) + _field(2, float(value)) + _field(20, 1)  # FLOAT


def _values(text: str) -> Iterator[bytes]:
    """`float[B, 2, T] x, int64[1] y`: a ValueInfoProto each."""
    for element, axes, name in _TENSOR.findall(text):
        dims = [_field(1, int(axis)) if axis.isdecimal() else _field(2, axis) for axis in _split(axes)]
        shape = b"".join(_field(1, dim) for dim in dims)
        tensor = _field(1, ELEMENT_TYPES[element]) + _field(2, shape)
        yield _field(1, name.strip('"')) + _field(2, _field(1, tensor))


def _initializer(name: str, array: Array, external: Mapping[str, str] | None) -> bytes:
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
    tensor = b"".join(_field(1, size) for size in array.shape)
    tensor += _field(2, ELEMENT_TYPES[kinds[array.dtype]]) + _field(8, name)
    if external is None:
        return tensor + _field(9, array.tobytes())
    entries = (_field(13, _field(1, key) + _field(2, value)) for key, value in external.items())
    return tensor + b"".join(entries) + _field(14, EXTERNAL)


def _split(names: str) -> list[str]:
    return [name.strip().strip('"') for name in names.split(",")] if names else []


# --- protobuf -----------------------------------------------------------------------------------------------------
def _field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a message: its number and the kind of its value, then the value."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; a negative number as its two's complement of 64 bits."""
    number %= 1 << 64
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
