"""The header of a safetensors file: eight bytes of length, then JSON, then the tensors without gaps.

https://huggingface.co/docs/safetensors. The header is checked before the library reads the file, so that no count in it
exceeds the file's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import IntegrityError
from ..values import is_int
from .reading import MOST_JSON, parse_json, require_regular

_MOST_AXES = 32


@dataclass(frozen=True)
class StoredTensor:
    """A header's entry for one tensor."""

    dtype: str  # safetensors' name: "F32"
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class HeaderError(ValueError):
    """An error in a header, for a sentence that names the file."""


def read_header(file: Path) -> Mapping[str, StoredTensor]:
    """Returns the tensors by name. Raises HeaderError, MissingFileError, or InputError if it is not a regular file."""
    size = require_regular(file).st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise HeaderError(f"it has {size:,} bytes, fewer than its header: {length:,}")
        if length > MOST_JSON:
            raise HeaderError(f"its header has {length:,} bytes; at most {MOST_JSON:,} are allowed")
        content = opened.read(length)
    try:
        found = parse_json(content, file)
    except IntegrityError:
        raise HeaderError("its header is not JSON") from None
    if not isinstance(found, dict):
        raise HeaderError("its header is not a JSON object")
    tensors = {name: _tensor(name, entry) for name, entry in found.items() if name != "__metadata__"}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            raise HeaderError("its tensors overlap, or have a gap between them")
        end = tensor.end
    if 8 + length + end != size:
        raise HeaderError(f"it has {size:,} bytes, its header says {8 + length + end:,}")
    return tensors


def _tensor(name: str, entry: object) -> StoredTensor:
    dtype, shape, place = (
        (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else 3 * (None,)
    )
    if not isinstance(dtype, str) or (bits := re.search("[0-9]+", dtype if dtype != "BOOL" else "8")) is None:
        raise HeaderError(f"its tensor {name!r:.60} has no type")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(is_int(axis, 0, 2**48) for axis in shape):
        raise HeaderError(f"its tensor {name!r:.60} has no shape")
    if not isinstance(place, list) or len(place) != 2 or not all(is_int(offset, 0, 2**63 - 1) for offset in place):
        raise HeaderError(f"its tensor {name!r:.60} has no place")
    tensor = StoredTensor(dtype, tuple(shape), place[0], place[1])
    if len(bits[0]) > 3 or tensor.elements * int(bits[0]) != (tensor.end - tensor.start) * 8:
        raise HeaderError(f"its tensor {name!r:.60} has another number of bytes than its shape says")
    return tensor
