"""Weights in float8 with a scale per block, x.weight and x.weight_scale_inv: they are read as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graph.stored import read
from .file import FLOATS, QuantizedFile


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """A `Stored` of `graph/stored.py`: its content is widened each time that it is read."""

    file: QuantizedFile
    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]  # rows, channels

    def read_into(self, out: Tensor) -> None:
        rows = self.block[0]
        scales = (
            self.file.read(f"{self.name}_scale_inv").float().repeat_interleave(self.block[1], 1)[:, : self.shape[1]]
        )
        for block, scale in enumerate(scales):
            part = slice(block * rows, (block + 1) * rows)
            out[part] = self.file.read(self.name)[part].float() * scale

    def mapped(self, dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002  # of the protocol
        return None

    def elements(self, places: Tensor) -> Tensor:
        return read(self).flatten()[places]


def float8(file: QuantizedFile, *, block: tuple[int, int]) -> Iterator[tuple[str, Float8Matrix]]:
    """Yields the matrices of a file by name."""
    for base in file.bases("weight_scale_inv"):
        name = f"{base}.weight"
        rows, channels = file.shape(name, ("F8_E4M3",), None, None)
        file.shape(f"{name}_scale_inv", FLOATS, -(-rows // block[0]), -(-channels // block[1]))
        file.scales(f"{name}_scale_inv")
        yield name, Float8Matrix(file, name, (rows, channels), block)
