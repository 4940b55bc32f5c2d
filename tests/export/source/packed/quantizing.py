"""Quantizes the matrices of a tiny Llama and writes them as GPTQ and AWQ do, in loops over single codes.

A second program, independent of pastkey's reader: it was written from AutoGPTQ's and AutoAWQ's layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pastkey.contract import names

from ..opening import change

Matrix = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # codes (N, K), scales (N, G), zeros (N, G), group (K,)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantized(weight: np.ndarray, bits: int, size: int, *, sym: bool, order: np.ndarray | None = None) -> Matrix:
    """Rounds to the nearest; `order`: channels in groups of `size`, one group after the other."""
    rows, channels = weight.shape
    sorted_channels = np.arange(channels) if order is None else order
    group = np.empty(channels, np.int32)
    group[sorted_channels] = np.arange(channels) // size
    most = 2**bits - 1
    parts = weight[:, sorted_channels].reshape(rows, -1, size)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if sym else np.clip(np.rint(-low / scales), 0, most).astype(int)
    codes = np.clip(np.rint(weight / scales[:, group]) + zeros[:, group], 0, most).astype(np.int64)
    return codes, scales, zeros.astype(np.int64), group


def dequantized(matrix: Matrix) -> np.ndarray:
    codes, scales, zeros, group = matrix
    return (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]


def packed(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Words (R, C * bits / 32) of codes (R, C); `order`: which code of each word comes first."""
    count = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // count), np.int64)
    for column in range(words.shape[1]):
        for place, code in enumerate(order or range(count)):
            words[:, column] += codes[:, column * count + code] << place * bits
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def gptq(matrix: Matrix, bits: int, *, version: int = 1) -> dict[str, Tensor]:
    codes, scales, zeros, group = matrix
    words = packed(zeros.T, bits)
    if version == 1:  # as GPTQModel does: of whole words
        ones = sum(1 << place for place in range(0, 32, bits))
        words = torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    return {
        "qweight": packed(codes, bits).T.contiguous(), "qzeros": words,
        "scales": torch.from_numpy(scales.T.copy()), "g_idx": torch.from_numpy(group),
    }  # fmt: skip


def awq(matrix: Matrix) -> dict[str, Tensor]:
    codes, scales, zeros, _ = matrix
    return {
        "qweight": packed(codes.T, 4, AWQ_ORDER), "qzeros": packed(zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(scales.T.copy()),
    }  # fmt: skip


def quantize_folder(
    folder: Path,
    settings: dict[str, Any],
    made: Callable[[np.ndarray], Matrix],
    written: Callable[[Matrix], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Replaces the projections of a folder's model. Returns all weights by name, dequantized in float32."""
    weights, content = load_file(folder / names.WEIGHTS), dict[str, Tensor]()
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        if not base.endswith("_proj"):
            content[name] = weight
            continue
        matrix = made(weight.numpy())
        weights[name] = torch.from_numpy(dequantized(matrix))
        content |= {f"{base}.{part}": tensor for part, tensor in written(matrix).items()}
    save_file(content, folder / names.WEIGHTS, metadata={"format": "pt"})
    change(folder / names.CONFIG, quantization_config=settings)
    return weights
