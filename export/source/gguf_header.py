"""Checks a GGUF file's header before the gguf library reads it: every count must fit into the remaining bytes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian, versions 2 and 3:

    "GGUF", uint32 version, uint64 tensors, uint64 pairs
    each pair: text key, uint32 type, value      text: uint64 length, the bytes      array: uint32 type, uint64 count
    each tensor: text name, uint32 axes, uint64 each axis, uint32 type, uint64 offset from the data's beginning
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.errors import InputError
from pastkey.files.reading import require_regular

_VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of a tensor's entry, without name and axes
_LEAST_PAIR = 8 + 4 + 1
_MOST_AXES, _MOST_ALIGNMENT = 8, 1 << 20
_LONGEST_TEXT = 1 << 24  # bytes, of a chat template or a token
_LAYERS = "block_count"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's entry."""

    name: str
    elements: int
    kind: int  # ggml's number of its type
    offset: int  # bytes from the file's beginning


class _Walk:
    """Reads values in sequence. Raises ValueError if the file is too short for a count."""

    def __init__(self, content: mmap.mmap | bytes) -> None:
        self.content, self.position = content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.position)
        self.position += struct.calcsize(letter)
        return value

    def count(self, least: int, what: str) -> int:
        """Reads a number of items of at least `least` bytes each."""
        found: int = self.number("Q")
        if found * least > self.left:
            raise ValueError(f"it announces {found:,} {what}, and {self.left:,} bytes are left")
        return found

    def text(self) -> str:
        size = self.count(1, "bytes of a text")
        if size > _LONGEST_TEXT:
            raise ValueError(f"a text of {size:,} bytes")
        start, self.position = self.position, self.position + size
        return bytes(self.content[start : self.position]).decode("utf-8", "replace")

    def value(self, kind: int, *, nested: bool = False) -> Any:
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or nested:
            raise ValueError(f"a value of the unknown type {kind}")
        inner = self.number("I")
        size = struct.calcsize(f"<{_FORMATS[inner]}") if inner in _FORMATS else 8
        count = self.count(size, "values")
        if inner in _FORMATS:
            self.position += size * count
        else:
            for _ in range(count):
                self.value(inner, nested=True)
        return count


def read_gguf(file: Path) -> list[GgufTensor]:
    """Returns the tensors in a header.

    Raises InputError if it is not GGUF or is cut short, MissingFileError if it does not exist.
    """
    require_regular(file)
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _header(_Walk(content))
            except (ValueError, struct.error) as error:
                raise InputError(f"{file} is cut short or damaged ({error}): fetch it again") from None


def _header(walk: _Walk) -> list[GgufTensor]:
    walk.position = 4
    version = walk.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, expected {' or '.join(map(str, _VERSIONS))}")
    tensors, pairs = walk.count(_LEAST_TENSOR, "tensors"), walk.count(_LEAST_PAIR, "keys")
    values: dict[str, Any] = {}  # numbers and texts; for an array its length
    for _ in range(pairs):
        key = walk.text()
        if key in values:
            raise ValueError(f"the key {key!r:.60} occurs twice")
        values[key] = walk.value(walk.number("I"))
    entries = [_tensor(walk) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _MOST_ALIGNMENT:
        raise ValueError(f"its alignment is {alignment!r:.60}")
    start = -(-walk.position // alignment) * alignment
    for key, value in values.items():
        if key.endswith(f".{_LAYERS}") and (not isinstance(value, int) or not 0 <= value <= tensors):
            raise ValueError(f"its {key} is {value!r:.60}, and it has {tensors} tensors")
    return [GgufTensor(name, elements, kind, start + offset) for name, elements, kind, offset in entries]


def _tensor(walk: _Walk) -> tuple[str, int, int, int]:
    name, axes = walk.text(), walk.number("I")
    if axes > _MOST_AXES:
        raise ValueError(f"the tensor {name!r:.60} has {axes} axes")
    shape = [walk.number("Q") for _ in range(axes)]
    return name, math.prod(shape), walk.number("I"), walk.number("Q")
