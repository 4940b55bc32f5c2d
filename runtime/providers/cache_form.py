"""The form of the KV cache that a graph takes."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest

_DTYPES: dict[str, type[np.generic]] = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class CacheForm:
    """Shapes and dtype of a cache's rows."""

    layers: tuple[KVGeometry, ...]  # of each attention call
    dtype: type[np.generic]
    # Of the native graph's int8 cache, whose rows end in their scale: what further scales each channel of the keys,
    # (1, K, 1, D) float32 for each attention call.
    key_scales: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def scaled(self) -> bool:
        """Whether each row ends in its scale."""
        return bool(self.key_scales)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of one sequence."""
        numbers = sum(layer.kv_heads * (layer.key_head_size + layer.value_head_size) for layer in self.layers)
        return numbers * np.dtype(self.dtype).itemsize


def cache_form(session: Any, manifest: Manifest, path: Path) -> CacheForm:
    """The form that the graph at `path` takes, open as `session`."""
    kinds = [value.type for value in session.get_inputs() if value.name.startswith(names.PAST_PREFIX)]
    dtype = _DTYPES.get(kinds[0] if kinds else "", np.float32)
    if dtype is not np.int8 or path.name != Path(names.NATIVE_GRAPH).name:
        return CacheForm(manifest.layers, dtype)
    stored = session.get_modelmeta().custom_metadata_map
    return CacheForm(
        tuple(layer.in_int8 for layer in manifest.layers),
        dtype,
        tuple(
            np.frombuffer(base64.b64decode(stored[names.past_key(i)]), "<f4").reshape(
                1, layer.kv_heads, 1, layer.key_head_size
            )
            for i, layer in enumerate(manifest.layers)
        ),
    )
