"""compressed-tensors, which llm-compressor writes: integers of 4 or 8 bits, packed in words or as int8.

Packed, x.weight_packed has neighbours along K in a word of int32, and x.weight_zero_point neighbours along N; both are
unsigned there. As int8, x.weight and x.weight_zero_point are signed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .file import FLOATS, QuantizedFile, groups_of
from .matrix import PackedMatrix, unpacked

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def compressed(file: QuantizedFile, *, asymmetric: bool) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the matrices of a file by name. `asymmetric`: each of them needs zero points."""
    for base in file.bases(*_PARTS):
        yield f"{base}.weight", _matrix(file, base, asymmetric)


def _matrix(file: QuantizedFile, base: str, asymmetric: bool) -> PackedMatrix:
    packed, scale, zero, sizes, g_idx = (f"{base}.{part}" for part in _PARTS)
    plain = f"{base}.weight"
    if packed in file.tensors:
        rows, words = file.shape(packed, ("I32",), None, None)
        file.shape(sizes, ("I64", "I32"), 2)
        stated, channels = file.read(sizes).tolist()
        bits = next((bits for bits in (4, 8) if -(-channels * bits // 32) == words), None)
        if stated != rows or bits is None:
            raise file.wrong(packed, f"has {rows} rows of {words} words, not ({stated}, {channels}) of 4 or 8 bits")
    else:
        (rows, channels), bits = file.shape(plain, ("I8",), None, None), 8
    _, groups = file.shape(scale, FLOATS, rows, None)
    if channels % groups:
        raise file.wrong(scale, f"has {groups} groups, which do not divide {channels} channels")
    size, middle = channels // groups, 1 << bits - 1
    zero_is_packed = zero in file.tensors and file.tensors[zero].dtype == "I32"
    if zero_is_packed:
        file.shape(zero, ("I32",), -(-rows * bits // 32), groups)
    elif asymmetric or zero in file.tensors:
        file.shape(zero, ("I8",), rows, groups)

    def codes(start: int, stop: int) -> Tensor:
        if packed in file.tensors:
            return unpacked(file.read(packed)[start:stop], bits)[:, :channels]
        return shifted(file.read(plain)[start:stop], middle)

    def zeros() -> Tensor:
        found = file.read(zero)
        return unpacked(found.t(), bits)[:, :rows].t().contiguous() if zero_is_packed else shifted(found, middle)

    order = None  # -1 says that there is none
    if g_idx in file.tensors and file.shape(g_idx, ("I32", "I64"), channels) and (file.read(g_idx) >= 0).any():
        order = file.order(g_idx, groups, size)
    return PackedMatrix(
        f"compressed-tensors, {bits} bits, {groups_of(size, channels)}",
        (rows, channels),
        bits,
        size,
        order,
        codes,
        file.scales(scale),
        zeros if zero in file.tensors else None,
    )


def shifted(signed: Tensor, middle: int) -> Tensor:
    """Returns the unsigned codes uint8 of signed ones int8."""
    return (signed.to(torch.int16) + middle).to(torch.uint8)
