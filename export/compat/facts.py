"""The facts that other programs read of a bundle: their names of its tensors, and the cache of config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry

Config = Mapping[str, Any]  # config.json

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


# --- transformers.js and optimum ----------------------------------------------------------------------------------
# Both build the cache from a `model_type` that they know. That of llama has any number of K/V heads of one size.
_TYPE, UNKNOWN_TYPE = "llama", "pastkey"
NOTE_KEY, REPLACED_KEY = "pastkey_note", "pastkey_replaced"
_NOTE = "the graph is the model: these keys only declare its cache to programs that build one from a known model_type"


def declare_cache(config: Config, sizes: Config, layers: Sequence[KVGeometry]) -> dict[str, Any]:
    """Returns a config.json from which the programs build the graph's cache, if they can.

    `config` is the source's own and may be empty. `sizes` holds the observed sizes under Hugging Face's names, with
    `hidden_size` = heads * head size, since optimum divides it by the heads. A llama's own configuration keeps its
    other keys. Replaced keys are saved under a separate key. Where layers differ, or keys and values, the source's
    own configuration stays, or declares nobody's type.
    """
    own = dict(config) if config.get("model_type") not in (None, UNKNOWN_TYPE) else {}
    observed = {**sizes, "architectures": config.get("architectures", sizes["architectures"])}
    if len({*layers, KVGeometry(layers[0].kv_heads, *[layers[0].key_head_size] * 2)}) > 1:
        return own or observed | {"model_type": UNKNOWN_TYPE}
    resized = {key: sizes[key] for key in ("hidden_size", "head_dim", "num_key_value_heads")}
    declared = own | resized if own.get("model_type") == _TYPE else observed | {"model_type": _TYPE}
    replaced = {key: value for key, value in own.items() if declared.get(key) != value}
    return (
        declared | ({} if own and not replaced else {NOTE_KEY: _NOTE}) | ({REPLACED_KEY: replaced} if replaced else {})
    )
