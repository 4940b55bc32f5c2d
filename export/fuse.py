"""Passes that put onnxruntime's fused operators in place of what torch wrote, for the fused graph. Each is exact.

    1. fuse_norms       x / sqrt(mean(x²) + e) * w               -> SimplifiedLayerNormalization (RMSNorm)
    2. fuse_skips       a + b, then that norm                    -> SkipSimplifiedLayerNormalization, the sum an output
    3. fuse_rotary      q cos + rotate(q) sin before attention   -> GroupQueryAttention with do_rotary and two tables

What does not match is left as it is: the graph is right without any of them, and verified with them.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from pastkey import names
from pastkey.runtime.ort import onnxruntime

from .passes import add_weight, replace_node, take_over, weight

_DOMAIN = "com.microsoft"
_ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads of such sizes only
# Tables grow with the context: at most so many bytes of them, or such a share of the weights.
_TABLE_BYTES, _TABLE_SHARE = 4 << 20, 0.02


def fuse(model: ir.Model, context_length: int) -> None:
    """Runs the passes in their order, on a graph that still has its shapes.

    `context_length` is how many positions the rotary tables hold.
    """
    fuse_norms(model)
    fuse_skips(model)
    fuse_rotary(model, context_length)
    common.RemoveUnusedNodesPass()(model)


# --- norms --------------------------------------------------------------------------------------------------------
def fuse_norms(model: ir.Model) -> None:
    """RMSNorm as torch writes it, with the weight at either side."""
    for node in tuple(model.graph):
        if node.op_type != "Mul" or len(node.inputs) != 2:
            continue
        scale, normed = _weight_and_rest(node)
        if scale is None or normed is None:
            continue
        found = _normalised(normed)
        if found is None:
            continue
        x, epsilon = found
        new = ir.node(
            "SimplifiedLayerNormalization",
            [x, scale],
            {"axis": -1, "epsilon": epsilon, "stash_type": 1},
            name=node.name,
        )
        replace_node(model, node, new)


def _weight_and_rest(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The operand that is a vector of weights, and the other one."""
    for scale, rest in (tuple(node.inputs), tuple(reversed(node.inputs))):
        array = weight(scale)
        if array is not None and array.ndim == 1 and array.size > 1 and weight(rest) is None:
            return scale, rest
    return None, None


def _normalised(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(x, epsilon) of x * (1 / sqrt(mean(x ** 2, -1) + epsilon))."""
    product = _made_by(value, "Mul")
    if product is None:
        return None
    for x, inverse in (tuple(product.inputs), tuple(reversed(product.inputs))):
        root = _input_of(_input_of(inverse, "Reciprocal"), "Sqrt")
        total = _made_by(root, "Add")
        if total is None or x is None:
            continue
        mean, epsilon = (total.inputs[0], weight(total.inputs[1]))
        if epsilon is None or epsilon.size != 1:
            continue
        square = _input_of(mean, "ReduceMean")
        reduced = _made_by(mean, "ReduceMean")
        power = _made_by(square, "Pow")
        if reduced is None or power is None or power.inputs[0] is not x:
            continue
        exponent, axes = weight(power.inputs[1]), weight(reduced.inputs[1]) if len(reduced.inputs) > 1 else None
        last = [-1] if x.shape is None else [-1, len(x.shape) - 1]
        if (
            exponent is not None
            and axes is not None
            and exponent.tolist() == 2
            and axes.tolist() in ([a] for a in last)
        ):
            return x, float(epsilon.item())
    return None


def fuse_skips(model: ir.Model) -> None:
    """The residual sum before a norm, which the rest of the graph reads too."""
    for node in tuple(model.graph):
        if node.op_type != "SimplifiedLayerNormalization":
            continue
        total = _made_by(node.inputs[0], "Add")
        if total is None or any(value is None or weight(value) is not None for value in total.inputs):
            continue
        one, other = total.inputs
        assert one is not None
        assert other is not None
        if one.shape is None or one.shape != other.shape or len(one.shape) != 3 or total.outputs[0].is_graph_output():
            continue  # the operator takes (B, T, E) and does not spread one over the other, as Add does
        new = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, node.inputs[1]],
            {"epsilon": node.attributes["epsilon"].as_float()},
            domain=_DOMAIN,
            num_outputs=4,
            name=node.name,
        )
        for number, unused in enumerate(new.outputs[1:3]):
            unused.name = f"{node.name}_unused_{number}"
        model.graph.insert_before(total, new)  # others may read the sum before the norm does
        take_over(model, node.outputs[0], new.outputs[0])
        take_over(model, total.outputs[0], new.outputs[3])


# --- rotary positions ---------------------------------------------------------------------------------------------
def fuse_rotary(model: ir.Model, context_length: int) -> None:
    """Lifts the rotation of queries and keys into attention, where both are turned by the same angles."""
    weights = sum(array.nbytes for v in model.graph.initializers.values() if (array := weight(v)) is not None)
    allowed = max(_TABLE_BYTES, _TABLE_SHARE * weights)
    tables: dict[tuple[int, int], list[ir.Value] | None] = {}
    for node in tuple(model.graph):
        if node.op_type != "GroupQueryAttention" or len(node.inputs) > 7:
            continue
        query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
        if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
            continue
        angles = (id(query.cos), id(query.sin))
        if angles not in tables:
            tables[angles] = _tables(model, query, context_length, allowed)
        found = tables[angles]
        if found is None:
            continue
        for i, rotation in enumerate((query, key)):
            _feed_unrotated(model, node, i, rotation.x)
        new = ir.node(
            node.op_type,
            [*node.inputs, *found],
            {**node.attributes, "do_rotary": 1},
            domain=_DOMAIN,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        replace_node(model, node, new)


@dataclass(frozen=True)
class _Rotation:
    """Queries or keys x (B, T, H, D) that are turned by cos and sin, D / 2 wide, or `doubled`: D, both halves equal."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    half: int  # D / 2
    doubled: bool


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """What turns a query or key (B, T, H * D), in either of the ways in which people write it."""
    turned = _input_of(_input_of(value, "Reshape"), "Transpose")
    found = _by_halves(turned) or _by_swapping(turned)
    before = None if found is None else _made_by(found.x, "Transpose")
    if found is None or before is None or before.inputs[0] is None:
        return None
    if list(before.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    return dataclasses.replace(found, x=before.inputs[0])


def _by_swapping(turned: ir.Value | None) -> _Rotation | None:
    """x cos + concat(-x₂, x₁) sin."""
    direct, crossed = _operands(turned, "Add", "Mul")
    if direct is None or crossed is None:
        return None
    x, swapped = direct.inputs[0], _made_by(crossed.inputs[0], "Concat")
    if swapped is None or x is None or len(swapped.inputs) != 2:
        return None
    upper, lower = _made_by(_input_of(swapped.inputs[0], "Neg"), "Slice"), _made_by(swapped.inputs[1], "Slice")
    half = None if upper is None or lower is None else _half(x, lower, upper)
    cos, sin = direct.inputs[1], crossed.inputs[1]
    if half is None or cos is None or sin is None or not _on_last_axis(swapped):
        return None
    return _Rotation(x, cos, sin, half, doubled=True)


def _half(x: ir.Value, lower: ir.Node, upper: ir.Node) -> int | None:
    """D / 2, where the slices are the two halves of x's last axis."""
    if lower.inputs[0] is not x or upper.inputs[0] is not x:
        return None
    first, end, start = weight(lower.inputs[1]), weight(lower.inputs[2]), weight(upper.inputs[1])
    axes = [weight(node.inputs[3]) if len(node.inputs) > 3 else None for node in (lower, upper)]
    if first is None or end is None or start is None or any(a is None or a.tolist() not in ([3], [-1]) for a in axes):
        return None
    size = None if x.shape is None else x.shape[-1]
    cut = int(end.item())
    return cut if first.tolist() == [0] and start.tolist() == [cut] and size == 2 * cut else None


def _on_last_axis(node: ir.Node) -> bool:
    """Whether a Concat or Split is along the last of four axes."""
    axis = node.attributes.get("axis")
    return axis is not None and axis.as_int() in (3, -1)


def _by_halves(turned: ir.Value | None) -> _Rotation | None:
    """concat(x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    whole = _made_by(turned, "Concat")
    if whole is None or len(whole.inputs) != 2:
        return None
    left, right = _operands(whole.inputs[0], "Sub", "Mul"), _operands(whole.inputs[1], "Add", "Mul")
    if None in (*left, *right):
        return None
    (first, cos), (second, sin) = (tuple(node.inputs) for node in left if node is not None)
    expected = [(second, cos), (first, sin)]
    if [tuple(node.inputs) for node in right if node is not None] != expected or cos is None or sin is None:
        return None
    split = _made_by(first, "Split")
    if split is None or list(split.outputs) != [first, second] or not (_on_last_axis(split) and _on_last_axis(whole)):
        return None
    x = split.inputs[0]
    size = None if x is None or x.shape is None else x.shape[-1]
    if x is None or not isinstance(size, int) or (len(split.inputs) > 1 and split.inputs[1] is not None):
        return None
    return _Rotation(x, cos, sin, size // 2, doubled=False)


def _operands(value: ir.Value | None, operator: str, made_by: str) -> tuple[ir.Node | None, ir.Node | None]:
    """The nodes that make the two operands of the node that makes the value."""
    node = _made_by(value, operator)
    if node is None or len(node.inputs) != 2:
        return None, None
    return _made_by(node.inputs[0], made_by), _made_by(node.inputs[1], made_by)


def _tables(model: ir.Model, rotation: _Rotation, context_length: int, allowed: float) -> list[ir.Value] | None:
    """cos and sin of every position, (context, D / 2), or None where they are too large or not of positions alone."""
    if context_length * 2 * rotation.half * 4 > allowed or 2 * rotation.half % _ROTARY_MULTIPLE:
        return None
    arrays = []
    for value in (rotation.cos, rotation.sin):
        array = _at_all_positions(model, value, context_length)
        width = rotation.half * (2 if rotation.doubled else 1)
        if array is None or array.shape[-2:] != (context_length, width) or array.size != context_length * width:
            return None
        array = array.reshape(context_length, width)
        if rotation.doubled:
            array, again = np.split(array, 2, axis=1)
            if not np.array_equal(array, again):
                return None
        arrays.append(np.ascontiguousarray(array))
    number = sum(1 for name in model.graph.initializers if str(name).startswith("cos_cache"))
    return [add_weight(model, f"{name}_cache_{number}", a) for name, a in zip(("cos", "sin"), arrays, strict=True)]


def _at_all_positions(model: ir.Model, value: ir.Value, context_length: int) -> np.ndarray | None:
    """The value for position_ids 0, 1, ..., or None where it depends on more: what makes it is cut out and run."""
    inside: set[int] = set()
    constants: dict[str, np.ndarray] = {}
    waiting = [value]
    while waiting:
        current = waiting.pop()
        producer = current.producer()
        array = weight(current)
        if array is not None:
            constants[str(current.name)] = array
        elif producer is not None and producer.domain:
            return None  # an operator of somebody else's
        elif producer is not None and id(producer) not in inside:
            inside.add(id(producer))
            waiting += [v for v in producer.inputs if v is not None]
        elif producer is None and current.name != names.POSITION_IDS:
            return None
    helper = onnx.helper
    graph = helper.make_graph(
        [ir.to_proto(node) for node in model.graph if id(node) in inside],
        "angles",
        [helper.make_tensor_value_info(names.POSITION_IDS, onnx.TensorProto.INT64, [1, None])],
        [helper.make_tensor_value_info(str(value.name), onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", model.opset_imports[""])
    content = helper.make_model(graph, opset_imports=[opset], ir_version=model.ir_version).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {names.POSITION_IDS: np.arange(context_length)[None]})
    return np.asarray(found)


def _feed_unrotated(model: ir.Model, attention: ir.Node, index: int, heads: ir.Value) -> None:
    """Gives attention `heads` (B, T, H, D) as (B, T, H * D)."""
    fed = attention.inputs[index]
    assert fed is not None
    reshape = fed.producer()
    assert reshape is not None
    name = f"{attention.name}_unrotated_{index}"  # two calls may share a query
    new = ir.node("Reshape", [heads, reshape.inputs[1]], dict(reshape.attributes), name=name)
    new.outputs[0].name = f"{name}_output"
    model.graph.insert_before(attention, new)
    attention.replace_input_with(index, new.outputs[0])


# --- the graph ----------------------------------------------------------------------------------------------------
def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _input_of(value: ir.Value | None, operator: str) -> ir.Value | None:
    """The first input of the node of that type that makes the value."""
    node = _made_by(value, operator)
    return None if node is None else node.inputs[0]
