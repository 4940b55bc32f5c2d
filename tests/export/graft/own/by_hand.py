"""Attention written out, in the many ways in which a mask, a scale and a softmax are written."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import CONTEXT, WIDTH, Gpt, Own, Qkv


class TrilBuffer(Qkv):
    bias: Tensor

    def more(self) -> None:
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))
        self.drop = nn.Dropout(0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        return self.drop(F.softmax(att, dim=-1)) @ v


class TriuAdded(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[-2]
        mask = torch.triu(torch.full((T, T), float("-inf"), device=q.device), diagonal=1)
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.size) + mask, dim=-1) @ v


class LargeNegativeFill(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / k.shape[-1] ** 0.5
        mask = torch.tril(torch.ones(scores.shape[-2:])).unsqueeze(0).unsqueeze(0)
        return torch.matmul(scores.masked_fill(mask == 0, -1e9).softmax(dim=-1), v)


class SmallNegativeFill(Qkv):
    """1e-4 of a weight is left of nothing: exp(-1e4) is 0."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        visible = torch.ones(T, T).tril()
        scores = torch.matmul(q, k.mT) * self.size**-0.5
        scores = scores * visible - 1e4 * (1 - visible)
        return scores.softmax(-1) @ v


class Where(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        causal = torch.tril(torch.ones((T, T), dtype=torch.bool))
        scores = q @ k.mT * self.size**-0.5
        return torch.where(causal, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


class MultipliedAndRenormalised(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT / math.sqrt(self.size), dim=-1)
        weights = weights * torch.tril(torch.ones(q.shape[2], q.shape[2]))
        return weights / weights.sum(dim=-1, keepdim=True) @ v


def softmax(x: Tensor) -> Tensor:
    x = torch.exp(x - torch.max(x, dim=-1, keepdim=True).values)
    return x / torch.sum(x, dim=-1, keepdim=True)


class OwnSoftmax(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        scores = q @ k.mT / math.sqrt(self.size)
        return softmax(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)) @ v


class ExpMaskedAfterwards(Qkv):
    """The mask times exp of the scores, and their sum below."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(q @ k.mT / math.sqrt(self.size)).tril()
        return weights / weights.sum(-1, keepdim=True) @ v


class AverageOfEarlier(nn.Module):
    """A table of weights in place of queries and keys, as a lecture begins."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        return weights / weights.sum(1, keepdim=True) @ self.value(x)


class SoftmaxInFloat32(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        mask = torch.full((1, 1, T, T), torch.finfo(q.dtype).min).triu_(1)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.size**-0.5 + mask
        return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


class KeysTimesQueries(Qkv):
    """Scores that stand transposed: softmax over dim -2."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        scores = k @ q.transpose(-1, -2) / math.sqrt(self.size)  # (B, H, keys, queries)
        scores = scores.masked_fill(torch.ones(T, T).tril(-1).bool(), float("-inf"))
        return torch.softmax(scores, dim=-2).transpose(-1, -2) @ v


class TriuIndices(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[-2]
        scores = q @ k.mT / math.sqrt(self.size)
        i, j = torch.triu_indices(T, T, offset=1)
        scores[..., i, j] = float("-inf")
        return scores.softmax(-1) @ v


class FilledInPlace(Qkv):
    mask: Tensor

    def more(self) -> None:
        self.register_buffer("mask", torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens = q.shape[2]
        attn_scores = q @ k.transpose(2, 3)
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        return torch.softmax(attn_scores / k.shape[-1] ** 0.5, dim=-1) @ v


class ComparedPositions(Qkv):
    """Queries scaled before the product; the mask is a comparison of two aranges."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.size(2), device=q.device)
        hidden = place[None, :] > place[:, None]
        return (q * self.size**-0.5 @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class MaskThatGrows(Qkv):
    """Kept from call to call, made anew where a text is longer."""

    def more(self) -> None:
        self.kept: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        if self.kept is None or self.kept.size(0) < T:
            self.kept = torch.triu(torch.full((T, T), float("-inf")), diagonal=1)
        return (q @ k.mT / math.sqrt(self.size) + self.kept[:T, :T]).softmax(-1) @ v


class ScaledByWidth(Qkv):
    """By the width of the model in place of the head's, and dropout by a function that knows the mode."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wei = q @ k.transpose(-2, -1) * (self.heads * self.size) ** -0.5
        wei = wei.masked_fill(torch.tril(torch.ones_like(wei)) == 0, float("-inf"))
        return F.dropout(F.softmax(wei, dim=-1), 0.2, training=self.training) @ v


class MaskOfLen(nn.Module):
    """One head over one text at a time, of len(x) rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
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
    "large_negative_fill": Own(lambda: Gpt(LargeNegativeFill)),
    "small_negative_added": Own(lambda: Gpt(SmallNegativeFill), note="scores * mask - 1e4 * (1 - mask)"),
    "where": Own(lambda: Gpt(Where)),
    "multiplied_and_renormalised": Own(lambda: Gpt(MultipliedAndRenormalised), graph="either"),
    "own_softmax": Own(lambda: Gpt(OwnSoftmax), note="exp, max and sum"),
    "average_of_earlier": Own(lambda: Gpt(AverageOfEarlier), note="no queries and keys at all"),
    "exp_masked_afterwards": Own(lambda: Gpt(ExpMaskedAfterwards), graph="either"),
    "softmax_in_float32": Own(lambda: Gpt(SoftmaxInFloat32)),
    "keys_times_queries": Own(lambda: Gpt(KeysTimesQueries), graph="either", note="softmax over dim -2"),
    "triu_indices": Own(lambda: Gpt(TriuIndices), note="torch.export makes T a constant"),
    "filled_in_place": Own(lambda: Gpt(FilledInPlace)),
    "compared_positions": Own(lambda: Gpt(ComparedPositions)),
    "mask_that_grows": Own(lambda: Gpt(MaskThatGrows), note="kept on self between calls"),
    "scaled_by_width": Own(lambda: Gpt(ScaledByWidth), note="F.dropout(..., training=self.training)"),
    "len_of_x": Own(lambda: Gpt(MaskOfLen), note="torch.export makes T a constant; one head without projection"),
    "head_of_ten": Own(lambda: Gpt(lambda: HeadOfTen(width=40), width=40), graph="standard"),
    "context_16": Own(lambda: Gpt(TriuAdded, context=16), context=16),
    "context_300": Own(lambda: Gpt(TriuAdded, context=300, layers=1), context=300, layers=1),
}  # fmt: skip
