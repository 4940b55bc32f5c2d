"""ONNX's textual syntax -> the bytes of a ModelProto, without the package `onnx`.

Of the syntax, what the tests write: tensors with named axes, and nodes whose attributes are numbers, texts or lists of
whole numbers. The fields' numbers are those of onnx.proto.
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
_TENSOR = re.compile(r"(\w+)(?:\[([^\]]*)\])? ([\w.\"]+)")
_NAMES = r'[\w."]+(?:\s*,\s*[\w."]+)*'
_NODE = re.compile(rf"({_NAMES})\s*=\s*((?:\w+\.)*)(\w+)\s*(?:<([^>]*)>)?\s*\(\s*({_NAMES})?\s*\)")
_ATTRIBUTE = re.compile(r"(\w+) = (\[[^\]]*\]|[^,]+)")


def encode_model(
    text: str, weights: Mapping[str, Array], data_file: str = "", metadata: Mapping[str, str] | None = None,
    *, first: bytes = b"", functions: bytes = b"",
) -> tuple[bytes, bytes]:  # fmt: skip
    """The ModelProto of `text` with `weights` as initializers, and the content of `data_file`, where that is named.

    `data_file` is next to the graph and holds the weights one after another; without it they are in the graph.
    `first` are encoded fields of the graph that come before all others, `functions` further ones of the model.
    """
    matched = _MODEL.fullmatch(text)
    assert matched is not None, text
    ir_version, opsets, name, inputs, outputs, body = matched.groups()
    data = b""
    graph = first + b"".join(field(1, node) for node in nodes(body)) + field(2, name)
    for weight_name, array in weights.items():
        content = array.tobytes()
        where = {"location": data_file, "offset": str(len(data)), "length": str(len(content))} if data_file else None
        graph += field(5, _initializer(weight_name, array, where))
        data += content if data_file else b""
    graph += b"".join(field(11, value) for value in values(inputs))
    graph += b"".join(field(12, value) for value in values(outputs))
    imports = b"".join(field(8, field(1, domain) + field(2, int(n))) for domain, n in _OPSET.findall(opsets))
    pairs = b"".join(field(14, field(1, key) + field(2, value)) for key, value in (metadata or {}).items())
    return field(1, int(ir_version)) + field(7, graph) + imports + pairs + functions, data


def nodes(body: str) -> Iterator[bytes]:
    rest = _NODE.sub("", body).strip()
    assert not rest, f"not understood: {rest}"
    for outputs, domain, kind, attributes, inputs in _NODE.findall(body):
        node = b"".join(field(1, name) for name in _split(inputs))
        node += b"".join(field(2, name) for name in _split(outputs))
        node += field(4, kind) + b"".join(field(5, _attribute(*pair)) for pair in _ATTRIBUTE.findall(attributes))
        yield node + field(7, domain.removesuffix("."))


def _attribute(name: str, literal: str) -> bytes:
    value = ast.literal_eval(literal.strip())
    if isinstance(value, list):
        return field(1, name) + b"".join(field(8, item) for item in value) + field(20, 7)  # INTS
    if isinstance(value, str):
        return field(1, name) + field(4, value) + field(20, 3)  # STRING
    if isinstance(value, int):
        return field(1, name) + field(3, value) + field(20, 2)  # INT
    return field(1, name) + field(2, float(value)) + field(20, 1)  # FLOAT


def values(text: str) -> Iterator[bytes]:
    """`float[B, 2, T] x, int64[1] y`: a ValueInfoProto each."""
    for element, axes, name in _TENSOR.findall(text):
        dims = [field(1, int(axis)) if axis.isdecimal() else field(2, axis) for axis in _split(axes)]
        shape = b"".join(field(1, dim) for dim in dims)
        tensor = field(1, ELEMENT_TYPES[element]) + field(2, shape)
        yield field(1, name.strip('"')) + field(2, field(1, tensor))


def _initializer(name: str, array: Array, external: Mapping[str, str] | None) -> bytes:
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
    tensor = b"".join(field(1, size) for size in array.shape)
    tensor += field(2, ELEMENT_TYPES[kinds[array.dtype]]) + field(8, name)
    if external is None:
        return tensor + field(9, array.tobytes())
    entries = (field(13, field(1, key) + field(2, value)) for key, value in external.items())
    return tensor + b"".join(entries) + field(14, EXTERNAL)


def _split(names: str) -> list[str]:
    return [name.strip().strip('"') for name in names.split(",")] if names else []


# --- protobuf -----------------------------------------------------------------------------------------------------
def field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a message: its number and the kind of its value, then the value."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; a negative number as its two's complement of 64 bits."""
    number %= 1 << 64
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
