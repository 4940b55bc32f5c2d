"""Graphs of the native operators, their inputs, and the same sums in numpy.

Shape letters: B batch, S new tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from .running import Array, Case

FLOAT = 1
OPSETS = [helper.make_opsetid(*pair) for pair in (("", 20), ("com.microsoft", 1), ("pastkey", 1))]
NOTHING: Mapping[str, Any] = {}


def graph(nodes, weights, inputs, outputs, types=NOTHING) -> bytes:
    """The ModelProto of `nodes`. Inputs and outputs are float32 but for what `types` says, and of any shape."""
    ends = [
        [helper.make_tensor_value_info(name, types.get(name, FLOAT), None) for name in some]
        for some in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "graph", *ends, initializers)
    return helper.make_model(made, opset_imports=OPSETS, ir_version=10).SerializeToString()


# --- attention --------------------------------------------------------------------------------------------------------
INPUTS = [
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin"),
    *("head_sink", "evicted"),
]
IN_PLACE = {"present_key": "past_key", "present_value": "past_value"}


def attention(feed: Mapping[str, Array], operator: str = "DecoderAttention", **attributes: Any) -> bytes:
    """The operator with the inputs that are fed. Outputs: y, present_key, present_value."""
    native = operator == "DecoderAttention"
    names = [name if name in feed else "" for name in INPUTS]
    if not native:
        names[9:9] = ["", ""]  # position_ids, attention_bias
    while not names[-1]:
        names.pop()
    domain = "pastkey" if native else "com.microsoft"
    node = helper.make_node(operator, names, ["y", *IN_PLACE], domain=domain, **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed.items()}
    types |= dict.fromkeys(IN_PLACE, types["past_value"])  # as onnxruntime infers it
    return graph([node], {}, feed, node.output, types)


def case(feeds: Sequence[Mapping[str, Array]], *operator: str, threads: int = 1, **attributes: Any) -> Case:
    return Case(attention(feeds[0], *operator, **attributes), feeds, threads, IN_PLACE)


def draw(
    lengths, new, heads=(6, 2), d=64, *, form="float32", rotary=0, packed=True, sink=False, size=1, seed=0
) -> dict[str, Array]:
    """Inputs for rows of `lengths` tokens, `new` of them new. The whole cache is filled, with 9 tokens of room left."""
    rng = np.random.default_rng([seed, d, new, *heads])
    h, g = heads
    batch, total = len(lengths), max(lengths)
    width = (h + 2 * g if packed else h) * d

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    feed: dict[str, Array] = {"query": normal(batch, new, width) * np.float32(size)}
    if not packed:
        feed |= {name: normal(batch, new, g * d) for name in ("key", "value")}
    feed |= {name: normal(batch, g, total + 9, d).astype(form) for name in ("past_key", "past_value")}
    feed |= {"seqlens_k": np.array(lengths, np.int32) - 1, "total_sequence_length": np.array(total, np.int32)}
    if rotary:
        angles = np.outer(np.arange(total), 1e4 ** -(np.arange(rotary // 2) / (rotary // 2)))
        feed |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if sink:
        feed["head_sink"] = normal(h)
    return feed


def evicted(feed: Mapping[str, Array], *gone: int) -> dict[str, Array]:
    """The inputs with a cache from which so many first tokens of each row are gone, and with less room."""
    room = feed["past_key"].shape[2] - min(gone)
    caches = {name: np.zeros_like(feed[name][:, :, :room]) for name in ("past_key", "past_value")}
    for name, array in caches.items():
        for b, count in enumerate(gone):
            left = feed[name][b, :, count:]
            array[b, :, : left.shape[1]] = left
    return {**feed, **caches, "evicted": np.array(gone, np.int32)}


def in_numpy(feed, heads, form, softcap=0.0) -> tuple[Array, Array, Array]:
    """y, present_key and present_value for packed inputs without rotation, sums in float64."""
    h, g = heads
    batch, new, width = feed["query"].shape
    d = width // (h + 2 * g)
    query, key, value = np.split(feed["query"].reshape(batch, new, -1, d), [h, h + g], axis=2)
    keys, values = feed["past_key"].copy(), feed["past_value"].copy()
    y = np.zeros((batch, new, h, d))
    for b, last in enumerate(feed["seqlens_k"]):
        past = last + 1 - new
        keys[b, :, past : past + new] = key[b].swapaxes(0, 1).astype(form)
        values[b, :, past : past + new] = value[b].swapaxes(0, 1).astype(form)
        for i, head in np.ndindex(new, h):
            seen = slice(past + i + 1)
            asked = query[b, i, head].astype(np.float64)
            scores = keys[b, head * g // h, seen].astype(np.float64) @ asked / np.sqrt(d)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            y[b, i, head] = weights / weights.sum() @ values[b, head * g // h, seen].astype(np.float64)
    return y.reshape(batch, new, h * d), keys, values


# --- products ---------------------------------------------------------------------------------------------------------
FORMS = ("int8", "int4", "int4 without zero points", "int8 in halves", "int8 with offsets", "int4 with offsets")


@dataclass(frozen=True)
class Weights:
    """The operators' inputs W [N, K / 32, 4 bits] and bias [N], and the other inputs in several ways.

    4 bits may have zero points [N, K / 64 rounded up]. Scales are of 32 weights, or of 16; offsets of 32.
    """

    codes: Array
    scale_codes: Array
    row_scales: Array
    bias: Array
    bits: int = 8
    zeros: Array | None = None
    offset_codes: Array | None = None

    @staticmethod
    def draw(n: int, k: int, form: str = "int8") -> Weights:
        rng = np.random.default_rng(n * 10007 + k)
        bits, blocks = 4 if "int4" in form else 8, k // 32
        return Weights(
            rng.integers(0, 256, (n, blocks, 4 * bits), dtype=np.uint8),
            rng.integers(1, 256, (n, 2 * blocks if "halves" in form else blocks), dtype=np.uint8),
            (rng.random((n, 1)) * 1e-4 + 1e-5).astype(np.float32),
            rng.standard_normal(n).astype(np.float32),
            bits,
            rng.integers(0, 256, (n, (blocks + 1) // 2), dtype=np.uint8) if form == "int4" else None,
            rng.integers(0, 256, (n, blocks), dtype=np.uint8) if "offsets" in form else None,
        )

    @property
    def stored(self) -> list[str]:
        """The ways in which scales and offsets can be stored."""
        blocks = self.codes.shape[1]
        if self.offset_codes is not None:
            return ["groups", "mixed"] * (blocks % 8 == 0) + ["float32", "float16"]
        return ["rows"] + ["groups"] * (blocks % 8 == 0 and blocks > 8) + ["float32", "float16"]

    def named(self, stored: str = "rows", bias: bool = False) -> dict[str, Array]:
        """The initializers of a node, by the names that `arguments` uses."""
        found = {"w": self.codes, "codes": self.scale_codes, "row_scales": self.row_scales}
        if bias:
            found["bias"] = self.bias
        if self.zeros is not None:
            found["zeros"] = self.zeros
        if stored in ("groups", "mixed"):
            found["row_scales"] = self.row_scales * np.linspace(1, 2, self.codes.shape[1] // 8, dtype=np.float32)
        if self.offset_codes is not None:
            found |= {"offsets": self.offset_codes, "offset_scales": found["row_scales"] * 2 ** (self.bits - 1)}
            if stored != "groups":
                floats = "float16" if stored == "mixed" else stored
                found["offsets"] = _numbers(found["offsets"], found.pop("offset_scales")).astype(floats)
        if "float" in stored:
            found["scales"] = _numbers(found.pop("codes"), found.pop("row_scales")).astype(stored)
        return found


def matrix(arrays: Mapping[str, Array]) -> Array:
    """float64 [N, K] of what `Weights.named` returns."""
    n, blocks, size = arrays["w"].shape
    codes = (arrays["w"] if size == 32 else _nibbles(arrays["w"])).reshape(n, -1).astype(np.float64)
    scales = arrays["scales"] if "scales" in arrays else _numbers(arrays["codes"], arrays["row_scales"])
    zeros = _nibbles(arrays["zeros"])[:, :blocks] if "zeros" in arrays else np.full((n, 1), 128 if size == 32 else 8)
    if "offsets" in arrays:
        offsets = _numbers(arrays["offsets"], arrays.get("offset_scales", np.ones((n, 1))))
        return codes * _each(scales, codes) - _each(offsets, codes)
    return (codes - _each(zeros, codes)) * _each(scales, codes)


def _numbers(codes: Array, groups: Array) -> Array:
    return codes * _each(groups.astype(np.float64), codes)


def _each(some: Array, codes: Array) -> Array:
    return np.repeat(some.astype(np.float64), codes.shape[1] // some.shape[1], axis=1)


def _nibbles(packed: Array) -> Array:
    """[..., n] -> [..., 2 n], the low one of each byte first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def arguments(weights: Mapping[str, Array]) -> list[str]:
    """The inputs of a node from W on."""
    scales = "scales" if "scales" in weights else "codes"
    names = ["w", scales, "row_scales", "bias", "zeros", "offsets", "offset_scales"]
    names = [name if name in weights else "" for name in names]
    while not names[-1]:
        names.pop()
    return names


def matmul(weights: Mapping[str, Array], **attributes: Any) -> bytes:
    node = helper.make_node("MatMulInt8", ["x", *arguments(weights)], ["y"], domain="pastkey", **attributes)
    return graph([node], weights, ["x"], ["y"])


def nbits(weights: Weights) -> bytes:
    """MatMulNBits, which has neither scales of 16 weights nor offsets here."""
    n, blocks, _ = weights.codes.shape
    sizes: dict[str, Any] = {"K": blocks * 32, "N": n, "bits": weights.bits, "block_size": 32, "accuracy_level": 4}
    inputs = ["x", "w", "scales", *([] if weights.zeros is None else ["zeros"])]
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes)
    return graph([node], weights.named("float32"), ["x"], ["y"])


def compared(weights: Weights, bias: bool) -> bytes:
    """MatMulInt8 in each way in which the weights can be stored, with one term and with two."""
    nodes, initializers = [], dict[str, Array]()
    for stored in weights.stored:
        arrays = {f"{stored} {name}": array for name, array in weights.named(stored, bias).items()}
        initializers |= arrays
        inputs = ["x", *(name and f"{stored} {name}" for name in arguments(weights.named(stored, bias)))]
        for terms in (1, 2):
            attributes = {"terms": terms, "bits": weights.bits}
            nodes.append(helper.make_node("MatMulInt8", inputs, [f"{stored} {terms}"], domain="pastkey", **attributes))
    return graph(nodes, initializers, ["x"], [node.output[0] for node in nodes])


def norm_matmul(weights: Mapping[str, Array], *, skip: bool, beta: bool, summed: bool, **attributes: Any) -> bytes:
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
