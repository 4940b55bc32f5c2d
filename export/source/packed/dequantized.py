"""Weights whose numbers are no blocks of integers: they are read as float32, and rounded anew.

    float8      x.weight, and x.weight_scale or x.weight_scale_inv: a scale for the matrix, for each row or each block
    MXFP4       x_blocks and x_scales of experts (E, N, G, 16): two of 16 numbers in a byte, a power of two for each 32
    NF4, FP4    x.weight, x.weight.absmax and others of bitsandbytes: two numbers of a table in a byte, the first above

Sources: transformers' integrations for fp8 and mxfp4; functional.py of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pastkey.files.reading import reading

from ...graph.stored import read
from .file import FLOATS, QuantizedFile

_AT_ONCE = 256  # rows
_STATE = "quant_state.bitsandbytes__"
_Read = Callable[[], Tensor]
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_MXFP4 = torch.cat([_FP4, -_FP4])


@dataclass(frozen=True, eq=False)
class Dequantized:
    """A `Stored` of `graph/stored.py`: its content is computed each time that it is read."""

    form: str  # as people call it
    shape: tuple[int, ...]
    part: Callable[[int, int], Tensor]  # float32, from an index of the first axis to before the second
    at_once: int = _AT_ONCE  # of the first axis

    def read_into(self, out: Tensor) -> None:
        for start in range(0, self.shape[0], self.at_once):
            stop = min(start + self.at_once, self.shape[0])
            out[start:stop] = self.part(start, stop)

    def mapped(self, dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002  # of the protocol
        return None

    def elements(self, places: Tensor) -> Tensor:
        return read(self).flatten()[places]


def float8(file: QuantizedFile, *, block: tuple[int, int] | None) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of a file by name. `block`: rows and channels of a scale; None: of all, or of one row."""
    for base in file.bases("weight_scale_inv", "weight_scale"):
        name = f"{base}.weight"
        scale = next(each for each in (f"{name}_scale_inv", f"{name}_scale") if each in file.tensors)
        rows, channels = file.shape(name, ("F8_E4M3",), None, None)
        stored, span = file.tensors[scale].shape, block
        if span is None:
            file.shape(scale, FLOATS, *((rows, 1) if math.prod(stored) > 1 else (1, 1))[: len(stored)])
            span = rows // math.prod(stored), channels
        else:
            file.shape(scale, FLOATS, -(-rows // span[0]), -(-channels // span[1]))
        scales = file.scales(scale)

        def part(
            start: int, stop: int, name: str = name, span: tuple[int, int] = span, scales: _Read = scales
        ) -> Tensor:
            codes = file.read(name)[start:stop].float()
            of_rows = scales().view(-(-file.tensors[name].shape[0] // span[0]), -1)[
                torch.arange(start, stop) // span[0]
            ]
            return codes * of_rows.repeat_interleave(span[1], 1)[:, : codes.shape[1]]

        yield name, Dequantized("float8", (rows, channels), part)


def mxfp4(file: QuantizedFile) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of all experts (E, K, N) of a file by name."""
    for name in (name.removesuffix("_blocks") for name in file.tensors if name.endswith("_blocks")):
        experts, rows, groups, _ = file.shape(f"{name}_blocks", ("U8",), None, None, None, 16)
        file.shape(f"{name}_scales", ("U8",), experts, rows, groups)

        def part(start: int, stop: int, name: str = name) -> Tensor:
            codes, powers = (file.read(f"{name}_{what}")[start:stop] for what in ("blocks", "scales"))
            numbers = torch.ldexp(_of(_MXFP4, codes & 15, codes >> 4), powers[..., None].int() - 127)
            return numbers.flatten(2).transpose(1, 2)

        yield name, Dequantized("MXFP4", (experts, groups * 32, rows), part, at_once=1)


def bitsandbytes(file: QuantizedFile) -> Iterator[tuple[str, Dequantized]]:
    """Yields the matrices of a file by name."""
    for name in file.bases("absmax"):
        yield name, _bitsandbytes(file, name)


def _bitsandbytes(file: QuantizedFile, name: str) -> Dequantized:
    absmax, table = f"{name}.absmax", f"{name}.quant_map"
    kind = next((kind for kind in ("nf4", "fp4") if f"{name}.{_STATE}{kind}" in file.tensors), "nf4")
    file.shape(f"{name}.{_STATE}{kind}", ("U8",), None)
    with reading(file.path, "safetensors of bitsandbytes"):  # the state is anybody's
        state = json.loads(bytes(file.read(f"{name}.{_STATE}{kind}").tolist()))
        (rows, channels), size = (int(number) for number in state["shape"]), int(state["blocksize"])
        nested, shift = int(state.get("nested_blocksize", 0)), float(state.get("nested_offset", 0))
    if size < 1 or channels % size:
        raise file.wrong(name, f"has blocks of {size} weights, which do not divide {channels} channels")
    blocks = rows * channels // size
    file.shape(name, ("U8",), rows * channels // 2, 1)
    file.shape(table, ("F32",), 16)
    file.shape(absmax, ("U8",) if nested else ("F32",), blocks)
    if nested:
        file.shape(f"{name}.nested_absmax", ("F32",), -(-blocks // nested))
        file.shape(f"{name}.nested_quant_map", ("F32",), 256)
    for each in ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())):
        file.scales(f"{name}.{each}")

    def part(start: int, stop: int) -> Tensor:
        first, last = start * channels // size, stop * channels // size
        scales = file.read(absmax)[first:last]
        if nested:
            of_blocks = file.read(f"{name}.nested_absmax")[torch.arange(first, last) // nested]
            scales = file.read(f"{name}.nested_quant_map")[scales.int()] * of_blocks + shift
        codes = file.read(name)[start * channels // 2 : stop * channels // 2, 0]
        numbers = _of(file.read(table), codes >> 4, codes & 15)
        return (numbers.view(-1, size) * scales[:, None]).view(-1, channels)

    return Dequantized(kind.upper(), (rows, channels), part)


def _of(table: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns the numbers (..., 2 n) that two codes (..., n) of each byte name."""
    return table[torch.stack([first, second], -1).flatten(-2).int()]
