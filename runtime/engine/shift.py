"""Context shift: evicts old tokens from the KV cache; later ones move to their positions.

Cached keys are rotated by their positions (RoPE), so moving them rotates them back by the same number of positions. The
first tokens stay as attention sinks (Xiao et al., "Efficient streaming language models with attention sinks",
https://arxiv.org/abs/2309.17453). The export measured how keys rotate, by running the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import KeyRotation, Manifest
from pastkey.errors import InputError

Rows = npt.NDArray[Any]
Moved = Callable[[int, Rows], Rows]  # (index of a cache's tensor, its rows (B, K, n, D)) -> rows at new positions


def turned(keys: Rows, rotation: KeyRotation, by: int) -> Rows:
    """A copy of keys (B, K, n, D), rotated by `by` positions, in their dtype. `by` may be negative."""
    angles = by * np.array(rotation.angles)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, end = rotation.first, rotation.first + 2 * len(angles)
    if rotation.interleaved:
        places = slice(first, end, 2), slice(first + 1, end, 2)
    else:
        places = slice(first, first + len(angles)), slice(first + len(angles), end)
    found = keys.copy()
    one, other = (keys[..., place].astype(np.float32, copy=False) for place in places)
    found[..., places[0]] = one * cos - other * sin
    found[..., places[1]] = other * cos + one * sin
    return found


def moved_by(manifest: Manifest, tokens: int) -> Moved:
    """The function that a cache's `drop` applies to rows that move up by `tokens`."""
    of_layer = {layer: rotation for rotation in manifest.shift.rotations for layer in rotation.layers}

    def moved(index: int, rows: Rows) -> Rows:
        rotation = of_layer.get(index // 2) if index % 2 == 0 else None  # keys and values in turn
        return rows if rotation is None else turned(rows, rotation, -tokens)

    return moved


def require_shift(manifest: Manifest) -> None:
    """Raises InputError if a bundle's cache cannot be shifted."""
    if manifest.shift.refused:
        raise InputError(
            f'context_overflow is "shift", and the cache of {manifest.source} cannot be shifted: '
            f"{manifest.shift.refused}; shorten the text, or export with a larger --context"
        )
