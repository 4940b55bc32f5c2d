"""Decoding with an int8 KV cache after a long prefix, by a second graph over the same weights.

Attention over a long cache reads more bytes than the weights; int8 reads a quarter of them. Prefill stays in float32,
which is faster there. Rows are rounded once, before the first token that decodes in int8.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Manifest
from pastkey.providers import PROVIDERS, Provider
from pastkey.values import parse_version

from ...providers.cache_form import CacheForm
from ...providers.ort import onnxruntime
from ...settings import MAX_DRAFT_TOKENS
from ..shift import Moved
from .fixed import FixedKVCache
from .kv import KVCache

Rows = npt.NDArray[Any]

# The oldest onnxruntime whose GroupQueryAttention takes an int8 cache on the CPU.
MIN_ONNXRUNTIME = "1.27.0"
# Cached tokens from which int8 is faster; below, the second graph only costs memory.
INT8_KV_FROM = 1024
# Largest number of tokens of a run that counts as decoding.
MAX_DECODE_TOKENS = MAX_DRAFT_TOKENS + 1


class CachePair:
    """A float32 KV cache and an int8 one, used as one. The int8 cache decodes one sequence after a long prefix.

    Behind their common rows, either may hold rows that the other lacks. A run is `for_run`, onnxruntime's run with the
    returned cache, and that cache's `advance`.
    """

    def __init__(
        self,
        onnx: Any,
        manifest: Manifest,
        form: CacheForm,
        *,
        provider: Provider = PROVIDERS["cpu"],
        device_id: int = 0,
        open_int8: Callable[[], Any] | None = None,
        int8_from: int | None = INT8_KV_FROM,
    ) -> None:
        """Makes empty caches.

        Args:
            onnx: The onnxruntime.InferenceSession of a graph with a float32 cache.
            manifest: The bundle's manifest.
            form: The form of the cache.
            provider: The table row of the execution provider.
            device_id: Index of the device.
            open_int8: Opens the session of the int8-KV graph, at the first token that it decodes; None without such a
                graph.
            int8_from: Cached tokens from which a token decodes with int8, if onnxruntime can; None for never.
        """
        shared = manifest.graph == "fused"
        context = manifest.context_length
        states = manifest.states
        self.float32: KVCache | FixedKVCache
        if provider.fixed_shapes and not shared and manifest.padding and not states:  # a hole is padding
            self.float32 = FixedKVCache(onnx, form.layers, context_length=context, dtype=form.dtype)
        else:
            self.float32 = KVCache(
                onnx,
                form.layers,
                shared=shared,
                context_length=context,
                provider=provider,
                device_id=device_id,
                dtype=form.dtype,
                states=states,
            )
        self.int8: KVCache | None = None
        self._manifest = manifest
        self._open_int8 = open_int8
        new = parse_version(onnxruntime.__version__) >= parse_version(MIN_ONNXRUNTIME)
        able = open_int8 is not None and new and shared and provider.device == "cpu"
        self._int8_from = int8_from if able and int8_from is not None else math.inf
        self._scales: list[Rows] = []  # (1, K, 1, D) of keys and values of each layer in turn

    @property
    def length(self) -> int:
        """Tokens per sequence, padding included."""
        return self.float32.length if self.int8 is None else max(self.float32.length, self.int8.length)

    def reset(self) -> None:
        """Forgets all tokens."""
        for cache in self._caches:
            cache.reset()

    def trim(self, length: int) -> None:
        """Trims each sequence to its first `length` tokens. Raises InputError if the cache has fewer."""
        longest = max(self._caches, key=lambda cache: cache.length)
        longest.trim(length)
        for cache in self._caches:
            cache.trim(min(length, cache.length))

    def drop(self, start: int, end: int, moved: Moved) -> None:
        """See `KVCache.drop`."""
        self._dequantize()
        if self.int8 is not None:
            self.int8.trim(min(start, self.int8.length))
        self.float32.drop(start, end, moved)

    def reserve(self, batch: int, tokens: int) -> None:
        """Allocates room at once for `tokens` that several runs prefill in each of `batch` sequences."""
        self._dequantize()
        self.float32.reserve(batch, tokens)

    def for_run(self, batch: int, tokens: int, *, padded: bool) -> KVCache | FixedKVCache:
        """The cache for the next run of `tokens` in each of `batch` sequences: it holds all tokens and has room.

        `padded`: whether the cache or the run has padding.
        """
        one_row = batch == self.float32.batch == 1 and not padded
        cache: KVCache | FixedKVCache
        if one_row and tokens <= MAX_DECODE_TOKENS and self.length >= self._int8_from:
            cache = self._quantize()
        else:
            self._dequantize()
            cache = self.float32
        cache.reserve(batch, tokens)
        return cache

    def rows(self, length: int) -> list[Rows]:
        """See `KVCache.rows`; in float32."""
        self._dequantize()
        return self.float32.rows(length)

    def fill(self, rows: Sequence[Rows]) -> None:
        """See `KVCache.fill`."""
        self.reset()
        self.float32.fill(rows)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.float32.batch

    @property
    def nbytes(self) -> int:
        """Current size of the tensors in bytes."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def decodes_in_int8(self) -> bool:
        """Whether the next token of one sequence would decode with the int8 cache."""
        return self.length >= self._int8_from

    @property
    def _caches(self) -> list[KVCache | FixedKVCache]:
        return [self.float32] if self.int8 is None else [self.float32, self.int8]

    def _quantize(self) -> KVCache:
        """Rounds the rows that only the float32 cache has to int8. Returns the int8 cache."""
        if self.int8 is None:
            assert self._open_int8 is not None
            self.int8 = self._make_int8(self._open_int8())
        _copy(self.float32, self.int8, self._scales, lambda rows, scales: np.clip(np.rint(rows / scales), -128, 127))
        return self.int8

    def _dequantize(self) -> None:
        """Copies the rows that only the int8 cache has to the float32 cache."""
        if self.int8 is not None:
            _copy(self.int8, self.float32, self._scales, lambda rows, scales: rows * scales)

    def _make_int8(self, onnx: Any) -> KVCache:
        stored, layers = onnx.get_modelmeta().custom_metadata_map, self._manifest.layers
        self._scales = [
            np.frombuffer(base64.b64decode(stored[name(i)]), "<f4").reshape(1, layer.kv_heads, 1, -1)
            for i, layer in enumerate(layers)
            for name in (names.past_key, names.past_value)
        ]
        return KVCache(onnx, layers, shared=True, context_length=self._manifest.context_length, dtype=np.int8)


def _copy(
    source: KVCache | FixedKVCache,
    target: KVCache | FixedKVCache,
    scales: list[Rows],
    converted: Callable[[Rows, Rows], Rows],
) -> None:
    """Appends to `target` the rows that only `source` has."""
    first, end = target.length, source.length
    if first >= end:
        return
    target.reserve(1, end - first)
    for read, written, scale in zip(source.arrays, target.arrays, scales, strict=True):
        written[:, :, first:end] = converted(read[:, :, first:end], scale)
    target.advance(end - first)
