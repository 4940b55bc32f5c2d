"""GPTQ and AWQ: x.qweight, x.qzeros and x.scales, and x.g_idx of GPTQ.

Eight codes of 4 bits, or four of 8, are in a word of int32. In GPTQ's words they are neighbours along K, in AWQ's along
N, where those of one word are in the order 0 2 4 6 1 3 5 7. Zero points are along N in both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .file import FLOATS, QuantizedFile, groups_of
from .matrix import PackedMatrix, unpacked

PARTS = ("qweight", "qzeros", "scales", "g_idx")

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight rows in a word


def gptq(file: QuantizedFile, *, stored_less_one: bool) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the matrices of a file by name. `stored_less_one`: the first version of the format, "gptq"."""
    for base in file.bases(*PARTS):
        yield f"{base}.weight", _gptq(file, base, stored_less_one)


def _gptq(file: QuantizedFile, base: str, stored_less_one: bool) -> PackedMatrix:
    qweight, qzeros, scales, g_idx = (f"{base}.{part}" for part in PARTS)
    words, rows = file.shape(qweight, ("I32",), None, None)
    groups, _ = file.shape(scales, FLOATS, None, rows)
    _, width = file.shape(qzeros, ("I32",), groups, None)
    bits = width * 32 // rows
    if bits not in (4, 8) or bits * rows != width * 32:
        raise file.wrong(qzeros, f"has {width} words for {rows} rows, which are not of 4 or 8 bits")
    channels = words * 32 // bits
    if channels % groups:
        raise file.wrong(scales, f"has {groups} groups, which do not divide {channels} channels")
    size = channels // groups
    # The words are added as GPTQModel subtracts: a zero point of 0 borrows from its neighbour.
    one = (0x11111111 if bits == 4 else 0x01010101) if stored_less_one else 0
    return PackedMatrix(
        f"GPTQ, {bits} bits, {groups_of(size, channels)}",
        (rows, channels),
        bits,
        size,
        file.order(g_idx, groups, size) if g_idx in file.tensors else None,
        lambda start, stop: unpacked(file.read(qweight)[:, start:stop].t(), bits),
        file.scales(scales, Tensor.t),
        lambda: unpacked(file.read(qzeros) + one, bits).t().contiguous(),
    )


def awq(file: QuantizedFile) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the matrices of a file by name."""
    for base in file.bases(*PARTS):
        yield f"{base}.weight", _awq(file, base)


def _awq(file: QuantizedFile, base: str) -> PackedMatrix:
    qweight, qzeros, scales, _ = (f"{base}.{part}" for part in PARTS)
    channels, words = file.shape(qweight, ("I32",), None, None)
    groups, rows = file.shape(scales, FLOATS, None, words * 8)
    file.shape(qzeros, ("I32",), groups, words)
    if channels % groups:
        raise file.wrong(scales, f"has {groups} groups, which do not divide {channels} channels")

    def codes(words: Tensor) -> Tensor:
        lines = words.t().contiguous()
        return torch.stack([(lines >> 4 * place & 15).to(torch.uint8) for place in _AWQ_PLACES], 1).flatten(0, 1)

    size = channels // groups
    return PackedMatrix(
        f"AWQ, 4 bits, {groups_of(size, channels)}",
        (rows, channels),
        4,
        size,
        None,
        lambda start, stop: codes(file.read(qweight)[:, start // 8 : stop // 8]),
        file.scales(scales, Tensor.t),
        lambda: codes(file.read(qzeros)),
    )
