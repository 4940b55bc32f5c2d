"""The form of the KV cache that a graph takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest

_DTYPES: dict[str, type[np.generic]] = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class CacheForm:
    """Shapes and dtype of a cache's rows."""

    layers: tuple[KVGeometry, ...]  # of each attention call
    dtype: type[np.generic]
    scaled: bool = False  # whether each row ends in its scale: the native graph's int8 cache

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of one sequence."""
        numbers = sum(layer.kv_heads * (layer.key_head_size + layer.value_head_size) for layer in self.layers)
        return numbers * np.dtype(self.dtype).itemsize


def cache_form(session: Any, manifest: Manifest, path: Path) -> CacheForm:
    """The form that the graph at `path` takes, open as `session`."""
    kinds = [value.type for value in session.get_inputs() if value.name.startswith(names.PAST_PREFIX)]
    dtype = _DTYPES.get(kinds[0] if kinds else "", np.float32)
    scaled = dtype is np.int8 and path.name == Path(names.NATIVE_GRAPH).name
    layers = tuple(layer.in_int8 for layer in manifest.layers) if scaled else manifest.layers
    return CacheForm(layers, dtype, scaled)
