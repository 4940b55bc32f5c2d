"""Finds the activations that can be smoothed, which only projections read, and the weights that make their channels.

A channel is divided by s where it is made, and the weights that read it are multiplied by s, which preserves every
result. The division is folded into a weight, so that it costs nothing at run time:

    1. Mul(x, weight), LayerNormalization(x, weight, bias)   the norm before q, k, v and before gate and up
    2. MatMul(x, W) [+ bias]                                 up_proj before down_proj: Mul(gate, up) is linear in up
    3. GroupQueryAttention(q, k, MatMul(x, W))               v_proj before o_proj, equal for heads that share a value

Channels without a fixed order, such as those of gate and up before down, are permuted:

    4. element-wise operators over MatMul(x, W)              columns of each W, and the rows that read them

Channels of attention and of the residual stream keep their order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...graph.edit import shape_of, weight
from ..rounding.matrices import matmul_weight

# Norms, and which of their inputs have one number per channel.
_NORMS = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
}
# Operators that process each channel by itself, or together with the same channel of another value.
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"),
    *("Sigmoid", "Gelu", "Erf", "Tanh", "Relu", "Sqrt", "Exp", "Neg", "Softplus", "Elu", "LeakyRelu", "HardSwish"),
}


@dataclass(frozen=True)
class ChannelWeight:
    """A weight with one number, or one row or column, for each channel of an activation."""

    node: ir.Node
    index: int  # of the weight among the node's inputs
    axis: int  # of the channels

    @property
    def array(self) -> np.ndarray:
        found = weight(self.node.inputs[self.index])
        assert found is not None
        return found

    @property
    def channels(self) -> int:
        """How many there are."""
        shape = shape_of(self.node.inputs[self.index])
        assert shape is not None
        return shape[self.axis]


@dataclass(frozen=True)
class Group:
    """An activation (B, T, K), the projections that read it, and the weights that make its channels."""

    activation: str  # name of the value
    readers: tuple[ChannelWeight, ...]  # weights of the projections, along K; nothing else reads the activation
    divided: tuple[ChannelWeight, ...] = ()  # absorb the division of channels; empty if they cannot be divided
    permuted: tuple[ChannelWeight, ...] = ()  # move with the channels; empty if their order is fixed
    heads: int = 0  # query heads H, K = H * D, if attention makes the activation; else 0
    shared_by: int = 1  # neighbouring query heads that read one value head, whose scales must be equal
    rotatable: bool = False  # whether value heads may be rotated: no operator after v_proj processes single channels


def find_groups(model: ir.Model) -> list[Group]:
    """Returns every activation whose channels can be divided or permuted, in the graph's order."""
    readers: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if matmul_weight(node) is not None and node.inputs[0] is not None:
            readers.setdefault(str(node.inputs[0].name), []).append(node)
    return [group for nodes in readers.values() if (group := _group(nodes)) is not None]


def _group(projections: list[ir.Node]) -> Group | None:
    """Returns the group of all projections that read one activation, or None."""
    activation = projections[0].inputs[0]
    assert activation is not None
    readers = tuple(_channels_of(node, reads=True) for node in projections)
    if len(tuple(activation.uses())) != len(readers) or activation.is_graph_output():
        return None
    if not all(_only_here(reader) for reader in readers):
        return None
    channels = readers[0].channels
    divided, permuted = _divided(activation, channels) or _Divided(()), _permuted(activation, channels)
    if not divided.weights and not permuted:
        return None
    return Group(
        str(activation.name),
        readers,
        divided.weights,
        permuted,
        divided.heads,
        divided.shared_by,
        rotatable=divided.heads > 0 and divided.mixable,
    )


def _channels_of(projection: ir.Node, *, reads: bool) -> ChannelWeight:
    """Returns a projection's weight along the channels that it reads, or those that it makes."""
    found = matmul_weight(projection)
    assert found is not None
    return ChannelWeight(projection, 1, 0 if found.transposed == reads else 1)


def _only_here(found: ChannelWeight) -> bool:
    """Whether nothing else reads the weight: a shared one (a tied head, a block applied twice) must not change."""
    value = found.node.inputs[found.index]
    return value is not None and shape_of(value) is not None and len(tuple(value.uses())) == 1


def _fits(found: ChannelWeight, channels: int) -> bool:
    """Whether the weight is a matrix with a column, or a vector with a number, for each channel."""
    shape = shape_of(found.node.inputs[found.index])
    if shape is None or shape[found.axis] != channels:
        return False
    return found.node.op_type == "MatMul" or math.prod(shape) == channels


def _alone(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


# --- rules 1 to 3 -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Divided:
    """The weights to divide so that an activation's channels are divided; heads as in `Group`."""

    weights: tuple[ChannelWeight, ...]
    mixable: bool = True  # no operator on the way processes single channels
    heads: int = 0
    shared_by: int = 1


def _divided(value: ir.Value, channels: int) -> _Divided | None:
    """Returns how the `channels` of a value can be divided where they are made, or None."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type in _NORMS:
        given = [i for i in _NORMS[node.op_type] if i < len(node.inputs) and node.inputs[i] is not None]
        weights = tuple(ChannelWeight(node, i, -1) for i in given)
        fit = value is node.outputs[0] and all(_fits(found, channels) for found in weights)
        return _Divided(weights, mixable=False) if fit else None
    vectors = [i for i, v in enumerate(node.inputs) if (shape := shape_of(v)) is not None and math.prod(shape) > 1]
    made = [v for v in node.inputs if v is not None and shape_of(v) is None]
    vector = ChannelWeight(node, vectors[0], -1) if len(vectors) == len(made) == 1 else None
    if node.op_type == "Mul":
        if vector is not None:
            return _Divided((vector,), mixable=False) if _fits(vector, channels) else None
        factors = (_divided(v, channels) for v in reversed(made) if _alone(v))
        linear = next((found for found in factors if found is not None), None)
        return None if linear is None else dataclasses.replace(linear, mixable=False)
    if node.op_type == "Add" and vector is not None and _fits(vector, channels) and _alone(made[0]):
        term = _divided(made[0], channels)
        return None if term is None else dataclasses.replace(term, weights=(vector, *term.weights))
    if node.op_type == "MatMul" and matmul_weight(node) is not None:
        columns = _channels_of(node, reads=False)
        return _Divided((columns,)) if _only_here(columns) and _fits(columns, channels) else None
    if node.op_type == "Reshape" and made and _alone(made[0]):
        # Regrouping on the way does not matter: if both ends have so many channels, each keeps its place.
        return _divided(made[0], channels)
    if node.op_type == "GroupQueryAttention" and value is node.outputs[0]:
        heads, kv_heads = (int(node.attributes[name].as_int()) for name in ("num_heads", "kv_num_heads"))
        values, shared_by = node.inputs[2], heads // kv_heads
        found = _divided(values, channels // shared_by) if values is not None and _alone(values) else None
        return None if found is None else dataclasses.replace(found, heads=heads, shared_by=shared_by)
    return None


# --- rule 4 -------------------------------------------------------------------------------------------------------
def _permuted(activation: ir.Value, channels: int) -> tuple[ChannelWeight, ...]:
    """Returns the weights that move with the channels: the projections' matrices, and vectors of the operators between.

    Empty if the channels are made in another way, or something else reads a value on the way.
    """
    matrices: list[ChannelWeight] = []
    vectors: list[ChannelWeight] = []
    inside: dict[int, ir.Node] = {}
    waiting = [activation.producer()]
    while waiting:
        node = waiting.pop()
        if node is None:
            return ()
        if id(node) in inside:
            continue
        inside[id(node)] = node
        if node.op_type == "MatMul":
            if matmul_weight(node) is None:
                return ()
            columns = _channels_of(node, reads=False)
            if not (_only_here(columns) and _fits(columns, channels)):
                return ()
            matrices.append(columns)
            continue
        if node.op_type not in _ELEMENTWISE or len(node.outputs) != 1:
            return ()
        for index, value in enumerate(node.inputs):
            shape = shape_of(value)
            if shape is None:
                waiting.append(None if value is None else value.producer())
            elif math.prod(shape) == channels == shape[-1]:
                vectors.append(ChannelWeight(node, index, -1))
            elif math.prod(shape) != 1:
                return ()
    made = [value for node in inside.values() for value in node.outputs if value is not activation]
    if any(value.is_graph_output() or any(id(reader) not in inside for reader, _ in value.uses()) for value in made):
        return ()
    return (*matrices, *vectors) if matrices else ()
