"""The table of decoders that are exported: each with its context, and the graph that it must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from . import decoders
from .decoders import Plain, gpt2, llama


@dataclass(frozen=True)
class Case:
    """A decoder, its context, and the graph that auto must choose."""

    build: Callable[[], nn.Module]
    context: int
    graph: str = "fused"


CASES = {
    "head_size_8_one_head_context_8": Case(lambda: Plain(heads=1, vocab=33, context=8), 8),
    "head_size_10_context_11": Case(lambda: Plain(size=10, kv_heads=2, context=11), 11, "standard"),
    "head_size_80_unaligned_vocabulary": Case(lambda: Plain(heads=1, size=80, vocab=131, width=40), 40),
    "wider_values_context_2": Case(lambda: Plain(size=8, value_size=12, context=2), 2, "standard"),
    "three_axes": Case(lambda: decoders.OneHead(heads=1, size=16, vocab=5, width=6, context=8), 8),
    "one_block_twice": Case(lambda: decoders.Twice(size=10, kv_heads=2, width=40), 40, "standard"),
    "multi_query_repeated_by_hand": Case(lambda: decoders.RepeatedKv(kv_heads=1), 11),
    "softcap_bias_and_scale": Case(lambda: decoders.Softcapped(bias=True, vocab=50), 40),
    "nano_gpt": Case(lambda: decoders.NanoGpt(layers=1), 32),
    "multi_head_attention": Case(decoders.MultiHead, 11),
    "transformer_encoder": Case(decoders.Encoder, 11),
    "llama": Case(llama, 40),
    "gpt2": Case(gpt2, 40),
    "encoder_layers": Case(decoders.EncoderLayers, 20),
    "gpt_j": Case(decoders.GptJ, 20),
    "both_positions": Case(decoders.BothPositions, 20),
    "compiled_part": Case(decoders.CompiledAttention, 20),
    "compiled": Case(lambda: torch.compile(Plain(), backend="eager"), 20),  # type: ignore[arg-type, return-value]
    "data_parallel": Case(lambda: nn.DataParallel(Plain()), 20),
    "vocabulary_of_one": Case(lambda: Plain(vocab=1), 20),
}  # fmt: skip
