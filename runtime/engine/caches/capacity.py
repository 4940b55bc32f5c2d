"""How many rows a buffer of keys and values has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pastkey.contract.bundle import KVGeometry, Manifest

from .marks import WINDOW_MARKS

GROWTH_STEP = 128  # smallest growth of a cache, in rows
# Tokens kept in addition to a sliding window, so that rejected drafts and the end of a prompt can be trimmed.
TRIMMABLE = 16


def grown(capacity: int, needed: int, context_length: int) -> int:
    """The new capacity, in rows, of a cache that needs more.

    At least a quarter more than `capacity`, a multiple of GROWTH_STEP, and at most the context.
    """
    wanted = max(needed, capacity + capacity // 4)
    return min(-(-wanted // GROWTH_STEP) * GROWTH_STEP, context_length)


@dataclass(frozen=True)
class Windows:
    """The attention calls of a graph whose rows can be evicted, once no token sees them."""

    calls: tuple[bool, ...]  # for each call, whether it is one
    widest: int  # tokens that the widest window of them sees, with the new one
    room: int  # rows of a buffer for them

    @classmethod
    def of(cls, manifest: Manifest, tokens: int) -> Windows | None:
        """Those of a bundle for runs of so many tokens, if they and their marks need less than the whole context."""
        found = cls(tuple(window > 0 for window in manifest.windows), max(manifest.windows, default=0), 0)
        room = grown(0, found.kept + found.slack + tokens, manifest.context_length)
        saves = room + WINDOW_MARKS * found.widest < manifest.context_length
        return replace(found, room=room) if any(found.calls) and saves else None

    @property
    def kept(self) -> int:
        """The fewest rows that an eviction leaves."""
        return self.widest - 1 + TRIMMABLE

    @property
    def slack(self) -> int:
        """The most rows that are not worth an eviction, which moves all that it leaves."""
        return self.kept // 8


def bytes_per_token(layers: Sequence[KVGeometry], windows: Windows | None, itemsize: int) -> tuple[int, int]:
    """Bytes of a token's keys and values: of attention calls that keep all rows, and of those that evict some."""
    sizes = [0, 0]
    for layer, local in zip(layers, [False] * len(layers) if windows is None else windows.calls, strict=True):
        sizes[local] += layer.kv_heads * (layer.key_head_size + layer.value_head_size) * itemsize
    return sizes[0], sizes[1]
