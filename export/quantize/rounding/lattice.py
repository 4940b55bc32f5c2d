"""Float matrices whose numbers are whole multiples of a scale in each block of 32: quantization-aware training ends so.

The largest number of a block is n times its scale, for an n of at most 8 (4 bits) or 128 (8 bits). Each n is tried. All
numbers must equal their multiples in the type that the matrix was stored in, so that rounding loses nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ...graph.blocks import Blocks, Numbers, packed
from ...graph.stored import Stored, stored_weights
from .blocks import in_blocks
from .kept import Found
from .workers import one_thread_each, parts_of

_BLOCK = 32
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of a number's significant digits
_UNUSED = {0xFFFF: torch.bfloat16, 0x1FFF: torch.float16}  # bits of a float32 -> the type that lacks them
_SAMPLED, _SAMPLED_ROWS, _SAMPLED_COLUMNS = 24, 8, 256


def lattice_of(weights: np.ndarray) -> Found | None:
    """Returns a matrix (N, K) float32 in blocks of 4 or 8 bits, None if some of its blocks are on no lattice."""
    if not np.isfinite(weights).all():
        return None
    found = _type(weights)
    for bits in (4, 8):
        for stored_in in dict.fromkeys((torch.float32, found)):
            if (bits, stored_in) == (8, torch.bfloat16):  # whose 8 bits do not tell integers up to 128 apart
                continue
            few = in_blocks(weights[:_SAMPLED_ROWS, :_SAMPLED_COLUMNS], _BLOCK)
            if _is_possible(few, bits, stored_in) and (blocks := _blocks(weights, bits, stored_in)) is not None:
                return Found(f"a lattice of {bits} bits", blocks)
    return None


def is_on_lattice(module: nn.Module) -> bool:
    """Whether most matrices of a module are on a lattice, by some blocks of some of them."""
    stored, found = stored_weights(module), list[bool]()
    every = [each for each in module.parameters() if not each.is_meta]
    matrices = [each for each in every if each.ndim == 2 and each.shape[1] >= _BLOCK]
    for parameter in matrices[:: -(-len(matrices) // _SAMPLED) or 1]:
        sample = _sample(parameter, None if stored is None else stored.of(parameter))
        found.append(np.unique(np.abs(sample)).size > 2 and lattice_of(sample) is not None)
    return sum(found) * 2 > len(found)


def _sample(parameter: nn.Parameter, stored: Stored | None) -> np.ndarray:
    count, width = parameter.shape
    rows = torch.linspace(0, count - 1, min(_SAMPLED_ROWS, count)).long()
    columns = torch.arange(min(width, _SAMPLED_COLUMNS) // _BLOCK * _BLOCK)
    if stored is None:
        return parameter.detach().cpu()[rows][:, columns].float().numpy()
    return stored.elements((rows[:, None] * width + columns).flatten()).view(len(rows), -1).numpy()


def _type(weights: np.ndarray) -> torch.dtype:
    """The shortest type that holds the weights."""
    used = int(np.bitwise_or.reduce(np.ascontiguousarray(weights).view(np.uint32), axis=None))
    return next((dtype for unused, dtype in _UNUSED.items() if not used & unused), torch.float32)


def _is_possible(blocks: np.ndarray, bits: int, stored_in: torch.dtype) -> bool:
    """Whether each block (..., 32) has an n that makes its numbers nearly whole: most matrices have not."""
    magnitudes = np.abs(blocks.reshape(-1, 1, _BLOCK)).astype(np.float64)
    each = np.arange(1, (1 << (bits - 1)) + 1)[:, None]  # n, against the numbers of a block
    multiples = magnitudes / np.maximum(magnitudes.max(2, keepdims=True), np.finfo(np.float64).tiny) * each
    near = np.abs(multiples - np.rint(multiples)) <= each * 2.0 ** (2 - _BITS[stored_in])
    return bool(near.all(2).any(1).all())


def _blocks(weights: np.ndarray, bits: int, stored_in: torch.dtype) -> Blocks | None:
    count, columns = weights.shape
    parts = parts_of(count)
    with one_thread_each() as pool:
        found = list(pool.map(lambda part: _scales(in_blocks(weights[part], _BLOCK), bits, stored_in), parts))
    scales = [part for part in found if part is not None]
    if len(scales) < len(found):
        return None
    factors = np.concatenate(scales)
    with np.errstate(over="ignore"):
        narrow = factors.astype(np.float16)

    def make() -> np.ndarray:
        made = np.empty((*factors.shape, _BLOCK * bits // 8), np.uint8)
        for part in parts:
            numbers = np.rint(in_blocks(weights[part], _BLOCK) / factors[part][..., None]) + (1 << (bits - 1))
            made[part] = packed(numbers) if bits == 4 else numbers
        return made

    return Blocks(make, Numbers(narrow if np.array_equal(narrow, factors) else factors), columns, _BLOCK, bits=bits)


@np.errstate(over="ignore", invalid="ignore")  # of scales that float16 does not hold
def _scales(blocks: np.ndarray, bits: int, stored_in: torch.dtype) -> np.ndarray | None:
    """Returns scales (n, blocks) float32, of blocks (n, blocks, 32), None if one has none."""
    most, shape = 1 << (bits - 1), blocks.shape[:2]
    blocks = blocks.reshape(-1, _BLOCK)
    scales = np.ones(len(blocks), np.float32)
    waiting = np.flatnonzero(blocks.any(1))
    for largest in range(most, 0, -1):
        some = blocks[waiting]
        magnitudes = np.abs(some).astype(np.float64)
        numbers = np.rint(magnitudes * (largest / magnitudes.max(1, keepdims=True)))
        half = np.ldexp(0.5, np.frexp(magnitudes)[1] - _BITS[stored_in])  # a step between two numbers, halved
        low, high = (
            np.divide(magnitudes + end, numbers, out=np.full_like(numbers, np.nan), where=numbers > 0)
            for end in (-half, half)
        )
        low, high = np.nanmax(low, 1), np.nanmin(high, 1)
        middle = (low + high) / 2
        fits = np.zeros(len(some), bool)
        for each in (middle.astype(np.float16), middle, low, high):  # schemes store float16; an end is a tie
            scale = each.astype(np.float32)
            turned = (numbers * np.sign(some) == most).any(1)  # integers end at most - 1
            scale[turned] *= -1
            signed = numbers * np.sign(some) * np.sign(scale)[:, None]
            products = torch.from_numpy(signed.astype(np.float32) * scale[:, None]).to(stored_in).float().numpy()
            found = (products == some).all(1) & (signed < most).all(1) & ~fits
            scales[waiting[found]] = scale[found]
            fits |= found
        waiting = waiting[~fits]
        if not len(waiting):
            return scales.reshape(shape)
    return None if len(waiting) else scales.reshape(shape)
