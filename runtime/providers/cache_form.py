"""The form of the KV cache that a graph takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest

_DTYPES: dict[str, type[np.generic]] = {"tensor(float16)": np.float16}


@dataclass(frozen=True)
class CacheForm:
    """Shapes and dtype of a cache's rows."""

    layers: tuple[KVGeometry, ...]  # of each attention call
    dtype: type[np.generic]

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of one sequence."""
        numbers = sum(layer.kv_heads * (layer.key_head_size + layer.value_head_size) for layer in self.layers)
        return numbers * np.dtype(self.dtype).itemsize


def cache_form(session: Any, manifest: Manifest) -> CacheForm:
    """The form that an open graph takes."""
    kinds = [value.type for value in session.get_inputs() if value.name.startswith(names.PAST_PREFIX)]
    return CacheForm(manifest.layers, _DTYPES.get(kinds[0] if kinds else "", np.float32))
