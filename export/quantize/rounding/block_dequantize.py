"""Matrices in blocks as ONNX's own operators: block-wise DequantizeLinear (opset 21), then MatMul.

onnxruntime from 1.27 on fuses the two into MatMulNBits when it loads a graph. Any other runtime can run them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.edit import add_weight
from .blocks import ZERO, Blocks
from .int4_blocks import unpacked

OPSET = 21  # the first with block-wise DequantizeLinear
_UINT4 = ir.DataType.UINT4.numpy()


def dequantize_linear(model: ir.Model, name: str, matrix: Blocks) -> ir.Node:
    """Returns a node that outputs the matrix (N, K) transposed, from int8 or uint4 with a scale for each block.

    The output is (blocks * block_size, N) float32: not every runtime accepts a partial last block.
    """
    rows, blocks = matrix.scale_codes.shape
    if matrix.zeros is not None:
        columns = unpacked(matrix.data.reshape(rows, -1)).astype(_UINT4)
        zeros = {"column_zeros": unpacked(matrix.zeros)[:, :blocks].astype(_UINT4)}
    else:
        columns = (matrix.data.reshape(rows, -1).astype(np.int16) - ZERO).astype(np.int8)
        zeros = {}
    arrays = {"columns": columns, "column_scales": matrix.scales, **zeros}
    values = [add_weight(model, f"{name}.{what}", np.ascontiguousarray(array.T)) for what, array in arrays.items()]
    node = ir.node(
        "DequantizeLinear", values, {"axis": 0, "block_size": matrix.block_size}, name=f"{name}_DequantizeLinear"
    )
    node.outputs[0].name = f"{name}.weight"
    return node
