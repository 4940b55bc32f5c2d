"""A decoder of the Llama kind with rotary positions of its own, grouped queries, RMSNorm and SwiGLU. Export it with

pastkey export examples/own_rope.py:make --context 128 --out own_rope_bundle
"""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rope_table(context, size, theta=10000.0):  # -> cos and sin, each (context, size / 2)
    angles = torch.outer(torch.arange(context).float(), theta ** (-torch.arange(0, size, 2) / size))
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):  # (B, heads, T, size): each adjacent pair turns by its position's angle
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.size, bias=False)

    def forward(self, x, cos, sin):
        q = self.wq(x).unflatten(2, (self.heads, self.size)).transpose(1, 2)
        k = self.wk(x).unflatten(2, (self.kv_heads, self.size)).transpose(1, 2)
        v = self.wv(x).unflatten(2, (self.kv_heads, self.size)).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # The heads of k and v are shared by `enable_gqa` and not by repeating them, so that the cache stays small.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, inner):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    def __init__(self, vocab_size=96, context=128, width=64, heads=4, kv_heads=2, inner=172, layers=3):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocab_size, bias=False)
        cos, sin = rope_table(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids, position_ids):  # (B, T), (B, T) -> (B, T, V)
        # Rows of the table by position_ids, not self.cos[:T]: with a cache, new tokens do not begin at position 0.
        cos, sin = self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)  # (B, 1, T, size / 2)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def make():
    torch.manual_seed(0)  # load your trained weights here
    return Decoder()
