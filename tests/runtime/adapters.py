"""LoRA adapters of the tests' decoder, as peft saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.files.durable import write_json

from .tiny_decoder import Array, Tiny


def write_adapter(folder: Path, matrices: Mapping[str, tuple[Array, Array]], **config: Any) -> Path:
    """An adapter as peft saves it: module -> A (r, K) and B (N, r). Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": array
        for module, pair in matrices.items()
        for side, array in zip("AB", pair, strict=True)
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | config)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """A safetensors file; arrays of uint16 are bfloat16."""
    header, data = dict[str, Any](), b""
    for name, array in tensors.items():
        dtype = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64"}[array.dtype.name]
        start = len(data)
        data += array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, len(data)]}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


def lora(tiny: Tiny, weights: Sequence[str], rank: int = 2, seed: int = 1) -> dict[str, tuple[Array, Array]]:
    """Random A and B of these weights."""
    rng, found = np.random.default_rng(seed), dict[str, tuple[Array, Array]]()
    for weight in weights:
        columns, rows = tiny.weights[weight].shape
        a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
        found[f"model.{weight}"] = a, b
    return found


def merged(tiny: Tiny, matrices: Mapping[str, tuple[Array, Array]], scale: float = 1) -> Tiny:
    """The decoder with an adapter in its weights."""
    weights = dict(tiny.weights)
    for module, (a, b) in matrices.items():
        weight = module.removeprefix("model.")
        weights[weight] = (weights[weight] + scale * (b @ a).T).astype(np.float32)
    return Tiny(tiny.layers, tiny.context_length, weights)
