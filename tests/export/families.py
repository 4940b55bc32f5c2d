"""Tiny decoders of Hugging Face families, randomly initialised: what the graft takes, and what it refuses and why.

Sizes are stated under the names that most configurations share; a family states what it has beside or instead. The
windows are smaller than the text that `verify` compares, so that it sees tokens leave them. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CONTEXT = 96
WINDOW = 12

_COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {  # keys and values out of a smaller vector, and heads of two sizes
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_KINDS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
_SOFTCAP: dict[str, Any] = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}

_PLAIN = (
    "arcee", "biogpt", "bitnet", "cohere", "diffllama", "ernie4_5", "gemma", "gpt2", "gpt_bigcode", "helium",
    "hunyuan_v1_dense", "jais2", "llama", "nanochat", "nemotron", "olmo", "olmo2", "openai-gpt", "persimmon",
    "qwen3", "seed_oss", "smollm3",
)  # fmt: skip
# family -> what its configuration has beside the common sizes
FAMILIES: dict[str, dict[str, Any]] = {family: {} for family in _PLAIN} | {
    "afmoe": _EXPERTS | _KINDS,
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"rotary_dim": 8, "n_inner": 112},
    "cohere2": _KINDS,
    "ctrl": {"dff": 112},
    "cwm": _KINDS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v2": _ROUTED | _LATENT,
    "deepseek_v3": _ROUTED | _LATENT,
    "dots1": _ROUTED | {"n_shared_experts": 1},
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": _KINDS,
    "exaone_moe": _EXPERTS | _KINDS,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "flex_olmo": _EXPERTS,
    "gemma2": _KINDS | _SOFTCAP | {"query_pre_attn_scalar": 16},
    "gemma3_text": _KINDS | {"query_pre_attn_scalar": 16},
    "gemma3n_text": _KINDS | {"activation_sparsity_pattern": [0.9, 0.0], "num_kv_shared_layers": 0},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": _ROUTED,
    "glm4_moe_lite": _ROUTED | _LATENT,
    "granitemoehybrid": {  # dense Granite 4.0; its configuration has infinity
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "window_size": WINDOW,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": _EXPERTS | _KINDS,
    "gptj": {"rotary_dim": 8, "n_inner": 112},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": _EXPERTS | {"attention_multiplier": 0.3},
    "granitemoeshared": _EXPERTS | {"attention_multiplier": 0.3, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": _EXPERTS,
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "minimax_m2": _EXPERTS | {"rotary_dim": 8},
    "ministral": _KINDS,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": _EXPERTS | {"sliding_window": WINDOW},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "olmo3": _KINDS,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": _EXPERTS | {"sliding_window": WINDOW},
    "qwen2": _KINDS | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS,
    "solar_open": _ROUTED,
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": _KINDS | _SOFTCAP | {"query_pre_attn_scalar": 16},
    "xglm": {"ffn_dim": 112, "num_layers": 2, "attention_heads": 4, "d_model": 64},
    "youtu": _LATENT,
}

# One family or two of each kind; the others are combinations of what these have, and `make matrix` runs them.
QUICK = ("gemma2",)  # in every run: rotary positions with windows and a soft cap
IN_CI = (
    "gpt2",  # learned positions
    "llama",  # what most are: grouped queries, rotary halves, gated
    "bloom",  # ALiBi
    "gpt_oss",  # sinks, experts
    "qwen2",  # biases, and windows in some layers
    "cohere2",  # parallel, rotary neighbours
    "phi3",  # fused projections
    "gpt_neox",  # partly rotary, parallel
    "opt",  # positions from 2 on
    "falcon",  # attention by hand, grouped
    "qwen3_moe",  # norms of queries and keys
    "deepseek_v3",  # latent, of two head sizes
    "diffllama",  # differential
    "lfm2",  # short convolutions
)  # fmt: skip

# family -> what its configuration has beside the common sizes, and words of the reason that it is refused with
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "doge": ({}, "puts numbers of earlier tokens beside the scores of attention"),
    "llama4_text": (_EXPERTS | {"interleave_moe_layer_step": 1, "attention_chunk_size": 16}, "repeats positions"),
    "mamba": ({}, "keep another state than keys and values"),
}
_BY_HAND = "it computes this attention by hand, not through AttentionInterface"
_UNTRACED = "its experts are picked by values, in a way that no trace can follow"
_OTHERWISE = "it is refused for another reason"
# Families that transformers 4.57 has, too, and what keeps them from being exported (or refused as above) there.
FROM_TRANSFORMERS_5: dict[str, str] = {
    "codegen": _BY_HAND,
    "ctrl": _BY_HAND,
    "deepseek_v2": _OTHERWISE,
    "deepseek_v3": _UNTRACED,
    "diffllama": _BY_HAND,
    "dots1": _UNTRACED,
    "glm4_moe": _UNTRACED,
    "gptj": _BY_HAND,
    "jetmoe": _BY_HAND,
    "nemotron": _BY_HAND,
    "olmoe": _BY_HAND,
    "phimoe": _BY_HAND,
    "qwen2_moe": _BY_HAND,
    "stablelm": _BY_HAND,
    "xglm": _OTHERWISE,
}


def build(family: str) -> nn.Module:
    """The model with weights large enough that attention is sharp and every part of it shows."""
    import transformers

    logging: Any = transformers.utils.logging  # without types
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # remarks on sizes this small
    try:
        known = transformers.AutoConfig.for_model(family)
        named = {k: v for k, v in _COMMON.items() if hasattr(known, k) and not _is_derived(known, k)}
        extras = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **(named | extras))
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    finally:
        logging.set_verbosity(verbosity)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1  # type: ignore[misc]
    return model.eval()


def _is_derived(config: Any, name: str) -> bool:
    """Whether a configuration computes this field from others, and lets nobody set it."""
    field = getattr(type(config), name, None)
    return isinstance(field, property) and field.fset is None
