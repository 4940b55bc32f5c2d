"""Cleans the graph that torch exports. Each pass changes the model in place.

`clean` runs them in this order:

    1. merge_equal_weights      one initializer per content: a block applied several times is stored once
    2. share_transposed_weights a weight that is the transpose of another becomes Transpose(other): tied heads
    3. fold_transposed_weights  Transpose(weight) without other readers becomes a weight in MatMul's layout
    4. restore_weight_names     the module's own names instead of torch's val_131
    5. name_axes                the axes of inputs and outputs get the names in `pastkey.contract.names`
    6. strip_traces             removes paths, source lines and doc strings of the exporting machine
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, RowsGeometry, StateGeometry

from .edit import IR_VERSION, add_tensor, drop_unused_weights, replace_uses, shape_of
from .stored import StoredWeight, stored_weights

HALVES = (torch.float16, torch.bfloat16)  # the graph stores them in float32
DECODER = "decoder"  # the module's name inside the grafted one, stripped from weight names here


def clean(
    model: ir.Model,
    module: nn.Module,
    layers: tuple[KVGeometry, ...],
    vocab_size: int,
    rows: tuple[RowsGeometry, ...] = (),
    states: tuple[StateGeometry, ...] = (),
) -> None:
    """Runs all passes above in order."""
    merge_equal_weights(model)
    share_transposed_weights(model)
    fold_transposed_weights(model)
    restore_weight_names(model, module)
    name_axes(model, layers, vocab_size, rows, states)
    strip_traces(model)


# --- weights ------------------------------------------------------------------------------------------------------
def merge_equal_weights(model: ir.Model) -> None:
    """Merges initializers of equal type, shape and content.

    onnx_ir's DeduplicateHashedInitializersPass hashes every weight, 0.7 s instead of 0.01 s for 135 million, and
    refuses an array that is not C-contiguous.
    """
    first: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in tuple(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output():
            continue
        seen = first.setdefault(_key(tensor), [])
        same = next((other for other in seen if _are_equal(other.const_value, tensor)), None)
        if same is None:
            seen.append(value)
        else:
            replace_uses(value, same)
    drop_unused_weights(model)


def share_transposed_weights(model: ir.Model) -> None:
    """Replaces a matrix that is the transpose of a gathered one, an embedding, by Transpose(embedding)."""
    matrices = list(_matrices(model))
    gathered = {id(node.inputs[0]): node.inputs[0] for node in model.graph if node.op_type == "Gather"}
    for value, tensor in matrices:
        for other, content in matrices:
            if id(other) not in gathered or other is value or content.shape != tensor.shape[::-1]:
                continue
            turned = _transposed(content)
            if _key(turned) == _key(tensor) and _are_equal(turned, tensor):
                node = ir.node("Transpose", [other], {"perm": [1, 0]}, name=f"{value.name}_transposed")
                node.outputs[0].name = f"{value.name}_transposed"
                model.graph.insert_before(model.graph[0], node)
                replace_uses(value, node.outputs[0])
                break
    drop_unused_weights(model)


def fold_transposed_weights(model: ir.Model, *, shared: bool = False) -> None:
    """Stores a transposed matrix in MatMul's layout if nothing else reads it, or, with `shared`, also next to it."""
    for node in tuple(model.graph):
        if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        tensor = None if source is None or shape_of(source) is None else source.const_value
        if source is None or tensor is None or len(tensor.shape) != 2 or (len(tuple(source.uses())) > 1 and not shared):
            continue
        folded = add_tensor(model, f"{node.outputs[0].name}_folded", _transposed(tensor))
        replace_uses(node.outputs[0], folded)
        model.graph.remove(node, safe=True)
    drop_unused_weights(model)


def restore_weight_names(model: ir.Model, module: nn.Module) -> None:
    """Gives each weight the name of the parameter or buffer that it holds, directly or transposed."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    weights = stored_weights(module)
    known: dict[tuple[object, ...], list[tuple[str, ir.TensorProtocol]]] = {}
    for name, tensor in tensors.items():
        held: ir.TensorProtocol | None = None if weights is None else weights.weight(tensor)
        if held is None:
            held = ir.Tensor((tensor.detach().float() if tensor.dtype in HALVES else tensor.detach()).numpy())
        for form in (held, _transposed(held)) if len(held.shape) == 2 else (held,):
            known.setdefault(_key(form), []).append((name, form))
    taken = {name for name in model.graph.initializers if name in tensors}
    for value in tuple(model.graph.initializers.values()):
        content = value.const_value
        plain = str(value.name).removeprefix(f"{DECODER}.")
        if content is None or content.size < 2:
            continue
        fitting = [name for name, form in known.get(_key(content), []) if _are_equal(form, content)]
        name = plain if plain in fitting else next((n for n in fitting if n not in taken), plain)
        if name != value.name and name not in model.graph.initializers:
            value.name = name
        taken.add(name)


def _matrices(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT:
            yield value, tensor


def _transposed(matrix: ir.TensorProtocol) -> ir.TensorProtocol:
    return matrix.transposed() if isinstance(matrix, StoredWeight) else ir.Tensor(matrix.numpy().T)


def _key(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Returns type, shape and a few elements, equal for equal tensors: avoids most comparisons of whole tensors."""
    places = np.arange(0, tensor.size, max(1, tensor.size // 61))
    few = tensor.sample(places) if isinstance(tensor, StoredWeight) else tensor.numpy().flat[places]
    return tensor.dtype, tuple(tensor.shape.numpy()), few.tobytes()


def _are_equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol) -> bool:
    """Whether two tensors with the same key have the same content. Reads them only if it must."""
    if isinstance(other, StoredWeight) and other.is_same(one):
        return True
    return one is not None and np.array_equal(one.numpy(), other.numpy())


# --- names --------------------------------------------------------------------------------------------------------
def name_axes(
    model: ir.Model,
    layers: tuple[KVGeometry, ...],
    vocab_size: int,
    rows: tuple[RowsGeometry, ...] = (),
    states: tuple[StateGeometry, ...] = (),
) -> None:
    """Sets the shapes of inputs and outputs: symbols for dynamic axes, numbers for heads, head size and vocabulary."""
    new = (names.BATCH, names.SEQUENCE)
    shapes: dict[str, tuple[str | int, ...]] = {
        names.INPUT_IDS: new,
        names.ATTENTION_MASK: (names.BATCH, names.TOTAL),
        names.POSITION_IDS: new,
        names.LOGITS: (*new, vocab_size),
    }
    for i, g in enumerate(layers):
        shapes[names.past_key(i)] = (names.BATCH, g.kv_heads, names.PAST, g.key_head_size)
        shapes[names.past_value(i)] = (names.BATCH, g.kv_heads, names.PAST, g.value_head_size)
        shapes[names.present_key(i)] = (names.BATCH, g.kv_heads, names.TOTAL, g.key_head_size)
        shapes[names.present_value(i)] = (names.BATCH, g.kv_heads, names.TOTAL, g.value_head_size)
    for i, kept in enumerate(rows):
        shapes[names.past_conv(i)] = (names.BATCH, names.PAST_ROWS, kept.size)
        shapes[names.present_conv(i)] = (names.BATCH, names.PRESENT_ROWS, kept.size)
    for past, state in zip(names.past_states([state.kind for state in states]), states, strict=True):
        shapes[past] = shapes[names.present_of(past)] = (names.BATCH, *state.shape)
    ends = [*model.graph.inputs, *model.graph.outputs]
    assert {value.name for value in ends} == set(shapes), f"{[v.name for v in ends]} are not {list(shapes)}"
    for value in ends:
        value.shape = ir.Shape(shapes[str(value.name)])


def strip_traces(model: ir.Model) -> None:
    """Removes metadata, doc strings and inferred shapes: they hold the exporting machine's paths and torch's names."""
    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "pastkey", None
    model.ir_version = IR_VERSION
    model.graph.name = "decoder"
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            if isinstance(value.const_value, ir.TensorProtoTensor):  # a constant loaded from a file is immutable
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
            value.const_value.metadata_props.clear()
            value.const_value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if id(value) not in ends:
                value.shape = value.type = None
