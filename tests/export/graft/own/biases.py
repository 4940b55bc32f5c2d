"""Attention that is more than causal: windows, ALiBi, relative biases, soft caps, sinks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .parts import CONTEXT, WIDTH, Causal, Gpt, NoPositions, Own, attending, causal

WINDOW = 10


def band_by_rows(self, q, k):
    """A mask that is written in a loop over positions, into one that was made elsewhere."""
    T = q.size(2)
    band = torch.full((T, T), float("-inf"))
    for i in range(T):
        band[i, max(0, i - WINDOW + 1) : i + 1] = 0.0
    return Causal.scores(self, q, k) + band.view(1, 1, T, T)


def band_by_vmap(self, q, k):
    """A mask of a rule for one query and one key, as transformers 4 has it."""

    def seen(i, j):
        return (j <= i) & (i - j < WINDOW)

    rule = torch.vmap(torch.vmap(seen, in_dims=(None, 0)), in_dims=(0, None))
    band = rule(torch.arange(q.size(2)), torch.arange(k.size(2)))
    return Causal.scores(self, q, k).masked_fill(~band, float("-inf"))


def alibi_to_sdpa(self, q, k, v):
    """A mask with the bias in it for scaled_dot_product_attention."""
    T = q.size(2)
    place = torch.arange(T)
    slopes = torch.tensor([2 ** (-8 * (i + 1) / self.heads) for i in range(self.heads)])
    bias = -slopes[:, None, None] * (place[:, None] - place)
    bias = bias + torch.full((T, T), float("-inf")).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class RelativeBuckets(Causal):
    """T5's: near distances have a bucket each, far ones share them by logarithms. Its scores are not scaled."""

    def more(self):
        self.relative_attention_bias = nn.Embedding(16, self.heads)

    def scores(self, q, k):
        place = torch.arange(q.size(2))
        n = (place[:, None] - place[None, :]).clamp(min=0)
        far = 8 + (torch.log(n.float().clamp(min=1) / 8) / math.log(32 / 8) * 8).long()
        buckets = torch.where(n < 8, n, far.clamp(max=15))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return torch.matmul(q, k.transpose(3, 2)) * 0.4 + 2 * bias


class RelativeKeys(Causal):
    """Shaw: scores are q kᵀ and q times a vector for each distance."""

    def more(self):
        self.er = nn.Embedding(CONTEXT, self.size)

    def scores(self, q, k):
        place = torch.arange(q.size(2))
        vectors = self.er((place[:, None] - place).abs())  # (T, T, D)
        return super().scores(q, k) + torch.einsum("bhid,ijd->bhij", q, vectors) / math.sqrt(self.size)


class UnitKeys(Causal):
    """Cosines, with a learned temperature for each head."""

    def more(self):
        self.logit_scale = nn.Parameter(torch.full((self.heads, 1, 1), 1.5))

    def scores(self, q, k):
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.logit_scale.exp()


def soft_capped(self, q, k):
    return 2 * torch.tanh(Causal.scores(self, q, k) / 2)


def softmax_plus_one(self, q, k, v):
    """exp(x) / (1 + sum of exp(x))."""
    scores = causal(self.scores(q, k))
    top = scores.max(-1, keepdim=True).values.clamp(min=0)
    weights = torch.exp(scores - top)
    return weights / (torch.exp(-top) + weights.sum(-1, keepdim=True)) @ v


class Differential(nn.Module):
    """One softmax less a part of another, over two halves of each key."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lambda_ = nn.Parameter(torch.tensor(0.4))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        one, other = (causal(a @ b.mT / math.sqrt(8)).softmax(-1) for a, b in ((q1, k1), (q2, k2)))
        return self.o(((one - self.lambda_ * other) @ v).transpose(1, 2).flatten(2))


def largest_scores(self, q, k, v):
    """Only the five largest scores of each row."""
    scores = causal(self.scores(q, k))
    largest, _ = scores.topk(min(5, scores.size(-1)), dim=-1)
    return scores.masked_fill(scores < largest[..., -1:], float("-inf")).softmax(-1) @ v


DECODERS = {
    "largest_scores": Own(lambda: Gpt(attending(largest_scores)), graph="standard"),  # topk of masked scores
    "band_by_vmap": Own(lambda: Gpt(attending(scores=band_by_vmap))),  # a window of 10, of a rule for one pair
    "band_by_rows": Own(lambda: Gpt(attending(scores=band_by_rows), context=16), context=16),  # the same, in a loop
    "alibi_to_sdpa": Own(lambda: NoPositions(attending(alibi_to_sdpa)), graph="standard"),
    "relative_buckets": Own(lambda: NoPositions(RelativeBuckets), graph="standard"),  # T5
    "relative_keys": Own(lambda: NoPositions(RelativeKeys), graph="standard"),  # Shaw: q times a table (T, T, D)
    "cosines_with_temperature": Own(lambda: Gpt(UnitKeys)),
    "soft_cap": Own(lambda: Gpt(attending(scores=soft_capped))),
    "differential": Own(lambda: Gpt(Differential), graph="standard"),  # two softmaxes share the values
    "softmax_plus_one": Own(lambda: Gpt(attending(softmax_plus_one))),
}  # fmt: skip
