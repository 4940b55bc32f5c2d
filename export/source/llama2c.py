"""A llama2.c checkpoint (one .bin of float32 weights) and the tokenizer .bin next to it.

Both are read as https://github.com/karpathy/llama2.c writes them, little-endian, without padding between tensors:

    model      version 0: seven int32 (`_SIZES`), of which a negative vocabulary size says that the head is untied
               version 1: "24ka", int32 version, the seven, a byte that is 1 when the head is tied; padded to 256 bytes
               then the tensors in the order of `_ORDER`, those of all layers in one block per kind
    tokenizer  int32 longest piece, then for each piece float32 score, int32 byte length, the bytes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors
from torch import Tensor

from pastkey.contract.config import ModelConfig
from pastkey.errors import InputError, MissingFileError
from pastkey.files.memory import require_memory_for
from pastkey.files.reading import read_bytes, reading, require_regular
from pastkey.files.tokenizer_file import MOST_BYTES
from pastkey.train.model import Decoder

from .source import BeforeLoading, Opening, Source, context_of
from .tokenizers.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Piece,
    SentencePieceModel,
    tokenizer_of,
)
from .tokenizers.tokenizer import read_tokenizer

BOS, EOS = 1, 2  # by the format; a decoder trained there ends a text with BOS, which begins the next one

_MAGIC = b"24ka"
_HEADER_BYTES = 256  # from version 1 on
_SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_LARGEST = 1 << 24  # maximum of any size in a header: beyond, the file is something else
_MOST_LAYERS = 1000
_LONGEST_PIECE = 1000  # characters: the conversion cuts a piece in all places

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_NORM1, _NORM2 = "input_layernorm.weight", "post_attention_layernorm.weight"
_Q, _K, _V, _O = (f"self_attn.{name}_proj.weight" for name in "qkvo")
_GATE, _DOWN, _UP = (f"mlp.{name}_proj.weight" for name in ("gate", "down", "up"))
_ROTARY = "cosines and sines"  # version 0 only: a table that is skipped

_ORDER = {
    0: (_EMBEDDING, _NORM1, _Q, _K, _V, _O, _NORM2, _GATE, _DOWN, _UP, _NORM, _ROTARY, _HEAD),
    1: (_NORM1, _NORM2, _NORM, _EMBEDDING, _Q, _K, _V, _O, _GATE, _DOWN, _UP, _HEAD),
}

_SPECIALS = ("<unk>", "<s>", "</s>")  # ids 0 to 2
_RESERVED = (*_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)))  # ids 0 to 258


def open_llama2c(path: Path, opening: Opening) -> Source:
    """Opens the decoder in `path`, with the text of a llama2.c tokenizer .bin or a tokenizer.json, or ids only.

    Raises MissingFileError, InputError or ResourceError.
    """
    header, config = _read_header(path)
    state = _read_weights(header, config, opening.before_loading)  # before a decoder of possibly invalid sizes is made
    model = Decoder(config)
    model.load_state_dict(state)
    context = context_of(path, config.max_position_embeddings, opening.context_length)
    tokenizer = opening.tokenizer
    if tokenizer is not None and Path(tokenizer).suffix == ".bin":
        with reading(tokenizer, "a llama2.c tokenizer"):
            found = _read_tokenizer_bin(Path(tokenizer), config)
    else:
        found = read_tokenizer(tokenizer)
    found |= {"bos_token_id": BOS, "eos_token_ids": (EOS, BOS)}
    content = config.to_json() | {"max_position_embeddings": context}
    return Source(model.eval(), path.stem, context, config=content, **found)


# --- the model ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Header:
    path: Path
    version: int
    size: int  # bytes


def _read_header(path: Path) -> tuple[_Header, ModelConfig]:
    require_regular(path)
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    version, offset, size = 0, 0, 4 * len(_SIZES)
    if start.startswith(_MAGIC) and len(start) == _HEADER_BYTES:
        version, offset, size = struct.unpack_from("<i", start, 4)[0], 8, _HEADER_BYTES
        if version not in _ORDER:
            kind = ", the one with int8 weights," if version == 2 else ""
            raise InputError(
                f"{path} is of llama2.c's format version {version}{kind} and pastkey reads versions 0 and 1: "
                "export the checkpoint there with --version 1"
            )
    if len(start) < size:
        raise InputError(f"{path} has {len(start)} bytes, which is less than the header of a llama2.c checkpoint")
    sizes = dict(zip(_SIZES, struct.unpack_from(f"<{len(_SIZES)}i", start, offset), strict=True))
    tied = bool(start[offset + 4 * len(_SIZES)]) if version else sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    _check_sizes(path, sizes)
    return _Header(path, version, size), ModelConfig(
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_seq_len"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        head_dim=sizes["dim"] // sizes["n_heads"],
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _check_sizes(path: Path, sizes: dict[str, int]) -> None:
    """Raises InputError if no llama2.c checkpoint can have these sizes."""
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    sensible = all(1 <= size <= _LARGEST for size in sizes.values()) and sizes["vocab_size"] > EOS
    sensible = sensible and sizes["n_layers"] <= _MOST_LAYERS
    if not sensible or sizes["dim"] % (2 * sizes["n_heads"]) or sizes["n_heads"] % sizes["n_kv_heads"]:
        raise InputError(
            f"{path} is not a llama2.c checkpoint: its header would mean {told}; a .bin of pickled PyTorch weights "
            "must be saved as safetensors, with its config.json"
        )


def _read_weights(header: _Header, config: ModelConfig, before_loading: BeforeLoading) -> dict[str, Tensor]:
    """Returns the state of a Decoder. Raises InputError unless the file's size fits its header."""
    shapes = _shapes(config)
    order = [name for name in _ORDER[header.version] if name != _HEAD or not config.tie_word_embeddings]
    expected = header.size + 4 * sum(prod(shapes[name]) for name in order)
    found = header.path.stat().st_size
    if found != expected:
        raise InputError(
            f"{header.path} has {found:,} bytes and its header asks for {expected:,}: it was cut short or altered, "
            "copy it again"
        )
    count = sum(prod(shapes[name]) for name in order if name != _ROTARY)
    before_loading(count, 4 * count, 0)
    require_memory_for(header.path, 4 * count)
    values = torch.from_numpy(np.fromfile(header.path, "<f4", offset=header.size).astype(np.float32, copy=False))
    state: dict[str, Tensor] = {}
    for name, block in zip(order, values.split([prod(shapes[name]) for name in order]), strict=True):
        block = block.view(shapes[name])
        if name in (_EMBEDDING, _NORM, _HEAD):
            state[name] = block
        elif name != _ROTARY:
            for i, weight in enumerate(block):
                state[f"model.layers.{i}.{name}"] = _split_pairs(weight, config) if name in (_Q, _K) else weight
    return {_HEAD: state[_EMBEDDING]} | state


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each block in the file, matrices as (out, in)."""
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        _EMBEDDING: (config.vocab_size, width),
        _HEAD: (config.vocab_size, width),
        _NORM: (width,),
        _NORM1: (layers, width),
        _NORM2: (layers, width),
        _Q: (layers, query, width),
        _K: (layers, kv, width),
        _V: (layers, kv, width),
        _O: (layers, width, query),
        _GATE: (layers, inner, width),
        _UP: (layers, inner, width),
        _DOWN: (layers, width, inner),
        _ROTARY: (2, config.max_position_embeddings, config.head_dim // 2),
    }


def _split_pairs(weight: Tensor, config: ModelConfig) -> Tensor:
    """Reorders the rows of (heads * D, E) from rotary pairs (2i, 2i + 1) to our pairs (i, i + D/2)."""
    halves: Tensor = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return halves


# --- the tokenizer ------------------------------------------------------------------------------------------------
def _read_tokenizer_bin(path: Path, config: ModelConfig) -> dict[str, Any]:
    """Returns a Source's fields from a llama2.c tokenizer. Raises MissingFileError or InputError."""
    if not path.is_file():
        raise MissingFileError(f"no such tokenizer: {path} does not exist; expected a llama2.c tokenizer .bin")
    pieces = _read_pieces(path)
    if len(pieces) != config.vocab_size:
        raise InputError(
            f"{path} has {len(pieces)} pieces and the model {config.vocab_size} embeddings: give the tokenizer that "
            "the model was trained with"
        )
    # llama2.c writes line breaks around <s> and </s>, and plain spaces.
    texts = [text.strip() if i < len(_RESERVED) else text.replace(" ", SPACE) for i, (text, _) in enumerate(pieces)]
    if tuple(texts[: len(_RESERVED)]) != _RESERVED or len(set(texts)) != len(texts):
        raise InputError(
            f"the pieces of {path} are not {', '.join(_SPECIALS)}, the 256 bytes, and then each its own text: give the "
            "tokenizer's tokenizer.json instead"
        )
    configuration = {
        "bos_token": _SPECIALS[BOS],
        "eos_token": _SPECIALS[EOS],
        "unk_token": _SPECIALS[0],
        "clean_up_tokenization_spaces": False,
    }
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256] + [NORMAL] * (len(pieces) - len(_RESERVED))
    found = tuple(Piece(text, score, kind) for text, (_, score), kind in zip(texts, pieces, kinds, strict=True))
    tokenizer = tokenizer_of(SentencePieceModel(found, trainer={3: BPE}, normalizer={4: 0}))  # all spaces stay
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIALS[BOS]} $A", special_tokens=[(_SPECIALS[BOS], BOS)]
    )
    return {"tokenizer": tokenizer.to_str().encode(), "tokenizer_config": configuration}


def _read_pieces(path: Path) -> list[tuple[str, float]]:
    """Returns each piece with its score."""
    content = read_bytes(path, MOST_BYTES)
    pieces: list[tuple[str, float]] = []
    position = 4
    try:
        while position < len(content) or position == 4:
            score, length = struct.unpack_from("<fi", content, position)
            text = content[position + 8 : position + 8 + length]
            if not 0 <= length <= _LONGEST_PIECE or len(text) != length:
                raise ValueError("a piece is cut short")
            pieces.append((text.decode(), score))
            position += 8 + length
    except (struct.error, ValueError):
        raise InputError(
            f"{path} is not a llama2.c tokenizer, or was cut short: piece {len(pieces)}, at byte {position}, cannot "
            "be read"
        ) from None
    return pieces
