"""How heads are laid out: einsum, helpers like those of einops, a module per head, merged batches, grouped queries."""

import math

import torch
import torch.nn.functional as F
from torch import einsum, nn

from .parts import CONTEXT, HEADS, WIDTH, Gpt, Own, Qkv

SIZE = WIDTH // HEADS


def future(length):
    return torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)


class EinsumLengthFirst(nn.Module):
    """Heads stay behind the length."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).unbind(2)  # each (B, T, H, D)
        energy = torch.einsum("bqhd,bkhd->bhqk", [q, k])
        energy = energy.masked_fill(future(t)[None, None], float("-1e20"))
        attention = torch.softmax(energy / math.sqrt(c), dim=3)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", [attention, v]).reshape(b, t, c))


class EinsumWeights(nn.Module):
    """Projections of shape (H, C, D), and keys before queries in the scores."""

    def __init__(self):
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(HEADS, WIDTH, SIZE)) for _ in range(3))
        self.W_O, self.b_O = nn.Parameter(torch.empty(HEADS, SIZE, WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x):
        q, k, v = (torch.einsum("nde,bpd->bpne", w, x) for w in (self.W_Q, self.W_K, self.W_V))
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / SIZE**0.5
        scores = torch.where(self.mask[: x.shape[1], : x.shape[1]].bool(), scores, -1e5)
        z = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v)
        return torch.einsum("bqnh,nhd->bqd", z, self.W_O) + self.b_O


class MergedBatch(nn.Module):
    """(B*H, T, D) by view, and bmm or baddbmm of a mask."""

    def __init__(self, *, add=False):
        super().__init__()
        self.add = add
        self.tokeys, self.toqueries, self.tovalues = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.unify = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, e = x.size()
        keys, queries, values = (
            w(x).view(b, t, HEADS, SIZE).transpose(1, 2).contiguous().view(b * HEADS, t, SIZE)
            for w in (self.tokeys, self.toqueries, self.tovalues)
        )
        if self.add:
            mask = torch.zeros(t, t).masked_fill(future(t), float("-inf")).expand(b * HEADS, t, t)
            dot = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=SIZE**-0.5)
        else:
            dot = torch.bmm(queries / e**0.25, (keys / e**0.25).transpose(1, 2))
            dot = dot.masked_fill(future(t), float("-inf"))
        out = torch.bmm(F.softmax(dot, dim=2), values).view(b, HEADS, t, SIZE)
        return self.unify(out.transpose(1, 2).contiguous().view(b, t, e))


class Head(nn.Module):
    """One head, with a mask of its own."""

    def __init__(self, head_size):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, head_size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        T = x.shape[1]
        k, q = self.key(x), self.query(x)  # (B, T, D)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(wei, dim=-1)) @ self.value(x)


class ModulePerHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head(SIZE) for _ in range(HEADS)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


class GroupedInFive(Qkv):
    """Queries as (B, K, G, T, D) against keys as (B, K, 1, T, D)."""

    def attend(self, q, k, v):
        q = q.unflatten(1, (self.kv_heads, -1))
        scores = q @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(self.size)  # (B, K, G, T, T)
        weights = scores.masked_fill(future(q.shape[3]), float("-inf")).softmax(-1)
        return (weights @ v[:, :, None]).flatten(1, 2)


class GroupedByEinsum(Qkv):
    def attend(self, q, k, v):
        q = q.reshape(q.shape[0], self.kv_heads, -1, *q.shape[2:])
        scores = torch.einsum("bkgtd,bksd->bkgts", q, k) / math.sqrt(self.size)
        weights = (scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)).softmax(-1)
        return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


def repeat_kv(x, n_rep):
    bs, n_kv_heads, slen, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, None, :, :].expand(bs, n_kv_heads, n_rep, slen, head_dim)
    return x.reshape(bs, n_kv_heads * n_rep, slen, head_dim)


class Expanded(Qkv):
    def attend(self, q, k, v):
        k, v = repeat_kv(k, self.heads // self.kv_heads), repeat_kv(v, self.heads // self.kv_heads)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.size)
        return torch.matmul(F.softmax(scores.masked_fill(future(q.shape[2]), -1e38), dim=-1), v)


class MultiQuery(nn.Module):
    """One key and one value for all heads, without an axis for them."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * SIZE, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q = self.to_q(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) * SIZE**-0.5
        k, v = self.to_kv(x).chunk(2, dim=-1)  # (B, T, D)
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        attn = sim.masked_fill(future(x.shape[1]), -1e9).softmax(dim=-1)
        return self.to_out(einsum("b h i j, b j d -> b h i d", attn, v).transpose(1, 2).flatten(2))


class WiderValues(nn.Module):
    """One head, whose values are as wide as the model and keys are not."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        scores = self.wq(x) @ self.wk(x).transpose(1, 2) / 8**0.5
        return (scores + torch.full_like(scores[0], -torch.inf).triu(1)).softmax(-1) @ self.wv(x)


DECODERS = {
    "einsum_length_first": Own(lambda: Gpt(EinsumLengthFirst)),  # bqhd,bkhd->bhqk, scaled by the width
    "einsum_weights": Own(lambda: Gpt(EinsumWeights)),  # weights (H, C, D)
    "bmm": Own(lambda: Gpt(MergedBatch)),  # (B*H, T, D)
    "baddbmm": Own(lambda: Gpt(lambda: MergedBatch(add=True))),  # the mask is added by the product
    "module_per_head": Own(lambda: Gpt(ModulePerHead), graph="either", layers=8),  # layers: of each head
    "grouped_in_five": Own(lambda: Gpt(lambda: GroupedInFive(kv_heads=2))),
    "grouped_by_einsum": Own(lambda: Gpt(lambda: GroupedByEinsum(kv_heads=2))),
    "expand_and_reshape": Own(lambda: Gpt(lambda: Expanded(kv_heads=2))),
    "multi_query": Own(lambda: Gpt(MultiQuery)),
    "wider_values": Own(lambda: Gpt(WiderValues)),  # values of 32, keys of 8
}  # fmt: skip
