"""Declares in config.json a `model_type` for which transformers.js and optimum build the graph's cache.

The lists of types come from the sources of the versions named here, at the addresses beside them;
`tests/programs/test_facts.py` compares them with the installed packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry
from pastkey.values import is_int

Config = Mapping[str, Any]  # config.json


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- transformers.js ----------------------------------------------------------------------------------------------
# Decoders of transformers.js 4.3, by the key of config.json that holds the number of layers with a cache:
# getNormalizedConfig in
# https://github.com/huggingface/transformers.js/blob/4.3.1/packages/transformers/src/configs.js
_JS_LAYERS_KEY = {
    "num_hidden_layers": _words(
        """afmoe apertus arcee cohere cohere2 deepseek_v3 ernie4_5 falcon gemma gemma2 gemma3_text glm glm_moe_dsa
        gpt_neox gpt_oss granite helium hrm_text hunyuan_v1_dense llama llama4_text ministral ministral3 mistral
        mistral4 mobilellm modernbert-decoder nanochat olmo olmo2 olmo3 opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe
        smollm3 solar_open stablelm starcoder2 vaultgemma youtu"""
    ),
    "n_layer": _words("bloom codegen gpt2 gpt_bigcode gptj jais"),
    "n_layers": frozenset({"mpt"}),
    "num_layers": frozenset({"exaone", "gpt_neo"}),
    "num_transformer_layers": frozenset({"openelm"}),
}


def js_layers_key(model_type: str) -> str | None:
    """Returns the key that transformers.js reads the number of layers from, or None for an unknown type."""
    return next((key for key, types in _JS_LAYERS_KEY.items() if model_type in types), None)


# --- onnxruntime-genai --------------------------------------------------------------------------------------------
# Its keys for the graph's tensors. The values are also its defaults.
GENAI_INPUTS = {
    "input_ids": names.INPUT_IDS,
    "attention_mask": names.ATTENTION_MASK,
    "position_ids": names.POSITION_IDS,
    "past_key_names": names.past_key("%d"),
    "past_value_names": names.past_value("%d"),
}
GENAI_OUTPUTS = {
    "logits": names.LOGITS,
    "present_key_names": names.present_key("%d"),
    "present_value_names": names.present_value("%d"),
}


# --- transformers and optimum -------------------------------------------------------------------------------------
# Decoder types of transformers 4.57, whose configuration class parses config.json: CONFIG_MAPPING_NAMES in
# https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/auto/configuration_auto.py
TRANSFORMERS_TYPES = _words(
    """apertus arcee biogpt bitnet bloom blt code_llama codegen cohere cohere2 cpmant ctrl dbrx deepseek_v2 deepseek_v3
    diffllama doge dots1 emu3 ernie4_5 ernie4_5_moe exaone4 falcon flex_olmo gemma gemma2 gemma3_text gemma3n_text glm
    glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama llama4_text longcat_flash minimax ministral mistral mixtral
    modernbert-decoder moshi mpt nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma xglm"""
)
# ORTModelForCausalLM's constructor in
# https://github.com/huggingface/optimum-onnx/blob/v0.1.0/optimum/onnxruntime/modeling_decoder.py
_OPTIMUM_KV_HEADS = _words(
    """arcee deepseek_v3 cohere gemma gemma3_text glm granite gpt_oss helium mistral llama nemotron qwen2 qwen3
    qwen3_moe smollm3 stablelm"""
)
_OPTIMUM_HEAD_DIM = _words("gemma gemma3_text gpt_oss nemotron")

# Other names for hidden_size and num_attention_heads in some configuration classes: their attribute_map, for example
# https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/gpt2/configuration_gpt2.py
_OTHER_NAMES = {
    "hidden_size": {"n_embd": "codegen ctrl gpt2 gpt_bigcode gptj openai-gpt", "d_model": "dbrx mpt xglm"},
    "num_attention_heads": {
        "n_head": "bloom codegen ctrl gpt2 gpt_bigcode gptj openai-gpt",
        "n_heads": "dbrx mpt",
        "num_heads": "gpt_neo",
        "attention_heads": "xglm",
    },
}


def optimum_cache(config: Config) -> KVGeometry | None:
    """Returns the cache that ORTModelForCausalLM builds for every layer; None if config.json lacks a key for it."""
    kind = str(config.get("model_type"))
    hidden, heads = _spelled("hidden_size", kind), _spelled("num_attention_heads", kind)
    if not all(is_int(config.get(key), 1) for key in (hidden, heads)):
        return None
    key_size = value_size = config[hidden] // config[heads]
    if kind == "deepseek_v3":
        sizes: list[Any] = [config.get(part) for part in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")]
        if not all(is_int(size, 1) for size in sizes):
            return None
        rope, nope, value_size = sizes
        key_size = rope + nope
    elif kind in _OPTIMUM_HEAD_DIM and is_int(config.get("head_dim"), 1):
        key_size = value_size = config["head_dim"]
    return KVGeometry(_optimum_kv_heads(config, kind, heads), key_size, value_size)


def _optimum_kv_heads(config: Config, kind: str, heads: str) -> int:
    key, multi_query = heads, False
    if kind in _OPTIMUM_KV_HEADS:
        key = "num_key_value_heads"
    elif kind == "falcon":
        key = "num_kv_heads"
        multi_query = bool(config.get("multi_query", True)) and not config.get("new_decoder_architecture")
    elif kind == "gpt_bigcode":
        multi_query = bool(config.get("multi_query", True))
    if multi_query:
        return 1
    return int(config[key] if is_int(config.get(key), 1) else config[heads])


def _spelled(key: str, kind: str) -> str:
    return next((other for other, kinds in _OTHER_NAMES[key].items() if kind in kinds.split()), key)


# --- declaring a cache --------------------------------------------------------------------------------------------
UNKNOWN_TYPE = "pastkey"  # declared if no known type has the graph's cache
NOTE_KEY, REPLACED_KEY = "pastkey_note", "pastkey_replaced"
_NOTE = "the graph is the model: these keys only declare its cache to programs that build one from a known model_type"


def declare_cache(config: Config, sizes: Config, layers: Sequence[KVGeometry]) -> dict[str, Any]:
    """Returns a config.json whose model_type makes the programs build the graph's cache, if such a type exists.

    `config` is the source's own and may be empty. `sizes` holds the observed sizes under Hugging Face's names, with
    `hidden_size` = heads * head size. The first of these that suits is used: the source's own; the source's own with
    `hidden_size` (which optimum divides by the heads), `head_dim` and `num_key_value_heads` replaced; a llama
    configuration, whose cache has any number of K/V heads of one size. Replaced values are saved under their own key.
    """
    own = dict(config) if config.get("model_type") not in (None, UNKNOWN_TYPE) else {}
    if own and suits(own, layers):
        return own
    observed = {**sizes, "architectures": config.get("architectures", sizes["architectures"])}
    resized = {key: sizes[key] for key in ("hidden_size", "head_dim", "num_key_value_heads")}
    for changed in ([own | resized] if own else []) + [observed | {"model_type": "llama"}]:
        if suits(changed, layers):
            replaced = {key: value for key, value in own.items() if changed.get(key) != value}
            return changed | {NOTE_KEY: _NOTE} | ({REPLACED_KEY: replaced} if replaced else {})
    return own or observed | {"model_type": UNKNOWN_TYPE}


def suits(config: Config, layers: Sequence[KVGeometry]) -> bool:
    """Whether transformers.js and optimum, which read config.json, both build this cache."""
    kind = str(config.get("model_type"))
    key = js_layers_key(kind)
    return (
        key is not None
        and config.get(key) == len(layers)
        and kind in TRANSFORMERS_TYPES
        and set(layers) == {optimum_cache(config)}
    )
