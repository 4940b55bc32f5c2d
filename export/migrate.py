"""Scale migration: making activations easier to quantize, exactly, by moving their scale into the weights.

Most of int8's error is that of the activations: in a block of 32, one channel that is far larger than the others takes
all of the block's precision. Dividing a channel by s and multiplying the weights that read it by s changes no product;
the division is folded into whatever makes the channel, so that it costs nothing at run time:

    1. Mul(x, weight), LayerNormalization(x, weight, bias)   the norm before q, k, v and before gate and up
    2. MatMul(x, W) [+ bias]                                 up_proj before down_proj: Mul(gate, up) is linear in up
    3. GroupQueryAttention(q, k, MatMul(x, W))               v_proj before o_proj, equal for heads that share a value

How much is moved, s = rms(x)^a / max|W|^(1 - a), is chosen for each activation by the error of its quantized products
on text. SmoothQuant, https://arxiv.org/abs/2211.10438, and AWQ, https://arxiv.org/abs/2306.00978, describe both halves.
Channels that may move are put in the order of their size as well (`order`), and value heads are turned: v_proj's
columns and o_proj's rows by one rotation for all heads, which attention commutes with. It spreads what a few channels
have over all of a head, so that an int8 cache, whose scales are a channel's, cuts off next to nothing. QuaRot,
https://arxiv.org/abs/2404.00456, turns values so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .blocks import choose_block_size, dequantize_blocks, quantize_blocks
from .graph import add_weight, weight
from .order import Makers, by_size, find_makers
from .quantize import constant_factor

_STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)  # the exponents a that are tried
_MAX_FACTOR = 100.0
# Norms, and which of their inputs have a weight for each channel.
_CHANNELWISE = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
}


@dataclass(frozen=True)
class Fold:
    """A weight whose last axis (or, of a matrix stored transposed, first) is the activation's channels."""

    node: ir.Node
    index: int  # of the weight among the node's inputs
    axis: int


@dataclass
class Group:
    """The products that read one activation, and what can take the division of its channels."""

    activation: str
    products: list[Fold]  # axis: the one that the activation is multiplied with
    folds: list[Fold] = field(default_factory=list)
    heads: int = 0  # query heads, where attention makes the activation, and
    turnable: bool = True  # nothing on the way treats channels one by one, so that they may be mixed
    shared_by: int = 1  # neighbouring ones that read one value head, whose factors must be equal
    makers: Makers | None = None  # where channels have no order of their own


def find_groups(model: ir.Model) -> list[Group]:
    """Every activation that only products with weights read, and whose channels can be divided or moved where made."""
    readers: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if constant_factor(node) is not None and node.inputs[0] is not None:
            readers.setdefault(str(node.inputs[0].name), []).append(node)
    groups = []
    for name, nodes in readers.items():
        activation = nodes[0].inputs[0]
        assert activation is not None
        if len(tuple(activation.uses())) != len(nodes) or activation.is_graph_output():
            continue
        group = Group(name, [_as_fold(node, reads=True) for node in nodes])
        if all(_only_here(fold) for fold in group.products):
            channels = _matrix(group.products[0]).shape[1]
            group.makers = find_makers(activation, channels)
            if not _collect(activation, group, channels):
                group.folds = []
            if group.folds or group.makers is not None:
                groups.append(group)
    return groups


def _as_fold(product: ir.Node, *, reads: bool) -> Fold:
    """The weight of a product: its rows read the activation, its columns are the next one."""
    found = constant_factor(product)
    assert found is not None
    _, stored_input_first = found
    return Fold(product, 1, 0 if stored_input_first == reads else 1)


def _only_here(fold: Fold) -> bool:
    """Whether nothing else reads the weight: a shared one (a tied head, a block applied twice) stays as it is."""
    value = fold.node.inputs[fold.index]
    return weight(value) is not None and value is not None and len(tuple(value.uses())) == 1


def _collect(value: ir.Value, group: Group, channels: int) -> bool:
    """Adds what must be divided for the `channels` of `value` to be divided. Returns whether all of it can be."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _CHANNELWISE:
        weights = [i for i in _CHANNELWISE[node.op_type] if i < len(node.inputs) and node.inputs[i] is not None]
        return value is node.outputs[0] and all(_add(Fold(node, i, -1), group, channels) for i in weights)
    vectors = [i for i, v in enumerate(node.inputs) if (a := weight(v)) is not None and a.size > 1]
    made = [v for v in node.inputs if v is not None and weight(v) is None]
    if node.op_type == "Mul":
        group.turnable = False
        if len(vectors) == 1 and len(made) == 1:
            return _add(Fold(node, vectors[0], -1), group, channels)
        return any(_alone(v) and _collected(v, group, channels) for v in reversed(made))
    if node.op_type == "Add" and len(vectors) == 1 and len(made) == 1 and _alone(made[0]):
        return _add(Fold(node, vectors[0], -1), group, channels) and _collect(made[0], group, channels)
    if node.op_type == "MatMul" and constant_factor(node) is not None:
        fold = _as_fold(node, reads=False)
        return _only_here(fold) and _add(fold, group, channels)
    if node.op_type == "Reshape" and made and _alone(made[0]):
        # Whatever is regrouped on the way: where both ends have so many channels, each keeps its place among them.
        return _collect(made[0], group, channels)
    if node.op_type == "GroupQueryAttention" and value is node.outputs[0]:
        values = node.inputs[2]
        heads, kv_heads = (int(node.attributes[name].as_int()) for name in ("num_heads", "kv_num_heads"))
        group.heads, group.shared_by = heads, heads // kv_heads
        return values is not None and _alone(values) and _collect(values, group, channels // group.shared_by)
    return False


def _add(fold: Fold, group: Group, channels: int) -> bool:
    """Adds a weight that has one number, or one column, for each channel."""
    array = weight(fold.node.inputs[fold.index])
    product = fold.node.op_type == "MatMul"
    if array is None or array.shape[fold.axis] != channels or (not product and array.size != channels):
        return False
    group.folds.append(fold)
    return True


def _collected(value: ir.Value, group: Group, channels: int) -> bool:
    """As `_collect`, but leaves the group as it was where it fails."""
    before = dataclasses.replace(group, folds=list(group.folds))
    if _collect(value, group, channels):
        return True
    group.folds, group.heads, group.shared_by = before.folds, before.heads, before.shared_by
    return False


def _alone(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


# --- migrating ----------------------------------------------------------------------------------------------------
def migrate(model: ir.Model, groups: Sequence[Group], samples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Moves scales in place. `samples` holds rows (N, K) of each group's activation on text.

    Returns each activation's exponent a; 0 where nothing was moved.
    """
    chosen: dict[str, float] = {}
    for group in groups:
        rows = _of_one_size(samples[group.activation])
        if group.heads and group.folds and group.turnable:
            rotation = _rotation(rows.shape[1] // group.heads)
            rows = _turned(rows, -1, rotation)
            for fold in (*group.products, *group.folds):
                _change(model, fold, functools.partial(_turned, rotation=rotation))
        matrices = [_matrix(fold) for fold in group.products]
        with np.errstate(over="ignore", invalid="ignore"):  # of huge weights: what is not finite is not chosen
            strength, factors = _best(rows, matrices, group)
        chosen[group.activation] = strength
        if strength != 0:
            for fold in group.products:
                _scale(model, fold, factors)
            for fold in group.folds:
                _scale(model, fold, 1 / _as_made(factors, group, fold))
        if group.makers is not None:
            _move(model, group, group.makers, by_size(rows / factors))
    return chosen


def _matrix(fold: Fold) -> np.ndarray:
    """(N, K), a row per output."""
    array = weight(fold.node.inputs[fold.index])
    assert array is not None
    return array.T if fold.axis == 0 else array


def _best(rows: np.ndarray, matrices: list[np.ndarray], group: Group) -> tuple[float, np.ndarray]:
    exact = [rows @ matrix.T for matrix in matrices]
    best = (np.inf, 0.0, np.ones(rows.shape[1], np.float32))
    for strength in _STRENGTHS if group.folds else (0.0,):
        factors = _factors(rows, matrices, group, strength)
        if not all(
            np.isfinite(scaled).all() for scaled in (rows / factors, *(matrix * factors for matrix in matrices))
        ):
            continue
        error = 0.0
        order = slice(None) if group.makers is None else by_size(rows / factors)
        for matrix, expected in zip(matrices, exact, strict=True):
            block = choose_block_size(matrix.shape[1])
            found = _rounded((rows / factors)[:, order], block) @ _rounded((matrix * factors)[:, order], block).T
            error += float(np.square(found - expected, dtype=np.float64).sum())
        if error < best[0]:
            best = (error, strength, factors)
    return best[1], best[2]


def _of_one_size(rows: np.ndarray) -> np.ndarray:
    """Rows (N, K) over their own root mean squares: a begin token's may be a thousand times larger than any other."""
    sizes = np.sqrt(np.square(rows, dtype=np.float64).mean(1, keepdims=True))
    return np.asarray(rows / np.maximum(sizes, np.finfo(np.float32).tiny), np.float32)


def _factors(rows: np.ndarray, matrices: list[np.ndarray], group: Group, strength: float) -> np.ndarray:
    """s (K,), around 1."""
    if strength == 0:
        return np.ones(rows.shape[1], np.float32)
    x = np.sqrt(np.square(rows).mean(0))
    w = np.max([np.abs(matrix).max(0) for matrix in matrices], axis=0)
    if group.shared_by > 1:
        x, w = (_over_shared(array, group) for array in (x, w))
    if min(x.max(), w.max()) < np.finfo(np.float32).tiny:  # a layer that was switched off has nothing to go by
        return np.ones(rows.shape[1], np.float32)
    x, w = np.maximum(x, 1e-5 * x.max()), np.maximum(w, 1e-5 * w.max())
    factors = x**strength / w ** (1 - strength)
    factors /= np.exp(np.log(factors).mean())
    return np.asarray(np.clip(factors, 1 / _MAX_FACTOR, _MAX_FACTOR), np.float32)


def _over_shared(channels: np.ndarray, group: Group) -> np.ndarray:
    """The largest over the query heads that share a value head, for each of them. (H * D,) in and out."""
    heads = channels.reshape(group.heads // group.shared_by, group.shared_by, -1)  # (K, G, D)
    return np.broadcast_to(heads.max(1, keepdims=True), heads.shape).reshape(-1)


def _as_made(factors: np.ndarray, group: Group, fold: Fold) -> np.ndarray:
    """The factors at the weight that makes the activation: one for each value head instead of each query head."""
    array = weight(fold.node.inputs[fold.index])
    assert array is not None
    if group.shared_by == 1 or array.shape[fold.axis] == len(factors):
        return factors
    return factors.reshape(group.heads // group.shared_by, group.shared_by, -1)[:, 0].reshape(-1)


def _rotation(size: int) -> np.ndarray:
    """An orthogonal (D, D) whose columns have as much of every channel as can be: Hadamard's, or of another size
    than a power of two the discrete cosine transform."""
    if size & (size - 1) == 0:
        signs = np.ones((1, 1))
        while len(signs) < size:
            signs = np.block([[signs, signs], [signs, -signs]])
        return np.asarray(signs / np.sqrt(size))
    angles = np.pi / size * (np.arange(size)[:, None] + 0.5) * np.arange(size)
    cosines = np.cos(angles) * np.sqrt(2 / size)
    cosines[:, 0] = np.sqrt(1 / size)
    return np.asarray(cosines)


def _turned(array: np.ndarray, axis: int, rotation: np.ndarray) -> np.ndarray:
    """Every head along the axis, whose channels are heads times D, multiplied by the rotation (D, D)."""
    last = np.moveaxis(array, axis, -1)
    heads = last.reshape(*last.shape[:-1], -1, len(rotation)) @ rotation
    return np.asarray(np.moveaxis(heads.reshape(last.shape), -1, axis), np.float32)


def _rounded(matrix: np.ndarray, block_size: int) -> np.ndarray:
    return dequantize_blocks(quantize_blocks(matrix, block_size))


def _move(model: ir.Model, group: Group, makers: Makers, order: np.ndarray) -> None:
    """Puts the channels in a new order, on both sides."""
    made = [_as_fold(product, reads=False) for product in makers.products]
    for fold in (*group.products, *made, *(Fold(node, index, -1) for node, index in makers.vectors)):
        _change(model, fold, lambda array, axis: np.take(array, order, axis))


def _scale(model: ir.Model, fold: Fold, factors: np.ndarray) -> None:
    """Multiplies the weight along its axis."""

    def scaled(array: np.ndarray, axis: int) -> np.ndarray:
        shape = [1] * array.ndim
        shape[axis] = len(factors)
        result: np.ndarray = array * factors.reshape(shape)
        return result

    _change(model, fold, scaled)


def _change(model: ir.Model, fold: Fold, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Changes the weight along its axis, as a new one: another node may read the old one."""
    value = fold.node.inputs[fold.index]
    array = weight(value)
    assert value is not None
    assert array is not None
    name = str(value.name)
    changed = np.ascontiguousarray(change(array, fold.axis), np.float32)
    if len(tuple(value.uses())) == 1:
        value.const_value = ir.Tensor(changed, name=name)
        return
    number = sum(1 for known in model.graph.initializers if str(known).startswith(f"{name}.scaled"))
    fold.node.replace_input_with(fold.index, add_weight(model, f"{name}.scaled_{number}", changed))
