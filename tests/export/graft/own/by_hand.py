"""Attention written out, in the many ways in which a mask, a scale and a softmax are written."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .parts import CONTEXT, WIDTH, Gpt, Own, Qkv


class TrilBuffer(Qkv):
    def more(self):
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))
        self.drop = nn.Dropout(0.1)

    def attend(self, q, k, v):
        T = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        return self.drop(F.softmax(att, dim=-1)) @ v


class TriuAdded(Qkv):
    def attend(self, q, k, v):
        T = q.shape[-2]
        mask = torch.triu(torch.full((T, T), float("-inf"), device=q.device), diagonal=1)
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.size) + mask, dim=-1) @ v


class SmallNegativeFill(Qkv):
    """1e-4 of a weight is left of nothing: exp(-1e4) is 0."""

    def attend(self, q, k, v):
        T = q.size(-2)
        visible = torch.ones(T, T).tril()
        scores = torch.matmul(q, k.mT) * self.size**-0.5
        scores = scores * visible - 1e4 * (1 - visible)
        return scores.softmax(-1) @ v


class MultipliedAndRenormalised(Qkv):
    def attend(self, q, k, v):
        weights = torch.softmax(q @ k.mT / math.sqrt(self.size), dim=-1)
        weights = weights * torch.tril(torch.ones(q.shape[2], q.shape[2]))
        return weights / weights.sum(dim=-1, keepdim=True) @ v


def softmax(x):
    x = torch.exp(x - torch.max(x, dim=-1, keepdim=True).values)
    return x / torch.sum(x, dim=-1, keepdim=True)


class OwnSoftmax(Qkv):
    def attend(self, q, k, v):
        T = q.size(-2)
        scores = q @ k.mT / math.sqrt(self.size)
        return softmax(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)) @ v


class AverageOfEarlier(nn.Module):
    """A table of weights in place of queries and keys, as a lecture begins."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        return weights / weights.sum(1, keepdim=True) @ self.value(x)


class KeysTimesQueries(Qkv):
    """Scores that stand transposed: softmax over dim -2."""

    def attend(self, q, k, v):
        T = q.size(-2)
        scores = k @ q.transpose(-1, -2) / math.sqrt(self.size)  # (B, H, keys, queries)
        scores = scores.masked_fill(torch.ones(T, T).tril(-1).bool(), float("-inf"))
        return torch.softmax(scores, dim=-2).transpose(-1, -2) @ v


class TriuIndices(Qkv):
    def attend(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.mT / math.sqrt(self.size)
        i, j = torch.triu_indices(T, T, offset=1)
        scores[..., i, j] = float("-inf")
        return scores.softmax(-1) @ v


class FilledInPlace(Qkv):
    def more(self):
        self.register_buffer("mask", torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1))

    def attend(self, q, k, v):
        num_tokens = q.shape[2]
        attn_scores = q @ k.transpose(2, 3)
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        return torch.softmax(attn_scores / k.shape[-1] ** 0.5, dim=-1) @ v


class MaskOfLen(nn.Module):
    """One head over one text at a time, of len(x) rows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x):
        x = x.transpose(0, 1)  # (T, B, C)
        T = len(x)
        q, k, v = (w(x).transpose(0, 1) for w in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2) / math.sqrt(32) + torch.full((T, T), -1e9).triu(1)
        return scores.softmax(2) @ v


class HeadOfTen(TrilBuffer):
    """Heads of a size that GroupQueryAttention does not take."""


DECODERS = {
    "tril_buffer": Own(lambda: Gpt(TrilBuffer)),
    "triu_added": Own(lambda: Gpt(TriuAdded)),
    "small_negative_added": Own(lambda: Gpt(SmallNegativeFill)),  # scores * mask - 1e4 * (1 - mask)
    "multiplied_and_renormalised": Own(lambda: Gpt(MultipliedAndRenormalised), graph="either"),
    "own_softmax": Own(lambda: Gpt(OwnSoftmax)),  # exp, max and sum
    "average_of_earlier": Own(lambda: Gpt(AverageOfEarlier)),  # no queries and keys at all
    "keys_times_queries": Own(lambda: Gpt(KeysTimesQueries), graph="either"),  # softmax over dim -2
    "triu_indices": Own(lambda: Gpt(TriuIndices)),  # torch.export makes T a constant
    "filled_in_place": Own(lambda: Gpt(FilledInPlace)),
    "len_of_x": Own(lambda: Gpt(MaskOfLen)),  # torch.export makes T a constant; one head without projection
    "head_of_ten": Own(lambda: Gpt(lambda: HeadOfTen(width=40), width=40), graph="standard"),
    "context_16": Own(lambda: Gpt(TriuAdded, context=16), context=16),
    "context_300": Own(lambda: Gpt(TriuAdded, context=300, layers=1), context=300, layers=1),
}  # fmt: skip
