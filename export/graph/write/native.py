"""The native graph: the last-logits graph by the operators of pastkey's kernel library (`kernels/`), same weights.

1. MatMulNBits with 8 or 4 bits, blocks of 32 -> MatMulInt8, by scales and offsets as they are stored
2. the two terms of the output head           -> one MatMulInt8
3. a bias and SiLU or GELU behind, or gating  -> in the same node
4. a norm in front, with its residual sum     -> NormMatMulInt8
5. GroupQueryAttention                        -> DecoderAttention, with the cache in float16 if all calls have a kernel
6. LinearAttention                            -> DecoderRecurrence
7. CausalConvWithState and its transposes -> DecoderConvolution

A node without a kernel stays as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.precisions import PRECISIONS

from ..edit import (
    CONTRIB_DOMAIN,
    input_of,
    producer,
    replace_node,
    replace_value,
    shape_of,
    sole_consumer,
    weight,
)
from .sequence_lengths import SEQLENS_K, TOTAL
from .tables import TableRows, compute_apart, table_rows
from .windows import POSITION_IDS

_BLOCK = 32
_ZERO_POINT_INPUT = 3  # of MatMulNBits; group indices and a bias follow
_NORMS = {  # operator -> whether it adds a residual, and its norm
    "SimplifiedLayerNormalization": (False, "rms"),
    "SkipSimplifiedLayerNormalization": (True, "rms"),
    "LayerNormalization": (False, "layer"),
    "SkipLayerNormalization": (True, "layer"),
}
_EPSILON = {False: 1e-5, True: 1e-12}  # defaults without and with a residual
_SUM = 3  # output of a norm with a residual
# Inputs of GroupQueryAttention: DecoderAttention has those before POSITION_IDS, head_sink and `evicted`.
_PAST, _HEAD_SINK = 3, 11
_HEAD_SIZES = range(32, 257, 16)
_ATTENTION = ("num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "local_window_size", "softcap",
              "smooth_softmax")  # fmt: skip


def add_native_graph(bundle: Bundle) -> Bundle:
    """Writes the native graph of a quantized bundle with the fused graph, if an operator has a kernel.

    Returns the bundle with the operators' version in its manifest.
    """
    manifest = bundle.manifest
    if manifest.graph != "fused" or not PRECISIONS[manifest.precision].quantized:
        return bundle
    model = ir.load(bundle.last_logits_graph)
    if not to_native(model):
        return bundle
    ir.save(model, bundle.path / names.NATIVE_GRAPH)
    return dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, native=names.NATIVE_OPERATORS))


def to_native(model: ir.Model) -> bool:
    """Replaces the nodes that have a kernel. Returns whether there was any."""
    matmuls = [node for node in model.graph if _has_kernel(node)]
    for node in matmuls:
        _replace_matmul(model, node)
    attention = [node for node in model.graph if _is_attention(node)]
    for node in attention:
        _replace_attention(model, node)
    states = [_replace_recurrence(model, node) or _replace_convolution(model, node) for node in tuple(model.graph)]
    if not matmuls and not attention and not any(states):
        return False
    _cache_in_float16(model)
    compute_apart(model)
    common.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[names.NATIVE_DOMAIN] = names.NATIVE_OPERATORS
    for node in model.graph:  # onnxruntime does not tell an operator the graph's imports
        if node.domain == names.NATIVE_DOMAIN:
            node.attributes["version"] = ir.AttrInt64("version", names.NATIVE_OPERATORS)
    return True


# --- matrices -----------------------------------------------------------------------------------------------------
def _has_kernel(node: ir.Node) -> bool:
    if node.op_type != "MatMulNBits" or node.domain != CONTRIB_DOMAIN:
        return False
    bits, size, zeros = _integer(node, "bits"), _integer(node, "block_size"), _zero_points(node)
    plain = not any(node.inputs[_ZERO_POINT_INPUT + 1 :])
    whole = (size == _BLOCK or (size, bits) == (_BLOCK // 2, 8)) and _integer(node, "K") % _BLOCK == 0
    known = bits in (4, 8) if zeros is None or _offsets(node) else bits == 4 and shape_of(zeros) is not None
    return plain and whole and known and table_rows(node.inputs[2]) is not None


def _zero_points(node: ir.Node) -> ir.Value | None:
    return node.inputs[_ZERO_POINT_INPUT] if len(node.inputs) > _ZERO_POINT_INPUT else None


def _offsets(node: ir.Node) -> tuple[TableRows, ir.Node] | None:
    """The offsets of a product's blocks, and the node that subtracts their term, as `rounding.rewrite` writes it."""
    whole = sole_consumer(node.outputs[0])
    term = None if whole is None or whole.op_type != "Sub" else producer(whole.inputs[1], "MatMul")
    centred = None if term is None else producer(input_of(term.inputs[1], "Transpose"), "Sub")
    found = None if centred is None else table_rows(centred.inputs[0])
    return None if whole is None or found is None else (found, whole)


def _replace_matmul(model: ir.Model, node: ir.Node) -> None:
    """Applies rules 1 to 4."""
    numbers, x, last, attributes = table_rows(node.inputs[2]), node.inputs[0], node, dict[str, Any]()
    assert numbers is not None
    codes, factors = numbers.take(model)
    stored, offsets = [factors, None] if codes is None else [codes, factors], list[ir.Value | None]()
    readers = [node]
    if (second := _offsets(node)) is not None:
        of_offsets, last = second
        codes, factors = of_offsets.take(model)
        offsets = [factors] if codes is None else [codes, factors]
        readers += [reader for reader in (() if x is None else x.consumers()) if _sums_blocks(reader, last)]
    if (terms := _two_terms(node, last)) is not None:
        x, last = terms
        attributes["terms"] = 2
    bias = None
    if (added := sole_consumer(last.outputs[0])) is not None and (vector := _bias(added, _integer(node, "N"))):
        last, bias = added, vector
    if (after := _activation(last)) is not None:
        last, attributes = after[0], attributes | after[1]
    if _integer(node, "bits") == 4:
        attributes["bits"] = 4
    weights = [node.inputs[1], *stored, bias, None if offsets else _zero_points(node), *offsets]
    norm = _norm(x, readers, _integer(node, "K"))
    if norm is None:
        new = ir.node("MatMulInt8", _trimmed([x, *weights]), attributes, domain=names.NATIVE_DOMAIN, name=node.name)
        replace_node(model, last, new)
        return
    residual, kind = _NORMS[norm.op_type]
    values = list(norm.inputs) + [None] * 4
    inputs = [values[0], values[1], *values[2:4]] if residual else [values[0], None, *values[1:3]]
    epsilon = norm.attributes.get_float("epsilon", _EPSILON[residual])
    attributes |= {"norm": kind, "epsilon": epsilon}
    summed = norm.outputs[_SUM] if len(norm.outputs) > _SUM and norm.outputs[_SUM].uses() else None
    new = ir.node(
        "NormMatMulInt8",
        _trimmed([*inputs, *weights]),
        attributes,
        domain=names.NATIVE_DOMAIN,
        num_outputs=1 if summed is None else 2,
        name=node.name,
    )
    _insert(model, last, norm, new, summed)


def _sums_blocks(node: ir.Node, whole: ir.Node) -> bool:
    """Whether a node is the first of the term that `whole` subtracts."""
    term = producer(whole.inputs[1], "MatMul")
    return term is not None and input_of(term.inputs[0], "ReduceSum") is node.outputs[0]


def _insert(model: ir.Model, last: ir.Node, norm: ir.Node, new: ir.Node, total: ir.Value | None) -> None:
    """Replaces `norm`, whose sum `new` computes, and `last`, whose result `new` computes."""
    model.graph.insert_before(norm, new)
    replace_value(model, last.outputs[0], new.outputs[0])
    if total is not None:
        replace_value(model, total, new.outputs[1])


def _two_terms(node: ir.Node, last: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Matches rule 2: the nodes that `rounding.rewrite` makes of the output head. Returns its input and its last node.

    `last` outputs the product of `node`.
    """
    both, parts = producer(node.inputs[0], "Concat"), sole_consumer(last.outputs[0])
    if both is None or parts is None or parts.op_type != "Split" or len(both.inputs) != 2:
        return None
    rest = producer(both.inputs[1], "Sub")
    if rest is None or rest.inputs[1] is not both.inputs[0] or rest.inputs[0] is None:
        return None
    readers = {reader for output in parts.outputs for reader, _ in output.uses()}
    if len(parts.outputs) != 2 or len(readers) != 1:
        return None
    total = readers.pop()
    return (rest.inputs[0], total) if total.op_type == "Add" else None


def _bias(node: ir.Node, columns: int) -> ir.Value | None:
    """The vector that an Add adds to a product of so many columns."""
    if node.op_type != "Add":
        return None
    return next((value for value in node.inputs if shape_of(value) == (columns,)), None)


def _activation(node: ir.Node) -> tuple[ir.Node, dict[str, Any]] | None:
    """Matches rule 3 behind `node`. Returns the last node and the attributes."""
    value = node.outputs[0]
    parts = sole_consumer(value)
    if parts is not None and parts.op_type == "Split" and _halves(parts):
        for gate in (0, 1):
            acted = _acted(parts.outputs[gate])
            if acted is None or (product := sole_consumer(acted[0].outputs[0])) is None:
                continue
            other = parts.outputs[1 - gate]
            if product.op_type == "Mul" and other in product.inputs and sole_consumer(other) is product:
                return product, {"activation": acted[1], "gate": gate}
        return None
    acted = _acted(value)
    return None if acted is None else (acted[0], {"activation": acted[1]})


def _acted(value: ir.Value) -> tuple[ir.Node, str] | None:
    """The last node of SiLU or GELU of a value that nothing else reads, and the activation's name."""
    readers = [node for node, _ in value.uses()]
    if len(readers) == 1 and readers[0].op_type == "Gelu" and readers[0].domain == "":
        tanh = readers[0].attributes.get_string("approximate", "none") == "tanh"
        return readers[0], "gelu_tanh" if tanh else "gelu"
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    if sigmoid is None or len(readers) != 2:
        return None
    product = sole_consumer(sigmoid.outputs[0])
    if product is None or product.op_type != "Mul" or product not in readers:
        return None
    return product, "silu"


def _halves(split: ir.Node) -> bool:
    """Whether a Split has two equal outputs on the last axis."""
    sizes = weight(split.inputs[1]) if len(split.inputs) > 1 else None
    equal = sizes is not None and len(sizes) == 2 and sizes[0] == sizes[1]
    return split.attributes.get_int("axis", 0) == -1 and len(split.outputs) == 2 and equal


def _norm(x: ir.Value | None, readers: list[ir.Node], channels: int) -> ir.Node | None:
    """Matches rule 4: the norm whose result only `readers` read, by constants of one number for each channel."""
    node = None if x is None else x.producer()
    if x is None or node is None or node.op_type not in _NORMS or x is not node.outputs[0]:
        return None
    if x.is_graph_output() or set(x.consumers()) != set(readers):
        return None
    residual, kind = _NORMS[node.op_type]
    vectors = list(node.inputs[2 if residual else 1 :])
    constants = [value for value in vectors if value is not None]
    extra = vectors[2 if kind == "layer" else 1 :]  # a bias that is added to the residual
    sized = all(shape_of(value) == (channels,) for value in constants)
    unread = all(not output.uses() for output in node.outputs[1:_SUM])
    last = node.attributes.get_int("axis", -1) == -1
    return node if sized and unread and last and constants and not any(extra) else None


# --- attention ----------------------------------------------------------------------------------------------------
def _is_attention(node: ir.Node) -> bool:
    if node.op_type != "GroupQueryAttention" or len(node.inputs) <= TOTAL:
        return False
    known = (_HEAD_SINK,) if _evicted(node) is None else (_HEAD_SINK, POSITION_IDS)
    further = [value for index, value in enumerate(node.inputs) if index >= POSITION_IDS and index not in known]
    past = node.inputs[_PAST]
    size = None if past is None or past.shape is None else past.shape[-1]
    plain = not any(further) and set(node.attributes) <= set(_ATTENTION) and len(node.outputs) == 3
    return plain and isinstance(size, int) and size in _HEAD_SIZES


def _evicted(node: ir.Node) -> ir.Value | None:
    """The graph's input `evicted` if `windows.py` gave the call its lengths."""
    rows = producer(node.inputs[SEQLENS_K], "Sub")
    return None if rows is None or rows.inputs[1].name != names.EVICTED else rows.inputs[1]  # type: ignore[union-attr]


def _replace_attention(model: ir.Model, node: ir.Node) -> None:
    """Applies rule 5."""
    values = [*node.inputs, *[None] * (_HEAD_SINK + 1)]
    if evicted := _evicted(node):  # then the lengths of all tokens
        given = {value.name: value for value in model.graph.inputs}
        values[SEQLENS_K], values[TOTAL] = given[names.SEQLENS_K], given[names.TOTAL_SEQUENCE_LENGTH]
    inputs = _trimmed([*values[:POSITION_IDS], values[_HEAD_SINK], evicted])
    new = ir.node(
        "DecoderAttention",
        inputs,
        dict(node.attributes),
        domain=names.NATIVE_DOMAIN,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    replace_node(model, node, new)


# --- states -------------------------------------------------------------------------------------------------------
_LANES, _KEY_SIZES, _TAPS = 16, range(16, 257, 16), range(1, 9)


def _state_of(node: ir.Node, operator: str) -> list[int] | None:
    """The sizes of the state, of one sequence, that an operator of onnxruntime reads."""
    if node.op_type != operator or node.domain != CONTRIB_DOMAIN or len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    shape = node.inputs[3].shape
    sizes = [] if shape is None else [size for size in shape[1:] if isinstance(size, int)]
    return sizes if shape is not None and len(sizes) == len(shape) - 1 else None


def _replace_recurrence(model: ir.Model, node: ir.Node) -> bool:
    """Applies rule 6. Returns whether the node has a kernel."""
    sizes = _state_of(node, "LinearAttention")
    fits = sizes is not None and sizes[1] in _KEY_SIZES and sizes[2] % _LANES == 0
    if not fits or _integer(node, "kv_num_heads") % max(1, _integer(node, "q_num_heads")):
        return False
    attributes = {name: node.attributes[name] for name in ("q_num_heads", "kv_num_heads", "scale", "update_rule")
                  if name in node.attributes}  # fmt: skip
    _put(model, node, node, "DecoderRecurrence", list(node.inputs), attributes)
    return True


def _replace_convolution(model: ir.Model, node: ir.Node) -> bool:
    """Applies rule 7. Returns whether the node has a kernel."""
    sizes = _state_of(node, "CausalConvWithState")
    before, after = producer(node.inputs[0], "Transpose"), sole_consumer(node.outputs[0])
    ends = [each for each in (before, after) if each is not None and each.op_type == "Transpose"]
    swapped = [each for each in ends if list(each.attributes.get_ints("perm", [])) == [0, 2, 1]]
    if sizes is None or sizes[0] % _LANES or sizes[1] + 1 not in _TAPS or len(swapped) < 2:
        return False
    activation = node.attributes.get_string("activation", "none")
    if activation not in ("none", "silu", "swish"):
        return False
    inputs = [swapped[0].inputs[0], *node.inputs[1:4]]
    _put(model, swapped[1], node, "DecoderConvolution", inputs, {"activation": activation.replace("swish", "silu")})
    return True


def _put(model: ir.Model, last: ir.Node, node: ir.Node, operator: str, inputs: list[Any], attributes: Any) -> None:
    """Replaces `node`, whose state an operator returns, and `last`, whose result it returns."""
    new = ir.node(operator, inputs, attributes, domain=names.NATIVE_DOMAIN, num_outputs=2, name=node.name)
    model.graph.insert_before(node, new)
    replace_value(model, last.outputs[0], new.outputs[0])
    replace_value(model, node.outputs[1], new.outputs[1])


def _cache_in_float16(model: ir.Model) -> None:
    """Changes the type of the cache to float16, if only DecoderAttention reads its numbers."""
    ends = (names.PAST_PREFIX, names.PRESENT_PREFIX)
    both = [value for value in (*model.graph.inputs, *model.graph.outputs) if str(value.name).startswith(ends)]
    cached = [value for value in both if not names.is_state(str(value.name))]
    nodes = [node for value in cached for node in (*value.consumers(), value.producer()) if node is not None]
    if all(node.op_type in ("DecoderAttention", "Shape") for node in nodes):  # a trace reads the batch from any shape
        for value in cached:
            value.type = ir.TensorType(ir.DataType.FLOAT16)


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes.get_int(name, 0))
