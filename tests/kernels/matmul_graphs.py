"""Graphs of one MatMulInt8 or NormMatMulInt8, beside what they should compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from .running import Array

FLOAT = 1
OPSETS = [helper.make_opsetid(*pair) for pair in (("", 20), ("com.microsoft", 1), ("pastkey", 1))]


def graph(
    nodes: list[Any],
    weights: dict[str, Array],
    inputs: list[str],
    outputs: list[str],
    types: dict[str, int] | None = None,
) -> bytes:
    """The ModelProto of `nodes`. Inputs are float32 but for what `types` says, and of any shape."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, (types or {}).get(name, FLOAT), None) for name in inputs],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        initializers,
    )
    model: bytes = helper.make_model(made, opset_imports=OPSETS, ir_version=10).SerializeToString()
    return model


@dataclass(frozen=True)
class Weights:
    """What the operators take as W [N, K / 32, 4 bits], scales [N, K / 32], row scales [N, 1] and bias [N].

    4 bits may have zero points [N, K / 64 rounded up].
    """

    codes: Array
    scale_codes: Array
    row_scales: Array
    bias: Array
    bits: int = 8
    zeros: Array | None = None

    @staticmethod
    def draw(n: int, k: int, bits: int = 8, zeros: bool = True) -> Weights:
        rng = np.random.default_rng(n * 10007 + k)
        return Weights(
            rng.integers(0, 256, (n, k // 32, 4 * bits), dtype=np.uint8),
            rng.integers(1, 256, (n, k // 32), dtype=np.uint8),
            (rng.random((n, 1)) * 1e-4 + 1e-5).astype(np.float32),
            rng.standard_normal(n).astype(np.float32),
            bits,
            rng.integers(0, 256, (n, (k // 32 + 1) // 2), dtype=np.uint8) if bits == 4 and zeros else None,
        )

    @property
    def scales(self) -> Array:
        return (self.scale_codes * self.row_scales).astype(np.float32)

    @property
    def matrix(self) -> Array:
        """float64 [N, K]"""
        scales = self.scale_codes * self.row_scales.astype(np.float64)
        codes, zeros = self.codes, np.full(scales.shape, 128 if self.bits == 8 else 8)
        if self.bits == 4:
            codes = _nibbles(codes)
            if self.zeros is not None:
                zeros = _nibbles(self.zeros)[:, : scales.shape[1]]
        return ((codes.astype(np.float64) - zeros[..., None]) * scales[..., None]).reshape(len(codes), -1)

    def named(self, float_scales: bool = False, bias: bool = False) -> dict[str, Array]:
        """The initializers of a node, by the names that `arguments` uses."""
        scales = {"scales": self.scales} if float_scales else {"codes": self.scale_codes, "row_scales": self.row_scales}
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"w": self.codes, **scales, **({"bias": self.bias} if bias else {}), **zeros}


def _nibbles(packed: Array) -> Array:
    """[..., n] -> [..., 2 n], the low one of each byte first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def arguments(weights: dict[str, Array]) -> list[str]:
    """The inputs of a node from W on."""
    scales = ["scales", ""] if "scales" in weights else ["codes", "row_scales"]
    bias, zeros = (["bias"] if "bias" in weights else []), (["zeros"] if "zeros" in weights else [])
    return ["w", *scales, *(bias or [""] * len(zeros)), *zeros]


def matmul(weights: dict[str, Array], **attributes: Any) -> bytes:
    node = helper.make_node("MatMulInt8", ["x", *arguments(weights)], ["y"], domain="pastkey", **attributes)
    return graph([node], weights, ["x"], ["y"])


def compared(weights: Weights, bias: bool) -> bytes:
    """MatMulNBits without the bias, then MatMulInt8 by codes and by float scales, with one term and with two."""
    n, blocks, _ = weights.codes.shape
    sizes = {"K": blocks * 32, "N": n, "bits": weights.bits, "block_size": 32, "accuracy_level": 4}
    inputs = ["x", "w", "scales", *([] if weights.zeros is None else ["zeros"])]
    nodes = [helper.make_node("MatMulNBits", inputs, ["nbits"], domain="com.microsoft", **sizes)]
    bits: dict[str, Any] = {} if weights.bits == 8 else {"bits": weights.bits}
    for float_scales in (False, True):
        inputs = ["x", *arguments(weights.named(float_scales, bias))]
        for terms in (1, 2):
            output = f"y{terms}{float_scales}"
            nodes.append(helper.make_node("MatMulInt8", inputs, [output], domain="pastkey", terms=terms, **bits))
    initializers = weights.named(bias=bias) | weights.named(float_scales=True)
    return graph(nodes, initializers, ["x"], [node.output[0] for node in nodes])


def norm_matmul(weights: dict[str, Array], *, skip: bool, beta: bool, summed: bool, **attributes: Any) -> bytes:
    """`weights` has gamma, and beta where `beta`."""
    names = ["x", "skip" if skip else "", "gamma", "beta" if beta else "", *arguments(weights)]
    outputs = ["y", "s"] if summed else ["y"]
    node = helper.make_node("NormMatMulInt8", names, outputs, domain="pastkey", **attributes)
    return graph([node], weights, ["x", "skip"] if skip else ["x"], outputs)


def activate(name: str, x: Array) -> Array:
    """In float64."""
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x


def gated(y: Array, activation: str, gate: int) -> Array:
    """What the attributes `activation` and `gate` make of the product `y` [M, N], in float64."""
    if gate < 0:
        return activate(activation, y)
    halves = np.split(y, 2, axis=1)
    return activate(activation, halves[gate]) * halves[1 - gate]


def normalize(x: Array, gamma: Array, beta: Array | None, norm: str, epsilon: float) -> Array:
    """In float64."""
    x = x.astype(np.float64)
    if norm == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + epsilon) * gamma
    return x if beta is None else x + beta
