"""torchao's weight-only int4 and int8: x._weight_qdata, x._weight_scale, ..., of a class that the metadata names.

torchao/prototype/safetensors of https://github.com/pytorch/ao says how classes become parts. In Int4Tensor,
weight = (code - 8) * scale + zero, where zero is no integer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pastkey.files.reading import reading

from .compressed_tensors import shifted
from .file import FLOATS, QuantizedFile, groups_of
from .matrix import PackedMatrix, unpacked

_PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_pre_scale")


def torchao(file: QuantizedFile) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the matrices of a file by name."""
    readers = {"Int8Tensor": _bytes, "IntxUnpackedToInt8Tensor": _bytes, "Int4Tensor": _nibbles}
    for base in file.bases(*_PARTS):
        with reading(file.path, "safetensors of torchao"):  # the metadata is anybody's
            entry = json.loads(file.metadata.get(f"{base}.weight", "{}"))
            kind = entry.get("_type")
            scaled = f"{base}.{_PARTS[3]}" in file.tensors
            if kind not in readers or scaled:
                what = f"of torchao's class {kind}" if kind else "without its class in the file's metadata"
                what += " with scales of activations" if scaled else ""
                raise file.wrong(
                    f"{base}.{_PARTS[0]}", f"is {what}, which pastkey does not read", "export the unquantized model"
                )
            matrix = readers[kind](file, base, entry["_data"])
        yield f"{base}.weight", matrix


def _bytes(file: QuantizedFile, base: str, data: Any) -> PackedMatrix:
    """Signed codes (N, K) int8; scales and zero points for blocks of rows and channels."""
    qdata, scale, zero, *_ = (f"{base}.{part}" for part in _PARTS)
    bits = {"int4": 4, "int8": 8}.get(data.get("target_dtype", {"_data": "int8"})["_data"])
    if bits is None:
        raise file.wrong(qdata, f"has codes of {data['target_dtype']['_data']}, not int4 or int8")
    rows, channels = file.shape(qdata, ("I8",), None, None)
    if bits == 4 and not ((codes := file.read(qdata)).min() >= -8 and codes.max() <= 7):
        raise file.wrong(qdata, "has codes that are not between -8 and 7")
    blocks, groups = file.shape(scale, FLOATS, None, None)
    if rows % blocks or channels % groups:
        raise file.wrong(scale, f"has ({blocks}, {groups}) blocks, which do not divide ({rows}, {channels})")
    if zero in file.tensors:
        file.shape(zero, ("I8",), blocks, groups)

    def of_rows(blocked: Tensor) -> Tensor:
        return blocked.repeat_interleave(rows // blocks, 0)

    middle = 1 << bits - 1
    return _matrix(
        (rows, channels),
        bits,
        groups,
        lambda start, stop: shifted(file.read(qdata)[start:stop], middle),
        file.scales(scale, of_rows),
        (lambda: of_rows(shifted(file.read(zero), middle))) if zero in file.tensors else None,
    )


def _nibbles(file: QuantizedFile, base: str, _: Any) -> PackedMatrix:
    """Signed codes (N, K / 2), the lower half of a byte first; scales and zero points (G, N)."""
    qdata, scale, zero, *_ = (f"{base}.{part}" for part in _PARTS)
    rows, half = file.shape(qdata, ("I8", "U8"), None, None)
    groups, _ = file.shape(scale, FLOATS, None, rows)
    file.shape(zero, FLOATS, groups, rows)
    if 2 * half % groups:
        raise file.wrong(scale, f"has {groups} groups, which do not divide {2 * half} channels")
    scales, zeros = file.scales(scale, Tensor.t), file.scales(zero, Tensor.t)
    return _matrix(
        (rows, 2 * half),
        4,
        groups,
        lambda start, stop: unpacked(file.read(qdata)[start:stop], 4) ^ 8,
        scales,
        read_offsets=lambda: 8 * scales() - zeros(),
    )


def _matrix(shape: tuple[int, int], bits: int, groups: int, *read: Any, **others: Any) -> PackedMatrix:
    size = shape[1] // groups
    return PackedMatrix(f"torchao, {bits} bits, {groups_of(size, shape[1])}", shape, bits, size, None, *read, **others)
