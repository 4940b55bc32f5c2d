"""The whole decoder: token embedding, positions, masked self-attention, residual connections, next-token logits.

It has no cache: the model reads all tokens and returns logits at every position, as training needs. `export` grafts the
cache onto its attention calls.

Shape letters: B batch, T tokens, E hidden size, H query heads, K key/value heads, D head size, V vocabulary.
Parameters have the names of Hugging Face's Llama, so that transformers can load the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pastkey.contract.config import ModelConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (B, 1, T, D/2)

EMBEDDING_NORM = 3.0  # norm of a token's embedding before training; tied logits begin with this deviation


class Decoder(nn.Module):
    """A decoder-only transformer: `forward(input_ids, position_ids) -> logits`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Returns the logits of the next token at every position, (B, T, V) float32.

        `input_ids` and `position_ids`, counted from 0, are (B, T) int64.
        """
        hidden = self.model(input_ids, position_ids)  # (B, T, E)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def end_at(self, token: int) -> None:
        """Makes this the EOS token."""
        self.config = dataclasses.replace(self.config, eos_token_id=token)

    def _initialize(self) -> None:
        """Initializes projections to preserve variance; those that add to the residual stream start at zero.

        So every layer is the identity at first, and the embedding, initialized large, reaches each layer unchanged. A
        decoder then learns to copy a name from earlier in the text much sooner than from small random weights.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.0 if name.endswith(("o_proj", "down_proj")) else module.in_features**-0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.model.embed_tokens.weight, std=EMBEDDING_NORM * self.config.hidden_size**-0.5)
        if self.config.position_encoding == "learned":
            nn.init.normal_(self.model.embed_positions.weight, std=0.02)


class Backbone(nn.Module):
    """Everything except the output head: token ids to hidden states.

    Attributes:
        checkpointing: Keeps one activation per layer, and computes the others again in the backward pass.
    """

    checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_encoding = config.position_encoding
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_encoding == "sinusoidal":
            self.sinusoids = Sinusoids(config.hidden_size)
        else:
            self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)  # (B, T, E)
        rotation = None
        if self.position_encoding == "learned":
            hidden = hidden + self.embed_positions(position_ids)  # (B, T, E)
        elif self.position_encoding == "sinusoidal":
            hidden = hidden + self.sinusoids(position_ids)  # (B, T, E)
        else:
            rotation = self.rotary(position_ids)
        for layer in self.layers:
            if self.checkpointing:
                hidden = checkpoint(layer, hidden, rotation, use_reentrant=False)  # (B, T, E)
            else:
                hidden = layer(hidden, rotation)  # (B, T, E)
        output: Tensor = self.norm(hidden)  # (B, T, E)
        return output


class Layer(nn.Module):
    """Attention, then an MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.has_mlp = config.mlp != "none"
        if self.has_mlp:
            self.post_attention_layernorm = make_norm(config)
            self.mlp = SwigluMlp(config) if config.mlp == "swiglu" else GeluMlp(config)

    def forward(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation)  # (B, T, E)
        if self.has_mlp:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))  # (B, T, E)
        return hidden


class Attention(nn.Module):
    """Masked multi-head self-attention; with K < H, K/V heads are shared by groups of query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        batch, length, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, length, self.heads, self.head_dim)  # (B, T, H, D)
        key = self.k_proj(hidden).view(batch, length, self.kv_heads, self.head_dim)  # (B, T, K, D)
        value = self.v_proj(hidden).view(batch, length, self.kv_heads, self.head_dim)  # (B, T, K, D)
        query = self.q_norm(query).transpose(1, 2)  # (B, H, T, D)
        key = self.k_norm(key).transpose(1, 2)  # (B, K, T, D)
        value = value.transpose(1, 2)  # (B, K, T, D)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.kv_heads < self.heads
        )  # (B, H, T, D)
        mixed = mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim)  # (B, T, H * D)
        output: Tensor = self.o_proj(mixed)  # (B, T, E)
        return output


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # (B, T, E)
        return output


class GeluMlp(nn.Module):
    """down(gelu(up(x))), as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.gelu(self.up_proj(hidden), approximate="tanh"))  # (B, T, E)
        return output


class Rotary(nn.Module):
    """The angles by which RoPE rotates each pair of a head, Su et al. 2021, https://arxiv.org/abs/2104.09864."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inv_freq, self.scale = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)  # (D/2,)

    def forward(self, position_ids: Tensor) -> Rotation:
        # Computed from the positions instead of a table, which would grow the exported graph with the context.
        angles = position_ids[:, None, :, None].float() * self.inv_freq  # (B, 1, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1 else (self.scale * cos, self.scale * sin)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Returns the angle of each pair per position, (D/2,), and the factor of cos and sin.

    Scaled for a longer context as in transformers: linear (position interpolation, https://arxiv.org/abs/2306.15595),
    YaRN (https://arxiv.org/abs/2309.00071) or Llama 3.1's. They do not depend on the length of a text, since cached
    keys stay rotated as they were.
    """
    theta, scaling, pairs = config.rope_theta, config.rope_scaling, config.head_dim // 2
    inv_freq = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)  # (D/2,)
    if scaling is None or scaling.rope_type == "dynamic":
        return inv_freq, 1.0
    original = scaling.original_max_position_embeddings or 0
    kept, scale = torch.zeros(pairs), 1.0  # linear: 1 keeps a pair's frequency, 0 divides it by the factor
    if scaling.rope_type == "llama3":  # by the turns of a pair within the original context
        turns, low, high = original * inv_freq / (2 * math.pi), scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling.rope_type == "yarn":  # by the pair's index, between those of beta_fast and beta_slow turns
        first, last = (
            pairs * math.log(original / (2 * math.pi * turns)) / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), config.head_dim - 1)
        kept = 1 - ((torch.arange(pairs) - first) / ((last - first) or 0.001)).clamp(0, 1)
        scale = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return torch.lerp(inv_freq / scaling.factor, inv_freq, kept), scale


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the pairs (i, i + D/2) of `heads` (B, heads, T, D): the rotate-half layout of Hugging Face's Llama."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)  # each (B, heads, T, D/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # (B, heads, T, D)


class Sinusoids(nn.Module):
    """Interleaved sines and cosines of the position, Vaswani et al. 2017, section 3.5."""

    inv_freq: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        exponents = torch.arange(0, hidden_size, 2, dtype=torch.float32) / hidden_size
        self.register_buffer("inv_freq", 1.0 / 10000.0**exponents, persistent=False)  # (ceil(E/2),)

    def forward(self, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, :, None].float() * self.inv_freq  # (B, T, ceil(E/2))
        pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)  # (B, T, ceil(E/2), 2)
        return pairs.flatten(2)[:, :, : self.hidden_size]  # (B, T, E): an odd E drops the last cosine


def make_norm(config: ModelConfig) -> nn.Module:
    """Returns the configured normalisation over the hidden size."""
    if config.norm == "none":
        return nn.Identity()
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def positions_like(input_ids: Tensor) -> Tensor:
    """Returns the positions 0, 1, ... T - 1 for every row: (B, T) int64."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


@torch.no_grad()
def generate(
    model: Decoder, prompt: Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """The naive reference, which reads the whole text at every step. The fast path is `pastkey.runtime`.

    Returns the new ids of each row of `prompt` (B, P) int64, until (and without) the EOS token, `max_new_tokens` or the
    context length. `temperature` 0 chooses the most likely token; above 0, it samples with `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prompt  # (B, P), then one more column per step
    end = model.config.eos_token_id
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - prompt.shape[1])):
        logits = model(ids, positions_like(ids))[:, -1].float().cpu()  # (B, V)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)  # (B, 1)
        else:
            chosen = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        ids = torch.cat((ids, chosen.to(ids.device)), dim=1)
        ended |= chosen[:, 0] == end if end is not None else False
        if ended.all():
            break
    rows = ids[:, prompt.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
