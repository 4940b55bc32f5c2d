"""Random rows of GGUF's quantized types, with scales as real files have them, and a tiny Llama of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ...tiny_llama import TEMPLATE, VOCABULARY, bpe

TYPES: Any = gguf.GGMLQuantizationType
# Where a block has its float16 d and dmin, and what d times the integers and scales reaches at most.
PLACES: dict[str, tuple[int, int | None, int]] = {
    "Q8_0": (0, None, 127), "Q4_0": (0, None, 8), "Q5_0": (0, None, 16), "Q4_1": (0, 2, 15), "Q5_1": (0, 2, 31),
    "Q2_K": (80, 82, 45), "Q3_K": (108, None, 128), "Q4_K": (0, 2, 945), "Q5_K": (0, 2, 1953),
    "Q6_K": (208, None, 4096),
}  # fmt: skip
CENTRE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}  # dmin over d


def random_rows(kind: str, rows: int, columns: int, seed: int = 0, reach: float = 0.4) -> np.ndarray:
    """(rows, bytes) uint8: all bits of a block are random but for d and dmin."""
    rng = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = rng.integers(0, 256, (rows, columns // weights, size), np.uint8)
    d, dmin, most = PLACES[kind]
    factors = (reach / most * rng.uniform(0.5, 1.5, (*blocks.shape[:2], 1))).astype(np.float16)
    blocks[..., d : d + 2] = factors.view(np.uint8)
    if dmin is not None:
        blocks[..., dmin : dmin + 2] = (factors * np.float16(CENTRE[kind])).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def weights_of(raw: np.ndarray, kind: str) -> np.ndarray:
    """(rows, columns) float32, by the gguf library."""
    return np.asarray(gguf.dequantize(raw, TYPES[kind]))


def write_tokenizer(writer: Any) -> None:
    """A byte-level tokenizer of VOCABULARY ids, and a chat template."""
    vocabulary = json.loads(bpe(bos=False).backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(vocabulary["model"]["vocab"].items(), key=lambda entry: entry[1])]
    tokens += [f"[unused{i}]" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(VOCABULARY)])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)


def write_llama(file: Path, kinds: Sequence[str], *, width: int = 256, **others: int) -> Path:
    """A Llama of one layer whose matrices are of these types in turn; "F32" stays in floats."""
    writer = gguf.GGUFWriter(file, "llama")
    kv = width // 2
    for name, value in {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": width,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": width // 4,
        "vocab_size": VOCABULARY,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    write_tokenizer(writer)
    shapes = {
        "token_embd": VOCABULARY, "output": VOCABULARY, "blk.0.attn_q": width, "blk.0.attn_k": kv,
        "blk.0.attn_v": kv, "blk.0.attn_output": width, "blk.0.ffn_gate": width, "blk.0.ffn_up": width,
        "blk.0.ffn_down": width,
    } | others  # fmt: skip
    for number, (name, rows) in enumerate(shapes.items()):
        kind = kinds[number % len(kinds)]
        if kind == "F32":
            content = np.random.default_rng(number).normal(0, 0.2, (rows, width)).astype(np.float32)
            writer.add_tensor(f"{name}.weight", content)
        else:
            writer.add_tensor(f"{name}.weight", random_rows(kind, rows, width, number), raw_dtype=TYPES[kind])
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
