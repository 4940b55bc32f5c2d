"""Decoding after a long text: a second graph over the same weights whose cache is int8.

Attention over a long cache reads more bytes than the weights are, and a quarter of them in int8. Prefill stays with
float32, which is faster there. Rows are rounded once, before the first token that is decoded here.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey import names
from pastkey.bundle import Manifest

from .cache import KVCache

Rows = npt.NDArray[Any]

# The oldest onnxruntime whose GroupQueryAttention takes an int8 cache on the CPU.
MIN_ONNXRUNTIME = "1.27.0"
# Tokens in the cache from which on it pays: below, the second graph's memory buys nothing.
LONG_CONTEXT = 1024


class Int8Cache:
    """The int8 graph's `cache`, of one row, and the way between it and a float32 one of the same layers.

    Each may hold rows that the other has not, behind those that both have.
    """

    def __init__(self, onnx: Any, manifest: Manifest) -> None:
        """`onnx` is the onnxruntime.InferenceSession of the int8-cache graph."""
        context = manifest.context_length
        self.cache = KVCache(onnx, manifest.layers, shared=True, context_length=context, dtype=np.int8)
        stored = onnx.get_modelmeta().custom_metadata_map
        self._scales = [  # (1, K, 1, D) of keys and values of each layer in turn
            np.frombuffer(base64.b64decode(stored[name(i)]), "<f4").reshape(1, layer.kv_heads, 1, -1)
            for i, layer in enumerate(manifest.layers)
            for name in (names.past_key, names.past_value)
        ]

    def take_over(self, exact: KVCache) -> None:
        """Rounds the rows that the float32 cache has and this one has not."""
        self._copy(exact, self.cache, lambda rows, scales: np.clip(np.rint(rows / scales), -128, 127))

    def give_back(self, exact: KVCache) -> None:
        """Gives the rows that are here alone to the float32 cache."""
        self._copy(self.cache, exact, lambda rows, scales: rows * scales)

    def _copy(self, source: KVCache, target: KVCache, converted: Callable[[Rows, Rows], Rows]) -> None:
        first, end = target.length, source.length
        if first >= end:
            return
        target.reserve(1, end - first)
        for read, written, scales in zip(source.arrays, target.arrays, self._scales, strict=True):
            written[:, :, first:end] = converted(read[:, :, first:end], scales)
        target.advance(end - first)
