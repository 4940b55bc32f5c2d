"""The integers of a GGUF file's matrices as they are stored, without rounding: codes, scales and offsets of blocks.

A weight is d * scale * q, or d * scale * q - dmin * min. The gguf library knows where the bits of q are, and returns
weights only. So it is asked for the weights of blocks in which d and all scales are 1 and all offsets 0: these are q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pastkey.errors import InputError

from ...graph.blocks import Blocks, Numbers, packed

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
    ones: bytes = b""  # the bytes there if all scales are 1, and all offsets 0
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
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        weights, size = _sizes(self.form)
        return len(self.raw), self.raw.shape[1] // size * weights

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns weights (n, K) float32 as the gguf library reads them."""
        return _dequantized(self.raw[rows], self.form)

    def blocks(self, rows: np.ndarray) -> Blocks | None:
        """Returns some rows; None for types that have a table of numbers, or few bits and large offsets."""
        kind = _TYPES.get(self.form)
        if kind is None:
            return None
        found = self._of_file(rows)
        codes, mins = (None, None) if kind.codes is None else kind.codes(found)
        scales = _numbers(found, kind.d, len(rows), codes)
        offsets = None if kind.dmin is None else _numbers(found, kind.dmin, len(rows), mins)
        if offsets is not None and mins is None:
            offsets = Numbers(-offsets.factors)  # the file adds them

        def make() -> np.ndarray:
            numbers = self._integers(kind, rows)
            data = numbers if kind.bits == 8 else packed(numbers)
            return data.reshape(len(rows), self.shape[1] // kind.size, -1)

        return Blocks(make, scales, self.shape[1], kind.size, bits=kind.bits, offsets=offsets)

    def _integers(self, kind: _Type, rows: np.ndarray) -> np.ndarray:
        """(n, K) uint8. Those without offsets have their zero point in the middle."""
        blocks = self._of_file(rows)
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

    def _of_file(self, rows: np.ndarray) -> np.ndarray:
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
        kind, raw = _TYPES.get(form), matrix.raw.reshape(-1, _sizes(form)[1])
        places = [] if kind is None else [place for place in (kind.d, kind.dmin) if place is not None]
        if not all(np.isfinite(_numbers(raw, place, 1).factors).all() for place in places):
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


def _numbers(blocks: np.ndarray, place: slice, rows: int, codes: np.ndarray | None = None) -> Numbers:
    """The float16 numbers at a place of each block, or their multiples."""
    factors = np.ascontiguousarray(blocks[:, place]).view("<f2").reshape(rows, -1)
    if codes is None:
        return Numbers(factors)
    return Numbers(factors.astype(np.float32), np.abs(codes).astype(np.uint8).reshape(rows, -1))
