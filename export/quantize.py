"""int8 weights in blocks: arrays first, then the graph.

Each row of a matrix is cut into blocks of `block_size` weights that share one float32 scale, max |w| / 127; a
weight is stored as round(w / scale) + 128 in a uint8. Products become com.microsoft.MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md); at accuracy level 4 activations are
quantized to int8 per block too, at run time. Embeddings gather blocks and scales, and multiply: onnxruntime's operator
for that, GatherBlockQuantized, is not in the WebAssembly that transformers.js loads in a browser.

Rules over the graph:

    1. MatMul(x, W)             -> MatMulNBits
    2. Gemm(x, W[, bias])       -> MatMulNBits [+ Add]
    3. Gather(E, ids), axis 0   -> (Gather(blocks, ids) - 128) * Gather(scales, ids) [+ Slice back to the width
                                   before padding]
    4. MatMul(x, Transpose(E))  -> MatMulNBits over the very bytes of rule 3: a tied head is stored once
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey.errors import InputError

from .graph import add_weight, drop_unused_weights, replace_node, weight

BITS = 8
ACCURACY_LEVEL = 4  # int8 activations: the only level with a fast kernel for 8-bit weights
_BLOCK_SIZES = (32, 16)
_ZERO = 128
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix (N, K) in int8 blocks."""

    data: np.ndarray  # (N, blocks, block_size) uint8, offset by 128; the last block padded with zeros
    scales: np.ndarray  # (N, blocks) float32
    columns: int  # K

    @property
    def block_size(self) -> int:
        return int(self.data.shape[2])


# --- arrays -------------------------------------------------------------------------------------------------------
def quantize_blocks(matrix: np.ndarray, block_size: int) -> BlockQuantized:
    """Quantizes (N, K) float32 row by row. Raises ValueError on NaN or infinity."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, blocks, block_size)
    scales = np.abs(padded).max(2) / np.float32(127)
    # A block of zeros, or of numbers too small to divide by, is stored as zeros.
    scales[scales < np.finfo(np.float32).tiny] = 1
    data = np.rint(padded / scales[:, :, None]) + _ZERO
    return BlockQuantized(data.astype(np.uint8), scales.astype(np.float32), columns)


def dequantize_blocks(quantized: BlockQuantized) -> np.ndarray:
    """(N, K) float32, what the kernels compute with."""
    values: np.ndarray = (quantized.data.astype(np.float32) - _ZERO) * quantized.scales[:, :, None]
    return values.reshape(len(values), -1)[:, : quantized.columns]


def choose_block_size(columns: int) -> int:
    """32 weights to a scale, or 16 where padding a row to a multiple of 32 costs more than the further scales."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size + 4))


# --- the graph ----------------------------------------------------------------------------------------------------
def quantize(model: ir.Model) -> None:
    """Quantizes every matrix of the graph in place, by the rules above. Raises InputError on NaN or infinity."""
    quantized: dict[int, _Stored] = {}  # by the identity of the initializer: one that is used twice is stored once
    for node in tuple(model.graph):
        if node.op_type == "Gather" and _axis(node) == 0:
            _quantize_gather(model, node, quantized)
        elif node.op_type in ("MatMul", "Gemm"):
            _quantize_product(model, node, quantized)
    for node in tuple(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    drop_unused_weights(model)
    model.graph.opset_imports[_DOMAIN] = 1


@dataclass(frozen=True)
class _Stored:
    """The initializers of one quantized matrix.

    `blocks` and `table` are over the same bytes. MatMulNBits reads and rearranges all of its own at load and then lets
    go of them, unless something else uses them too; of a table, only the rows that are gathered come into memory.
    """

    matrix: BlockQuantized
    blocks: ir.Value  # (N, blocks, block_size) uint8, for products
    table: ir.Value  # the same, for gathering
    scales: ir.Value  # (N, blocks) float32


def _store(model: ir.Model, value: ir.Value, transposed: bool, quantized: dict[int, _Stored]) -> _Stored:
    """Quantizes an initializer (N, K), or (K, N) when `transposed`, once."""
    if id(value) not in quantized:
        array = weight(value)
        assert array is not None
        matrix = array.T if transposed else array
        try:
            blocks = quantize_blocks(matrix, choose_block_size(matrix.shape[1]))
        except ValueError as error:
            raise InputError(
                f"the weight {value.name} holds {error}, which cannot be quantized: training went wrong"
            ) from None
        quantized[id(value)] = _Stored(
            blocks,
            add_weight(model, f"{value.name}.blocks", blocks.data),
            add_weight(model, f"{value.name}.table", blocks.data),
            add_weight(model, f"{value.name}.scales", blocks.scales),
        )
    return quantized[id(value)]


def _quantize_gather(model: ir.Model, node: ir.Node, quantized: dict[int, _Stored]) -> None:
    table, indices = node.inputs
    array = weight(table)
    if table is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return
    assert indices is not None
    stored = _store(model, table, False, quantized)
    nodes: list[ir.Node] = []

    def step(operator: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes, name=f"{node.name}_{operator}_{len(nodes)}"))
        return nodes[-1].outputs[0]

    def constant(what: str, content: np.ndarray) -> ir.Value:
        return add_weight(model, f"{node.name}.{what}", content)

    # With ... for the axes of the indices: (..., blocks, block_size), (..., blocks, 1), (..., blocks * block_size)
    integers = step("Cast", step("Gather", stored.table, indices, axis=0), to=ir.DataType.FLOAT)
    centred = step("Sub", integers, constant("zero_point", np.array(_ZERO, np.float32)))
    scales = step("Unsqueeze", step("Gather", stored.scales, indices, axis=0), constant("last", np.array([-1])))
    flat = step("Concat", step("Shape", indices), constant("rest", np.array([-1])), axis=0)
    rows = step("Reshape", step("Mul", centred, scales), flat)
    if stored.matrix.data[0].size != stored.matrix.columns:
        bounds = (("start", 0), ("width", stored.matrix.columns), ("axis", -1))
        step("Slice", rows, *(constant(what, np.array([number])) for what, number in bounds))
    replace_node(model, node, *nodes)


def _quantize_product(model: ir.Model, node: ir.Node, quantized: dict[int, _Stored]) -> None:
    found = constant_factor(node)
    if found is None:
        return
    value, transposed = found
    stored = _store(model, value, transposed, quantized)
    rows, _, block_size = stored.matrix.data.shape
    new = ir.node(
        "MatMulNBits",
        [node.inputs[0], stored.blocks, stored.scales],
        {
            "K": stored.matrix.columns,
            "N": rows,
            "bits": BITS,
            "block_size": block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=_DOMAIN,
        name=node.name,
    )
    nodes = [new]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [new.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    replace_node(model, node, *nodes)


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


def _axis(node: ir.Node) -> int:
    return int(_number(node, "axis", 0))


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
