"""Writing a bundle's files: the graphs over one weights file, and the configurations that other programs read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.bundle import Manifest
from pastkey.folder import write_json

from .contents import special_ids
from .embedding import take_embedding_rows
from .last_position import keep_last_positions
from .programs import GENAI_INPUTS, GENAI_OUTPUTS, declare_cache
from .source import Source

# Below this, a weight stands in the graph itself: shapes and axes must, for onnxruntime to infer shapes from them.
INLINE_BYTES = 1024
_ALIGNMENT = 64  # bytes; a cache line
_PAGE_ALIGNMENT, _PAGE_ALIGNED_FROM = 4096, 1 << 20  # large weights start on a page, to be mapped


# --- graphs -------------------------------------------------------------------------------------------------------
def write_graphs(model: ir.Model, folder: Path, precision: str) -> int:
    """Writes the common graph, its weights, and pastkey's own graph over the same weights. Changes `model`.

    Returns the bytes of the weights, in their own file and in the graph.
    """
    common = folder / names.COMMON_GRAPH[precision]
    common.parent.mkdir(parents=True, exist_ok=True)
    weight_bytes = _move_weights_out(model, common.with_name(common.name + names.DATA_SUFFIX))
    ir.save(model, common)
    keep_last_positions(model)
    take_embedding_rows(model)
    ir.save(model, folder / names.LAST_GRAPH)
    return weight_bytes


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


def _move_weights_out(model: ir.Model, path: Path) -> int:
    """Writes the larger initializers to one file and points the graph at it.

    Initializers over the same memory are written once and share the bytes: a tied head and its embedding. A model
    so small that all its weights stand in the graph gets no file. Returns the bytes of all floating-point and
    quantized weights.
    """
    inline = 0
    # (address, bytes) -> offset, and the array itself: while it lives, no other array has its address
    written: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            array = np.ascontiguousarray(value.const_value.numpy())
            if array.nbytes < INLINE_BYTES:
                inline += array.nbytes if array.dtype in (np.float32, np.uint8) else 0
                continue
            memory = (array.__array_interface__["data"][0], array.nbytes)
            if memory not in written:
                alignment = _PAGE_ALIGNMENT if array.nbytes >= _PAGE_ALIGNED_FROM else _ALIGNMENT
                file.write(b"\0" * (-file.tell() % alignment))
                written[memory] = (file.tell(), array)
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
            value.const_value = ir.ExternalTensor(
                path.name,
                written[memory][0],
                array.nbytes,
                value.const_value.dtype,
                shape=ir.Shape(array.shape),
                name=str(value.name),
                base_dir=path.parent,
            )
        external = file.tell()
    if not external:
        path.unlink()
    return external + inline


# --- configurations -----------------------------------------------------------------------------------------------
def write_configurations(folder: Path, source: Source, manifest: Manifest, heads: Sequence[int]) -> None:
    """config.json, generation_config.json, genai_config.json and the tokenizer's two files."""
    config = _config(source, manifest, heads) | _loading(folder, manifest)
    write_json(folder / names.CONFIG, config)
    eos = list(manifest.eos_token_ids)
    special = {
        "bos_token_id": manifest.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": eos[0] if eos else None,
    }
    write_json(folder / names.GENERATION_CONFIG, special | {"max_length": manifest.context_length})
    write_json(folder / names.GENAI_CONFIG, _genai_config(special, manifest, heads))
    if source.tokenizer is not None:
        (folder / names.TOKENIZER).write_bytes(source.tokenizer)
        write_json(folder / names.TOKENIZER_CONFIG, _tokenizer_config(source, source.tokenizer))


def _tokenizer_config(source: Source, tokenizer: bytes) -> dict[str, Any]:
    """The source's own, with what other programs would guess wrong."""
    own = source.tokenizer_config
    config = {
        "tokenizer_class": names.TOKENIZER_CLASS,  # else transformers goes by the model_type, and may add tokens
        **own,
        "model_input_names": [names.INPUT_IDS, names.ATTENTION_MASK],  # else transformers makes token_type_ids too
    }
    # transformers.js runs the post-processor only where this is said.
    config.setdefault("add_bos_token", special_ids(tokenizer)[:1] == (source.bos_token_id,))
    return config


def _config(source: Source, manifest: Manifest, heads: Sequence[int]) -> dict[str, Any]:
    """What transformers, optimum and transformers.js read: the source's own where it declares the graph's cache."""
    first = manifest.layers[0]
    sizes = {
        "architectures": [manifest.source],
        "vocab_size": manifest.vocab_size,
        "max_position_embeddings": manifest.context_length,
        "num_hidden_layers": len(manifest.layers),
        "num_attention_heads": heads[0],
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.key_head_size,
        "hidden_size": heads[0] * first.key_head_size,
        "bos_token_id": manifest.bos_token_id,
        "eos_token_id": manifest.eos_token_ids[0] if manifest.eos_token_ids else None,
    }
    return declare_cache(source.config, sizes, manifest.layers)


def _loading(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What config.json says of the files beside it.

    transformers.js takes its default precision from it: without, that is fp32 in Node and q8 in a browser.
    """
    graph = names.COMMON_GRAPH[manifest.precision]
    javascript: dict[str, Any] = {"dtype": names.TRANSFORMERS_JS_DTYPE[manifest.precision]}
    if (folder / (graph + names.DATA_SUFFIX)).exists():
        javascript["use_external_data_format"] = {Path(graph).name: 1}
    return {"transformers.js_config": javascript}


def _genai_config(special: dict[str, Any], manifest: Manifest, heads: Sequence[int]) -> dict[str, Any]:
    """What onnxruntime-genai reads."""
    first = manifest.layers[0]
    decoder = {
        "filename": names.COMMON_GRAPH[manifest.precision],
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
