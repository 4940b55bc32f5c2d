"""Matrices in blocks as ONNX's own operators: block-wise DequantizeLinear (opset 21), then MatMul.

onnxruntime from 1.27 on fuses the two into MatMulNBits when it loads a graph. Any other runtime can run them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.blocks import Blocks, unpacked
from ...graph.edit import add_weight
from .blocks import ZERO
from .matrices import add_lazy_weight

OPSET = 21  # the first with block-wise DequantizeLinear
_UINT4 = ir.DataType.UINT4.numpy()


def dequantize_linear(model: ir.Model, name: str, matrix: Blocks) -> ir.Node:
    """Returns a node that outputs the matrix (N, K) transposed, from int8 or uint4 with a scale for each block.

    The output is (blocks * block_size, N) float32: not every runtime accepts a partial last block.
    """
    rows, blocks, _ = matrix.shape
    bits = matrix.bits
    columns = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT4

    def make() -> np.ndarray:
        data = matrix.numbers.reshape(rows, -1)
        numbers = (data.astype(np.int16) - ZERO).astype(np.int8) if bits == 8 else data.astype(_UINT4)
        return np.ascontiguousarray(numbers.T)

    arrays = {"column_scales": matrix.scales.values}
    if bits == 8 and matrix.zeros is not None:
        arrays["column_zeros"] = (matrix.zeros.astype(np.int16) - ZERO).astype(np.int8)
    if bits == 4:
        zeros = np.full((rows, blocks), matrix.middle) if matrix.zeros is None else unpacked(matrix.zeros)[:, :blocks]
        arrays["column_zeros"] = zeros.astype(_UINT4)
    values = [
        add_lazy_weight(model, f"{name}.columns", columns, (blocks * matrix.block_size, rows), make),
        *(add_weight(model, f"{name}.{what}", np.ascontiguousarray(array.T)) for what, array in arrays.items()),
    ]
    node = ir.node(
        "DequantizeLinear", values, {"axis": 0, "block_size": matrix.block_size}, name=f"{name}_DequantizeLinear"
    )
    node.outputs[0].name = f"{name}.weight"
    return node
