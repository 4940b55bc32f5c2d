"""The static graph: all sizes are fixed, for NPUs, which compile a graph once.

It is made from the standard graph, for one row, T new tokens and P rows of past:

    1. fix_sizes           (B, T, P) are numbers; values computed from them are folded
    2. take_masks          Where(visible, scores, lowest) becomes scores + mask: a float input, 0 or a large negative
                           number
    3. tabulate_positions  values that depend only on positions are gathered from tables (tables.py)
    4. narrow_ids          ids and positions are int32
    5. suit_htp            some operators get another form (htp.py)
    6. yield_new           present holds only the T new rows, which the runtime writes into its arrays

A mask is (1, 1, T, P + T). Running the nodes that compute it shows whether it covers all earlier tokens or a window.
Attention that needs more than a mask is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, StaticShape
from pastkey.errors import ContractError
from pastkey.runtime.engine.caches.static_graphs import visible_columns

from ..edit import NodeBuilder, replace_value, weight
from ..part import Subgraph, depends_only_on
from ..simplify import simplify
from ..write.weights_file import WeightsFile
from .htp import suit_htp
from .tables import tabulate_positions, take_tables

MASKED = -1e4  # added to the score of a masked token: e to it is 0, and float16 can hold it
_LOWEST = -1e30  # a score at or below it is masked


@dataclass(frozen=True)
class StaticGraph:
    """A static graph, and the windows of its masks in tokens (0: all earlier tokens)."""

    model: ir.Model
    windows: tuple[int, ...]


def make_static(model: ir.Model, tokens: int, past: int, file: WeightsFile, *, by_host: bool = False) -> StaticGraph:
    """Changes a standard all-logits graph into the static one of T = `tokens` and P = `past`.

    Tables of positions go to `file`. With `by_host`, the host reads rows of these and of embeddings.

    Raises ContractError if its attention needs more than masks.
    """
    fix_sizes(model, tokens, past)
    windows = take_masks(model, tokens, past)
    tabulate_positions(model, tokens, past, file)
    if by_host:
        take_tables(model, tokens, file)
    narrow_ids(model)
    simplify(model)
    suit_htp(model)
    yield_new(model, tokens)  # last: `simplify` would remove an Identity that creates an output
    _strip(model)
    return StaticGraph(model, windows)


def write_static_graphs(
    bundle: Bundle, chunk: int, *, by_host: bool = False, shard_size: int | None = None
) -> StaticShape:
    """Writes the graphs of one new token and of a chunk over the weights file of a float32 bundle's standard graph.

    They replace the last-logits graph. `by_host`: see `make_static`; `shard_size`: see `WeightsFile`. Raises
    ContractError if attention needs more than masks.
    """
    windows: set[int] = set()
    file = WeightsFile(bundle.path / names.STATIC_DATA, shard_size)
    for path, tokens in zip(bundle.static_graphs, (1, chunk), strict=True):
        model = ir.load(bundle.all_logits_graph)
        made = make_static(model, tokens, bundle.manifest.context_length, file, by_host=by_host)
        ir.save(made.model, path)
        windows |= {*made.windows}
    bundle.last_logits_graph.unlink()
    return StaticShape(chunk, MASKED, tuple(sorted(windows)))


# --- sizes --------------------------------------------------------------------------------------------------------
def fix_sizes(model: ir.Model, tokens: int, past: int) -> None:
    """Fixes the sizes of inputs and outputs, and folds values computed from sizes."""
    sizes = {names.BATCH: 1, names.SEQUENCE: tokens, names.PAST: past, names.TOTAL: past + tokens}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        assert value.shape is not None
        value.shape = ir.Shape([sizes.get(str(size), size) for size in value.shape])
    simplify(model)
    if _fold_shapes(model):
        simplify(model)


def _fold_shapes(model: ir.Model) -> bool:
    """Folds the shapes that onnxscript leaves, those up to a negative axis. Returns whether there were any."""
    common.ShapeInferencePass()(model)
    folded = False
    for node in tuple(model.graph):
        shape = node.inputs[0].shape if node.op_type == "Shape" and node.inputs[0] is not None else None
        if shape is None or not shape.is_static():
            continue
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        builder = NodeBuilder(model, f"folded_{node.name}")
        replace_value(model, node.outputs[0], builder.constant("shape", np.array(shape.numpy()[start:end])))
        model.graph.remove(node, safe=True)
        folded = True
    return folded


# --- masks --------------------------------------------------------------------------------------------------------
def take_masks(model: ir.Model, tokens: int, past: int) -> tuple[int, ...]:
    """Replaces values computed from attention_mask by inputs. Returns their windows, 0 for none."""
    (seen,) = (value for value in model.graph.inputs if value.name == names.ATTENTION_MASK)
    dependent = depends_only_on(model, [seen])
    masks: dict[int, ir.Value] = {}
    windows: dict[int, int] = {}  # by the identity of the condition
    for node in tuple(model.graph):
        condition = node.inputs[0] if node.op_type == "Where" else None
        if condition is None or id(condition) not in dependent:
            continue
        kept, hidden = node.inputs[1:3]
        if kept is None or id(kept) in dependent or not _is_lowest(hidden):
            raise _refused()
        if id(condition) not in windows:
            windows[id(condition)] = _window_of(model, condition, seen, tokens, past)
        window = windows[id(condition)]
        if window not in masks:
            masks[window] = ir.Value(
                name=names.static_mask(window),
                shape=ir.Shape((1, 1, tokens, past + tokens)),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            model.graph.inputs.append(masks[window])
        builder = NodeBuilder(model, f"masked_{node.name}")
        masked = builder.add("Add", kept, masks[window])
        model.graph.insert_before(node, builder.nodes)
        replace_value(model, node.outputs[0], masked)
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    if seen.uses():
        raise _refused()
    model.graph.inputs.remove(seen)
    return tuple(sorted(masks))


def _refused() -> ContractError:
    return ContractError(
        "the attention of this model needs more than masks of the tokens that it sees (a bias by distance, say), which "
        "the static graph does not support: export with --graph standard, and for a target that does, such as cpu"
    )


def _is_lowest(value: ir.Value | None) -> bool:
    array = weight(value)
    return array is not None and array.size == 1 and float(array.reshape(())) <= _LOWEST


def _window_of(model: ir.Model, condition: ir.Value, source: ir.Value, tokens: int, past: int) -> int:
    """Returns how many tokens a token sees by this condition, 0 for all earlier ones.

    Runs the condition for several lengths of the past. Raises ContractError unless each result is that of one window.
    """
    lengths = sorted({0, 1, past // 3, past // 2, max(past - 1, 0), past})
    part = Subgraph(model, condition, source)
    seen = [_run_condition(part, length, tokens, past) for length in lengths]
    # The last token sees its full window, or fewer tokens if there are fewer.
    width = int(seen[-1][-1].sum())
    candidates = (0, width) if width == past + tokens else (width,)
    for window in candidates:
        if all(
            np.array_equal(found, visible_columns(length, tokens, past, window))
            for found, length in zip(seen, lengths, strict=True)
        ):
            return window
    raise _refused()


def _run_condition(part: Subgraph, length: int, tokens: int, past: int) -> np.ndarray:
    """Runs the condition, (T, P + T), with the first `length` rows of the past real."""
    mask = np.ones((1, past + tokens), np.int64)
    mask[:, length:past] = 0
    found = part.run(mask)
    return np.broadcast_to(found, (1,) * (found.ndim - 2) + (tokens, past + tokens)).reshape(tokens, past + tokens)


# --- the cache ----------------------------------------------------------------------------------------------------
def yield_new(model: ir.Model, tokens: int) -> None:
    """Reduces each `present` to the new tokens' rows, (1, K, T, D), the last part of its concatenation."""
    taken: set[int] = set()
    for place, whole in enumerate(model.graph.outputs):
        if not str(whole.name).startswith(names.PRESENT_PREFIX):
            continue
        node = whole.producer()
        while node is not None and node.op_type == "Identity":  # if keys and values are the same tensor
            source = node.inputs[0]
            node = None if source is None else source.producer()
        new = node.inputs[-1] if node is not None and node.op_type == "Concat" else None
        if node is None or new is None or len(node.inputs) != 2 or node.inputs[0] not in model.graph.inputs:
            raise _refused()
        name, shape = whole.name, list(whole.shape or ())
        whole.name = f"{name}_all"
        if new.producer() is None or new.is_graph_output() or id(new) in taken:
            builder = NodeBuilder(model, f"new_{name}")
            new = builder.add("Identity", new)
            model.graph.insert_after(node, builder.nodes)
        taken.add(id(new))
        new.name, new.type = name, whole.type
        new.shape = ir.Shape([*shape[:2], tokens, *shape[3:]])
        model.graph.outputs[place] = new
    common.RemoveUnusedNodesPass()(model)


# --- ids ----------------------------------------------------------------------------------------------------------
_TAKE_INT32 = {("Gather", 1), ("Cast", 0), ("Unsqueeze", 0), ("Reshape", 0), ("Squeeze", 0)}
_SHAPED = {"Unsqueeze", "Reshape", "Squeeze"}


def narrow_ids(model: ir.Model) -> None:
    """Makes ids and positions int32, cast to int64 only before operators that compute with them."""
    for value in model.graph.inputs:
        if value.name in (names.INPUT_IDS, names.POSITION_IDS):
            value.type = ir.TensorType(ir.DataType.INT32)
            _narrow(model, value)


def _narrow(model: ir.Model, value: ir.Value) -> None:
    """Follows the operators that only reshape the ids."""
    wide: Sequence[tuple[ir.Node, int]] = [
        (node, index) for node, index in value.uses() if (node.op_type, index) not in _TAKE_INT32
    ]
    for node, _ in tuple(value.uses()):
        if node.op_type in _SHAPED:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
            _narrow(model, node.outputs[0])
    if wide:
        builder = NodeBuilder(model, f"wide_{value.name}")
        cast = builder.add("Cast", value, to=ir.DataType.INT64)
        model.graph.insert_before(wide[0][0], builder.nodes)
        for node, index in wide:
            node.replace_input_with(index, cast)


def _strip(model: ir.Model) -> None:
    """Removes inferred shapes and types, except those of inputs and outputs."""
    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = value.type = None
