"""Checks the files of a Hugging Face folder or a GGUF file before transformers loads their weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError, missing_extra
from pastkey.files.folder import read_json
from pastkey.files.reading import reading
from pastkey.files.safetensors_header import read_header
from pastkey.values import is_int, shown

from .gguf_header import read_gguf

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "model*.bin")
_SAFETENSORS, _INDEX = ".safetensors", ".safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Architectures' names for their sizes. Each is limited to the size of the files, times some slack for smaller dtypes.
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "vocabulary": ("vocab_size",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "moe_intermediate_size"),
    "heads": ("num_attention_heads", "n_head", "num_key_value_heads", "num_local_experts", "num_experts"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
}
_SLACK = 16
MOST_POSITIONS = 1 << 27


def stored_bytes_per_weight(config: Mapping[str, Any]) -> int:
    """Returns the size of a weight in the files of a folder with this config.json."""
    return 2 if str(config.get("dtype", config.get("torch_dtype"))) in ("float16", "bfloat16") else 4


def check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raises InputError or MissingFileError unless a folder's weights are whole safetensors files."""
    named = config.get("transformers_weights")
    if named is not None and not _is_plain(named, _SAFETENSORS, _INDEX):
        raise InputError(
            f"{folder / names.CONFIG} names the weights {named!r:.80}: expected a {_SAFETENSORS} file next to it"
        )
    if any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        _check_safetensors(folder)
        whole, index = folder / names.WEIGHTS, folder / f"{names.WEIGHTS}.index.json"
        shard = next(iter(sorted(folder.glob("*-of-*.safetensors"))), None)
        if named is None and shard is not None and not whole.is_file() and not index.is_file():
            raise MissingFileError(
                f"{folder} has the shard {shard.name} and no {index.name}, which lists its weights: fetch that file too"
            )
        return
    pickled = sorted({found.name for pattern in _PICKLED for found in folder.glob(pattern)})
    if pickled:
        kinds = ["AutoModelForCausalLM", *(["AutoTokenizer"] if has_tokenizer(folder) else [])]
        program = (
            f"import transformers as t; kinds = {', '.join(f't.{kind}' for kind in kinds)},; "
            f"[kind.from_pretrained({str(folder)!r}).save_pretrained({f'{folder}-safetensors'!r}) for kind in kinds]"
        )
        raise InputError(
            f"{folder} has its weights only as {pickled[0]}, a pickle, which can run any code when it is read: if you "
            f"trust it, convert it with  {shlex.join(['python', '-c', program])}  and export that folder"
        )
    raise MissingFileError(f"{folder} has a config.json and no weights: expected model.safetensors next to it")


def _check_safetensors(folder: Path) -> None:
    """Raises MissingFileError, InputError or IntegrityError if a file is missing or shorter than its header says."""
    for index in folder.glob("*.safetensors.index.json"):
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise InputError(f"{index} has no weight_map, which lists the weights of each file: fetch it again")
        shards = {str(file) for file in listed.values()}
        other = next((name for name in sorted(shards) if not _is_plain(name, _SAFETENSORS)), None)
        if other is not None:
            raise InputError(
                f"{index} names the weights {other!r:.80}: expected {_SAFETENSORS} files next to it, since only these "
                "hold no code"
            )
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise MissingFileError(
                f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which "
                f"{index.name} names: fetch the missing files"
            )
    for file in sorted(folder.glob(f"*{_SAFETENSORS}")):
        with reading(file, "safetensors"):
            read_header(file)


def check_sizes(folder: Path, config: Mapping[str, Any]) -> int:
    """Returns the number of weights. Raises InputError if the configuration asks for far more than the files hold."""
    headers = [read_header(file) for file in weights_of(folder, config)]
    tensors, elements = sum(map(len, headers)), sum(t.elements for header in headers for t in header.values())
    for own in (config, *(part for part in config.values() if isinstance(part, dict))):
        sizes = {name: _largest_size(own, keys) for name, keys in SIZES.items()}
        largest = sizes["width"] * max(sizes["vocabulary"], sizes["layers"] * sizes["inner"], sizes["heads"])
        beyond = largest > _SLACK * (elements + 4096)
        if sizes["layers"] > max(64, tensors) or sizes["positions"] > MOST_POSITIONS or beyond:
            told = ", ".join(f"{keys[0]} {shown(sizes[name])}" for name, keys in SIZES.items())
            raise InputError(
                f"{folder / names.CONFIG} asks for more than the {tensors:,} tensors with {elements:,} weights next "
                f"to it hold ({told}): one of the two is another model's"
            )
    return elements


def weights_of(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Returns the safetensors files that transformers reads. Some folders also hold all weights once more."""
    named = folder / (config.get("transformers_weights") or names.WEIGHTS)
    index = named if named.name.endswith(_INDEX) else folder / f"model{_INDEX}"
    if named != index and named.is_file():
        return [named]
    if index.is_file():
        return [folder / shard for shard in set(read_json(index)["weight_map"].values())]
    return list(folder.glob(f"*{_SAFETENSORS}"))


def _largest_size(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    return max((value for key in keys if is_int(value := config.get(key), 1)), default=1)


def _is_plain(name: object, *endings: str) -> bool:
    """Whether this is a plain file name with one of these endings, not a path."""
    return isinstance(name, str) and name.endswith(endings) and not set(name) & set("/\\:\0")


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has a tokenizer that transformers can read."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def check_gguf(file: Path) -> int:
    """Returns the number of weights in the file. Raises InputError if it is not GGUF, or is cut short."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise missing_extra(error, "export", "huggingface") from None
    tensors, size = read_gguf(file), file.stat().st_size
    sizes: Mapping[int, tuple[int, int]] = {int(kind): found for kind, found in gguf.GGML_QUANT_SIZES.items()}
    for tensor in tensors:
        block, block_bytes = sizes.get(tensor.kind, (1, size + 1))
        end = tensor.offset + tensor.elements // block * block_bytes
        if end > size:
            raise InputError(
                f"{file} is cut short: the tensor {tensor.name} ends at byte {end:,} of {size:,}; fetch it again"
            )
    return sum(tensor.elements for tensor in tensors)
