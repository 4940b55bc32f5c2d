"""ONNX folders as optimum writes them: a small decoder with past keys and values as inputs, traced by TorchScript."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..opening import save, write

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE, LAYERS, CONTEXT = 61, 64, 4, 2, 16, 2, 128


@dataclass(frozen=True)
class Kind:
    """The form of the decoder, of those that people export."""

    window: int | None = None
    counts_positions: bool = False  # from the length of past, without an input position_ids, as optimum's Gemma 2
    learned: bool = False  # positions in an embedding, and Gemm instead of MatMul, as GPT-2
    bias: bool = False  # a bias on scores by distance (ALiBi)
    masked: bool = True  # whether it has attention_mask
    softcap: float | None = None


class Block(nn.Module):
    """Attention over past and new tokens, and an MLP."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.norms = nn.ParameterList([nn.Parameter(1 + 0.1 * torch.randn(WIDTH)) for _ in range(2)])
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=kind.learned)
        self.k = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=kind.learned)
        self.v = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=kind.learned)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 96, bias=False), nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor, turn: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = _norm(x, self.norms[0])
        heads = [_split(_project(normed, layer, self.kind.learned)) for layer in (self.q, self.k, self.v)]
        query, new = turn(heads[0]), turn(heads[1])
        key, value = torch.cat([key, new], 2), torch.cat([value, heads[2]], 2)
        repeated = [t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for t in (key, value)]
        if self.kind.softcap is None:
            mixed = F.scaled_dot_product_attention(query, repeated[0], repeated[1], attn_mask=mask)
        else:
            scores = query @ repeated[0].transpose(2, 3) / SIZE**0.5
            scores = torch.tanh(scores / self.kind.softcap) * self.kind.softcap
            low = torch.finfo(torch.float32).min
            mixed = scores.masked_fill(~mask, low).softmax(-1) @ repeated[1]
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(_norm(x, self.norms[1])))), key, value


class Decoder(nn.Module):
    """forward(input_ids, attention_mask, position_ids, past keys and values...) -> logits, present keys and values."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        length, new = past[0].shape[2], ids.shape[1]
        rows = torch.arange(length, length + new)
        positions = rows[None] if self.kind.counts_positions else positions
        distance = rows[:, None] - torch.arange(length + new)[None]
        seen = distance >= 0
        if self.kind.window is not None:
            seen = seen & (distance < self.kind.window)
        seen = seen[None, None]
        if self.kind.masked:
            seen = seen & mask[:, None, None, :].to(torch.bool)
        weight: Tensor = seen
        if self.kind.bias:
            weight = torch.where(seen, -0.1 * distance.to(torch.float32), torch.finfo(torch.float32).min)
        x, present = self.embedding(ids), []
        if self.kind.learned:
            x = x + self.positions(positions)
        angles = positions[:, :, None].to(torch.float32) * 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

        def turn(t: Tensor) -> Tensor:
            first, second = t[..., : SIZE // 2], t[..., SIZE // 2 :]
            return t if self.kind.learned else t * cos + torch.cat([-second, first], -1) * sin

        for block, key, value in zip(self.blocks, past[::2], past[1::2], strict=True):
            x, key, value = block(x, weight, turn, key, value)
            present += [key, value]
        return self.head(x), *present


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _project(x: Tensor, layer: nn.Linear, flat: bool) -> Tensor:
    if not flat:
        return layer(x)
    return torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight.T).view(*x.shape[:-1], -1)


def _split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)


def write_graph(path: Path, kind: Kind = Kind()) -> Path:  # it is frozen
    """Writes the decoder's graph in optimum's form."""
    past = [torch.randn(2, KV_HEADS, 5, SIZE) for _ in range(2 * LAYERS)]
    ids, mask = torch.randint(0, VOCABULARY, (2, 3)), torch.ones(2, 8, dtype=torch.long)
    parts = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs, outputs = [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]
    whole = "past_sequence_length + sequence_length"
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "position_ids", "logits")}
    axes |= {"attention_mask": {0: "batch_size", 1: whole}}
    axes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in inputs}
    axes |= {name: {0: "batch_size", 2: whole} for name in outputs}
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Decoder(kind).eval(),
            (ids, mask, torch.arange(5, 8).expand(2, 3), *past),
            path,
            input_names=["input_ids", "attention_mask", "position_ids", *inputs],
            output_names=["logits", *outputs],
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
    return path


def write_folder(folder: Path, kind: Kind = Kind(), tokenizer: Tokenizer | None = None, **others: Any) -> Path:
    """Writes what `optimum-cli export onnx --task text-generation-with-past` writes. Returns the folder."""
    write_graph(folder / "model.onnx", kind)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": VOCABULARY - 1,
        "transformers_version": "4.57.6",
    }  # fmt: skip
    write(folder / "config.json", config | others)
    if tokenizer is not None:
        special = {"eos_token": "<end>", "tokenizer_class": "TokenizersBackend", "model_max_length": CONTEXT}
        save(tokenizer, folder, **special)
    return folder
