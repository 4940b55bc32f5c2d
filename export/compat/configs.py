"""Writes the configurations that other programs read: config.json, genai_config.json, the tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.contract.bundle import Manifest
from pastkey.files.durable import write_json
from pastkey.files.tokenizer_file import open_tokenizer
from pastkey.precisions import PRECISIONS

from ..source.source import Source
from .facts import GENAI_INPUTS, GENAI_OUTPUTS, UNKNOWN_TYPE, declare_cache


def write_configurations(folder: Path, source: Source, manifest: Manifest, heads: Sequence[int]) -> None:
    """Writes config.json, generation_config.json, genai_config.json and the tokenizer's two files."""
    config = _config(source, manifest, heads) | _loading(folder, manifest)
    write_json(folder / names.CONFIG, _finite(config))
    eos = list(manifest.eos_token_ids)
    special = {
        "bos_token_id": manifest.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": eos[0] if eos else None,
    }
    generation = special | {"max_length": manifest.context_length} | source.generation
    write_json(folder / names.GENERATION_CONFIG, generation)
    if manifest.layers:
        write_json(folder / names.GENAI_CONFIG, _genai_config(special, manifest, heads))
    if source.tokenizer is not None:
        (folder / names.TOKENIZER).write_bytes(_with_short_merges(source.tokenizer))
        write_json(folder / names.TOKENIZER_CONFIG, _tokenizer_config(source, source.tokenizer))


def _with_short_merges(tokenizer: bytes) -> bytes:
    """Returns tokenizer.json with its pairs of merges as texts, "a b", which tokenizers opens in 3/4 of the time."""
    content = json.loads(tokenizer)
    pairs = content["model"].get("merges") or ()
    # Such a text with a second space is invalid, and one that begins with #version is skipped.
    if any(isinstance(pair, str) or " " in "".join(pair) or pair[0].startswith("#version") for pair in pairs):
        return tokenizer
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() if pairs else tokenizer


def _tokenizer_config(source: Source, tokenizer: bytes) -> dict[str, Any]:
    """Returns the source's tokenizer configuration, plus the keys that other programs would guess wrong."""
    own = source.tokenizer_config
    config = {
        "tokenizer_class": names.TOKENIZER_CLASS,  # otherwise transformers uses the model_type and may add tokens
        **own,
        "model_input_names": [names.INPUT_IDS, names.ATTENTION_MASK],  # otherwise transformers adds token_type_ids
    }
    # transformers.js runs the post-processor only if this key says so.
    added = open_tokenizer(Tokenizer, tokenizer, names.TOKENIZER).encode("").ids
    config.setdefault("add_bos_token", added[:1] == [source.bos_token_id])
    return config


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """Returns JSON's content as transformers 5 writes it: infinity as {"__float__": "Infinity"}, as JSON has none."""
    finite: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda name: {"__float__": name})
    return finite


def _config(source: Source, manifest: Manifest, heads: Sequence[int]) -> dict[str, Any]:
    """config.json for transformers, optimum and transformers.js: the source's own if it declares the graph's cache."""
    sizes = {
        "architectures": [manifest.source],
        "vocab_size": manifest.vocab_size,
        "max_position_embeddings": manifest.context_length,
        "bos_token_id": manifest.bos_token_id,
        "eos_token_id": manifest.eos_token_ids[0] if manifest.eos_token_ids else None,
    }
    if manifest.states:  # no configuration declares a cache with them
        return sizes | {"model_type": UNKNOWN_TYPE} | source.config
    first = manifest.layers[0]
    sizes |= {
        "num_hidden_layers": len(manifest.layers),
        "num_attention_heads": heads[0],
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.key_head_size,
        "hidden_size": heads[0] * first.key_head_size,
    }
    return declare_cache(source.config, sizes, manifest.layers)


def _loading(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Returns the part of config.json that describes the files next to it.

    transformers.js reads its default precision there. Without it, the default is fp32 in Node and q8 in a browser.
    """
    precision = PRECISIONS[manifest.precision]
    javascript: dict[str, Any] = {"dtype": precision.transformers_js}
    if precision.cache_bytes == 2:
        javascript["kv_cache_dtype"] = {"fp16": "float16"}
    graph = folder / precision.graph
    if files := sum(names.is_weights_file(path.name, graph.name) for path in graph.parent.iterdir()):
        javascript["use_external_data_format"] = {graph.name: files}
    return {"transformers.js_config": javascript}


def _genai_config(special: dict[str, Any], manifest: Manifest, heads: Sequence[int]) -> dict[str, Any]:
    """Returns onnxruntime-genai's configuration."""
    first = manifest.layers[0]
    decoder = {
        "filename": PRECISIONS[manifest.precision].graph,
        "head_size": first.key_head_size,
        "hidden_size": heads[0] * first.key_head_size,
        "num_attention_heads": heads[0],
        "num_hidden_layers": len(manifest.layers),
        "num_key_value_heads": first.kv_heads,
        "session_options": {"provider_options": []},
        "inputs": GENAI_INPUTS,
        "outputs": GENAI_OUTPUTS,
    }
    present = {key: value for key, value in special.items() if value is not None}
    return {
        "model": {
            "type": "decoder",
            **present,
            "context_length": manifest.context_length,
            "vocab_size": manifest.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "max_length": manifest.context_length,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": manifest.graph == "fused",
        },
    }
