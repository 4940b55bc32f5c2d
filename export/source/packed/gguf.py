"""The integers of a GGUF file's matrices as they are stored, without rounding: codes, scales and offsets of blocks.

A weight is d * scale * q, or d * scale * q - dmin * min. The gguf library knows where the bits of q lie, and returns
weights alone. So it is asked for the weights of blocks in which d and all scales are 1 and all offsets 0: these are q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pastkey.errors import InputError

_ONE = np.float16(1).tobytes()
_FLOATS = ("F32", "F16", "BF16", "F64")
_Codes = tuple[np.ndarray, np.ndarray | None]  # of scales (blocks in the file, of each) integers, and of offsets


def _six_bits(blocks: np.ndarray) -> _Codes:
    import gguf

    scales, mins = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
    return scales, mins


def _of_q3_k(blocks: np.ndarray) -> _Codes:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    codes = np.concatenate([low & 15, low >> 4], 1) | np.concatenate([high >> i & 3 for i in (0, 2, 4, 6)], 1) << 4
    return codes.astype(np.int16) - 32, None


def _of_q6_k(blocks: np.ndarray) -> _Codes:
    return np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.int16), None


@dataclass(frozen=True)
class _Type:
    """A type of GGUF, https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Slices are of a block's bytes."""

    bits: int  # that its integers are kept in
    size: int  # weights that share a scale
    d: slice  # float16
    dmin: slice | None = None  # float16, of the offsets
    scales: slice | None = None  # in units of d, and the offsets in units of dmin
    ones: bytes = b""  # what stands there if all scales are 1, and all offsets 0
    codes: Callable[[np.ndarray], _Codes] | None = None  # reads them


_FIRST, _SECOND = slice(0, 2), slice(2, 4)
_SIX_BITS = slice(4, 16), b"\1\1\1\1\0\0\0\0\1\1\1\1", _six_bits
_TYPES: Final = {
    "Q8_0": _Type(8, 32, _FIRST),
    "Q4_0": _Type(4, 32, _FIRST),
    "Q4_1": _Type(4, 32, _FIRST, _SECOND),
    "Q5_0": _Type(8, 32, _FIRST),
    "Q5_1": _Type(8, 32, _FIRST, _SECOND),
    "Q3_K": _Type(4, 16, slice(108, 110), None, slice(96, 108), b"\x11" * 8 + b"\xaa" * 4, _of_q3_k),
    "Q4_K": _Type(4, 32, _FIRST, _SECOND, *_SIX_BITS),
    "Q5_K": _Type(8, 32, _FIRST, _SECOND, *_SIX_BITS),
    "Q6_K": _Type(8, 16, slice(208, 210), None, slice(192, 208), b"\1" * 16, _of_q6_k),
}


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
        kind, blocks = _TYPES[self.form], self._blocks(rows)
        turned = None  # blocks with a negative scale: their integers are turned instead
        if kind.codes is not None and kind.dmin is None:
            turned = np.repeat((kind.codes(blocks)[0] < 0).reshape(len(rows), -1), kind.size, axis=1)
        for place, content in ((kind.d, _ONE), (kind.dmin, bytes(2)), (kind.scales, kind.ones)):
            if place is not None:
                blocks[:, place] = np.frombuffer(content, np.uint8)
        numbers = _dequantized(blocks.reshape(len(rows), -1), self.form)
        if turned is not None:
            np.negative(numbers, out=numbers, where=turned)
        if kind.dmin is None:
            numbers += np.float32(1 << (kind.bits - 1))
        return numbers.astype(np.uint8)

    def scales(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns factors and codes of the scales, as Numbers has them."""
        kind, blocks = _TYPES[self.form], self._blocks(rows)
        codes = None if kind.codes is None else np.abs(kind.codes(blocks)[0]).astype(np.uint8).reshape(len(rows), -1)
        return _factors(blocks, kind.d, len(rows), wide=codes is not None), codes

    def zeros(self, rows: np.ndarray) -> None:
        """Returns None: all zero points are the middle."""

    def offsets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns factors and codes of the offsets, or None if the type has none."""
        kind, blocks = _TYPES[self.form], self._blocks(rows)
        if kind.dmin is None:
            return None
        factors = _factors(blocks, kind.dmin, len(rows), wide=kind.codes is not None)
        if kind.codes is None:
            return -factors, None  # the file adds them
        codes = kind.codes(blocks)[1]
        return factors, codes if codes is None else codes.reshape(len(rows), -1)

    def finite(self) -> bool:
        """Whether all scales and offsets are finite numbers, as far as they are known."""
        kind = _TYPES.get(self.form)
        places = [] if kind is None else [place for place in (kind.d, kind.dmin) if place is not None]
        blocks = self.raw.reshape(-1, _sizes(self.form)[1])
        return all(np.isfinite(_factors(blocks, place, 1, wide=False)).all() for place in places)

    def _blocks(self, rows: np.ndarray) -> np.ndarray:
        """Returns a copy of some rows, (blocks of the file, bytes) uint8."""
        found: np.ndarray = self.raw[rows].reshape(-1, _sizes(self.form)[1])
        return found


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


def _factors(blocks: np.ndarray, place: slice, rows: int, *, wide: bool) -> np.ndarray:
    """The float16 numbers at a place of each block, (rows, blocks in the file); in float32 if `wide`."""
    found = np.ascontiguousarray(blocks[:, place]).view("<f2").reshape(rows, -1)
    return found.astype(np.float32 if wide else np.float16)
