"""The parts of this folder's tables: an entry, how its module is drawn and called, and a frame for attention.

The decoders are written as people write them who never heard of a cache: no position_ids, attention as they like it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pastkey.contract.bundle import KVGeometry

CONTEXT, VOCAB, WIDTH, HEADS = 48, 29, 32, 4
SIZE = WIDTH // HEADS
Call = Callable[[nn.Module, Tensor], Tensor]


def plainly(module, ids):
    return module(ids)


@dataclass(frozen=True)
class Own:
    """A decoder that must export: how it is made, and how its author calls it."""

    build: Callable[[], nn.Module]
    call: Call = plainly  # (module, ids (B, T)) -> logits (B, T, V), or (B, V) of the last position
    context: int = CONTEXT
    vocab: int = VOCAB
    graph: Literal["fused", "standard", "either"] = "fused"  # the one that it must get
    layers: int = 2  # pairs of key and value caches
    rows: int = 0  # of earlier tokens that are kept in addition to keys and values
    geometry: KVGeometry | None = None  # of each layer's cache, where a smaller row than keys and values is looked for

    def make(self):
        return drawn(self.build)


@dataclass(frozen=True)
class Refused:
    """A module that must be refused."""

    build: Callable[[], nn.Module]
    owner: Callable[..., object]  # the class or function with the line of the true cause
    words: str  # of that cause, as a pattern
    causes: int = 1  # that are told

    def make(self):
        return drawn(self.build)


def drawn(build):
    """The module in eval mode, the same each time, with weights large enough that every part of it shows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = build()
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


class Block(nn.Module):
    def __init__(self, attention, width=WIDTH, mlp=None):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention
        self.mlp = mlp or nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """Learned positions by arange, blocks of attention(x) and an MLP: `attention` is a class or a function of none."""

    def __init__(self, attention, *, context=CONTEXT, width=WIDTH, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(attention(), width) for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def embed(self, idx):
        return self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))

    def forward(self, idx):
        return self.logits(self.embed(idx))

    def logits(self, x):
        for block in self.blocks:
            x = block(x)  # (B, T, C)
        return self.lm_head(self.ln_f(x))


class NoPositions(Gpt):
    """Positions are left to attention."""

    def embed(self, idx):
        return self.wte(idx)


def causal(scores):
    T = scores.shape[-1]
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))


class Causal(nn.Module):
    """Projections to heads and back, as most write them; a variant says what its scores are, or how it attends."""

    def __init__(self, heads=HEADS, kv_heads=None, *, width=WIDTH, context=CONTEXT):
        super().__init__()
        self.heads, self.kv_heads, self.size, self.context = heads, kv_heads or heads, width // heads, context
        self.q = nn.Linear(width, heads * self.size)
        self.k, self.v = (nn.Linear(width, self.kv_heads * self.size) for _ in range(2))
        self.o = nn.Linear(heads * self.size, width)
        self.more()

    def more(self):
        """Further parameters and buffers of a variant."""

    def forward(self, x):
        B, T, C = x.size()
        q = self.q(x).view(B, T, self.heads, self.size).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.kv_heads, self.size).transpose(1, 2)  # (B, K, T, D)
        v = self.v(x).view(B, T, self.kv_heads, self.size).transpose(1, 2)
        y = self.attend(q, k, v)  # (B, H, T, D)
        return self.o(y.transpose(1, 2).contiguous().view(B, T, C))

    def attend(self, q, k, v):
        return causal(self.scores(q, k)).softmax(dim=-1) @ v

    def scores(self, q, k):
        return q @ k.transpose(-2, -1) / math.sqrt(self.size)


def attending(attend=Causal.attend, scores=Causal.scores, **sizes):
    """Makes attention that attends, or whose scores are, otherwise."""
    return lambda: type("Attention", (Causal,), {"attend": attend, "scores": scores})(**sizes)
