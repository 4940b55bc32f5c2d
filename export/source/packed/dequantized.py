"""Weights whose numbers are no blocks of integers: they are read as float32, and rounded anew.

    float8      x.weight, and x.weight_scale or x.weight_scale_inv: a scale for the matrix, for each row or each block
    MXFP4       x_blocks and x_scales of experts (E, N, G, 16): two of 16 numbers in a byte, a power of two for each 32
    NF4, FP4    x.weight, x.weight.absmax and others of bitsandbytes: two numbers of a table in a byte, the first above

Sources: transformers' integrations for fp8 and mxfp4; functional.py of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pastkey.files.reading import parse_json
from pastkey.values import is_int, is_number

from .computed import Computed
from .file import FLOATS, QuantizedFile

_LONGEST_STATE, _MOST = 10_000, 1 << 48  # bytes; numbers in it
_STATE = "quant_state.bitsandbytes__"
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_MXFP4 = torch.cat([_FP4, -_FP4])


@dataclass(frozen=True, eq=False)
class Dequantized(Computed):
    """A tensor of numbers that are no blocks of integers."""

    form: str  # as people call it
    shape: tuple[int, ...]
    read_part: Callable[[int, int], Tensor]

    def part(self, start: int, stop: int) -> Tensor:
        return self.read_part(start, stop)


def float8(file: QuantizedFile, *, block: tuple[int, ...]) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of a file by name. `block`: rows and channels of a scale; (): all channels."""
    for base in file.bases("weight_scale_inv", "weight_scale"):
        yield f"{base}.weight", _float8(file, f"{base}.weight", block)


def _float8(file: QuantizedFile, name: str, block: tuple[int, ...]) -> Dequantized:
    scale = next(each for each in (f"{name}_scale_inv", f"{name}_scale") if each in file.tensors)
    rows, channels = file.shape(name, ("F8_E4M3",), None, None)
    stored = file.tensors[scale].shape
    if block:
        height, width = min(block[0], rows), min(block[1], channels)
        file.shape(scale, FLOATS, -(-rows // height), -(-channels // width))
    else:
        height, width = (1 if math.prod(stored) > 1 else rows), channels
        file.shape(scale, FLOATS, *(rows // height, 1)[: len(stored)])
    scales = file.scales(scale)

    def part(start: int, stop: int) -> Tensor:
        codes = file.read(name)[start:stop].float()
        of_rows = scales().view(-(-rows // height), -1)[torch.arange(start, stop) // height]
        return codes * of_rows.repeat_interleave(width, 1)[:, :channels]

    return Dequantized("float8", (rows, channels), part)


def mxfp4(file: QuantizedFile) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of all experts (E, K, N) of a file by name."""
    for name in [name.removesuffix("_blocks") for name in file.tensors if name.endswith("_blocks")]:
        yield name, _mxfp4(file, name)


def _mxfp4(file: QuantizedFile, name: str) -> Dequantized:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    experts, rows, groups, _ = file.shape(blocks, ("U8",), None, None, None, 16)
    file.shape(scales, ("U8",), experts, rows, groups)
    if file.read(scales).max() == 255:
        raise file.wrong(scales, "has numbers that are not finite (NaN)")

    def part(start: int, stop: int) -> Tensor:
        codes, powers = file.read(blocks)[start:stop], file.read(scales)[start:stop, ..., None].int() - 127
        return torch.ldexp(_of(_MXFP4, codes & 15, codes >> 4), powers).flatten(2).transpose(1, 2)

    return Dequantized("MXFP4", (experts, groups * 32, rows), part)


def bitsandbytes(file: QuantizedFile) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of a file by name."""
    for name in file.bases("absmax"):
        yield name, _bitsandbytes(file, name)


def _bitsandbytes(file: QuantizedFile, name: str) -> Dequantized:
    absmax, table = f"{name}.absmax", f"{name}.quant_map"
    kind = next((kind for kind in ("nf4", "fp4") if f"{name}.{_STATE}{kind}" in file.tensors), "nf4")
    stated = f"{name}.{_STATE}{kind}"
    [length] = file.shape(stated, ("U8",), None)
    state = parse_json(file.read(stated)[:_LONGEST_STATE].numpy().tobytes(), f"{stated} of {file.path}")
    state = state if isinstance(state, dict) and length <= _LONGEST_STATE else {}
    shape, size, nested, shift = (
        state.get(key, default)
        for key, default in (("shape", None), ("blocksize", None), ("nested_blocksize", 0), ("nested_offset", 0))
    )
    rows, channels = shape if isinstance(shape, list) and len(shape) == 2 else (None, None)
    if not (
        is_int(rows, 1, _MOST)
        and is_int(channels, 1, _MOST)
        and is_int(size, 1, _MOST)
        and is_int(nested, 0, _MOST)
        and is_number(shift)
    ):
        raise file.wrong(stated, "has other entries than the shape of a matrix, blocksize, and those of nested scales")
    if channels % size:
        raise file.wrong(name, f"has blocks of {size} weights, which do not divide {channels} channels")
    blocks = rows * channels // size
    file.shape(name, ("U8",), rows * channels // 2, 1)
    file.shape(table, ("F32",), 16)
    file.shape(absmax, ("U8",) if nested else ("F32",), blocks)
    floats = [table] if nested else [table, absmax]
    if nested:
        factors, nested_table = f"{name}.nested_absmax", f"{name}.nested_quant_map"
        file.shape(factors, ("F32",), -(-blocks // nested))
        file.shape(nested_table, ("F32",), 256)
        floats += [factors, nested_table]
    for each in floats:
        file.require_finite(each)

    def part(start: int, stop: int) -> Tensor:
        first, last = start * channels // size, stop * channels // size
        scales = file.read(absmax)[first:last]
        if nested:
            of_blocks = file.read(factors)[torch.arange(first, last) // nested]
            scales = file.read(nested_table)[scales.int()] * of_blocks + shift
        codes = file.read(name)[start * channels // 2 : stop * channels // 2, 0]
        return (_of(file.read(table), codes >> 4, codes & 15).view(-1, size) * scales[:, None]).view(-1, channels)

    return Dequantized(kind.upper(), (rows, channels), part)


def _of(table: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns the numbers (..., 2 n) that two codes (..., n) of each byte name."""
    return table[torch.stack([first, second], -1).flatten(-2).int()]
