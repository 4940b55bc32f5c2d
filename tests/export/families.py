"""Tiny decoders of every Hugging Face family that the graft takes, randomly initialised. Needs transformers.

Sizes are stated under the names that most configurations share; a family states what it has beside or instead. The
windows are smaller than the text that `verify` compares, so that it sees tokens leave them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CONTEXT = 96
WINDOW = 12

_COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_MULTI_HEAD = {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}

# family -> what its configuration has beside the common sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 8, "n_inner": 112},
    "cohere": {},
    "cohere2": _KINDS,
    "ctrl": {"dff": 112},
    "deepseek_v2": _EXPERTS
    | {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "deepseek_v3": _EXPERTS
    | {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "diffllama": {},
    "dots1": _EXPERTS
    | {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "exaone4": _KINDS,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {},
    "gemma2": _KINDS | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "gemma3_text": _KINDS | {"query_pre_attn_scalar": 16},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": _EXPERTS | _KINDS,
    "gptj": {"rotary_dim": 8, "n_inner": 112},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": _EXPERTS | {"attention_multiplier": 0.3},
    "granitemoeshared": _EXPERTS | {"attention_multiplier": 0.3, "shared_intermediate_size": 48},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "minimax_m2": _EXPERTS | {"rotary_dim": 8},
    "ministral": _KINDS,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": _EXPERTS | {"sliding_window": WINDOW},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _KINDS,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": _EXPERTS | {"sliding_window": WINDOW},
    "qwen2": _KINDS | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": _KINDS | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "xglm": {"ffn_dim": 112, "num_layers": 3, "attention_heads": 4, "d_model": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": WINDOW},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "openai-gpt": {},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mamba": {},
    "nanochat": {},
    "flex_olmo": _EXPERTS,
    "hunyuan_v1_moe": _EXPERTS,
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "solar_open": _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "afmoe": _EXPERTS | _KINDS,
    "jais2": {},
    "cwm": _KINDS,
    "youtu": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "exaone_moe": _EXPERTS | _KINDS,
    "glm4_moe_lite": _EXPERTS
    | {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "longcat_flash": {},
    "jetmoe": {},
    "doge": {},
    "zamba": {},
    "rwkv": {},
    "llama4_text": _EXPERTS | {"interleave_moe_layer_step": 1, "attention_chunk_size": 16},
    "moonshine": {},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
}


def build(family: str) -> nn.Module:
    """The model with weights large enough that attention is sharp and every part of it shows."""
    import transformers

    known = transformers.AutoConfig.for_model(family)
    sizes = {k: v for k, v in _COMMON.items() if hasattr(known, k)} | FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()
