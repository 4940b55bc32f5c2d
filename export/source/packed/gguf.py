"""The integers of a GGUF file's matrices as they are stored, without rounding: codes, scales and offsets of blocks.

A weight is d * scale * q, or d * scale * q - dmin * min. The gguf library knows where the bits of each type lie, and
returns weights alone. So it is asked for the weights of blocks in which the other factors are 1: these are then what is
looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pastkey.errors import InputError

_Bytes = tuple[tuple[slice, bytes], ...]  # places in a block, and what stands there; a single byte is repeated
_ONE = np.float16(1).tobytes()
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class _Type:
    """A type of GGUF, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h."""

    bits: int  # that its integers are kept in
    size: int  # weights that share a scale
    d: slice  # float16, of a block in the file
    ones: _Bytes  # the integers, all 1
    dmin: slice | None = None  # float16, of the offsets
    zeros: _Bytes = ()  # the integers, all 0
    scales: _Bytes = ()  # the scales in units of d, all 1, and the offsets in units of dmin, all 0

    @property
    def known(self) -> _Bytes:
        """d is 1, and dmin is 0."""
        return ((self.d, _ONE), *(() if self.dmin is None else ((self.dmin, bytes(2)),)))


_SIX_BITS = b"\1\1\1\1\0\0\0\0\1\1\1\1"


def _at(start: int, end: int, content: bytes) -> tuple[slice, bytes]:
    return slice(start, end), content


_TYPES: Final = {
    "Q8_0": _Type(8, 32, slice(0, 2), (_at(2, 34, b"\1"),)),
    "Q4_0": _Type(4, 32, slice(0, 2), (_at(2, 18, b"\x99"),)),
    "Q4_1": _Type(4, 32, slice(0, 2), (_at(4, 20, b"\x11"),), slice(2, 4), (_at(4, 20, b"\0"),)),
    "Q5_0": _Type(8, 32, slice(0, 2), (_at(2, 6, b"\xff"), _at(6, 22, b"\x11"))),
    "Q5_1": _Type(8, 32, slice(0, 2), (_at(4, 8, b"\0"), _at(8, 24, b"\x11")), slice(2, 4), (_at(4, 24, b"\0"),)),
    "Q3_K": _Type(
        4, 16, slice(108, 110), (_at(0, 32, b"\xff"), _at(32, 96, b"\x55")),
        scales=(_at(96, 104, b"\x11"), _at(104, 108, b"\xaa")),
    ),
    "Q4_K": _Type(
        4, 32, slice(0, 2), (_at(16, 144, b"\x11"),), slice(2, 4), (_at(16, 144, b"\0"),), (_at(4, 16, _SIX_BITS),)
    ),
    "Q5_K": _Type(
        8, 32, slice(0, 2), (_at(16, 48, b"\0"), _at(48, 176, b"\x11")), slice(2, 4), (_at(16, 176, b"\0"),),
        (_at(4, 16, _SIX_BITS),),
    ),
    "Q6_K": _Type(
        8, 16, slice(208, 210), (_at(0, 128, b"\x11"), _at(128, 192, b"\xaa")), scales=(_at(192, 208, b"\1"),)
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GgufMatrix:
    """A matrix (N, K) of a GGUF file."""

    form: str  # the name of its type
    raw: np.ndarray  # (N, bytes) uint8: its rows, mapped

    @property
    def bits(self) -> int:
        """Of the integers as they are kept, 4 or 8."""
        return _TYPES[self.form].bits

    @property
    def block_size(self) -> int:
        """The weights that share a scale."""
        return _TYPES[self.form].size

    @property
    def kept(self) -> bool:
        """Whether its integers can be kept. Other types have a table of numbers, or few bits and large offsets."""
        return self.form in _TYPES

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        weights, size = _sizes(self.form)
        return len(self.raw), self.raw.shape[1] // size * weights

    @property
    def order(self) -> None:
        """The channels are in the matrix's own order."""

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns weights (n, K) float32 as the gguf library reads them."""
        return _dequantized(self.raw[rows], self.form)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Returns integers (n, K) uint8. Those without offsets have their zero point in the middle."""
        kind = _TYPES[self.form]
        numbers = self._with(rows, (*kind.known, *kind.scales)).astype(np.int16)
        if kind.dmin is not None:
            return numbers.astype(np.uint8)
        if kind.scales:  # negative scales: their integers are turned instead
            numbers *= np.repeat(np.where(self._scales(rows) < 0, -1, 1).astype(np.int16), kind.size, axis=1)
        return (numbers + (1 << (kind.bits - 1))).astype(np.uint8)

    def scales(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns factors and codes of the scales, as Numbers has them."""
        kind = _TYPES[self.form]
        codes = np.abs(self._scales(rows)).astype(np.uint8) if kind.scales else None
        return self._float16(self.raw[rows], kind.d, wide=codes is not None), codes

    def zeros(self, rows: np.ndarray) -> None:
        """Returns None: all zero points are the middle."""

    def offsets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns factors and codes of the offsets, or None if the type has none."""
        kind = _TYPES[self.form]
        if kind.dmin is None:
            return None
        factors = self._float16(self.raw[rows], kind.dmin, wide=bool(kind.scales))
        if not kind.scales:
            return -factors, None  # the file adds them
        mins = -self._with(rows, ((kind.d, _ONE), (kind.dmin, _ONE), *kind.zeros))[:, :: kind.size]
        return factors, mins.astype(np.uint8)

    def finite(self) -> bool:
        """Whether all scales and offsets are finite numbers, as far as they are known."""
        kind = _TYPES.get(self.form)
        places = [] if kind is None else [place for place in (kind.d, kind.dmin) if place is not None]
        return all(np.isfinite(self._float16(self.raw, place, wide=False)).all() for place in places)

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        """(n, blocks) float32, in units of d."""
        kind = _TYPES[self.form]
        return self._with(rows, (*kind.known, *kind.ones))[:, :: kind.size]

    def _with(self, rows: np.ndarray, known: _Bytes) -> np.ndarray:
        """Returns the weights (n, K) float32 that some rows would have with other bytes in each block."""
        _, size = _sizes(self.form)
        blocks = self.raw[rows].reshape(-1, size)  # a copy
        for place, content in known:
            blocks[:, place] = np.frombuffer(content, np.uint8)
        return _dequantized(blocks.reshape(len(rows), -1), self.form)

    def _float16(self, raw: np.ndarray, place: slice, *, wide: bool) -> np.ndarray:
        """(n, blocks in the file) float16, or float32 if they have codes."""
        _, size = _sizes(self.form)
        found = np.ascontiguousarray(raw.reshape(-1, size)[:, place]).view("<f2").reshape(len(raw), -1)
        return found.astype(np.float32 if wide else np.float16)


def gguf_matrices(file: Path) -> tuple[GgufMatrix, ...]:
    """Returns the quantized matrices of a file. Those of all experts are one matrix.

    Raises InputError for a scale that is not finite.
    """
    import gguf

    found = []
    for tensor in gguf.GGUFReader(file).tensors:
        form = tensor.tensor_type.name
        if form in _FLOATS or tensor.data.ndim < 2:
            continue
        matrix = GgufMatrix(form, tensor.data.reshape(-1, tensor.data.shape[-1]))
        if not matrix.finite():
            raise InputError(
                f"the tensor {tensor.name} of {file} has a scale that is NaN or infinite: the file is damaged, or its "
                "quantization went wrong; fetch or make it again"
            )
        found.append(matrix)
    return tuple(found)


def _sizes(form: str) -> Any:
    """Returns the weights and the bytes of a block in the file."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]


def _dequantized(raw: np.ndarray, form: str) -> np.ndarray:
    import gguf

    found: np.ndarray = gguf.dequantize(raw, gguf.GGMLQuantizationType[form])
    return found
