"""int8 and int4 weights in blocks: the graph. `blocks` has the arrays, `pack` joins products.

Products become com.microsoft.MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md);
at accuracy level 4 activations are quantized to int8 per block too, at run time. Embeddings gather blocks and scales,
and multiply: onnxruntime's operator for that, GatherBlockQuantized, is not in the WebAssembly that transformers.js
loads in a browser. Scales are Cast(bytes) * factors, of many matrices at once, which onnxruntime folds into constants
when it loads the graph.

Rules over the graph:

    1. MatMul(x, W)             -> MatMulNBits, joined with others that read x
    2. Gemm(x, W[, bias])       -> MatMulNBits [+ Add]
    3. Gather(E, ids), axis 0   -> (Gather(blocks, ids) - 128) * Gather(scales, ids) [+ Slice back to the width
                                   before padding]
    4. MatMul(x, Transpose(E))  -> MatMulNBits over the very bytes of rule 3: a tied head is stored once
    5. the output head          -> reads x twice, as int8 and as int8 of what that left of x: the rounding of this
                                   one activation is a third of int8's error, and a second row costs little beside one

Products whose matrix was rounded to 4 bits beforehand (`int4`) read that instead, and are joined among themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.errors import InputError

from . import gptq
from .blocks import ZERO, BlockQuantized, choose_block_size, join, quantize_blocks
from .gptq import FourBit
from .graph import Steps, add_weight, drop_unused_weights, replace_node, replace_uses, weight
from .last_position import output_head
from .pack import Pack, find_packs, split_up

BITS, INT4_BITS = 8, 4
ACCURACY_LEVEL = 4  # int8 activations: the only level with a fast kernel for 8-bit weights
_DOMAIN = "com.microsoft"
_COMPUTED_TOGETHER = 30  # matrices; their sizes must stand in the graph itself, where few bytes may


_NONE: Mapping[str, FourBit] = {}


def quantize(
    model: ir.Model,
    keep: Collection[str] = (),
    head: ir.Node | None = None,
    int4: Mapping[str, FourBit] = _NONE,
) -> None:
    """Quantizes every matrix of the graph in place, by the rules above, but the initializers named in `keep`.

    `head` is the output head, where the graph does not show it. `int4` holds matrices that only products read, by the
    names of their initializers. Raises InputError on NaN or infinity.
    """
    if head is None:
        head = next((output_head(value) for value in model.graph.outputs if value.name == names.LOGITS), None)
    weights = _Weights(model, frozenset(keep), int4)
    products = [n for n in model.graph if n.op_type == "MatMul" and n is not head and weights.factor(n)]
    packs = [p for bits in (BITS, INT4_BITS) for p in find_packs([n for n in products if weights.bits(n) == bits])]
    joined = {id(node) for pack in packs for node in pack.products}
    for node in tuple(model.graph):
        if gathered_table(node) is not None:
            _quantize_gather(model, node, weights)
        elif node is head:
            _quantize_head(model, node, weights)
        elif node.op_type in ("MatMul", "Gemm") and id(node) not in joined:
            _quantize_product(model, node, weights)
    for pack in packs:
        _quantize_pack(model, pack, weights)
    weights.compute_scales()
    for node in tuple(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    drop_unused_weights(model)
    model.graph.opset_imports[_DOMAIN] = 1


# --- weights ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Stored:
    """The initializers of one quantized matrix.

    `blocks` and `table` are over the same bytes. MatMulNBits reads and rearranges all of its own at load and then lets
    go of them, unless something else uses them too; of a table, only the rows that are gathered come into memory.
    """

    matrix: BlockQuantized | FourBit
    blocks: ir.Value  # (N, blocks, block_size) uint8, for products
    table: ir.Value  # the same, for gathering
    scales: ir.Value  # (N, blocks) float32; `compute_scales` puts what is computed at load in its place
    zeros: ir.Value | None = None  # zero points of 4-bit blocks


class _Weights:
    """The quantized matrices of a graph: one that is used twice is stored once."""

    def __init__(self, model: ir.Model, keep: frozenset[str], int4: Mapping[str, FourBit]) -> None:
        self._model = model
        self._keep = keep  # names of initializers that stay in float32
        self._int4 = int4  # by the names of initializers
        self._stored: dict[tuple[int, ...], _Stored] = {}  # by the identity of initializers

    def factor(self, node: ir.Node) -> tuple[ir.Value, bool] | None:
        """As `constant_factor`, of a matrix that is to be quantized."""
        found = constant_factor(node)
        return None if found is None or self.kept(found[0]) else found

    def kept(self, value: ir.Value) -> bool:
        """Whether it stays in float32."""
        return value.name in self._keep

    def bits(self, node: ir.Node) -> int:
        """Of the matrix that a product reads."""
        found = self.factor(node)
        return INT4_BITS if found is not None and found[0].name in self._int4 else BITS

    def store(self, factors: list[tuple[ir.Value, bool]]) -> _Stored:
        """Quantizes initializers (N, K), or (K, N) with True beside them, that are read below one another."""
        key = tuple(id(value) for value, _ in factors)
        if key not in self._stored and factors[0][0].name in self._int4:
            self._stored[key] = self._store_int4([str(value.name) for value, _ in factors])
        if key not in self._stored:
            matrix = join([_quantized(value, transposed) for value, transposed in factors])
            name = "+".join(str(value.name) for value, _ in factors)
            self._stored[key] = _Stored(
                matrix,
                add_weight(self._model, f"{name}.blocks", matrix.data),
                add_weight(self._model, f"{name}.table", matrix.data),
                ir.Value(name=f"{name}.scales"),
            )
        return self._stored[key]

    def _store_int4(self, names_of_all: list[str]) -> _Stored:
        matrix, name = gptq.join([self._int4[one] for one in names_of_all]), "+".join(names_of_all)
        blocks = add_weight(self._model, f"{name}.blocks", matrix.data)
        zeros = add_weight(self._model, f"{name}.zeros", matrix.zeros.reshape(-1))
        return _Stored(matrix, blocks, blocks, ir.Value(name=f"{name}.scales"), zeros)

    def compute_scales(self) -> None:
        """Adds the nodes for the scales of all matrices. Those of as many blocks to a row are computed together.

        onnxruntime folds them at load, and takes longer for a node than for its numbers.
        """
        by_width: dict[int, list[_Stored]] = {}
        for stored in self._stored.values():
            by_width.setdefault(stored.matrix.codes.shape[1], []).append(stored)
        for width, same in by_width.items():
            for first in range(0, len(same), _COMPUTED_TOGETHER):
                group = same[first : first + _COMPUTED_TOGETHER]
                steps = Steps(self._model, f"scales_of_{width}_{first}")
                codes, factors = (
                    steps.constant(what, np.concatenate([getattr(stored.matrix, what) for stored in group]))
                    for what in ("codes", "factors")
                )
                whole = steps.add("Mul", steps.add("Cast", codes, to=ir.DataType.FLOAT), factors)
                parts: tuple[ir.Value, ...] = (whole,)
                if len(group) > 1:
                    rows = steps.constant("rows", np.array([len(stored.matrix.data) for stored in group]))
                    parts = steps.add_several("Split", len(group), whole, rows, axis=0)
                self._model.graph.insert_before(self._model.graph[0], steps.nodes)
                for stored, part in zip(group, parts, strict=True):
                    replace_uses(stored.scales, part)


def _quantized(value: ir.Value, transposed: bool) -> BlockQuantized:
    array = weight(value)
    assert array is not None
    matrix = array.T if transposed else array
    try:
        return quantize_blocks(matrix, choose_block_size(matrix.shape[1]))
    except ValueError as error:
        raise InputError(
            f"the weight {value.name} holds {error}, which cannot be quantized: training went wrong"
        ) from None


# --- rules --------------------------------------------------------------------------------------------------------
def _product(x: ir.Value | None, stored: _Stored, name: str) -> ir.Node:
    attributes = {
        "K": stored.matrix.columns,
        "N": len(stored.matrix.data),
        "bits": BITS if stored.zeros is None else INT4_BITS,
        "block_size": stored.matrix.block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    inputs = [x, stored.blocks, stored.scales, *([] if stored.zeros is None else [stored.zeros])]
    return ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=name)


def _quantize_product(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    found = weights.factor(node)
    if found is None:
        return
    nodes = [_product(node.inputs[0], weights.store([found]), str(node.name))]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    replace_node(model, node, *nodes)


def _quantize_pack(model: ir.Model, pack: Pack, weights: _Weights) -> None:
    factors = [found for node in pack.products if (found := weights.factor(node)) is not None]
    activation = pack.products[0].inputs[0]
    joined = _product(activation, weights.store(factors), str(pack.products[0].name))
    split_up(model, pack, joined, [_rows(*factor) for factor in factors])


def _quantize_head(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    """Rule 5. The first reading repeats what the kernel itself does, so that the second is what it leaves."""
    found = weights.factor(node)
    if found is None or node.op_type != "MatMul":
        _quantize_product(model, node, weights)
        return
    x, head, steps = node.inputs[0], weights.store([found]), Steps(model, str(node.name))
    columns, blocks, size = head.matrix.columns, head.matrix.data.shape[1], head.matrix.block_size
    padded = x
    if columns % size:
        padding = np.array([0, 0, 0, 0, 0, blocks * size - columns])
        padded = steps.add("Pad", x, steps.constant("padding", padding))
    split = steps.add("Reshape", padded, steps.constant("split_shape", np.array([0, 0, blocks, size])))
    largest = steps.add("ReduceMax", steps.add("Abs", split), steps.constant("last_axis", np.array([-1])), keepdims=1)
    tiny = steps.constant("tiny", np.array(np.finfo(np.float32).tiny * 127, np.float32))
    scale = steps.add("Div", steps.add("Max", largest, tiny), steps.constant("levels", np.array(127, np.float32)))
    rounded = steps.add("Mul", steps.add("Round", steps.add("Div", split, scale)), scale)
    first = steps.add("Reshape", rounded, steps.constant("whole_shape", np.array([0, 0, blocks * size])))
    first = _without_padding(steps, first, head.matrix)
    twice = steps.add("Concat", first, steps.add("Sub", x, first), axis=1)  # (B, 2 T, K)
    product = _product(twice, head, str(node.name))
    # Of two numbers each, which is slower as a reduction.
    halves = ir.node(
        "Split", product.outputs, {"axis": 1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}_readings"
    )
    both = ir.node("Add", halves.outputs, name=f"{node.name}_sum")
    replace_node(model, node, *steps.nodes, product, halves, both)


def _quantize_gather(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    table, indices = gathered_table(node), node.inputs[1]
    if table is None or weights.kept(table):
        return
    assert indices is not None
    steps, found = Steps(model, str(node.name)), weights.store([(table, False)])
    # With ... for the axes of the indices: (..., blocks, block_size), (..., blocks, 1), (..., blocks * block_size)
    integers = steps.add("Cast", steps.add("Gather", found.table, indices, axis=0), to=ir.DataType.FLOAT)
    centred = steps.add("Sub", integers, steps.constant("zero_point", np.array(ZERO, np.float32)))
    last = steps.constant("last", np.array([-1]))
    scales = steps.add("Unsqueeze", steps.add("Gather", found.scales, indices, axis=0), last)
    flat = steps.add("Concat", steps.add("Shape", indices), steps.constant("rest", np.array([-1])), axis=0)
    _without_padding(steps, steps.add("Reshape", steps.add("Mul", centred, scales), flat), found.matrix)
    replace_node(model, node, *steps.nodes)


def _without_padding(steps: Steps, rows: ir.Value, matrix: BlockQuantized | FourBit) -> ir.Value:
    """Rows (..., blocks * block_size) as (..., K)."""
    if matrix.data[0].size == matrix.columns:
        return rows
    bounds = (("start", 0), ("width", matrix.columns), ("axis", -1))
    return steps.add("Slice", rows, *(steps.constant(what, np.array([number])) for what, number in bounds))


# --- what the graph multiplies by ---------------------------------------------------------------------------------
def constant_factor(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The initializer that a product multiplies by, and whether it lies as (K, N); None for any other node."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    factor = node.inputs[1]
    transposed = True
    if node.op_type == "Gemm":
        plain = _number(node, "alpha", 1.0) == 1 and _number(node, "beta", 1.0) == 1 and not _number(node, "transA", 0)
        if not plain:
            return None
        transposed = not _number(node, "transB", 0)
    producer = factor.producer() if factor is not None else None
    if producer is not None and producer.op_type == "Transpose":
        factor, transposed = producer.inputs[0], not transposed
    array = weight(factor)
    if factor is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return None
    return factor, transposed


def gathered_table(node: ir.Node) -> ir.Value | None:
    """The initializer (V, K) float32 whose rows a node gathers; None for any other node."""
    if node.op_type != "Gather" or _number(node, "axis", 0) != 0:
        return None
    array = weight(node.inputs[0])
    return node.inputs[0] if array is not None and array.ndim == 2 and array.dtype == np.float32 else None


def _rows(factor: ir.Value, transposed: bool) -> int:
    """N of a factor (N, K), or (K, N) when `transposed`."""
    array = weight(factor)
    assert array is not None
    return int(array.shape[1 if transposed else 0])


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
