"""Rewrites a graph to read quantized weights in blocks. `blocks` makes the arrays, `merge` joins projections.

MatMuls by a weight become com.microsoft.MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md);
at accuracy level 4, activations are also quantized to int8 per block, at run time. Embeddings gather blocks and scales,
and multiply: onnxruntime's operator for that, GatherBlockQuantized, is not in the WebAssembly that transformers.js
loads in a browser. Scales are Cast(scale codes) * row scales, of many matrices at once, which onnxruntime folds into
constants when it loads the graph.

Rules over the graph:

    1. MatMul(x, W)             -> MatMulNBits, merged with others that read x
    2. Gemm(x, W[, bias])       -> MatMulNBits [+ Add]
    3. Gather(E, ids), axis 0   -> (Gather(blocks, ids) - 128) * Gather(scales, ids) [+ Slice back to the width
                                   before padding]
    4. MatMul(x, Transpose(E))  -> MatMulNBits over the same bytes as rule 3: a tied head is stored once
    5. the output head          -> residual (two-term) quantization of x: int8 of x, and int8 of the remaining error.
                                   The rounding of this one activation is a third of int8's error, and a second row
                                   adds little cost

MatMuls whose weight was rounded to fewer bits beforehand (`rounded`) read that instead, and are merged among
themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from pastkey.errors import InputError
from pastkey.providers import Form

from ...graph.edit import (
    CONTRIB_DOMAIN,
    NodeBuilder,
    add_weight,
    drop_unused_weights,
    replace_node,
    replace_uses,
)
from ...graph.write.output_head import mark_head, output_head
from . import block_dequantize
from .block_dequantize import dequantize_linear
from .blocks import ZERO, Blocks, choose_block_size, join, quantize_blocks
from .matrices import MatMulWeight, add_lazy_weight, embedding_weight, mark_weights, matmul_weight, steering_weights
from .merge import Projections, find_mergeable, insert_merged

ACCURACY_LEVEL = 4  # int8 activations: the only level with a fast kernel for 8-bit weights
GPU_ACCURACY_LEVEL = 0  # activations are not quantized
_COMPUTED_TOGETHER = 30  # matrices; their sizes must be in the graph itself, below INLINE_BYTES
NONE_ROUNDED: Mapping[str, Blocks] = MappingProxyType({})


def quantize(
    model: ir.Model,
    keep: Collection[str] = (),
    head: ir.Node | None = None,
    rounded: Mapping[str, Blocks] = NONE_ROUNDED,
    form: Form = Form.MATMUL_NBITS,
) -> None:
    """Quantizes every matrix of a float32 graph in place, by the rules above. Marks the output head.

    Args:
        model: The graph.
        keep: Names of initializers that stay in float32.
        head: The output head, if the graph does not show it.
        rounded: Matrices of fewer bits, by initializer name. Only MatMuls read these weights.
        form: The operators.

    Raises:
        InputError: A weight holds NaN or infinity.
    """
    if head is None:
        head = output_head(model)
    weights = _Weights(model, frozenset(keep) | steering_weights(model), rounded, form)
    matmuls = [n for n in model.graph if n.op_type == "MatMul" and n is not head and weights.of(n)]
    by_bits: dict[int, list[ir.Node]] = {}
    for node in matmuls:
        by_bits.setdefault(weights.bits(node), []).append(node)
    mergeable = [p for bits in sorted(by_bits, reverse=True) for p in find_mergeable(by_bits[bits])]
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
    zeros: ir.Value | None = None  # zero points, if there are fewer than 8 bits


class _Weights:
    """The quantized matrices of a graph: one that is used twice is stored once."""

    def __init__(self, model: ir.Model, keep: frozenset[str], rounded: Mapping[str, Blocks], form: Form) -> None:
        self._model = model
        self._keep = keep  # names of initializers that stay in float32
        self._rounded = rounded  # by the names of initializers
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

    def bits(self, node: ir.Node) -> int:
        """Returns the bits of the weight that a MatMul reads."""
        found = self.of(node)
        before = None if found is None else self._rounded.get(str(found.initializer.name))
        return 8 if before is None else before.bits

    def store(self, *weights: MatMulWeight) -> _Stored:
        """Quantizes weights, stacked vertically as one matrix."""
        key = tuple(id(w.initializer) for w in weights)
        if key not in self._stored:
            matrix = join([self._rounded.get(str(w.initializer.name)) or _quantized(w) for w in weights])
            name = "+".join(str(w.initializer.name) for w in weights)
            blocks, scales = self._add_data(f"{name}.blocks", matrix), ir.Value(name=f"{name}.scales")
            if matrix.zeros is None:
                table = self._add_data(f"{name}.table", matrix)
                self._stored[key] = _Stored(matrix, blocks, table, scales, weights)
            else:
                zeros = add_weight(self._model, f"{name}.zeros", matrix.zeros.reshape(-1))
                self._stored[key] = _Stored(matrix, blocks, blocks, scales, weights, zeros)
        return self._stored[key]

    def _add_data(self, name: str, matrix: Blocks) -> ir.Value:
        return add_lazy_weight(self._model, name, ir.DataType.UINT8, matrix.shape, matrix.make)

    def product(self, x: ir.Value | None, stored: _Stored, name: str) -> list[ir.Node]:
        """Returns the nodes that multiply by a quantized matrix; the last one outputs the product."""
        if self.form is not Form.DEQUANTIZE_LINEAR:
            level = ACCURACY_LEVEL if self.form is Form.MATMUL_NBITS else GPU_ACCURACY_LEVEL
            node = _matmul_nbits(x, stored, name, level)
            mark_weights(node, stored.weights)
            return [node]
        key = str(stored.blocks.name)
        if key not in self._dequantized:
            node = dequantize_linear(self._model, key.removesuffix(".blocks"), stored.matrix)
            self._model.graph.insert_before(self._model.graph[0], [node])
            self._dequantized[key] = node.outputs[0]
        builder = NodeBuilder(self._model, f"{name}_padded")
        if padding := _padded(stored.matrix) - stored.matrix.columns:
            x = builder.add("Pad", x, builder.constant("end", np.array([0, 0, 0, 0, 0, padding])))
        return [*builder.nodes, ir.node("MatMul", [x, self._dequantized[key]], name=name)]

    def compute_scales(self) -> None:
        """Adds the nodes for the scales of all matrices. Matrices with equally many blocks per row share nodes.

        onnxruntime folds them at load, which takes longer for a node than for its numbers.
        """
        by_width: dict[int, list[_Stored]] = {}
        for stored in self._stored.values():
            if not stored.scales.uses():
                continue
            by_width.setdefault(stored.matrix.scale_codes.shape[1], []).append(stored)
        for width, same in by_width.items():
            for first in range(0, len(same), _COMPUTED_TOGETHER):
                group = same[first : first + _COMPUTED_TOGETHER]
                builder = NodeBuilder(self._model, f"scales_of_{width}_{first}")
                scale_codes, row_scales = (
                    builder.constant(what, np.concatenate([getattr(stored.matrix, what) for stored in group]))
                    for what in ("scale_codes", "row_scales")
                )
                whole = builder.add("Mul", builder.add("Cast", scale_codes, to=ir.DataType.FLOAT), row_scales)
                parts: tuple[ir.Value, ...] = (whole,)
                if len(group) > 1:
                    rows = builder.constant("rows", np.array([stored.matrix.shape[0] for stored in group]))
                    parts = builder.add_several("Split", len(group), whole, rows, axis=0)
                self._model.graph.insert_before(self._model.graph[0], builder.nodes)
                for stored, part in zip(group, parts, strict=True):
                    replace_uses(stored.scales, part)


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
    integers = builder.add("Cast", builder.add("Gather", found.table, indices, axis=0), to=ir.DataType.FLOAT)
    centred = builder.add("Sub", integers, builder.constant("zero_point", np.array(ZERO, np.float32)))
    last = builder.constant("last", np.array([-1]))
    scales = builder.add("Unsqueeze", builder.add("Gather", found.scales, indices, axis=0), last)
    flat = builder.add("Concat", builder.add("Shape", indices), builder.constant("rest", np.array([-1])), axis=0)
    _without_padding(builder, builder.add("Reshape", builder.add("Mul", centred, scales), flat), found.matrix)
    replace_node(model, node, *builder.nodes)


def _gather_block_quantized(
    model: ir.Model, indices: ir.Value, stored: _Stored, builder: NodeBuilder
) -> tuple[ir.Node, ...]:
    """Applies rule 3 with one operator, over the same bytes: its default zero point is 128."""
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
