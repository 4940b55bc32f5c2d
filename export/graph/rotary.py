"""Moves the rotation of queries and keys by their positions into GroupQueryAttention, where it is exact.

Rotary positions: RoFormer, https://arxiv.org/abs/2104.09864. The operator takes cos and sin of every position as two
tables. They are not stored. Instead, the nodes that compute them from position_ids stay in the graph and run over all
positions at once, so onnxruntime folds them into constants when it loads the graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from pastkey.contract import names
from pastkey.runtime.providers.ort import onnxruntime

from .edit import CONTRIB_DOMAIN, NodeBuilder, input_of, producer, replace_node, shape_of, weight

HEAD_MULTIPLE = 16  # GroupQueryAttention rotates only heads whose size is a multiple of this
# Tables grow with the context. Their limit is the larger of these bytes and this share of the weights.
_TABLE_BYTES, _TABLE_SHARE = 4 << 20, 0.02


def fuse_rotary(model: ir.Model, context_length: int) -> None:
    """Moves the rotation of queries and keys into attention if the same angles rotate both."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
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
            domain=CONTRIB_DOMAIN,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        replace_node(model, node, new)


@dataclass(frozen=True)
class _Rotation:
    """Queries or keys x (B, T, H, D), rotated by cos and sin of width D / 2, or, if `doubled`, D with equal halves."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    half: int  # D / 2
    doubled: bool


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """Matches the rotation of a query or key (B, T, H * D) in either of its two usual forms."""
    rotated = input_of(input_of(value, "Reshape"), "Transpose")
    found = _by_halves(rotated) or _by_swapping(rotated)
    before = None if found is None else producer(found.x, "Transpose")
    if found is None or before is None or before.inputs[0] is None:
        return None
    if list(before.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    return dataclasses.replace(found, x=before.inputs[0])


def _by_swapping(rotated: ir.Value | None) -> _Rotation | None:
    """Matches x cos + concat(-x₂, x₁) sin."""
    direct, crossed = _operands(rotated, "Add", "Mul")
    if direct is None or crossed is None:
        return None
    x, swapped = direct.inputs[0], producer(crossed.inputs[0], "Concat")
    if swapped is None or x is None or len(swapped.inputs) != 2:
        return None
    upper, lower = producer(input_of(swapped.inputs[0], "Neg"), "Slice"), producer(swapped.inputs[1], "Slice")
    half = None if upper is None or lower is None else _half(x, lower, upper)
    cos, sin = direct.inputs[1], crossed.inputs[1]
    if half is None or cos is None or sin is None or not _on_last_axis(swapped):
        return None
    return _Rotation(x, cos, sin, half, doubled=True)


def _half(x: ir.Value, lower: ir.Node, upper: ir.Node) -> int | None:
    """Returns D / 2 if the slices are the two halves of x's last axis."""
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


def _by_halves(rotated: ir.Value | None) -> _Rotation | None:
    """Matches concat(x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    whole = producer(rotated, "Concat")
    if whole is None or len(whole.inputs) != 2:
        return None
    left, right = _operands(whole.inputs[0], "Sub", "Mul"), _operands(whole.inputs[1], "Add", "Mul")
    if None in (*left, *right):
        return None
    (first, cos), (second, sin) = (tuple(node.inputs) for node in left if node is not None)
    expected = [(second, cos), (first, sin)]
    if [tuple(node.inputs) for node in right if node is not None] != expected or cos is None or sin is None:
        return None
    split = producer(first, "Split")
    if split is None or list(split.outputs) != [first, second] or not (_on_last_axis(split) and _on_last_axis(whole)):
        return None
    x = split.inputs[0]
    size = None if x is None or x.shape is None else x.shape[-1]
    if x is None or not isinstance(size, int) or (len(split.inputs) > 1 and split.inputs[1] is not None):
        return None
    return _Rotation(x, cos, sin, size // 2, doubled=False)


def _operands(value: ir.Value | None, operator: str, operands: str) -> tuple[ir.Node | None, ir.Node | None]:
    """Returns the nodes, both of type `operands`, that compute the two inputs of the value's producer."""
    node = producer(value, operator)
    if node is None or len(node.inputs) != 2:
        return None, None
    return producer(node.inputs[0], operands), producer(node.inputs[1], operands)


def _tables(model: ir.Model, rotation: _Rotation, context_length: int, allowed: float) -> list[ir.Value] | None:
    """Returns cos and sin of every position, (context, D / 2), or None if too large or not of positions alone."""
    if context_length * 2 * rotation.half * 4 > allowed or 2 * rotation.half % HEAD_MULTIPLE:
        return None
    width = rotation.half * (2 if rotation.doubled else 1)
    angles = [_made_of_positions(model, value) for value in (rotation.cos, rotation.sin)]
    if None in angles:
        return None
    for value, nodes in zip((rotation.cos, rotation.sin), angles, strict=True):
        assert nodes is not None
        array = _at_all_positions(model, value, nodes, context_length)
        if array.shape[-2:] != (context_length, width) or array.size != context_length * width:
            return None
        first, second = np.split(array, 2, axis=-1)
        if rotation.doubled and not np.array_equal(first, second):
            return None
    return _write_tables(model, rotation, [node for nodes in angles for node in nodes or ()], context_length)


def _made_of_positions(model: ir.Model, value: ir.Value) -> list[ir.Node] | None:
    """Returns the nodes that compute the value from position_ids and constants, in order; None if it needs more."""
    inside: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        producer = current.producer()
        if shape_of(current) is not None or (producer is None and current.name == names.POSITION_IDS):
            continue
        if producer is None or producer.domain:  # not an operator of ONNX
            return None
        if id(producer) not in inside:
            inside.add(id(producer))
            waiting += [v for v in producer.inputs if v is not None]
    return [node for node in model.graph if id(node) in inside]


def _at_all_positions(model: ir.Model, value: ir.Value, nodes: list[ir.Node], context_length: int) -> np.ndarray:
    """Computes the value for position_ids 0, 1, ...: cuts its nodes out and runs them."""
    constants = {str(v.name): weight(v) for node in nodes for v in node.inputs if v is not None}
    helper = onnx.helper
    graph = helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "angles",
        [helper.make_tensor_value_info(names.POSITION_IDS, onnx.TensorProto.INT64, [1, None])],
        [helper.make_tensor_value_info(str(value.name), onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if array is not None],
    )
    opset = helper.make_opsetid("", model.opset_imports[""])
    content = helper.make_model(graph, opset_imports=[opset], ir_version=model.ir_version).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {names.POSITION_IDS: np.arange(context_length)[None]})
    return np.asarray(found)


def _write_tables(model: ir.Model, rotation: _Rotation, angles: list[ir.Node], context_length: int) -> list[ir.Value]:
    """Copies the nodes, with all positions in place of position_ids."""
    number = sum(1 for node in model.graph if node.name and node.name.startswith("cos_cache"))
    builder = NodeBuilder(model, f"rotary_{number}")

    def whole(what: str, *content: int) -> ir.Value:
        return builder.constant(what, np.array(content))

    range_of = (("from", 0), ("context", context_length), ("step", 1))
    bounds = (builder.constant(what, np.array(n)) for what, n in range_of)
    positions = builder.add("Unsqueeze", builder.add("Range", *bounds), whole("row", 0))  # (1, context)
    made: dict[int, ir.Value] = {}  # the identity of a value -> its copy
    for node in angles:
        if id(node.outputs[0]) in made:
            continue
        inputs = [
            positions if v is not None and v.name == names.POSITION_IDS else made.get(id(v), v) for v in node.inputs
        ]
        attributes, name = tuple(node.attributes.values()), f"rotary_{number}_{len(builder.nodes)}"
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        for place, (old, output) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            output.name = f"{name}_output_{place}"
            made[id(old)] = output
        builder.nodes.append(copy)
    tables = []
    flat = whole("shape", context_length, -1)
    for name, value in (("cos", rotation.cos), ("sin", rotation.sin)):
        table = builder.add("Reshape", made[id(value)], flat)
        if rotation.doubled:
            half = (whole(f"{name}_{what}", n) for what, n in (("start", 0), ("end", rotation.half), ("axis", 1)))
            table = builder.add("Slice", table, *half)
        builder.nodes[-1].name = table.name = f"{name}_cache_{number}"
        tables.append(table)
    model.graph.insert_before(model.graph[0], builder.nodes)
    return tables


def _feed_unrotated(model: ir.Model, attention: ir.Node, index: int, heads: ir.Value) -> None:
    """Feeds attention `heads` (B, T, H, D) as (B, T, H * D)."""
    fed = attention.inputs[index]
    assert fed is not None
    reshape = fed.producer()
    assert reshape is not None
    name = f"{attention.name}_unrotated_{index}"  # two calls may share a query
    new = ir.node("Reshape", [heads, reshape.inputs[1]], dict(reshape.attributes), name=name)
    new.outputs[0].name, new.outputs[0].shape = f"{name}_output", fed.shape
    model.graph.insert_before(attention, new)
    attention.replace_input_with(index, new.outputs[0])
