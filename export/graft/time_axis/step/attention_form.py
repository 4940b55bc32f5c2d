"""Identifies each attention's form by probing it with known scores.

The operators' names do not matter. Zero scores show the mask or bias that is added to them; other scores show their
scale, and whether they are capped. Weights of the form softmax(cap(scale · q kᵀ) + bias) are described by these
numbers, so that the fused graph and other programs can compute them. Any other form keeps its author's operators.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GivenWeights = Callable[[list[Tensor], int], Tensor]  # scores (B, H, T, S) of each product, S -> weights (B, H, T, S)

_NOTHING = 1e-38  # a weight below this fraction of a row's largest counts as 0 in float32
_TOLD = 1e-30  # the smallest weight that float32 measures precisely
_MARGIN = 1e6  # times _TOLD, a weight that is measured for any share of sinks
_ROUNDING = 1e-5  # of float32 in a module's own softmax
_CHUNK = 1 << 22  # scores at once
_SHORT = 12
_SPREAD = 3.0  # of the scores that are the same while those of later tokens change
_RAISED = 60.0  # the most by which those change: the exp of it is far from the ends of float32
_FAR_RAISED = 1e4  # as far as thresholds are sensible: a score at 1e4 below is masked
_MOVED = 1e-3  # of a row's largest weight


@dataclass(frozen=True)
class Softmax:
    """weights = softmax(cap(scale · scores) + bias), without the sinks' share."""

    scale: Tensor  # (products, H)
    bias: Tensor  # (H or 1, context) by distance: query - key position; -inf if masked
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)

    @property
    def window(self) -> int | None:
        """The number of visible tokens if the bias is a window; None if all are visible."""
        seen = int((self.bias[0] > -math.inf).sum())
        return None if seen == self.bias.shape[1] else seen

    @property
    def plain(self) -> bool:
        """Whether the bias is only a causal mask or a window."""
        seen = self.bias[0] > -math.inf
        return bool(
            (self.bias == self.bias[:1]).all() and (self.bias[0][seen] == 0).all() and seen[: int(seen.sum())].all()
        )


class LooksAhead(Exception):
    """A token has a weight for a later token."""

    def __init__(self, head: int, row: int, column: int) -> None:
        super().__init__()
        self.head, self.row, self.column = head, row, column


def recognised(weights: GivenWeights, products: int, heads: tuple[int, ...], context: int) -> Softmax | None:
    """The form of an attention's weights, or None if they have another form. Raises LooksAhead.

    Args:
        weights: Computes the weights for the last T of S tokens.
        products: Number of products q kᵀ that they read.
        heads: H of each product.
        context: In tokens.
    """
    short = min(_SHORT, context)
    numbers = _numbers(heads, short, torch.Generator().manual_seed(1))
    _require_no_future(weights(numbers, short)[0], 0)
    bias = _bias(weights, heads, context)
    if bias is None:
        return None
    table, sinks = bias
    probe = _Probe(weights, table, heads, short)
    if any(h not in (1, table.shape[0]) for h in heads):
        return None
    rough = torch.stack([probe.slope(probe.numbers(1e-2, i), i, None) for i in range(products)])
    rough = torch.where(rough.abs() < 1e-9, 0.0, rough)
    largest = float(rough.abs().max())
    if largest == 0:
        return Softmax(rough, table, None, sinks)
    cap = None
    given = probe.numbers(3 / largest)
    if not _close(probe.expected(given, rough, None), probe.found(given), 3, 1e-3):
        cap = _softcap(weights, heads, probe.length)
        if cap is None:
            return None
    scale = torch.stack([probe.slope(probe.numbers(3 / largest, i), i, cap) for i in range(products)])
    scale = torch.where(rough == 0, 0.0, scale)
    for size in (0.3, 3.0, 20.0):
        given = probe.numbers(size / largest)
        expected, found = probe.expected(given, scale, cap), probe.found(given)
        if not _close(expected, found, size, _ROUNDING) or probe.lacks(expected, found):
            return None
    return Softmax(scale, table, cap, sinks)


class _Probe:
    """Turns scores into measured scores: the log of each weight minus the log of the token's own, minus the bias."""

    def __init__(self, weights: GivenWeights, table: Tensor, heads: tuple[int, ...], length: int) -> None:
        self._weights, self._heads, self.length = weights, heads, length
        self._count = table.shape[0]
        self._bias = _by_distance(table, length)  # (H, T, T)
        self._seen = self._bias > -math.inf
        self._generator = torch.Generator().manual_seed(0)

    def numbers(self, size: float, only: int | None = None) -> list[Tensor]:
        """Random scores (1, H, T, T) for each product, or for `only` one and zeros for the others."""
        given = _numbers(self._heads, self.length, self._generator)
        return [g * (size if only in (None, i) else 0) for i, g in enumerate(given)]

    def found(self, given: list[Tensor]) -> Tensor:
        """The measured scores; NaN where a weight is too small for float32 to measure."""
        weights = self._weights(given, self.length)[0].double()
        logs = torch.where(weights > _TOLD, weights.log(), torch.nan)
        logs = logs - logs.diagonal(dim1=1, dim2=2)[..., None]
        return torch.where(self._seen, logs - self._bias, 0.0)

    def lacks(self, expected: Tensor, found: Tensor) -> bool:
        """Whether a weight is too small to measure that should be far larger, such as one below a threshold."""
        weights = (expected + self._bias).softmax(-1)
        large = weights > _MARGIN * _TOLD
        return bool((found.isnan() & large & large.diagonal(dim1=1, dim2=2)[..., None]).any())

    def expected(self, given: list[Tensor], scale: Tensor, cap: float | None) -> Tensor:
        mixed = torch.zeros(self._count, self.length, self.length, dtype=torch.float64)
        for part, factor in zip(given, scale, strict=True):
            mixed = mixed + part[0] * factor[:, None, None]
        return self._against_own(mixed if cap is None else cap * torch.tanh(mixed / cap))

    def slope(self, given: list[Tensor], product: int, cap: float | None) -> Tensor:
        """(H,) the scale: least squares of the measured scores over the given scores."""
        if cap is None:
            x, y = self._against_own(given[product][0].expand(self._count, -1, -1)), self.found(given)
            x, y = torch.where(y.isnan(), 0.0, x), y.nan_to_num(0.0)
            return (x * y).sum((1, 2)) / (x * x).sum((1, 2)).clamp_min(1e-300)
        # One score at a time: all others, including the token's own, are 0.
        values = []
        for column in range(self.length - 1):
            one = [torch.zeros_like(g) for g in given]
            one[product][..., -1, column] = given[product][..., -1, column]
            y = (self.found(one)[:, -1, column].nan_to_num(0.0) / cap).clamp(-1 + 1e-12, 1 - 1e-12)
            values.append((one[product][0, :, -1, column].expand(self._count), cap * torch.atanh(y)))
        x, y = (torch.stack(part, -1) for part in zip(*values, strict=True))
        seen = self._seen[:, -1, :-1]
        return (x * y * seen).sum(-1) / (x * x * seen).sum(-1).clamp_min(1e-300)

    def _against_own(self, scores: Tensor) -> Tensor:
        return torch.where(self._seen, scores - scores.diagonal(dim1=1, dim2=2)[..., None], 0.0)


def _numbers(heads: tuple[int, ...], length: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(1, h, length, length, generator=generator, dtype=torch.float64) for h in heads]


def _close(expected: Tensor, found: Tensor, size: float, allowed: float) -> bool:
    return bool((expected - found).abs().nan_to_num(0.0).max() <= allowed * max(size, 1.0))


def _softcap(weights: GivenWeights, heads: tuple[int, ...], short: int) -> float | None:
    """c of c · tanh(s / c), from the effect of one very large score; None if there is no single cap."""
    given = [torch.zeros(1, h, short, short, dtype=torch.float64) for h in heads]
    reached = []
    for size in (1e4, 1e6):
        for part in given:
            part[..., 1, 0] = size
        found = weights(given, short)[0].double()
        if not bool((found[:, 1, 1] > 0).all()):
            return None
        zero = weights([torch.zeros_like(g) for g in given], short)[0].double()
        value = (found[:, 1, 0] / found[:, 1, 1]).log() - (zero[:, 1, 0] / zero[:, 1, 1]).log()
        reached.append(value)
    if not torch.allclose(reached[0], reached[1], rtol=1e-4):
        return None
    caps = reached[1]
    return float(caps[0]) if torch.allclose(caps, caps[:1].expand_as(caps), rtol=1e-5) and float(caps[0]) > 0 else None


def _bias(weights: GivenWeights, heads: tuple[int, ...], context: int) -> tuple[Tensor, Tensor | None] | None:
    """The bias by distance, in float64, and the sinks; None if rows differ in more than distance."""
    table: Tensor | None = None
    sinks: Tensor | None = None
    for start, stop in _chunks(heads, context):
        given = [torch.zeros(1, h, stop - start, stop, dtype=torch.float64) for h in heads]
        found = weights(given, stop)[0].double()  # (H, T, S)
        _require_no_future(found, start)
        if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
            return None
        found = torch.where(found < _NOTHING * found.amax(-1, keepdim=True), 0.0, found)
        rows = torch.arange(start, stop)
        future = torch.arange(stop)[None, :] > rows[:, None]
        own = found[:, torch.arange(stop - start), rows]
        if not bool((own > 0).all()):
            return None
        logs = found.log() - own.log()[..., None]
        distance = (rows[:, None] - torch.arange(stop)[None, :]).clamp_min(0)
        if table is None:
            table = logs[:, -1, :].flip(-1)  # the last row sees every distance
            table = table[:, :context]
            share = found.sum(-1)
            if bool((share < 1 - 1e-4).any()):
                sinks = (1 - share[:, -1]).log() - own[:, -1].log()
        if table.shape[1] < stop:
            return None
        expected = torch.where(future, -math.inf, table[:, distance])
        same = (expected == logs) | ((expected - logs).abs() <= _ROUNDING * (1 + expected.abs().nan_to_num(0, 0, 0)))
        if not bool((same | (torch.maximum(expected, logs) < -80)).all()):
            return None
        if sinks is not None:
            share = (1 - found.sum(-1)).log() - own.log()
            if not torch.allclose(share, sinks[:, None].expand_as(share), rtol=1e-4, atol=1e-4):
                return None
        elif bool(((found.sum(-1) - 1).abs() > 1e-4).any()):
            return None
    assert table is not None
    return torch.where(table.abs() < _ROUNDING, 0.0, table), sinks


def _require_no_future(weights: Tensor, start: int) -> None:
    """Raises LooksAhead for a weight (H, T, S) of a later token; the first row is at position `start`."""
    size = weights.abs()
    later = size > _NOTHING * size.amax(-1, keepdim=True)
    later &= torch.arange(size.shape[2])[None, :] > start + torch.arange(size.shape[1])[:, None]
    if bool(later.any()):
        head, row, column = (int(x) for x in later.nonzero()[0])
        raise LooksAhead(head, start + row, column)


def moved_by_later(weights: GivenWeights, heads: tuple[int, ...], length: int) -> bool:
    """Whether weights depend on the scores of later tokens, as behind a maximum that is computed before the mask.

    Two rows (2, H, T, T), as `weights` expects. If a softmax divides by another number, nothing moves.
    """
    generator = torch.Generator().manual_seed(3)
    size = 1 / _slope(weights, heads, length)
    given = [
        torch.randn(2, h, length, length, generator=generator, dtype=torch.float64) * _SPREAD * size for h in heads
    ]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = weights(given, length).masked_fill(later, 0)
    allowed = _MOVED * expected.abs().amax(-1, keepdim=True)
    for sign, most in itertools.product((1, -1), (_RAISED, _RAISED, _FAR_RAISED)):
        raised = most ** torch.rand(2, 1, length, 1, generator=generator, dtype=torch.float64)
        found = weights([g + sign * size * raised * later for g in given], length).masked_fill(later, 0)
        # Where later scores are far larger, a softmax over all of them leaves nothing to earlier ones.
        told = expected.isfinite() & (found.abs().sum(-1, keepdim=True) > 0 if most == _FAR_RAISED else True)
        if bool((told & ~((found - expected).abs() <= allowed)).any()):  # also true for NaN
            return True
    return False


def _slope(weights: GivenWeights, heads: tuple[int, ...], length: int) -> float:
    """Roughly the factor between scores and the logarithms of weights; 1 if there is none."""
    zeros = [torch.zeros(2, h, length, length, dtype=torch.float64) for h in heads]
    ratio = weights([z + 1e-2 * torch.eye(length) for z in zeros], length) / weights(zeros, length)
    slope = float((ratio.diagonal(dim1=-2, dim2=-1).abs().log() / 1e-2).abs().nan_to_num(0, 0, 0).max())
    return slope if slope > 1e-6 else 1.0


def _chunks(heads: tuple[int, ...], context: int) -> list[tuple[int, int]]:
    """The ranges of rows to check at once, the last rows first."""
    size = max(1, _CHUNK // (max(heads) * context))
    return [(max(0, stop - size), stop) for stop in range(context, 0, -size)]


def _by_distance(table: Tensor, length: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return torch.where(distance < 0, -math.inf, table[:, distance.clamp_min(0)])
