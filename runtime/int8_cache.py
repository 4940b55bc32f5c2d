"""Decoding after a long text: a second graph over the same weights whose cache is int8.

Attention over a long cache reads more bytes than the weights are, and a quarter of them in int8. Prefill stays with
float32, which is faster there; its rows are rounded once, before the first token that is decoded here.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey import names
from pastkey.bundle import Manifest

from .cache import GROWTH_STEP, KVCache
from .ort import onnxruntime

Ids = npt.NDArray[np.int64]

# The oldest onnxruntime whose GroupQueryAttention takes an int8 cache on the CPU.
MIN_ONNXRUNTIME = "1.27.0"
# Tokens in the cache from which on it pays: below, the second graph's memory buys nothing.
LONG_CONTEXT = 1024


class Int8Decoder:
    """One row's cache in int8, beside the float32 `cache` of a session.

    `length` counts its rows. Those from `cache.length` on are here alone, until `settle` gives them back.
    """

    def __init__(self, onnx: Any, manifest: Manifest) -> None:
        """`onnx` is the onnxruntime.InferenceSession of the int8-cache graph."""
        self._onnx = onnx
        self._binding = onnx.io_binding()
        self._context_length = manifest.context_length
        self._vocab_size = manifest.vocab_size
        self._pairs: list[tuple[str, str]] = []  # past and present, in the order of KVCache.arrays
        self._scales: list[npt.NDArray[np.float32]] = []  # (1, K, 1, D) each
        stored = onnx.get_modelmeta().custom_metadata_map
        for i, layer in enumerate(manifest.layers):
            for past, present in (
                (names.past_key(i), names.present_key(i)),
                (names.past_value(i), names.present_value(i)),
            ):
                self._pairs.append((past, present))
                scales = np.frombuffer(base64.b64decode(stored[past]), "<f4")
                self._scales.append(scales.reshape(1, layer.kv_heads, 1, -1))
        self._arrays: list[npt.NDArray[np.int8]] = []  # (1, K, capacity, D) each
        self._capacity = 0
        self.length = 0

    def trim(self, length: int) -> None:
        """Forgets all but the first `length` rows."""
        self.length = min(self.length, length)

    def decode(self, token: Ids, cache: KVCache) -> npt.NDArray[np.float32]:
        """Appends one token (1, 1) behind the rows of both caches; returns its logits (1, 1, V)."""
        self._take_over(cache)
        position = self.length
        if position + 1 > self._capacity:
            self._grow(position + 1)
        logits = np.empty((1, 1, self._vocab_size), np.float32)
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._binding.bind_ortvalue_input(names.INPUT_IDS, value(token))
        self._binding.bind_ortvalue_input(names.ATTENTION_MASK, value(np.ones((1, position + 1), np.int64)))
        self._binding.bind_ortvalue_input(names.POSITION_IDS, value(np.array([[position]], np.int64)))
        self._binding.bind_ortvalue_output(names.LOGITS, value(logits))
        self._onnx.run_with_iobinding(self._binding)
        self.length += 1
        return logits

    def settle(self, cache: KVCache) -> None:
        """Gives the rows that are here alone to the float32 cache."""
        first, count = cache.length, self.length - cache.length
        if count <= 0:
            return
        cache.reserve(1, count)
        for array, mine, scales in zip(cache.arrays, self._arrays, self._scales, strict=True):
            array[:, :, first : self.length] = mine[:, :, first : self.length] * scales
        cache.advance(count)

    def _take_over(self, cache: KVCache) -> None:
        """Rounds the rows that the float32 cache has and this one has not."""
        first, end = self.length, cache.length
        if first >= end:
            return
        if end > self._capacity:
            self._grow(end)
        for array, mine, scales in zip(cache.arrays, self._arrays, self._scales, strict=True):
            rounded = array[:, :, first:end] / scales
            np.rint(rounded, out=rounded)
            np.clip(rounded, -128, 127, out=rounded)
            mine[:, :, first:end] = rounded
        self.length = end

    def _grow(self, needed: int) -> None:
        """Moves the buffers to larger ones: at least a quarter more, a multiple of the step, the context at most."""
        wanted = max(needed, self._capacity + self._capacity // 4)
        capacity = min(-(-wanted // GROWTH_STEP) * GROWTH_STEP, self._context_length)
        old, self._arrays, self._capacity = self._arrays, [], 0
        for i, (past, present) in enumerate(self._pairs):
            _, heads, _, size = self._scales[i].shape
            array = np.zeros((1, heads, capacity, size), np.int8)
            if self.length:
                array[:, :, : self.length] = old[i][:, :, : self.length]
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
            self._arrays.append(array)
        self._capacity = capacity
