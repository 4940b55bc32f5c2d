"""Finds how positions enter a module: whether a cache can drop old tokens, and by which angles the others rotate.

A context shift moves cached tokens to smaller positions. It is exact if positions enter as a rotation of queries and
keys (RoPE, https://arxiv.org/abs/2104.09864), as a bias by distance (ALiBi) or not at all. `find_shift` runs the same
tokens at several positions: logits and values must be equal, and each pair of key channels must rotate by one angle
per token. It reads neither configuration names nor the graph, so it finds scaled, partial and interleaved rotations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pastkey.contract.bundle import CacheShift, KeyRotation

from ...compare import LOGITS, PER_TOKEN, relative_difference
from .observe import Observation, Opaque, Uncached, random_ids, run_uncached

_TOKENS = 16

Keys = npt.NDArray[np.float64]  # (K, T, D)


def find_shift(module: nn.Module, observation: Observation, context_length: int) -> CacheShift:
    """Runs a few tokens at several positions. The result holds the rotations, or why a shift is not exact."""
    if observation.rows or observation.states:
        return CacheShift("it keeps more than the keys and values of attention, which no rotation moves")
    if not observation.padding:
        return CacheShift("its attention counts every column of the cache")
    if isinstance(module, Opaque) and not module.takes_positions:
        return CacheShift("it computes the positions of tokens itself")
    tokens = min(_TOKENS, context_length // 2)
    if not tokens:
        return CacheShift("its context is one token")
    ids = random_ids(1, tokens, observation.vocab_size, seed=2)
    runs = {
        by: run_uncached(module, ids, torch.arange(by, by + tokens)[None]) for by in _distances(context_length, tokens)
    }
    first = runs[0]
    for by, run in runs.items():
        pairs = zip([first.logits, *first.values], [run.logits, *run.values], strict=True)
        if any(_differs(_array(before), _array(after), by) for before, after in pairs):
            return CacheShift(
                "its positions are neither a rotation of keys nor distances (learned positions, for example)"
            )
    return _rotations(runs, len(first.keys))


def _distances(context_length: int, tokens: int) -> list[int]:
    """0, 1, the largest distance that fits into the context, and one between.

    The ratio of successive distances is about the root of the context, so that the error of an angle stays far below
    half a turn at the next one: with a context of a million, an error of 1e-6 grows to 1e-3.
    """
    largest = context_length - tokens
    return sorted({0, min(1, largest), math.isqrt(largest), largest})


def _rotations(runs: dict[int, Uncached], layers: int) -> CacheShift:
    """The distinct rotations of all layers."""
    found: list[KeyRotation] = []
    for layer in range(layers):
        keys = {by: _array(run.keys[layer])[0] for by, run in runs.items()}
        if not any(_differs(keys[0], moved, 0) for moved in keys.values()):
            continue
        rotation = _rotation(keys)
        if rotation is None:
            return CacheShift("its keys change with their position, and not by one angle per token")
        same = next((place for place, other in enumerate(found) if _alike(other, rotation)), None)
        if same is None:
            found.append(dataclasses.replace(rotation, layers=(layer,)))
        else:
            found[same] = dataclasses.replace(found[same], layers=(*found[same].layers, layer))
    return CacheShift(rotations=tuple(found))


def _rotation(keys: dict[int, Keys]) -> KeyRotation | None:
    """The rotation between the keys at different distances; None if no pairing of channels gives one."""
    before = keys[0]
    for first, pairs, interleaved in _pairings(before.shape[-1]):
        channels = slice(first, first + 2 * pairs)
        complex_keys = {by: as_pairs(moved[..., channels], interleaved) for by, moved in keys.items()}
        angles = _angles(complex_keys)
        if all(_is_turned(keys, complex_keys, by, angles, channels) for by in keys):
            return KeyRotation((), first, interleaved, tuple(angles.tolist()))
    return None


def _pairings(size: int) -> Iterator[tuple[int, int, bool]]:
    """(first channel, number of pairs, interleaved) of the whole head, then of a part at either end."""
    yield 0, size // 2, False
    yield 0, size // 2, True  # covers any part as well: the other pairs rotate by 0
    for pairs in range(size // 2 - 1, 0, -1):
        yield 0, pairs, False
        yield size - 2 * pairs, pairs, False


def as_pairs(keys: Keys, interleaved: bool) -> npt.NDArray[np.complex128]:
    """Pairs of channels as complex numbers (K, T, D / 2)."""
    half = keys.shape[-1] // 2
    if interleaved:
        return keys[..., ::2][..., :half] + 1j * keys[..., 1::2]
    return keys[..., :half] + 1j * keys[..., half:]


def _angles(keys: dict[int, npt.NDArray[np.complex128]]) -> npt.NDArray[np.float64]:
    """Radians per token of each pair, more precise with each further distance."""
    angles = np.zeros(keys[0].shape[-1])
    for by, moved in keys.items():
        if by:
            turned = np.angle((moved * keys[0].conj()).sum((0, 1)))
            angles += np.angle(np.exp(1j * (turned - by * angles))) / by
    return angles


def _is_turned(
    keys: dict[int, Keys],
    pairs: dict[int, npt.NDArray[np.complex128]],
    by: int,
    angles: npt.NDArray[np.float64],
    channels: slice,
) -> bool:
    rest = np.ones(keys[0].shape[-1], bool)
    rest[channels] = False
    turned = pairs[0] * np.exp(1j * by * angles)
    return not _differs(turned, pairs[by], by) and not _differs(keys[0][..., rest], keys[by][..., rest], 0)


def _alike(one: KeyRotation, other: KeyRotation) -> bool:
    same = (one.first, one.interleaved, len(one.angles)) == (other.first, other.interleaved, len(other.angles))
    return same and bool(np.allclose(one.angles, other.angles, rtol=0, atol=PER_TOKEN))


def _differs(before: npt.NDArray[Any], after: npt.NDArray[Any], by: int) -> bool:
    return relative_difference(before, after) > LOGITS + PER_TOKEN * by


def _array(tensor: Tensor) -> Keys:
    return tensor.detach().double().numpy()
