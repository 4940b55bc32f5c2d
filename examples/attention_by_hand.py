"""Attention written by hand, softmax(Q K^T) V, is no call that a cache could be grafted onto:

pastkey export examples/attention_by_hand.py:by_hand --context 64 --out by_hand_bundle

is refused, and says which three lines to change. `ChangedAttention` has them changed, with the same weights and the
same results, and this one exports:

pastkey export examples/attention_by_hand.py:changed --context 64 --out changed_bundle
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class HandAttention(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        future = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):  # each (B, heads, T, size)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, heads, T, T)
        scores = scores.masked_fill(self.future[: q.size(2), : q.size(2)], float("-inf"))
        return scores.softmax(-1) @ v


class ChangedAttention(HandAttention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # instead of the three lines


class Decoder(nn.Module):
    def __init__(self, attention, vocab_size=96, context=64, width=64, heads=4, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(attention(width, heads, context) for _ in range(layers))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids, position_ids):  # (B, T), (B, T) -> (B, T, V)
        x = self.tokens(input_ids) + self.positions(position_ids)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


def by_hand():
    torch.manual_seed(0)  # load your trained weights here
    return Decoder(HandAttention)


def changed():
    torch.manual_seed(0)
    return Decoder(ChangedAttention)
