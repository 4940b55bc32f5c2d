"""int8 weights in blocks: arrays first, then the graph.

Each row of a matrix is cut into blocks of `block_size` weights that share one float32 scale, max |w| / 127; a
weight is stored as round(w / scale) + 128 in a uint8. Products become com.microsoft.MatMulNBits, embeddings
com.microsoft.GatherBlockQuantized (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md);
at accuracy level 4 activations are quantized to int8 per block too, at run time.

Rules over the graph:

    1. MatMul(x, W)             -> MatMulNBits
    2. Gemm(x, W[, bias])       -> MatMulNBits [+ Add]
    3. Gather(E, ids), axis 0   -> GatherBlockQuantized [+ Slice back to the width before padding]
    4. MatMul(x, Transpose(E))  -> MatMulNBits over the very bytes of rule 3: a tied head is stored once
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey.errors import InputError

from .passes import add_weight, drop_unused_weights, replace_uses, weight

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


@dataclass
class _Stored:
    """The initializers of one quantized matrix; the gathered form lies over the same bytes."""

    matrix: BlockQuantized
    name: str
    blocks: ir.Value | None = None  # (N, blocks, block_size), as MatMulNBits reads it
    table: ir.Value | None = None  # (N, blocks * block_size), as GatherBlockQuantized reads it
    scales: ir.Value | None = None  # (N, blocks)


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
        stored = _Stored(blocks, str(value.name))
        stored.scales = add_weight(model, f"{value.name}.scales", blocks.scales)
        quantized[id(value)] = stored
    return quantized[id(value)]


def _quantize_gather(model: ir.Model, node: ir.Node, quantized: dict[int, _Stored]) -> None:
    table, indices = node.inputs
    array = weight(table)
    if table is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return
    stored = _store(model, table, False, quantized)
    data = stored.matrix.data
    if stored.table is None:
        stored.table = add_weight(model, f"{stored.name}.table", data.reshape(len(data), -1))
    new = ir.node(
        "GatherBlockQuantized",
        [stored.table, indices, stored.scales],
        {"bits": BITS, "block_size": stored.matrix.block_size, "gather_axis": 0, "quantize_axis": 1},
        domain=_DOMAIN,
        name=node.name,
    )
    nodes = [new]
    if data.shape[1] * data.shape[2] != stored.matrix.columns:
        bounds = [
            add_weight(model, f"{stored.name}.{end}", np.array([number], np.int64))
            for end, number in (("start", 0), ("end", stored.matrix.columns), ("axis", -1))
        ]
        nodes.append(ir.node("Slice", [new.outputs[0], *bounds], name=f"{node.name}_width"))
    _replace(model, node, nodes)


def _quantize_product(model: ir.Model, node: ir.Node, quantized: dict[int, _Stored]) -> None:
    found = constant_factor(node)
    if found is None:
        return
    value, transposed = found
    stored = _store(model, value, transposed, quantized)
    rows, _, block_size = stored.matrix.data.shape
    if stored.blocks is None:
        stored.blocks = add_weight(model, f"{stored.name}.blocks", stored.matrix.data)
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
    _replace(model, node, nodes)


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


def _replace(model: ir.Model, old: ir.Node, nodes: list[ir.Node]) -> None:
    """Puts `nodes` in place of `old`; the last one's output takes its name and its uses."""
    model.graph.insert_before(old, nodes)
    output, new = old.outputs[0], nodes[-1].outputs[0]
    for number, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"{output.name}_part_{number}"
    name = output.name
    new.shape, new.type = output.shape, output.type
    replace_uses(output, new)
    for index, value in enumerate(model.graph.outputs):
        if value is output:
            model.graph.outputs[index] = new
    model.graph.remove(old, safe=True)
    new.name = name


def _axis(node: ir.Node) -> int:
    return int(_number(node, "axis", 0))


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
