"""Matrices in blocks by ONNX's own operators: block-wise DequantizeLinear (opset 21), then MatMul.

onnxruntime from 1.27 on makes MatMulNBits of the two when it loads a graph; any other runtime can run them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.edit import add_weight
from .blocks import ZERO, Blocks
from .int4_blocks import unpacked

OPSET = 21  # the first whose DequantizeLinear knows blocks
_UINT4 = ir.DataType.UINT4.numpy()


def dequantize_linear(model: ir.Model, name: str, matrix: Blocks) -> ir.Node:
    """A node that gives the matrix (N, K) transposed, of int8 or uint4 with a scale for each block.

    (blocks * block_size, N) float32: not every runtime takes a last block that is cut off.
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
