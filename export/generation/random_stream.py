"""The random stream of `pastkey.runtime.sampling.random_stream` as nodes: the same numbers to the last bit.

32-bit words are held in int64, since every execution provider has int64 operators.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.runtime.sampling.random_stream import PARITY, ROTATIONS, WORD

from .nodes import Nodes


def uniforms(n: Nodes, seed: ir.Value, places: ir.Value) -> ir.Value:
    """Numbers (N,) float64 in [0, 1), for `seed` (1,) int64 and the positions (N,) int64 of tokens in the text."""
    word, two32 = n.number(WORD), n.number(2**32)

    def cut(value: ir.Value) -> ir.Value:
        return n.add("BitwiseAnd", value, word)

    def plus(a: ir.Value, b: ir.Value) -> ir.Value:
        return cut(n.add("Add", a, b))

    low, high = cut(seed), n.add("Div", seed, two32)
    keys = (low, high, n.add("BitwiseXor", n.add("BitwiseXor", low, high), n.number(PARITY)))
    x, y = plus(places, low), n.add("Add", n.add("Mul", places, n.number(0)), high)
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = plus(x, y)
            moved = n.add("Mul", y, n.number(2**rotation))  # below 2**61
            y = n.add("BitwiseXor", n.add("Add", cut(moved), n.add("Div", moved, two32)), x)
        x = plus(x, keys[(group + 1) % 3])
        y = plus(y, n.add("Add", keys[(group + 2) % 3], n.number(group + 1)))
    upper, lower = n.add("Div", x, n.number(2**5)), n.add("Div", y, n.number(2**6))
    bits = n.add("Add", n.add("Mul", upper, n.number(2**26)), lower)
    return n.add("Mul", n.cast(bits, ir.DataType.DOUBLE), n.number(2.0**-53, np.float64))
