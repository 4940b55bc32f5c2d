"""Opens an ONNX folder that another program exported: its graph, configuration and tokenizer.

Nothing in it needs transformers: the graph is the model, and config.json only names its sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError
from pastkey.files.external_data import external_data
from pastkey.files.folder import is_inside, read_json
from pastkey.values import is_int

from ..source import Opening, Source, context_of, refuse_links, sampling_of, special_ids
from ..stored_weights import SIZES
from ..tokenizers.tokenizer import read_tokenizer
from .decoder import GivenDecoder
from .given import read_given

SUFFIX = ".onnx"
_PLACES = ("model.onnx", "onnx/model.onnx", "decode.onnx")  # optimum's, transformers.js', transformers' exporter's
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_OF_ANOTHER_MODEL = ("auto_map", "quantization_config", "_name_or_path", "transformers_version")
_TOKENIZERS = (names.TOKENIZER, "vocab.json", "tokenizer.model")


def find_graph(folder: Path) -> Path | None:
    """Returns the float32 graph of a folder; None if it has safetensors, which are preferred, or no such graph."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((folder / place for place in _PLACES if (folder / place).is_file()), None)


def open_onnx(path: Path, opening: Opening) -> Source:
    """Opens a graph, with the configuration and tokenizer next to it or above it.

    Raises InputError, MissingFileError, IntegrityError or ResourceError.
    """
    folder = next((f for f in (path.parent, path.parent.parent) if (f / names.CONFIG).is_file()), None)
    if folder is None:
        raise MissingFileError(
            f"{path} has no {names.CONFIG} next to it, which names the context length: fetch the whole folder"
        )
    refuse_links(folder, _read_of(folder, path))
    given = read_given(path)
    opening.before_loading(given.weights, 4 * given.weights, 0)
    content = read_json(folder / names.CONFIG)
    if content.get("is_encoder_decoder") is True:
        raise InputError(f"{folder} holds an encoder-decoder: only decoders can be exported")
    content = {key: value for key, value in content.items() if key not in _OF_ANOTHER_MODEL}
    longest = _size(content, SIZES["positions"]) or opening.context_length
    if longest is None:
        raise InputError(f"{folder / names.CONFIG} names no context length: give it with --context N")
    context = context_of(folder.resolve().name, longest, opening.context_length)
    decoder = GivenDecoder(given, _size(content, _HEADS) or given.layers[0].kv_heads, _window(content))
    generation = read_json(folder / names.GENERATION_CONFIG) if (folder / names.GENERATION_CONFIG).is_file() else {}
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
    fields = read_tokenizer(opening.tokenizer or (folder if has_tokenizer else None))
    fields |= special_ids(generation, content)
    fields["tokenizer_config"] = _portable(fields.get("tokenizer_config", {}))
    return Source(
        decoder,
        folder.resolve().name,
        context,
        config=content | {"max_position_embeddings": context, "dtype": "float32", "torch_dtype": "float32"},
        generation=sampling_of(generation),
        **fields,
    )


def _read_of(folder: Path, graph: Path) -> Iterator[Path]:
    """Yields the files that may be read: the graph with its data, and the files next to the configuration."""
    yield graph
    yield from (graph.parent / data.location for data in external_data(graph) if is_inside(data.location))
    yield from (file for file in folder.iterdir() if file.is_file() or file.is_symlink())


def _size(content: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((content[key] for key in keys if is_int(content.get(key), 1)), None)


def _window(content: Mapping[str, Any]) -> int | None:
    """Returns the window in tokens of the layers that have one."""
    used = content.get("use_sliding_window") is not False
    return _size(content, ("sliding_window", "window_size")) if used else None


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of tokenizer_config.json that transformers 4 and 5 read alike."""
    wanted = ("chat_template", "clean_up_tokenization_spaces", "model_max_length")
    return {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key in wanted or (key.endswith("_token") and value is not None and not isinstance(value, bool))
    }
