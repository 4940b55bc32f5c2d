"""Rewrites a graph to read quantized weights in blocks. `blocks` makes the arrays, `merge` joins projections.

MatMuls by a weight become com.microsoft.MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md);
at accuracy level 4, activations are also quantized to int8 per block, at run time. Embeddings gather blocks and scales,
and multiply: onnxruntime's operator for that, GatherBlockQuantized, is not in the WebAssembly that transformers.js
loads in a browser. Scales are computed of many matrices at once, as Cast(scale codes) * row scales, which onnxruntime
folds into constants when it loads the graph.

Rules over the graph:

    1. MatMul(x, W)             -> MatMulNBits, merged with others that read x
    2. Gemm(x, W[, bias])       -> MatMulNBits [+ Add]
    3. Gather(E, ids), axis 0   -> (Gather(blocks, ids) - 128) * Gather(scales, ids) [+ Slice back to the width
                                   before padding]
    4. MatMul(x, Transpose(E))  -> MatMulNBits over the same bytes as rule 3: a tied head is stored once
    5. the output head          -> residual (two-term) quantization of x: int8 of x, and int8 of the remaining error.
                                   The rounding of this one activation is a third of int8's error, and a second row
                                   adds little cost

Weights that are in blocks already (`blocks`), since they were rounded beforehand or their source has them so, are
read as they are, and merged among those of one form. Blocks with offsets have a second term: the sums of x in each
block, times the offsets. Their integers are centred first, so that the rounding of x is not amplified. Blocks with
another order of channels read x in that order.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from pastkey.errors import InputError
from pastkey.providers import Form

from ...graph.blocks import Blocks, Numbers
from ...graph.edit import (
    CONTRIB_DOMAIN,
    NodeBuilder,
    add_weight,
    drop_unused_weights,
    replace_node,
    replace_uses,
)
from ...graph.write.output_head import mark_head, output_head
from ..changes import INPUT, changes_of, record_change
from . import block_dequantize
from .block_dequantize import dequantize_linear
from .blocks import choose_block_size, join, quantize_blocks, stacked
from .matrices import MatMulWeight, add_lazy_weight, embedding_weight, mark_weights, matmul_weight, steering_weights
from .merge import Projections, find_mergeable, insert_merged

ACCURACY_LEVEL = 4  # int8 activations: the only level with a fast kernel for 8-bit weights
GPU_ACCURACY_LEVEL = 0  # activations are not quantized
_COMPUTED_TOGETHER = 30  # matrices; their sizes must be in the graph itself, below INLINE_BYTES
NONE_ROUNDED: Mapping[str, Blocks] = MappingProxyType({})
_MIDDLE_OF_OFFSETS = {4: 8, 8: 16}  # bits -> the zero point of blocks with offsets; those in 8 bits hold 5


def quantize(
    model: ir.Model,
    keep: Collection[str] = (),
    head: ir.Node | None = None,
    blocks: Mapping[str, Blocks] = NONE_ROUNDED,
    form: Form = Form.MATMUL_NBITS,
) -> None:
    """Quantizes every matrix of a float32 graph in place, by the rules above. Marks the output head.

    Args:
        model: The graph.
        keep: Names of initializers that stay in float32.
        head: The output head, if the graph does not show it.
        blocks: Matrices that are in blocks already, by initializer name.
        form: The operators.

    Raises:
        InputError: A weight holds NaN or infinity.
    """
    if head is None:
        head = output_head(model)
    weights = _Weights(model, frozenset(keep) | (steering_weights(model) - blocks.keys()), blocks, form)
    matmuls = [n for n in model.graph if n.op_type == "MatMul" and n is not head and weights.of(n)]
    by_form: dict[Hashable, list[ir.Node]] = {}
    for node in matmuls:
        by_form.setdefault(weights.form_of(node), []).append(node)
    mergeable = [projections for nodes in by_form.values() for projections in find_mergeable(nodes)]
    merged = {id(node) for projections in mergeable for node in projections.matmuls}
    for node in tuple(model.graph):
        if embedding_weight(node) is not None:
            _quantize_embedding(model, node, weights)
        elif node is head and form is Form.GPU:
            mark_head(_quantize_matmul(model, node, weights))
        elif node is head:
            _quantize_head(model, node, weights)
        elif node.op_type in ("MatMul", "Gemm") and id(node) not in merged:
            _quantize_matmul(model, node, weights)
    for projections in mergeable:
        _quantize_merged(model, projections, weights)
    weights.compute_scales()
    for node in tuple(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    drop_unused_weights(model)
    if form is Form.DEQUANTIZE_LINEAR:
        model.graph.opset_imports[""] = block_dequantize.OPSET
    else:
        model.graph.opset_imports[CONTRIB_DOMAIN] = 1


# --- weights ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Stored:
    """The initializers of one quantized matrix.

    `blocks` and `table` share the same bytes. MatMulNBits prepacks its weights at load and then frees the initializer,
    unless something else uses it. Only the gathered rows of a table are loaded into memory.
    """

    matrix: Blocks
    blocks: ir.Value  # (N, blocks, block_size * bits / 8) uint8, for MatMulNBits
    table: ir.Value  # the same, for Gather
    scales: ir.Value  # (N, blocks) float32; `compute_scales` replaces it by nodes that are folded at load
    weights: tuple[MatMulWeight, ...]  # that the matrix was made of
    zeros: ir.Value | None = None  # zero points, if not all are the middle
    offsets: ir.Value | None = None  # as scales
    order: ir.Value | None = None


class _Weights:
    """The quantized matrices of a graph: one that is used twice is stored once."""

    def __init__(self, model: ir.Model, keep: frozenset[str], blocks: Mapping[str, Blocks], form: Form) -> None:
        self._model = model
        self._keep = keep  # names of initializers that stay in float32
        self._blocks = blocks  # by the names of initializers
        self._stored: dict[tuple[int, ...], _Stored] = {}  # by the identity of initializers
        self.form = form
        self._dequantized: dict[str, ir.Value] = {}  # by the names of blocks

    def of(self, node: ir.Node) -> MatMulWeight | None:
        """As `matmul_weight`, but None for a weight that stays in float32."""
        found = matmul_weight(node)
        return None if found is None or self.kept(found.initializer) else found

    def kept(self, value: ir.Value) -> bool:
        """Whether the value stays in float32."""
        return value.name in self._keep

    def form_of(self, node: ir.Node) -> Hashable:
        """Equal for MatMuls whose weights can be stacked. Matrices that are rounded now all can."""
        found = self.of(node)
        before = None if found is None else self._blocks.get(str(found.initializer.name))
        return None if before is None else before.form

    def store(self, *weights: MatMulWeight) -> _Stored:
        """Quantizes weights, stacked vertically as one matrix."""
        key = tuple(id(w.initializer) for w in weights)
        if key not in self._stored:
            matrix = join([self._blocks.get(str(w.initializer.name)) or _quantized(w) for w in weights])
            name = "+".join(str(w.initializer.name) for w in weights)
            blocks = self._add_data(f"{name}.blocks", matrix)
            table = blocks if matrix.zeros is not None else self._add_data(f"{name}.table", matrix)
            self._stored[key] = _Stored(
                matrix, blocks, table, ir.Value(name=f"{name}.scales"), weights, self._zeros(matrix, name),
                None if matrix.offsets is None else ir.Value(name=f"{name}.offsets"), self._order(matrix, name, weights)
            )  # fmt: skip
        return self._stored[key]

    def _zeros(self, matrix: Blocks, name: str) -> ir.Value | None:
        if matrix.zeros is not None:
            return add_weight(self._model, f"{name}.zeros", matrix.zeros.reshape(-1))
        if matrix.offsets is None or matrix.middle == _MIDDLE_OF_OFFSETS[matrix.bits]:
            return None
        rows, blocks, _ = matrix.shape
        builder = NodeBuilder(self._model, f"{name}.zeros")
        value = ir.AttrTensor("value", ir.Tensor(np.array([_MIDDLE_OF_OFFSETS[matrix.bits]], np.uint8)))
        zeros = builder.add("ConstantOfShape", builder.constant("shape", np.array([rows * blocks])), value=value)
        self._model.graph.insert_before(self._model.graph[0], builder.nodes)
        return zeros

    def _order(self, matrix: Blocks, name: str, weights: Sequence[MatMulWeight]) -> ir.Value | None:
        if matrix.order is None:
            return None
        for weight in map(str, (read.initializer.name for read in weights)):
            record_change(self._model, weight, changes_of(self._model, weight), (INPUT, "permuted", matrix.order))
        return add_weight(self._model, f"{name}.order", matrix.order.astype(np.int64))

    def _add_data(self, name: str, matrix: Blocks) -> ir.Value:
        return add_lazy_weight(self._model, name, ir.DataType.UINT8, matrix.shape, matrix.make)

    def product(self, x: ir.Value | None, stored: _Stored, name: str) -> list[ir.Node]:
        """Returns the nodes that multiply by a quantized matrix; the last one outputs the product."""
        ordered = NodeBuilder(self._model, f"{name}_ordered")
        if stored.order is not None:
            x = ordered.add("Gather", x, stored.order, axis=-1)
        if self.form is not Form.DEQUANTIZE_LINEAR:
            level = ACCURACY_LEVEL if self.form is Form.MATMUL_NBITS else GPU_ACCURACY_LEVEL
            node = _matmul_nbits(x, stored, name, level)
            mark_weights(node, stored.weights)
            return [*ordered.nodes, node, *_offset(self._model, node, stored)]
        key = str(stored.blocks.name)
        if key not in self._dequantized:
            node = dequantize_linear(self._model, key.removesuffix(".blocks"), stored.matrix)
            self._model.graph.insert_before(self._model.graph[0], [node])
            self._dequantized[key] = node.outputs[0]
        builder = NodeBuilder(self._model, f"{name}_padded")
        if padding := _padded(stored.matrix) - stored.matrix.columns:
            x = builder.add("Pad", x, builder.constant("end", np.array([0, 0, 0, 0, 0, padding])))
        return [*ordered.nodes, *builder.nodes, ir.node("MatMul", [x, self._dequantized[key]], name=name)]

    def compute_scales(self) -> None:
        """Adds the nodes for the scales and offsets of all matrices. Those of one form share nodes.

        onnxruntime folds them at load, which is slower for a node than for its numbers.
        """
        by_form: dict[Hashable, list[tuple[ir.Value, Numbers]]] = {}
        for stored in self._stored.values():
            for value, numbers in ((stored.scales, stored.matrix.scales), (stored.offsets, stored.matrix.offsets)):
                if value is not None and numbers is not None and value.uses():
                    by_form.setdefault(numbers.form, []).append((value, numbers))
        for number, same in enumerate(by_form.values()):
            for first in range(0, len(same), _COMPUTED_TOGETHER):
                values, parts = zip(*same[first : first + _COMPUTED_TOGETHER], strict=True)
                builder = NodeBuilder(self._model, f"scales_of_{parts[0].shape[1]}_{number}_{first}")
                for value, part in zip(values, _computed(builder, parts), strict=True):
                    replace_uses(value, part)
                self._model.graph.insert_before(self._model.graph[0], builder.nodes)


def _computed(builder: NodeBuilder, parts: Sequence[Numbers]) -> tuple[ir.Value, ...]:
    """Builds the nodes for numbers of one form, (N, blocks) float32 each."""
    whole = stacked(parts)
    rows, blocks = whole.shape
    groups = whole.factors.shape[1]
    if whole.codes is None:
        value = builder.constant("row_scales", whole.factors)
        if whole.factors.dtype != np.float32:
            value = builder.add("Cast", value, to=ir.DataType.FLOAT)
    else:  # several groups have a separate axis, which multiplication broadcasts over
        codes, factors = whole.codes, whole.factors
        if groups > 1:
            codes, factors = codes.reshape(rows, groups, -1), factors[:, :, None]
        scale_codes, row_scales = builder.constant("scale_codes", codes), builder.constant("row_scales", factors)
        value = builder.add("Mul", builder.add("Cast", scale_codes, to=ir.DataType.FLOAT), row_scales)
        if groups > 1:
            value = builder.add("Reshape", value, builder.constant("shape", np.array([rows, blocks])))
    if len(parts) == 1:
        return (value,)
    sizes = builder.constant("rows", np.array([part.shape[0] for part in parts]))
    return builder.add_several("Split", len(parts), value, sizes, axis=0)


def _quantized(read: MatMulWeight) -> Blocks:
    matrix = read.matrix
    try:
        return quantize_blocks(matrix, choose_block_size(matrix.shape[1]))
    except ValueError as error:
        raise not_finite(read.initializer, error) from None


def not_finite(initializer: ir.Value, error: ValueError) -> InputError:
    """Returns the error for a weight that cannot be quantized."""
    return InputError(f"the weight {initializer.name} holds {error}, which cannot be quantized: training went wrong")


# --- rules --------------------------------------------------------------------------------------------------------
def _matmul_nbits(x: ir.Value | None, stored: _Stored, name: str, accuracy_level: int) -> ir.Node:
    attributes = {
        "K": stored.matrix.columns,
        "N": stored.matrix.shape[0],
        "bits": stored.matrix.bits,
        "block_size": stored.matrix.block_size,
        "accuracy_level": accuracy_level,
    }
    inputs = [x, stored.blocks, stored.scales, *([] if stored.zeros is None else [stored.zeros])]
    return ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB_DOMAIN, name=name)


def _offset(model: ir.Model, product: ir.Node, stored: _Stored) -> list[ir.Node]:
    """Returns the nodes of the second term of blocks with offsets; the last one outputs the sum of both."""
    if stored.offsets is None:
        return []
    _, blocks, _ = stored.matrix.shape
    builder = NodeBuilder(model, f"{product.name}_offsets")
    split = builder.constant("split_shape", np.array([0, 0, blocks, stored.matrix.block_size]))
    last = builder.constant("last_axis", np.array([-1]))
    sums = builder.add("ReduceSum", builder.add("Reshape", product.inputs[0], split), last, keepdims=0)
    middle = builder.constant("middle", np.array(_MIDDLE_OF_OFFSETS[stored.matrix.bits], np.float32))
    left = builder.add("Sub", stored.offsets, builder.add("Mul", stored.scales, middle))
    term = builder.add("MatMul", sums, builder.add("Transpose", left))
    return [*builder.nodes, ir.node("Sub", [product.outputs[0], term], name=f"{product.name}_whole")]


def _quantize_matmul(model: ir.Model, node: ir.Node, weights: _Weights) -> list[ir.Node]:
    """Applies rules 1, 2 and 4. Returns the nodes that replace `node`."""
    found = weights.of(node)
    if found is None:
        return []
    nodes = weights.product(node.inputs[0], weights.store(found), str(node.name))
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    replace_node(model, node, *nodes)
    return nodes


def _quantize_merged(model: ir.Model, projections: Projections, weights: _Weights) -> None:
    """Applies rule 1 to several MatMuls that read one activation."""
    found = [read for node in projections.matmuls if (read := weights.of(node)) is not None]
    first = projections.matmuls[0]
    *before, merged = weights.product(first.inputs[0], weights.store(*found), str(first.name))
    model.graph.insert_before(first, before)
    insert_merged(model, projections, merged, [read.shape[0] for read in found])


def _quantize_head(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    """Applies rule 5. The first term repeats the kernel's own rounding, so that the second is the remaining error."""
    found = weights.of(node)
    if found is None:
        return
    x, head, builder = node.inputs[0], weights.store(found), NodeBuilder(model, str(node.name))
    columns, (_, blocks, _), size = head.matrix.columns, head.matrix.shape, head.matrix.block_size
    padded = x
    if columns % size:
        padding = np.array([0, 0, 0, 0, 0, blocks * size - columns])
        padded = builder.add("Pad", x, builder.constant("padding", padding))
    split = builder.add("Reshape", padded, builder.constant("split_shape", np.array([0, 0, blocks, size])))
    last_axis = builder.constant("last_axis", np.array([-1]))
    largest = builder.add("ReduceMax", builder.add("Abs", split), last_axis, keepdims=1)
    tiny = builder.constant("tiny", np.array(np.finfo(np.float32).tiny * 127, np.float32))
    scale = builder.add("Div", builder.add("Max", largest, tiny), builder.constant("levels", np.array(127, np.float32)))
    rounded = builder.add("Mul", builder.add("Round", builder.add("Div", split, scale)), scale)
    first = builder.add("Reshape", rounded, builder.constant("whole_shape", np.array([0, 0, blocks * size])))
    first = _without_padding(builder, first, head.matrix)
    twice = builder.add("Concat", first, builder.add("Sub", x, first), axis=1)  # (B, 2 T, K)
    *before, matmul = weights.product(twice, head, str(node.name))
    # Split and Add: a reduction over two numbers is slower.
    terms = ir.node("Split", matmul.outputs, {"axis": 1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}_terms")
    both = ir.node("Add", terms.outputs, name=f"{node.name}_sum")
    nodes = (*builder.nodes, *before, matmul, terms, both)
    replace_node(model, node, *nodes)
    mark_head(nodes)


def _quantize_embedding(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    """Applies rule 3."""
    embedding, indices = embedding_weight(node), node.inputs[1]
    if embedding is None or weights.kept(embedding):
        return
    assert indices is not None
    builder, found = NodeBuilder(model, str(node.name)), weights.store(MatMulWeight(embedding, transposed=False))
    if weights.form is Form.GPU:
        replace_node(model, node, *_gather_block_quantized(model, indices, found, builder))
        return
    # ... are the axes of the indices: (..., blocks, block_size), (..., blocks, 1), (..., blocks * block_size)
    numbers = builder.add("Cast", builder.add("Gather", found.table, indices, axis=0), to=ir.DataType.FLOAT)
    last = builder.constant("last", np.array([-1]))
    if found.matrix.bits == 4:
        numbers = _two_of_each(builder, numbers, indices, found.matrix)

    def of_blocks(value: ir.Value) -> ir.Value:
        return builder.add("Unsqueeze", builder.add("Gather", value, indices, axis=0), last)

    if found.offsets is None:
        numbers = builder.add("Sub", numbers, builder.constant("zero_point", np.array(found.matrix.middle, np.float32)))
    rows = builder.add("Mul", numbers, of_blocks(found.scales))
    if found.offsets is not None:
        rows = builder.add("Sub", rows, of_blocks(found.offsets))
    flat = builder.add("Concat", builder.add("Shape", indices), builder.constant("rest", np.array([-1])), axis=0)
    _without_padding(builder, builder.add("Reshape", rows, flat), found.matrix)
    replace_node(model, node, *builder.nodes)


def _two_of_each(builder: NodeBuilder, both: ir.Value, indices: ir.Value, matrix: Blocks) -> ir.Value:
    """Splits each byte into two numbers of 4 bits: (..., blocks, block_size / 2) -> (..., blocks, block_size)."""
    last, sixteen = builder.constant("pair", np.array([-1])), builder.constant("sixteen", np.array(16, np.float32))
    high = builder.add("Floor", builder.add("Div", both, sixteen))
    low = builder.add("Sub", both, builder.add("Mul", high, sixteen))
    pairs = builder.add("Concat", builder.add("Unsqueeze", low, last), builder.add("Unsqueeze", high, last), axis=-1)
    sizes = builder.constant("whole_block", np.array([matrix.shape[1], matrix.block_size]))
    return builder.add("Reshape", pairs, builder.add("Concat", builder.add("Shape", indices), sizes, axis=0))


def _gather_block_quantized(
    model: ir.Model, indices: ir.Value, stored: _Stored, builder: NodeBuilder
) -> tuple[ir.Node, ...]:
    """Applies rule 3 with one operator, over the same bytes: its default zero point is the middle."""
    matrix = stored.matrix
    rows, blocks, size = matrix.shape
    table = add_lazy_weight(
        model,
        f"{stored.table.name}.rows",
        ir.DataType.UINT8,
        (rows, blocks * size),
        lambda: matrix.data.reshape(rows, -1),
    )
    attributes = {
        "bits": stored.matrix.bits,
        "block_size": stored.matrix.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    gather = ir.node(
        "GatherBlockQuantized", [table, indices, stored.scales], attributes, domain=CONTRIB_DOMAIN, name=f"{table.name}"
    )
    gather.outputs[0].name = f"{table.name}_gathered"
    _without_padding(builder, gather.outputs[0], stored.matrix)
    return (gather, *builder.nodes)


def _without_padding(builder: NodeBuilder, rows: ir.Value, matrix: Blocks) -> ir.Value:
    """Cuts rows (..., blocks * block_size) to (..., K)."""
    if _padded(matrix) == matrix.columns:
        return rows
    bounds = (("start", 0), ("width", matrix.columns), ("axis", -1))
    return builder.add("Slice", rows, *(builder.constant(what, np.array([number])) for what, number in bounds))


def _padded(matrix: Blocks) -> int:
    """Returns K rounded up to whole blocks."""
    return matrix.shape[1] * matrix.block_size
