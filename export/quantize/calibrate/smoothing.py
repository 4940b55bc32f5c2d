"""Smoothing: makes activations easier to quantize, exactly, by changing the weights around them.

Most of int8's error comes from activations: in a block of 32, one channel that is far larger than the others uses all
of the block's precision. Three transformations preserve every MatMul's result and cost nothing at run time:

    1. rotation of value heads   spreads outlier channels over the whole head (QuaRot)
    2. scale migration           divides channels, and multiplies the weights that read them (SmoothQuant, AWQ)
    3. channel permutation       puts channels of similar size into one block

`smoothing_groups` finds the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from pastkey.runtime.engine.channels import Kind, changed

from ...graft.streamed import product
from ..changes import INPUT, OUTPUT, SCALED, changes_of, record_change
from ..rounding.blocks import choose_block_size, round_trip, some_outputs
from ..rounding.matrices import add_lazy_weight, lazy
from ..rounding.workers import one_thread_each, parts_of
from .smoothing_groups import ChannelWeight, Group

# Candidate exponents a. 0 changes nothing; SmoothQuant uses 0.5 for most models and up to 0.9 for others.
_STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
# Scales are between 1 / this and this: a channel that is silent on the calibration text may be loud on another.
_MAX_SCALE = 100.0
_FLOOR = 1e-5  # relative to the largest channel: the minimum, so that a channel of zeros also has a scale


def smooth(model: ir.Model, groups: Sequence[Group], samples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Applies the three transformations to every group, in order and in place.

    Args:
        model: A float32 graph.
        groups: The groups of this graph.
        samples: Rows (N, K) of each group's activation on text, by its name.

    Returns:
        Each activation's exponent a of scale migration; 0 if nothing was migrated.
    """
    strengths: dict[str, float] = {}
    for group in groups:
        rows = _of_one_size(samples[group.activation])
        if group.rotatable:
            rows = rotate_value_heads(model, group, rows)
        strengths[group.activation], rows = migrate_scales(model, group, rows)
        if group.permuted:
            permute_channels(model, group, rows)
    return strengths


def _of_one_size(rows: np.ndarray) -> np.ndarray:
    """Divides rows (N, K) by their root mean squares: a BOS token's may be a thousand times larger than any other."""
    sizes = np.sqrt(np.square(rows, dtype=np.float64).mean(1, keepdims=True))
    return np.asarray(rows / np.maximum(sizes, np.finfo(np.float32).tiny), np.float32)


# --- rotation -----------------------------------------------------------------------------------------------------
def rotate_value_heads(model: ir.Model, group: Group, rows: np.ndarray) -> np.ndarray:
    """Multiplies v_proj's columns and o_proj's rows by one rotation for all heads, which commutes with attention.

    It spreads an outlier channel over its head. QuaRot, https://arxiv.org/abs/2404.00456.
    Returns the rotated rows (N, K) of the activation.
    """
    size = np.array([rows.shape[1] // group.heads])
    for side, weights in ((INPUT, group.readers), (OUTPUT, group.divided)):
        for found in weights:
            _change(model, found, side, "rotated", size)
    return changed(rows, -1, "rotated", size)


# --- scale migration ----------------------------------------------------------------------------------------------
def migrate_scales(model: ir.Model, group: Group, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """Divides the activation's channels by s, and multiplies the weights that read them.

    s = rms(x)^a / max|W|^(1 - a), with the exponent a that minimises the error of the quantized MatMuls of `rows` (N,
    K). SmoothQuant, https://arxiv.org/abs/2211.10438, and AWQ, https://arxiv.org/abs/2306.00978, describe both halves.
    Returns a, 0 if nothing was migrated, and the divided rows.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of huge weights: scales must be finite to be chosen
        strength, scales = _choose_scales(group, rows)
    if strength != 0:
        for found in group.readers:
            _change(model, found, INPUT, "scaled", scales)
        for found in group.divided:
            _change(model, found, OUTPUT, "scaled", 1 / _of_value_heads(scales, group, found))
    return strength, rows / scales


class _Candidate(NamedTuple):
    """One exponent of scale migration, and the activation with it."""

    strength: float
    scales: np.ndarray  # (K,) float32
    order: np.ndarray | slice  # of channels
    rounded: Tensor  # (N, K) float32: the divided rows in that order, after quantization


def _choose_scales(group: Group, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the exponent and its scales (K,)."""
    matrices, columns = [_matrix(found) for found in group.readers], rows.shape[1]
    block, candidates = choose_block_size(columns), list[_Candidate]()
    strengths = _STRENGTHS if group.divided else (0.0,)
    for strength, scales in zip(strengths, _scales(group, rows, matrices, strengths), strict=True):
        divided = rows / scales
        if np.isfinite(divided).all():
            order = _by_magnitude(divided) if group.permuted else slice(None)
            rounded = torch.from_numpy(round_trip(divided[:, order], block))
            candidates.append(_Candidate(strength, scales, order, rounded))

    def errors_of(matrix: np.ndarray, each: float, part: slice) -> list[float]:
        weights = np.ascontiguousarray(matrix[part].copy("K"))
        exact = product(torch.from_numpy(rows), torch.from_numpy(weights))
        return [each * _error(candidate, weights, exact, block) for candidate in candidates]

    # Work is divided into rows of the matrices, so that few are in memory as they become.
    with one_thread_each() as pool:
        parts = [(some, each, part) for some, each in map(some_outputs, matrices) for part in parts_of(len(some))]
        errors = np.sum(list(pool.map(errors_of, *zip(*parts, strict=True))), axis=0)
    possible = [(error, found) for error, found in zip(errors, candidates, strict=True) if error < np.inf]
    if not possible:
        return 0.0, np.ones(columns, np.float32)
    best = min(possible, key=lambda pair: pair[0])[1]
    return best.strength, best.scales


def _error(candidate: _Candidate, weights: np.ndarray, exact: Tensor, block_size: int) -> float:
    """Returns the sum of squares that quantization adds to a product of some rows of weights (n, K); else infinity."""
    with np.errstate(over="ignore", invalid="ignore"):  # of huge weights: scales must be finite to be chosen
        multiplied = weights * candidate.scales
    try:
        rounded = round_trip(multiplied[:, candidate.order], block_size)
    except ValueError:
        return np.inf
    return float((product(candidate.rounded, torch.from_numpy(rounded)) - exact).double().square_().sum())


def _matrix(reader: ChannelWeight) -> np.ndarray:
    """Returns (N, K), one row per output."""
    return reader.array.T if reader.axis == 0 else reader.array


def _scales(group: Group, rows: np.ndarray, matrices: list[np.ndarray], strengths: Sequence[float]) -> list[np.ndarray]:
    """Returns s (K,), around 1, for each exponent."""
    none = np.ones(rows.shape[1], np.float32)
    if len(strengths) == 1:
        return [none]
    x = np.sqrt(np.square(rows).mean(0))
    w = np.max([np.maximum(matrix.max(0), -matrix.min(0)) for matrix in matrices], axis=0)
    if group.shared_by > 1:
        x, w = (_largest_of_shared(array, group) for array in (x, w))
    if min(x.max(), w.max()) < np.finfo(np.float32).tiny:  # a layer that was switched off
        return [none for _ in strengths]
    x, w = np.maximum(x, _FLOOR * x.max()), np.maximum(w, _FLOOR * w.max())
    found = []
    for strength in strengths:
        if strength == 0:
            found.append(none)
            continue
        scales = x**strength / w ** (1 - strength)
        scales /= np.exp(np.log(scales).mean())
        found.append(np.asarray(np.clip(scales, 1 / _MAX_SCALE, _MAX_SCALE), np.float32))
    return found


def _largest_of_shared(channels: np.ndarray, group: Group) -> np.ndarray:
    """Returns the maximum over the query heads that share a value head, for each of them. (H * D,) in and out."""
    heads = channels.reshape(group.heads // group.shared_by, group.shared_by, -1)  # (K, G, D)
    return np.broadcast_to(heads.max(1, keepdims=True), heads.shape).reshape(-1)


def _of_value_heads(scales: np.ndarray, group: Group, producer: ChannelWeight) -> np.ndarray:
    """Returns the scales for the weight that makes the activation: one per value head instead of per query head."""
    if group.shared_by == 1 or producer.channels == len(scales):
        return scales
    return scales.reshape(group.heads // group.shared_by, group.shared_by, -1)[:, 0].reshape(-1)


# --- permutation --------------------------------------------------------------------------------------------------
def permute_channels(model: ir.Model, group: Group, rows: np.ndarray) -> None:
    """Sorts channels by their largest magnitude in `rows` (N, K), so that those of one block are similar."""
    order = _by_magnitude(rows)
    for side, weights in ((INPUT, group.readers), (OUTPUT, group.permuted)):
        for found in weights:
            _change(model, found, side, "permuted", order)


def _by_magnitude(rows: np.ndarray) -> np.ndarray:
    """Returns the order (K,) of channels, smallest maximum first."""
    return np.argsort(np.abs(rows).max(0), kind="stable")


# --- weights ------------------------------------------------------------------------------------------------------
def _change(model: ir.Model, found: ChannelWeight, side: str, kind: Kind, numbers: np.ndarray) -> None:
    """Replaces the weight by one changed along its axis, when it is read: another node may read the old one."""
    value = found.node.inputs[found.index]
    assert value is not None
    assert value.const_value is not None
    name, tensor, shape = str(value.name), value.const_value, tuple(value.const_value.shape.numpy())

    def make() -> np.ndarray:
        return np.ascontiguousarray(changed(tensor.numpy(), found.axis, kind, numbers), np.float32)

    before = changes_of(model, name)
    if len(tuple(value.uses())) == 1:
        value.const_value = lazy(name, ir.DataType.FLOAT, shape, make)
    else:
        number = sum(1 for known in model.graph.initializers if str(known).startswith(f"{name}{SCALED}"))
        name = f"{name}{SCALED}{number}"
        found.node.replace_input_with(found.index, add_lazy_weight(model, name, ir.DataType.FLOAT, shape, make))
    if len(shape) == 2:
        record_change(model, name, before, (side, kind, numbers))
