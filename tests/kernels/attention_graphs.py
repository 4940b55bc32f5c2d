"""Graphs of DecoderAttention and GroupQueryAttention, their inputs, and the same sums in numpy.

Shape letters: B batch, S new tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from .running import Array, Case

INPUTS = [
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin"),
    "head_sink",
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
    outputs = ["y", *IN_PLACE]
    node = helper.make_node(operator, names, outputs, domain=domain, **attributes)
    cache = helper.np_dtype_to_tensor_dtype(feed["past_value"].dtype)  # as onnxruntime infers it
    graph = helper.make_graph(
        [node],
        "attention",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in feed.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)]
        + [helper.make_tensor_value_info(name, cache, None) for name in IN_PLACE],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def case(feeds: Sequence[Mapping[str, Array]], *operator: str, threads: int = 1, **attributes: Any) -> Case:
    return Case(attention(feeds[0], *operator, **attributes), feeds, threads, IN_PLACE)


def draw(
    lengths: Sequence[int],
    new: int,
    heads: tuple[int, int] = (6, 2),
    d: int = 64,
    *,
    form: str = "float32",
    rotary: int = 0,
    packed: bool = True,
    sink: bool = False,
    size: float = 1,
    seed: int = 0,
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


def in_numpy(
    feed: Mapping[str, Array], heads: tuple[int, int], form: str, softcap: float = 0
) -> tuple[Array, Array, Array]:
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
        for i in range(new):
            for head in range(h):
                seen = slice(past + i + 1)
                asked = query[b, i, head].astype(np.float64)
                scores = keys[b, head * g // h, seen].astype(np.float64) @ asked / np.sqrt(d)
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                y[b, i, head] = weights / weights.sum() @ values[b, head * g // h, seen].astype(np.float64)
    return y.reshape(batch, new, h * d), keys, values
