"""Moves the rotation of queries and keys by their positions into GroupQueryAttention, where it is exact.

Rotary positions: RoFormer, https://arxiv.org/abs/2104.09864. The operator reads cos and sin of every position as two
tables. They are stored: as nodes over all positions, which onnxruntime folds into constants, they were most of a
session's start, 19 of 28 ms for SmolLM2 in int8.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey.contract import names

from ..compare import UNCHANGED, relative_difference
from .edit import CONTRIB_DOMAIN, add_weight, input_of, producer, replace_node, shape_of, weight
from .part import evaluate
from .session import window_feeds

HEAD_MULTIPLE = 16  # GroupQueryAttention rotates only heads whose size is a multiple of this
# Tables grow with the context. Their limit is the larger of these bytes and this share of the weights.
_TABLE_BYTES, _TABLE_SHARE = 4 << 20, 0.02


def fuse_rotary(model: ir.Model, context_length: int) -> None:
    """Moves the rotation of queries and keys into attention if the same angles rotate both."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    allowed = max(_TABLE_BYTES, _TABLE_SHARE * weights)
    known: dict[tuple[int, int], np.ndarray | None] = {}  # the identity of cos and sin -> angles
    tables: dict[bytes, list[ir.Value]] = {}  # by the numbers of the angles
    for node in tuple(model.graph):
        if node.op_type != "GroupQueryAttention" or any(value is not None for value in node.inputs[7:9]):
            continue
        query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
        if query is None or key is None or query.interleaved != key.interleaved:
            continue
        if any(r.heads != node.attributes.get_int(n, 0) for r, n in ((query, "num_heads"), (key, "kv_num_heads"))):
            continue  # the rotation of another width than a head's
        for rotation in (query, key):
            if rotation.angles not in known:
                known[rotation.angles] = _at_all_positions(model, rotation, context_length, allowed)
        angles, others = known[query.angles], known[key.angles]
        if angles is None or others is None or not np.array_equal(angles, others):
            continue
        content = hashlib.sha256(angles.tobytes()).digest()
        if content not in tables:
            tables[content] = _write_tables(model, angles)
        for i, rotation in enumerate((query, key)):
            _feed_unrotated(model, node, i, rotation)
        new = ir.node(
            node.op_type,
            [*node.inputs[:7], *tables[content], *node.inputs[9:]],
            {**node.attributes, "do_rotary": 1, "rotary_interleaved": int(query.interleaved)},
            domain=CONTRIB_DOMAIN,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        replace_node(model, node, new)


# --- recognising --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Rotation:
    """Queries or keys x, and cos and sin that rotate their pairs of channels."""

    x: ir.Value  # (B, H, T, D), or (B, T, H, D)
    cos: ir.Value
    sin: ir.Value
    interleaved: bool  # pairs of neighbouring channels instead of channels of the two halves
    doubled: bool  # whether cos and sin have each number twice, for both channels of a pair
    heads_first: bool = False  # whether x is (B, H, T, D)

    @property
    def half(self) -> int:
        """D / 2."""
        return _width(self.x) // 2

    @property
    def heads(self) -> object:
        """H."""
        return None if self.x.shape is None else self.x.shape[1 if self.heads_first else 2]

    @property
    def angles(self) -> tuple[int, int]:
        """The identity of cos and sin."""
        return id(self.cos), id(self.sin)


@dataclass(frozen=True)
class _Part:
    """The first or the second channels of all pairs of x."""

    x: ir.Value
    second: bool
    interleaved: bool


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """Matches the rotation of a query or key (B, T, H * D), of both kinds of pairs, in its two usual forms."""
    heads = input_of(value, "Reshape")
    swapped = producer(heads, "Transpose")
    if swapped is not None and list(swapped.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    rotated = heads if swapped is None else swapped.inputs[0]
    found = None if rotated is None else _by_parts(rotated) or _by_swapping(rotated)
    if found is None or found.x.shape is None or len(found.x.shape) != 4 or not _width(found.x):
        return None
    return dataclasses.replace(found, heads_first=swapped is not None)


def _by_parts(rotated: ir.Value) -> _Rotation | None:
    """Matches first · cos - second · sin, joined with second · cos + first · sin."""
    joined = _joined(rotated)
    difference, total = (None, None) if joined is None else (producer(joined[0], "Sub"), producer(joined[1], "Add"))
    if joined is None or difference is None or total is None:
        return None
    terms = [_scaled(value) for value in (*difference.inputs, *total.inputs)]
    if any(term is None for term in terms):
        return None
    (first, cos), (second, sin), *others = [term for term in terms if term is not None]
    x, interleaved = first.x, first.interleaved
    if (first, second) != (_Part(x, False, interleaved), _Part(x, True, interleaved)) or interleaved != joined[2]:
        return None
    if sorted(((part.second, id(by)) for part, by in others)) != [(False, id(sin)), (True, id(cos))]:
        return None
    if any(part.x is not x or part.interleaved != interleaved for part, _ in others):
        return None
    return _Rotation(x, cos, sin, interleaved, doubled=False)


def _by_swapping(rotated: ir.Value) -> _Rotation | None:
    """Matches x · cos + y · sin, where y joins the negated second channels and the first ones."""
    total = producer(rotated, "Add")
    products = [] if total is None else [producer(value, "Mul") for value in total.inputs]
    for direct, crossed in (products, products[::-1]) if len(products) == 2 else ():
        if direct is None or crossed is None:
            continue
        for y, sin in (tuple(crossed.inputs), tuple(reversed(crossed.inputs))):
            joined = None if y is None else _joined(y)
            second, first = (None, None) if joined is None else (_part(input_of(joined[0], "Neg")), _part(joined[1]))
            if joined is None or first is None or second != dataclasses.replace(first, second=True) or sin is None:
                continue
            cos = next((v for v, x in zip(direct.inputs, reversed(direct.inputs), strict=True) if x is first.x), None)
            if cos is not None and not first.second and first.interleaved == joined[2]:
                return _Rotation(first.x, cos, sin, first.interleaved, doubled=True)
    return None


def _joined(value: ir.Value) -> tuple[ir.Value, ir.Value, bool] | None:
    """Returns the first and second channels of all pairs that make the value, and whether as neighbours."""
    whole = producer(value, "Concat")
    if whole is not None and len(whole.inputs) == 2 and _on_last_axis(whole, value):
        first, second = whole.inputs
        return None if first is None or second is None else (first, second, False)
    stacked = input_of(value, "Reshape")
    whole = producer(stacked, "Concat")
    if whole is None or stacked is None or len(whole.inputs) != 2 or not _on_last_axis(whole, stacked):
        return None
    parts = [producer(part, "Unsqueeze") for part in whole.inputs]
    if any(node is None or weight(node.inputs[1]) is None for node in parts) or _width(stacked) != 2:
        return None
    first, second = (node.inputs[0] for node in parts if node is not None)
    last = None if stacked.shape is None else len(stacked.shape) - 1
    axes = [weight(node.inputs[1]) for node in parts if node is not None]
    if first is None or second is None or any(axis is None or axis.tolist() not in ([last], [-1]) for axis in axes):
        return None
    return first, second, True


def _scaled(value: ir.Value | None) -> tuple[_Part, ir.Value] | None:
    """Returns a part that is multiplied, and its factor."""
    product = producer(value, "Mul")
    operands = () if product is None else (tuple(product.inputs), tuple(reversed(product.inputs)))
    return next(((part, by) for x, by in operands if by is not None and (part := _part(x)) is not None), None)


def _part(value: ir.Value | None) -> _Part | None:
    """Matches the first or second channels of all pairs along the last axis of x."""
    node = None if value is None else value.producer()
    x = None if node is None else node.inputs[0]
    if value is None or node is None or x is None:
        return None
    if node.op_type == "Split" and len(node.outputs) == 2 and _on_last_axis(node, x):
        return _Part(x, value is node.outputs[1], interleaved=False) if 2 * _width(value) == _width(x) else None
    if node.op_type == "Gather" and _on_last_axis(node, x):  # of pairs (..., D / 2, 2)
        index, before = weight(node.inputs[1]), input_of(x, "Reshape")
        if index is None or index.ndim or before is None or _width(x) != 2 or _width(before) != 2 * _width(value):
            return None
        return _Part(before, bool(index), interleaved=True)
    if node.op_type != "Slice" or x.shape is None:
        return None
    given = [weight(v) for v in node.inputs[1:]] + [np.array([1])] * (5 - len(node.inputs))
    if len(given) != 4 or any(numbers is None or numbers.size != 1 for numbers in given):
        return None
    start, end, axis, step = (int(numbers.item()) for numbers in given if numbers is not None)
    size, half = _width(x), _width(x) // 2
    if axis not in (-1, len(x.shape) - 1) or not size or size % 2:
        return None
    bounds = (start, min(end, size), step)
    kinds = {(0, half, 1): (False, False), (half, size, 1): (True, False)}
    kinds |= {(0, size, 2): (False, True), (0, size - 1, 2): (False, True), (1, size, 2): (True, True)}
    return _Part(x, *kinds[bounds]) if bounds in kinds else None


def _on_last_axis(node: ir.Node, value: ir.Value) -> bool:
    """Whether a Concat, Split or Gather is along the last axis of the value."""
    axis = node.attributes.get_int("axis", 0)
    return value.shape is not None and axis in (-1, len(value.shape) - 1)


def _width(value: ir.Value) -> int:
    """Returns the size of the last axis, 0 if it is not a number."""
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else 0


# --- angles -------------------------------------------------------------------------------------------------------
def _at_all_positions(model: ir.Model, rotation: _Rotation, context_length: int, allowed: float) -> np.ndarray | None:
    """Returns cos and sin, (2, context, D / 2), or None if they are too large or not of each position only."""
    if context_length * 2 * rotation.half * 4 > allowed or 2 * rotation.half % HEAD_MULTIPLE:
        return None
    if not all(_is_made_of_positions(value) for value in (rotation.cos, rotation.sin)):
        return None
    whole, half = (_at_positions(model, rotation, length) for length in (context_length, -(-context_length // 2)))
    if whole is None or half is None or relative_difference(whole[:, : half.shape[1]], half) > UNCHANGED:
        return None  # angles that differ follow the longest position, as those of dynamic NTK do
    return whole


def _at_positions(model: ir.Model, rotation: _Rotation, context_length: int) -> np.ndarray | None:
    """Returns cos and sin of the first positions, None if they have another form."""
    shapes = {str(value.name): tuple(value.shape) for value in model.graph.inputs if value.shape is not None}
    feeds = window_feeds(shapes, np.arange(context_length))
    width, found = rotation.half * (2 if rotation.doubled else 1), []
    for array in evaluate(model, [rotation.cos, rotation.sin], feeds):
        if array.shape[-1:] != (width,) or [size for size in array.shape[:-1] if size != 1] != [context_length]:
            return None
        array = array.reshape(context_length, width)
        if rotation.doubled:
            array, again = (
                np.moveaxis(array.reshape(context_length, -1, 2), 2, 0)
                if rotation.interleaved
                else np.split(array, 2, 1)
            )
            if not np.array_equal(array, again):
                return None
        found.append(array)
    return np.stack(found)


def _is_made_of_positions(value: ir.Value) -> bool:
    """Whether ONNX's operators compute the value only from position_ids and constants."""
    inside: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if shape_of(current) is not None or (node is None and current.name == names.POSITION_IDS):
            continue
        if node is None or node.domain:  # not an operator of ONNX
            return False
        if id(node) not in inside:
            inside.add(id(node))
            waiting += [v for v in node.inputs if v is not None and not _counts(node)]
    return True


def _counts(node: ir.Node) -> bool:
    """Whether a node returns the rows, or the tokens, of the ids: position_ids have as many."""
    name = node.inputs[0].name if node.op_type == "Shape" and node.inputs[0] is not None else None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 9)
    axes = 2 if name in (names.INPUT_IDS, names.POSITION_IDS) else int(str(name).startswith(names.PAST_PREFIX))
    return 0 <= start < end <= axes


def _write_tables(model: ir.Model, angles: np.ndarray) -> list[ir.Value]:
    """Stores cos and sin, (2, context, D / 2)."""
    number = sum(name.startswith("cos_cache") for name in model.graph.initializers)
    parts = zip(("cos", "sin"), angles, strict=True)
    return [add_weight(model, f"{name}_cache_{number}", np.ascontiguousarray(part)) for name, part in parts]


def _feed_unrotated(model: ir.Model, attention: ir.Node, index: int, rotation: _Rotation) -> None:
    """Feeds attention the queries or keys before their rotation, as (B, T, H * D)."""
    fed = attention.inputs[index]
    reshape = producer(fed, "Reshape")
    assert fed is not None
    assert reshape is not None
    name = f"{attention.name}_unrotated_{index}"  # two calls may share a query
    nodes, heads = [], rotation.x
    before = producer(heads, "Transpose")
    if rotation.heads_first and before is not None and list(before.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
        assert before.inputs[0] is not None
        heads = before.inputs[0]
    elif rotation.heads_first:
        nodes.append(ir.node("Transpose", [heads], {"perm": [0, 2, 1, 3]}, name=f"{name}_swapped"))
        heads = nodes[-1].outputs[0]
        heads.name = f"{name}_swapped_output"
    nodes.append(ir.node("Reshape", [heads, reshape.inputs[1]], dict(reshape.attributes), name=name))
    new = nodes[-1].outputs[0]
    new.name, new.shape = f"{name}_output", fed.shape
    model.graph.insert_before(attention, nodes)
    attention.replace_input_with(index, new)
