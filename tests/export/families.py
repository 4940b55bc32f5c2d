"""Tiny decoders of Hugging Face families, randomly initialised: supported ones, and refused ones with their cause.

Sizes are stated under the names that most configurations share; a family states its additional or other ones. The
windows are smaller than the text that `verify` compares, so that it sees tokens leave them. Needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 96
WINDOW = 12
FEW = 3  # different tokens in a greedy continuation: with no more, it proves little

_COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
}  # fmt: skip
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {  # keys and values out of a smaller vector, and heads of two sizes
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_SMALL: dict[str, Any] = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97, "laurel_rank": 16}
_PER_LAYER: dict[str, Any] = _KINDS | {"num_kv_shared_layers": 0, "global_head_dim": 32, **_SMALL}
_SOFTCAP: dict[str, Any] = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}

_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 32,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}

_HALF_TURNED = {"partial_rotary_factor": 0.5}
_WINDOWED = {"sliding_window": WINDOW}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# The fields of several families' configurations in addition to the common sizes.
_ALIKE: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, (
        "arcee", "biogpt", "bitnet", "cohere", "diffllama", "ernie4_5", "exaone", "gemma", "gpt-sw3", "gpt2",
        "gpt_bigcode", "gpt_neox_japanese", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder",
        "jais2", "llama", "nanochat", "nemotron", "olmo", "olmo2", "openai-gpt", "persimmon", "qwen3", "seed_oss",
        "smollm3",
    )),
    (_KINDS, ("cohere2", "exaone4", "granite_swa", "ministral", "olmo3")),
    (_WINDOWED, ("ministral3", "mistral", "phi3", "starcoder2")),
    (_HALF_TURNED, ("glm", "glm4", "phi", "stablelm")),
    (_EXPERTS, ("flex_olmo", "hunyuan_v1_moe", "olmoe", "qwen3_moe")),
    (_EXPERTS | _WINDOWED, ("mixtral", "phimoe")),
    (_EXPERTS | _KINDS, (
        "afmoe", "cohere2_moe", "exaone_moe", "gpt_oss", "granitemoe_swa", "laguna", "mellum",
    )),
    (_LATENT, ("minicpm3", "youtu")),
    (_ROUTED, ("glm4_moe", "solar_open")),
    (_ROUTED | _LATENT, ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")),
)  # fmt: skip
# family -> the further fields of its configuration
FAMILIES: dict[str, dict[str, Any]] = {family: own for own, families in _ALIKE for family in families} | {
    "apertus": {"rope_parameters": _ROPE},
    "bloom": {"n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "codegen": {"rotary_dim": 8, "n_inner": 112},
    "ctrl": {"dff": 112, "tie_word_embeddings": False},
    "cwm": _KINDS | {"rope_parameters": _ROPE},
    "dots1": _ROUTED | {"n_shared_experts": 1},
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": _KINDS | _SOFTCAP | {"query_pre_attn_scalar": 16},
    "gemma3_text": _KINDS | {"query_pre_attn_scalar": 16},
    "gemma3n_text": _KINDS | _SMALL | {"activation_sparsity_pattern": [0.9, 0.0], "num_kv_shared_layers": 0},
    "gemma4_text": _PER_LAYER
    | {"num_hidden_layers": 4, "layer_types": _KINDS["layer_types"] * 2, "num_kv_shared_layers": 2}
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "granitemoehybrid": {  # dense Granite 4.0; its configuration has infinity
        "layer_types": ["attention", "attention"], "shared_intermediate_size": 48, "position_embedding_type": "rope",
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8, "n_inner": 112},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": _EXPERTS | {"attention_multiplier": 0.3},
    "granitemoeshared": _EXPERTS | {"attention_multiplier": 0.3, "shared_intermediate_size": 48},
    "hy_v3": _EXPERTS | {"first_k_dense_replace": 1},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "lfm2_moe": _EXPERTS | {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": _WINDOWED | {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "minimax_m2": _EXPERTS | {"rotary_dim": 8},
    "modernbert-decoder": {"layer_types": _KINDS["layer_types"], "local_attention": WINDOW},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "qwen2": _KINDS | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "vaultgemma": _KINDS | _SOFTCAP | {"query_pre_attn_scalar": 16},
    "xglm": {"tie_word_embeddings": False, "ffn_dim": 112, "num_layers": 2, "attention_heads": 4, "d_model": 64},
}  # fmt: skip

# Whose memory is also a state of one size. After a "+" is a variant of a family.
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1], "attn_rotary_emb": 8},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid+experts": _MAMBA
    | _EXPERTS
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "granitemoehybrid+mamba": _MAMBA
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "num_local_experts": 0}
    | {"num_experts_per_tok": 0, "position_embedding_type": "nope", "attention_multiplier": 0.1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8, "expert_layer_offset": 7}
    | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "kimi_linear": _ROUTED | _LATENT | {"layer_types": _LINEAR["layer_types"], "head_dim": 16, "q_lora_rank": None}
    | {"linear_num_heads": 4, "linear_head_dim": 16, "linear_conv_kernel_dim": 4},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 8}
    | {"mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "chunk_size": 32, "expand": 2},
    "olmo_hybrid": _LINEAR | {"linear_num_key_heads": 4},
    "qwen3_5_text": _LINEAR | {"rope_parameters": _MROPE},
    "qwen3_next": _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "rwkv": {},
    "zamba2": {"num_key_value_heads": 4, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]}
    | {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 2, "n_mamba_heads": 8}
    | {"chunk_size": 32, "num_mem_blocks": 1, "use_shared_mlp_adapter": True, "adapter_rank": 8, "use_mem_rope": True}
    | {"use_shared_attention_adapter": False},
}  # fmt: skip
FAMILIES |= HYBRIDS

# One family or two of each kind; the others are combinations of their parts, and `make matrix` runs them.
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
    "lfm3",  # short convolutions, a window and a full layer
    "qwen3_5_text",  # a gated delta rule
    "falcon_h1",  # attention and Mamba-2 in each layer
    "gemma3n_text",  # several streams, a sparse activation
)  # fmt: skip

# family -> the further fields of its configuration, and words of the reason that it is refused with
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "doge": ({}, "joins numbers of earlier tokens with the scores of attention"),
    "llama4_text": (_EXPERTS | {"interleave_moe_layer_step": 1, "attention_chunk_size": 16}, "repeats positions"),
}
_INDEXED = _ROUTED | _LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
# The fields that make the configurations of other types small.
_HALF: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
_VISION = _HALF | {"num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14}
_ALIKE_OTHERS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    (_EXPERTS, ("inkling_text", "inkling2_text", "inkling2_loop_text", "minimax", "minimax_m3_vl_text")),
    (_EXPERTS | _KINDS | {"shared_expert_intermediate_size": 48}, ("flint", "kolibri1")),
    (_INDEXED, ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")),
    (_ROUTED | _LATENT, ("axk1", "sarvam_mla")),
    ({"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}, ("zamba",)),
)
OTHERS: dict[str, dict[str, Any]] = {family: own for own, families in _ALIKE_OTHERS for family in families} | {
    "apertus1p5_text": {},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "aria_text": _EXPERTS | {"moe_num_experts": 4, "moe_topk": 2},
    "beam": _EXPERTS | _KINDS | {"n_group": 1, "topk_group": 1},
    "blt": {
        "encoder_hash_byte_group_vocab": 50, "patch_in_forward": False, "patcher_config": _HALF,
        "encoder_config": _HALF | {"hidden_size_global": 64}, "decoder_config": _HALF | {"hidden_size_global": 64},
        "global_config": _HALF | {"hidden_size": 64},
    },
    "cohere_compass_text": _KINDS | {"rope_parameters": dict.fromkeys(_KINDS["layer_types"], _ROPE)},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
    },
    "dory": _KINDS | {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 2, "n_recurrent_layers": 0},
    "gemma4_unified_text": _PER_LAYER,
    "longcat_flash": _LATENT
    | {"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
    | {"expert_ffn_hidden_size": 48, "ffn_hidden_size": 112, "head_dim": 8},
    "mimo_v2_flash": _ROUTED | _KINDS | {"v_head_dim": 16},
    "moshi": {"ffn_dim": 112, "audio_vocab_size": 33},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        "audio_config": {"hidden_size": 32, "num_blocks": 1, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True, "local_attn_chunk_length": 8,
        "feed_forward_size": 112, "attention_head_size": 16,
    },
    "sarvam_moe": _ROUTED,
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "causal": True},
}  # fmt: skip
# Types that are no decoder, where neither the class nor the configuration says so.
NO_DECODERS: dict[str, str] = {
    "xlnet": "its tokens see later ones: it was trained by permutations",
    "gemma4_assistant": "drafts from the hidden states and the cache of another model",
    "gemma4_unified_assistant": "drafts from the hidden states and the cache of another model",
}

_BY_HAND = "it computes this attention by hand, not through AttentionInterface"
_UNTRACED = "its experts are picked by values, in a way that no trace can follow"
_OTHERWISE = "it is refused for another reason"
_NO_KERNEL = "it does not call its recurrence as a kernel"
_UNTRIED = "it was not tried there"
# Families that transformers 4.57 also has, and the reason that they are not exported (or refused as above) there.
FROM_TRANSFORMERS_5: dict[str, str] = {
    family: reason
    for reason, families in (
        (_UNTRIED, (
            "modernbert-decoder", "lfm2_moe", "granitemoehybrid", "gpt_neox_japanese", "gpt-sw3", "gemma3n_text",
        )),
        (_NO_KERNEL, tuple(HYBRIDS)),
        (_BY_HAND, (
            "codegen", "ctrl", "diffllama", "gptj", "jetmoe", "nemotron", "olmoe", "phimoe", "qwen2_moe", "stablelm",
        )),
        (_UNTRACED, ("deepseek_v3", "dots1", "glm4_moe")),
        (_OTHERWISE, ("deepseek_v2", "xglm")),
    )
    for family in families
}  # fmt: skip


def configured(family: str) -> Any:
    """The small configuration of a family; an encoder's is that of a decoder where it can be."""
    import transformers

    kind = family.partition("+")[0]
    known = transformers.AutoConfig.for_model(kind)
    if known.is_encoder_decoder:
        return known
    own = {**OTHERS, **{name: extras for name, (extras, _) in REFUSED.items()}, **FAMILIES}.get(family, {})
    if (text := known.get_text_config()) is not known:  # around a model of text
        parts = {part for part in known.sub_configs if getattr(known, part, None) is not None}
        inner = configured(text.model_type).to_dict() if text.model_type in transformers.CONFIG_MAPPING else _VISION
        named = {part: inner if getattr(known, part) is text else _VISION for part in parts}
    else:
        sizes = _COMMON | {"is_decoder": True}
        named = {k: v for k, v in sizes.items() if _has(known, k) and not _is_derived(known, k)}
    return transformers.AutoConfig.for_model(kind, **(named | own))


def build(family: str) -> nn.Module:
    """The model with weights large enough that attention is sharp and every part of it shows."""
    import transformers

    logging: Any = transformers.utils.logging  # without types
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # remarks on sizes this small
    try:
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(configured(family), attn_implementation="eager")
    finally:
        logging.set_verbosity(verbosity)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.eval()
    for seed in range(1, 11):
        _draw(model, first, seed)
        if seed > 5:  # smaller embeddings, where a tied head repeats the last token
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(0.1)
        if family not in FAMILIES or len({*greedy(model)}) > FEW:
            break
    return model


def _draw(model: nn.Module, first: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.copy_(first[name] + torch.randn(parameter.shape, generator=generator) * 0.1)


def greedy(model: nn.Module, count: int = 24) -> list[int]:
    """The greedy continuation of a prompt, without a cache."""
    ids = [5, 17, 3, 60, 41]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[5:]


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # each layer has its own
        return True


def _is_derived(config: Any, name: str) -> bool:
    """Whether a configuration computes this field from others, and lets nobody set it."""
    field = getattr(type(config), name, None)
    return isinstance(field, property) and field.fset is None
