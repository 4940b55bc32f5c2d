"""The tiny decoder with rotary positions instead of learned ones, and the same in numpy with keys that are not turned.

The reference, which a context shift must equal, keeps keys as they were before any rotation, and turns them at each
step by their place in the cache (Xiao et al., https://arxiv.org/abs/2309.17453).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pastkey.contract.bundle import Bundle, CacheShift, KeyRotation

from .tiny_decoder import Array, H, K, Tiny, attended, projected


@dataclass(frozen=True)
class RotaryTiny(Tiny):
    """`pairs` of the first channels of each head turn, the first one by one radian per token."""

    pairs: int = 4
    interleaved: bool = False
    inside: bool = False  # whether GroupQueryAttention turns them, of whole heads
    window: int = 0  # tokens that a token sees with itself; 0 for all
    local: tuple[int, ...] = (0, 1)  # the attention calls with that window

    @classmethod
    def of(cls, size: int, context_length: int, layers: int = 2, **fields: Any) -> RotaryTiny:
        """With heads of this size."""
        plain = Tiny.random([(size, size)] * layers, context_length, seed=3)
        made = cls(plain.layers, context_length, plain.weights, **fields)
        angles = np.arange(context_length)[:, None] * made.angles
        tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        return dataclasses.replace(made, weights={**plain.weights, **tables})

    @property
    def angles(self) -> Array:
        """Radians per token of each pair."""
        return np.array(100.0 ** (-np.arange(self.pairs) / self.pairs))

    @property
    def shift(self) -> CacheShift:
        """The manifest's entry of an export."""
        layers = tuple(range(len(self.layers)))
        return CacheShift(rotations=(KeyRotation(layers, 0, self.interleaved, tuple(self.angles.tolist())),))

    def written(self, make_bundle: Callable[..., Bundle], graph: str = "fused", **fields: Any) -> Bundle:
        """As a bundle that tells of its rotations and its windows."""
        windows = [self.window_of(i) for i in range(len(self.layers))]
        fields = {"shift": self.shift, "windows": tuple(windows) if any(windows) else (), **fields}
        return make_bundle(self, graph, **fields)

    def window_of(self, call: int) -> int:
        return self.window if call in self.local else 0

    def text(self, graph: str, **options: Any) -> str:
        found = super().text(graph, **options)
        found = re.sub(
            r"place = .*\n x0 = .*\n", "x0 = Identity(word)\n places = Cast <to = 7> (position_ids)\n", found
        )
        if self.inside:
            found = found.replace(
                "kv_num_heads", f"do_rotary = 1, rotary_interleaved = {int(self.interleaved)}, kv_num_heads"
            )
            found = found.replace("seqlens, total)", "seqlens, total, cos, sin)").replace(
                'total,\n        "", "", ', "total,\n        cos, sin, "
            )
        else:
            for name, heads in (("q", H), ("k", K)):
                turn = (
                    rf"raw{name}\1 = MatMul(x\1, w{name}\1)\n "
                    rf"{name}\1 = com.microsoft.RotaryEmbedding <num_heads = {heads}, "
                    rf"rotary_embedding_dim = {2 * self.pairs}, interleaved = {int(self.interleaved)}> "
                    rf"(raw{name}\1, places, cos, sin)\n"
                )
                found = re.sub(rf"{name}(\d) = MatMul\(x\d, w{name}\d\)\n", turn, found)
        if self.window and graph == "standard":  # in all calls
            found = found.replace(
                "causal = LessOrEqual(columns, rows_up)\n",
                f"""before = LessOrEqual(columns, rows_up)
                width = Constant <value_int = {self.window}> ()
                within = Add(columns, width)
                near = Less(rows_up, within)
                causal = And(before, near)
                """,
            )
        if self.window and graph == "fused":
            found = self._windowed(found, evicting=options["last_only"])
        return found

    def _windowed(self, text: str, *, evicting: bool) -> str:
        for i in self.local:
            call = rf"(\n\s*a{i}, [^<]*GroupQueryAttention <)([^>]*>\s*\([^)]*)seqlens, total"
            lengths = "rows, most" if evicting else "seqlens, total"
            text = re.sub(call, rf"\1local_window_size = {self.window}, \2{lengths}", text)
        if not evicting:
            return text
        text = text.replace("most, cos, sin)", "most, cos, sin, position_ids)")
        text = text.replace("int32[B] seqlens_k", "int32[B] seqlens_k, int32[B] evicted")
        return text.replace(
            "total = Identity(total_sequence_length)\n",
            """total = Identity(total_sequence_length)
            rows = Sub(seqlens_k, evicted)
            last = ReduceMax <keepdims = 0> (rows)
            one = Constant <value_int = 1> ()
            one32 = Cast <to = 6> (one)
            longest = Add(last, one32)
            new_shape = Shape <start = 1> (position_ids)
            new64 = Squeeze(new_shape)
            new = Cast <to = 6> (new64)
            most = Max(longest, new)
            """,
        )

    def reference(self) -> Streaming:
        """An empty cache."""
        return Streaming(self)

    def __call__(self, ids: Sequence[int] | Array) -> Array:
        return self.reference().feed(ids)


class Streaming:
    """Keys and values in float64, the keys before any rotation."""

    def __init__(self, tiny: RotaryTiny) -> None:
        self._tiny = tiny
        self._weights = {name: weight.astype(np.float64) for name, weight in tiny.weights.items()}
        self._rows: list[tuple[Array, Array]] = [
            (np.zeros((0, K, layer.key_head_size)), np.zeros((0, K, layer.value_head_size))) for layer in tiny.layers
        ]

    def drop(self, keep: int, count: int) -> None:
        """Forgets `count` tokens behind the first `keep`."""
        self._rows = [tuple(np.delete(rows, slice(keep, keep + count), 0) for rows in pair) for pair in self._rows]  # type: ignore[misc]

    def feed(self, ids: Sequence[int] | Array) -> Array:
        """Logits (T, V) of tokens behind those in the cache."""
        w, tiny = self._weights, self._tiny
        x = w["embedding"][list(ids)]
        for i, (keys, values) in enumerate(self._rows):
            q, k, v = projected(x, w, i)
            keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
            self._rows[i] = keys, values
            places = np.arange(len(keys))
            new = places[-len(x) :]
            distance = new[:, None] - places
            seen = (distance >= 0) & (distance < (tiny.window_of(i) or np.inf))
            x = x + attended(self._turned(q, new), self._turned(keys, places), values, seen) @ w[f"wo{i}"]
        return x @ w["embedding"].T

    def _turned(self, heads: Array, places: Array) -> Array:
        """`heads` (T, heads, D) at their places (T,)."""
        tiny, found = self._tiny, heads.copy()
        n = tiny.pairs
        ones, others = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if tiny.interleaved else (slice(0, n), slice(n, 2 * n))
        turn = np.exp(1j * places[:, None] * tiny.angles)[:, None]
        both = (heads[..., ones] + 1j * heads[..., others]) * turn
        found[..., ones], found[..., others] = both.real, both.imag
        return found
