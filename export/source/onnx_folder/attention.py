"""Recognises attention in the standard graph of another program, and replaces it by GroupQueryAttention.

    1. past and the new keys are concatenated: present. The same with values
    2. views of present (repeated heads, transposed) are multiplied by the queries; factors make the scale
    3. a soft cap may follow, and a mask, up to the softmax, whose output is multiplied by views of the present values

The mask is recognised by its numbers on a text, since programs write it in many ways: causal, or causal with a window.
Nothing else may read past: where one buffer holds past and present, its size is not the number of tokens.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry

from ...graph.edit import CONTRIB_DOMAIN, NodeBuilder, producer, replace_uses, replace_value, sole_consumer, weight
from ...graph.part import evaluate
from ...graph.session import window_feeds

_VIEWS = ("Unsqueeze", "Expand", "Reshape", "Transpose", "Identity")
_MASKED = -1e4  # a masked score at or below it gets weight 0: its exp is 0 in float32
_LAST, _SQUARE = 2, 256  # tokens of the runs that show the masks, at the end of the context and at its beginning
_RUNS = ((5, 3), (1, 6))  # tokens of past and new ones, in the runs that show which values are positions


class UnrecognisedError(Exception):
    """The graph's attention has another form; the message says which."""


@dataclass(frozen=True)
class MatchedAttention:
    """One attention call in a standard graph."""

    query: ir.Value  # (B, H, T, D)
    key: ir.Value  # (B, K, T, D), of the new tokens
    value: ir.Value  # (B, K, T, D)
    present: tuple[ir.Value, ir.Value]  # the graph's outputs
    output: ir.Value  # (B, H, T, D)
    scale: float
    softcap: float | None
    masks: tuple[tuple[ir.Value, str], ...]  # "added" to the scores; true where "kept", "hidden", "never"
    heads: int | None  # H, if the graph's shapes have it
    window: int | None = None  # tokens


# --- recognising --------------------------------------------------------------------------------------------------
def recognise(model: ir.Model, layers: Sequence[KVGeometry], context_length: int) -> list[MatchedAttention]:
    """Returns the attention of each layer. Raises UnrecognisedError if one of them has another form."""
    calls = [_recognised(model, number) for number in range(len(layers))]
    masks = list({id(mask): mask for call in calls for mask, _ in call.masks}.values())
    # The last rows of the context see all of the longest window, and the first rows whether all is causal.
    new, square = min(_LAST, context_length), min(_SQUARE, context_length)
    runs = [_feeds(model, past, tokens) for past, tokens in ((context_length - new, new), (0, square))]
    last, first = (dict(zip(map(id, masks), evaluate(model, masks, feeds), strict=True)) for feeds in runs)
    windows: dict[tuple[tuple[int, str], ...], int | None] = {}
    for call in calls:
        key = tuple((id(mask), kind) for mask, kind in call.masks)
        if key not in windows:
            rows = [
                _seen([(arrays[place], kind) for place, kind in key], tokens, total)
                for arrays, tokens, total in ((last, new, context_length), (first, square, square))
            ]
            windows[key] = _window(rows)
    return [dataclasses.replace(c, window=windows[tuple((id(m), kind) for m, kind in c.masks)]) for c in calls]


@dataclass
class _Scores:
    """The parts found on the way from q kᵀ to the softmax."""

    factor: float = 1.0
    capped: float | None = None  # the factor before Tanh
    masks: list[tuple[ir.Value, str]] = field(default_factory=list)


def _recognised(model: ir.Model, number: int) -> MatchedAttention:
    ends = {str(value.name): value for value in model.graph.outputs}
    keys, values = ends[names.present_key(number)], ends[names.present_value(number)]
    key, value = (_appended(present, number) for present in (keys, values))
    products, key_factor = _multiplied(keys)
    if len(products) != 1:
        raise UnrecognisedError(f"the keys of layer {number} are read in another way")
    query, query_factor = _without_factors(products[0].inputs[0])
    scores = _Scores(key_factor * query_factor)
    weights = _softmaxed(products[0].outputs[0], scores, number)
    combined, value_factor = _multiplied(values)
    if len(combined) != 1 or value_factor != 1 or not _is_weights(combined[0].inputs[0], weights):
        raise UnrecognisedError(f"the values of layer {number} are read in another way")
    scale, softcap = scores.factor, None
    if scores.capped is not None:
        scale, softcap = scores.capped * scores.factor, scores.factor
    output = combined[0].outputs[0]
    last = sole_consumer(output)
    if last is not None and last.op_type == "Where" and last.inputs[2] is output and _is_zero(last.inputs[1]):
        unseeing = last.inputs[0]  # rows that see nothing, which a row of a text never is
        assert unseeing is not None
        scores.masks.append((unseeing, "never"))
        output = last.outputs[0]
    shapes = [v.shape for v in (query, products[0].outputs[0], output) if v.shape is not None and len(v.shape) == 4]
    heads = next((size for shape in shapes if isinstance(size := shape[1], int)), None)
    return MatchedAttention(query, key, value, (keys, values), output, scale, softcap, tuple(scores.masks), heads)


def _appended(present: ir.Value, number: int) -> ir.Value:
    """Returns the keys or values of the new tokens, which are appended to past."""
    node = producer(present, "Concat")
    axis = None if node is None else node.attributes.get_int("axis", 0)
    if node is None or len(node.inputs) != 2 or axis not in (2, -2):
        raise UnrecognisedError(f"layer {number} does not append keys or values to past by one Concat")
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input():
        raise UnrecognisedError(f"layer {number} does not append keys or values to past")
    return new


def _multiplied(present: ir.Value) -> tuple[list[ir.Node], float]:
    """Returns the MatMuls whose second operand is a view of the value, and the factor on the way to the first."""
    found: list[ir.Node] = []
    waiting, result = [(present, 1.0)], 1.0
    while waiting:
        value, factor = waiting.pop()
        for node, index in value.uses():
            if node.op_type == "MatMul" and index == 1:
                found.append(node)
                result = factor
            elif node.op_type in _VIEWS and index == 0:
                waiting.append((node.outputs[0], factor))
            elif (by := _scaled(node, value)) is not None:
                waiting.append((node.outputs[0], factor * by))
            elif node.op_type != "Shape":
                return [], 1.0
    return found, result


def _scaled(node: ir.Node, value: ir.Value | None) -> float | None:
    """Returns the number that a node multiplies the value by, None for any other node."""
    if node.op_type not in ("Mul", "Div") or value not in node.inputs:
        return None
    place = node.inputs.index(value)
    array = weight(node.inputs[1 - place])
    if array is None or array.size != 1 or (node.op_type == "Div" and place):
        return None
    return float(array.item()) if node.op_type == "Mul" else 1 / float(array.item())


def _without_factors(value: ir.Value | None) -> tuple[ir.Value, float]:
    factor = 1.0
    while value is not None and (node := value.producer()) is not None:
        operand = next((v for v in node.inputs if _scaled(node, v) is not None), None)
        if operand is None:
            break
        factor *= _scaled(node, operand) or 0.0
        value = operand
    assert value is not None
    return value, factor


def _softmaxed(value: ir.Value, scores: _Scores, number: int) -> ir.Value:
    """Follows the scores up to the softmax, whose output it returns."""
    other = UnrecognisedError(f"the scores of layer {number} become weights in another way than by a softmax")
    while True:
        readers = [node for node, _ in value.uses() if node.op_type != "Shape"]
        if len(readers) != 1 or value.is_graph_output():
            raise other
        node = readers[0]
        if node.op_type == "Softmax":
            if node.attributes.get_int("axis", -1) not in (-1, 3):
                raise other
            return node.outputs[0]
        by = _scaled(node, value)
        if by is not None and not scores.masks:
            scores.factor *= by
        elif node.op_type == "Tanh" and not scores.masks and scores.capped is None:
            scores.capped, scores.factor = scores.factor, 1.0
        elif node.op_type == "Add":
            mask = node.inputs[1 - node.inputs.index(value)]
            assert mask is not None
            scores.masks.append((mask, "added"))
        elif node.op_type == "Where" and node.inputs[0] is not None and node.inputs.index(value) > 0:
            place = node.inputs.index(value)
            lowest = weight(node.inputs[3 - place])
            if lowest is None or lowest.size != 1 or lowest.item() > _MASKED:
                raise other
            scores.masks.append((node.inputs[0], "kept" if place == 1 else "hidden"))
        elif node.op_type != "Identity":
            raise other
        value = node.outputs[0]


def _is_weights(value: ir.Value | None, weights: ir.Value) -> bool:
    """Whether a value is the softmax's output; NaN, in rows that see nothing, may be replaced by 0."""
    if value is weights:
        return True
    node = producer(value, "Where")
    if node is None:
        return False
    test = producer(node.inputs[0], "IsNaN")
    replaced = test is not None and test.inputs[0] is weights and _is_zero(node.inputs[1])
    return replaced and node.inputs[2] is weights


def _is_zero(value: ir.Value | None) -> bool:
    array = weight(value)
    return array is not None and not array.any()


def _seen(masks: Sequence[tuple[np.ndarray, str]], tokens: int, total: int) -> np.ndarray:
    """Returns which of `total` tokens the last `tokens` see, by all masks."""
    seen = np.ones((tokens, total), bool)
    for array, kind in masks:
        if kind == "never":
            if array.any():
                raise UnrecognisedError("some rows of attention are set to zero")
            continue
        if array.ndim < 2 or array.shape[-2:] != (tokens, total):
            raise UnrecognisedError(f"a mask is {array.shape} for {tokens} of {total} tokens")
        plain = array.astype(bool) if kind != "added" else array > _MASKED
        if kind == "added" and array[plain].any():
            raise UnrecognisedError("scores have a bias (ALiBi or relative positions, say)")
        plain = (~plain if kind == "hidden" else plain).reshape(-1, tokens, total)
        if not (plain == plain[:1]).all():
            raise UnrecognisedError("heads have different masks")
        seen &= plain[0]
    return seen


def _window(runs: Sequence[np.ndarray]) -> int | None:
    """Returns the window that rows of the end and the beginning of the context see, None for all earlier tokens."""
    window = int(runs[0][-1].sum())
    for seen in runs:
        tokens, total = seen.shape
        distance = np.arange(total - tokens, total)[:, None] - np.arange(total)[None]
        if not np.array_equal(seen, (distance >= 0) & (distance < window)):
            raise UnrecognisedError("a mask is neither causal nor a window")
    return None if window == runs[0].shape[1] else window


# --- replacing ----------------------------------------------------------------------------------------------------
def fuse_attention(
    model: ir.Model, calls: Sequence[MatchedAttention], layers: Sequence[KVGeometry], heads: int
) -> None:
    """Replaces the attention calls, with H `heads` where shapes do not show them.

    Raises UnrecognisedError if past is read elsewhere. Then the graph is of no use.
    """
    lengths = _lengths(model)
    for number, (call, geometry) in enumerate(zip(calls, layers, strict=True)):
        _replace(model, call, number, lengths, geometry, call.heads or heads)
    common.RemoveUnusedNodesPass()(model)
    _take_positions(model)
    model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    for value in model.graph.inputs:
        elsewhere = [
            node.op_type for node, _ in value.uses() if node.op_type != "GroupQueryAttention" and not _reads_batch(node)
        ]
        if str(value.name).startswith(names.PAST_PREFIX) and elsewhere:
            raise UnrecognisedError(f"{elsewhere[0]} reads past outside attention")


def _reads_batch(node: ir.Node) -> bool:
    """Whether a node reads only the number of rows."""
    return (
        node.op_type == "Shape" and node.attributes.get_int("start", 0) == 0 and node.attributes.get_int("end", 0) == 1
    )


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """Adds the number of real tokens of each row, minus one, and the length of the mask, as the operator reads them."""
    mask = next(value for value in model.graph.inputs if value.name == names.ATTENTION_MASK)
    builder = NodeBuilder(model, "lengths")
    one = builder.constant("axis", np.array([1]))
    count = builder.add("Sub", builder.add("ReduceSum", mask, one, keepdims=0), one)
    last = builder.add("Cast", count, to=ir.DataType.INT32)
    zero = builder.constant("first", np.array([0]))
    total = builder.add("Squeeze", builder.add("Shape", mask, start=1, end=2), zero)
    total = builder.add("Cast", total, to=ir.DataType.INT32)
    model.graph.insert_before(model.graph[0], builder.nodes)
    return last, total


def _replace(
    model: ir.Model,
    call: MatchedAttention,
    number: int,
    lengths: tuple[ir.Value, ir.Value],
    geometry: KVGeometry,
    heads: int,
) -> None:
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": geometry.kv_heads, "scale": call.scale}
    if call.window is not None:
        attributes["local_window_size"] = call.window
    if call.softcap is not None:
        attributes["softcap"] = call.softcap
    builder = NodeBuilder(model, f"attention.{number}")
    joined = builder.constant("joined", np.array([0, 0, -1]))
    flat = []
    sizes = (
        heads * geometry.key_head_size,
        *(geometry.kv_heads * size for size in (geometry.key_head_size, geometry.value_head_size)),
    )
    for value, size in zip((call.query, call.key, call.value), sizes, strict=True):
        by_token = builder.add("Transpose", value, perm=[0, 2, 1, 3])
        flat.append(builder.add("Reshape", by_token, joined))
        _describe(flat[-1], size)
    past = [present.producer().inputs[0] for present in call.present]  # type: ignore[union-attr]  # Concat
    output, *present = builder.add_several(
        "GroupQueryAttention", 3, *flat, *past, *lengths, domain=CONTRIB_DOMAIN, **attributes
    )
    _describe(output, heads * geometry.value_head_size)
    apart = builder.constant("heads", np.array([0, 0, heads, -1]))
    split = builder.add("Transpose", builder.add("Reshape", output, apart), perm=[0, 2, 1, 3])
    made = call.output.producer()
    assert made is not None
    model.graph.insert_before(made, builder.nodes)
    replace_uses(call.output, split)
    for old, new in zip(call.present, present, strict=True):
        replace_value(model, old, new)


def _describe(value: ir.Value, width: int) -> None:
    """Notes a type and shape that shape inference does not find: float32 (B, T, width)."""
    value.shape = ir.Shape([names.BATCH, names.SEQUENCE, width])
    value.type = ir.TensorType(ir.DataType.FLOAT)


def _take_positions(model: ir.Model) -> None:
    """Replaces positions (T,) that the graph counts from the length of past by those of each row, position_ids (B, T).

    A value is one of these if it equals them on two runs.
    """
    positions = next(value for value in model.graph.inputs if value.name == names.POSITION_IDS)
    readers = [
        (node, axes.tolist())
        for node in model.graph
        if node.op_type == "Unsqueeze"
        and (axes := weight(node.inputs[1])) is not None
        and 0 in axes
        and any(producer(node.inputs[0], operator) is not None for operator in ("Range", "Add"))
    ]
    counted = list({id(node.inputs[0]): node.inputs[0] for node, _ in readers if node.inputs[0] is not None}.values())
    if not counted:
        return
    runs = [(past, new, evaluate(model, counted, _feeds(model, past, new))) for past, new in _RUNS]
    for place, value in enumerate(counted):
        if not all(np.array_equal(arrays[place], np.arange(past, past + new)) for past, new, arrays in runs):
            continue
        for node, axes in readers:
            if node.inputs[0] is not value:
                continue
            builder, others = NodeBuilder(model, f"{node.name}_of_rows"), [axis for axis in axes if axis]
            made = positions
            if others:
                made = builder.add("Unsqueeze", positions, builder.constant("axes", np.array(others)))
                model.graph.insert_before(node, builder.nodes)
            replace_uses(node.outputs[0], made)
    common.RemoveUnusedNodesPass()(model)


def _feeds(model: ir.Model, past: int, new: int) -> dict[str, np.ndarray]:
    shapes = {str(value.name): tuple(value.shape or ()) for value in model.graph.inputs}
    return window_feeds(shapes, np.zeros(new, np.int64), past=past)
