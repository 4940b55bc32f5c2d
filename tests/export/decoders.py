"""Decoders as people write them, small: the inputs of export's tests.

Every module keeps the contract forward(input_ids, position_ids) -> logits; those that break it are in the tests
that show how. All weights come from seed 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pastkey.contract.config import ModelConfig
from pastkey.export.graft.attention import remember
from pastkey.export.graft.states import ConvolutionCall, RecurrenceCall
from pastkey.train.model import Decoder


class Plain(nn.Module):
    """Learned positions and attention layers with a residual; each step is a method, for others to replace."""

    def __init__(
        self,
        *,
        vocab: int = 37,
        width: int = 32,
        heads: int = 4,
        kv_heads: int | None = None,
        size: int = 8,
        value_size: int | None = None,
        context: int = 40,
        layers: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.size = heads, kv_heads or heads, size
        self.value_size = value_size or size
        self.context, self.width, self.vocab = context, width, vocab
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(self.block() for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=bias)
        self.more()

    def more(self) -> None:
        """Further parameters of a variant."""

    def block(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "norm": nn.LayerNorm(self.width),
                "q": nn.Linear(self.width, self.heads * self.size),
                "k": nn.Linear(self.width, self.kv_heads * self.size),
                "v": nn.Linear(self.width, self.kv_heads * self.value_size),
                "o": nn.Linear(self.heads * self.value_size, self.width),
            }
        )

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids, position_ids)  # (B, T, width)
        for block in self.blocks:
            hidden = self.apply_block(block, hidden, position_ids)  # type: ignore[arg-type]
        return self.logits(hidden)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position(position_ids)

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        normed = block["norm"](hidden)
        query, key, value = (
            block[name](normed).view(batch, length, heads, -1).transpose(1, 2)  # (B, heads, T, D)
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        query, key = self.turn(query, position_ids), self.turn(key, position_ids)
        mixed = self.attend(query, key, value)  # (B, H, T, Dv)
        return hidden + block["o"](mixed.transpose(1, 2).reshape(batch, length, -1))

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        return heads

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.kv_heads < self.heads)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class Tied(Plain):
    """The output head is the token embedding."""

    def more(self) -> None:
        self.head.weight = self.token.weight


class TableRope(Plain):
    """Rotary positions from tables indexed by position; pairs (2i, 2i + 1), as llama2.c turns them."""

    def more(self) -> None:
        frequencies = 1 / 10000 ** (torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(self.context).float(), frequencies)  # (context, D/2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids)

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Windowed(TableRope):
    """In every second block a token sees only itself and the three before it."""

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        self.local = block in list(self.blocks)[1::2]
        return super().apply_block(block, hidden, position_ids)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(query.shape[2])
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < 4) if self.local else distance >= 0
        return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=self.kv_heads < self.heads)


class RepeatedKv(TableRope):
    """Keys and values repeated in the module's code for the query heads, as llama2.c does."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        key, value = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Twice(TableRope):
    """One block applied twice over one set of weights, head tied by F.linear."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids, position_ids)
        for _ in range(2):
            hidden = self.apply_block(self.blocks[0], hidden, position_ids)  # type: ignore[arg-type]
        return F.linear(hidden, self.token.weight)


class Hybrid(Plain):
    """Attention, then a gated delta rule behind a short convolution, as transformers' hybrids call them."""

    def more(self) -> None:
        self.mixed = nn.Linear(self.width, 2 * 2 * self.size + self.heads * self.value_size)  # 2 heads of q and k
        self.kernel = nn.Parameter(torch.randn(self.mixed.out_features, 4) / 2)
        self.steer = nn.Linear(self.width, 2 * self.heads)
        self.out = nn.Linear(self.heads * self.value_size, self.width)

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().apply_block(block, hidden, position_ids)
        rows = remember(ConvolutionCall(self.mixed(hidden).transpose(1, 2), self.kernel, None, True)).transpose(1, 2)
        sizes = [2 * self.size, 2 * self.size, self.heads * self.value_size]
        query, key, value = (
            part.unflatten(2, (heads, -1)) for part, heads in zip(rows.split(sizes, 2), (2, 2, self.heads), strict=True)
        )
        decay, beta = self.steer(hidden).chunk(2, 2)
        call = RecurrenceCall(query, key, value, -F.softplus(decay), beta.sigmoid(), 0.5)
        return hidden + self.out(remember(call).flatten(2))


class OneHead(Plain):
    """A single head without an axis: q, k and v are (B, T, D)."""

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        query, key, value = (block[name](hidden) for name in "qkv")
        return hidden + block["o"](F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3))


class Softcapped(Plain):
    """Logits kept within 30 by a tanh, and scores scaled by a number of the author's."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)

    def logits(self, hidden: Tensor) -> Tensor:
        return 30 * torch.tanh(self.head(hidden) * 4 / 30)


class NanoGpt(nn.Module):
    """nanoGPT's habits: fused qkv, dropout everywhere, a length assertion, sdpa imported by name, tied head."""

    def __init__(self, vocab: int = 65, width: int = 48, heads: int = 3, layers: int = 2, context: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.context, self.heads = context, heads
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width, bias=False),
                    "c_attn": nn.Linear(width, 3 * width),
                    "c_proj": nn.Linear(width, width),
                    "ln_2": nn.LayerNorm(width, bias=False),
                    "c_fc": nn.Linear(width, 4 * width),
                    "c_out": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        batch, length = input_ids.size()
        assert length <= self.context, f"{length} tokens, the context is {self.context}"
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h:
            q, k, v = block["c_attn"](block["ln_1"](x)).split(x.size(-1), dim=2)
            q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            y = scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
            x = x + block["c_proj"](y.transpose(1, 2).contiguous().view(batch, length, -1))
            x = x + self.drop(block["c_out"](F.gelu(block["c_fc"](block["ln_2"](x)))))
        return self.lm_head(self.ln_f(x))


class MultiHead(Plain):
    """nn.MultiheadAttention, sequence first, as its default is."""

    batch_first = False

    def block(self) -> nn.ModuleDict:
        attention = nn.MultiheadAttention(self.width, self.heads, batch_first=self.batch_first)
        return nn.ModuleDict({"attention": attention})

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        x = hidden if self.batch_first else hidden.transpose(0, 1)
        mixed, _ = block["attention"](x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        return hidden + (mixed if self.batch_first else mixed.transpose(0, 1))


class MultiHeadBatchFirst(MultiHead):
    batch_first = True


class EncoderLayers(Plain):
    """nn.TransformerEncoderLayer, one by one."""

    def block(self) -> nn.ModuleDict:
        layer = nn.TransformerEncoderLayer(self.width, self.heads, 2 * self.width, batch_first=True, norm_first=True)
        return nn.ModuleDict({"layer": layer})

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        return block["layer"](hidden, src_mask=mask, is_causal=True)


class Encoder(Plain):
    """A whole nn.TransformerEncoder; it finds out by itself whether its mask is the causal one."""

    hint: bool | None = None

    def more(self) -> None:
        layer = nn.TransformerEncoderLayer(self.width, self.heads, 2 * self.width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids, position_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        return self.logits(self.encoder(hidden, mask=mask, is_causal=self.hint))


class HintedEncoder(Encoder):
    """The same, told that its mask is causal."""

    hint = True


# --- slow to export, so that only some are exported in a quick run --------------------------------------------------
class GptJ(Plain):
    """Attention and MLP side by side, rotary over half of each head, interleaved."""

    def more(self) -> None:
        self.up, self.down = nn.Linear(self.width, 64), nn.Linear(64, self.width)
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(0, 4, 2) / 4))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids)

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, None, :, None] * self.frequencies
        cos, sin = (t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
        turned, kept = heads[..., :4], heads[..., 4:]
        crossed = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        return torch.cat((turned * cos + crossed * sin, kept), -1)

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        mlp = self.down(F.gelu(self.up(block["norm"](hidden))))
        return super().apply_block(block, hidden, position_ids) + mlp


class BothPositions(TableRope):
    """A position table and rotary positions."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position(position_ids)


class CompiledAttention(Plain):
    """A compiled part, which must run as plain Python to be seen."""

    def more(self) -> None:
        self.attend = torch.compile(self.attend, backend="eager")  # type: ignore[method-assign]


class Wrapper(nn.Module):
    """Passes everything on, as DataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.module(*args, **kwargs)


# --- those of pastkey train ---------------------------------------------------------------------------------------
def llama(**changes: object) -> Decoder:
    """RoPE, RMSNorm, SwiGLU, grouped-query attention, tied head."""
    sizes: dict[str, Any] = {
        "vocab_size": 61, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    return drawn(ModelConfig(**(sizes | changes)))


def gpt2(**changes: object) -> Decoder:
    """Learned positions, LayerNorm, GELU, biases, a separate head."""
    changes = {
        "position_encoding": "learned", "norm": "layernorm", "mlp": "gelu", "qkv_bias": True, "bias": True,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    return llama(**changes)


def drawn(config: ModelConfig) -> Decoder:
    """With all weights large, as training makes them: a layer may start as the identity, and hide what is wrong."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    return model.eval()
