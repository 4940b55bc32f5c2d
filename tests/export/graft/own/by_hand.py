"""Attention: the many ways of writing out a mask, a scale, a softmax and heads; and torch's own."""

import math

import torch
import torch.nn.functional as F
from torch import einsum, nn

from .parts import CONTEXT, HEADS, SIZE, VOCAB, WIDTH, Causal, Gpt, Own, attending
from .positions import PositionalEncoding


# --- masks, scales and softmax ----------------------------------------------------------------------------------------
class TrilBuffer(Causal):
    def more(self):
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))
        self.drop = nn.Dropout(0.1)

    def attend(self, q, k, v):
        T = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        return self.drop(F.softmax(att, dim=-1)) @ v


def triu_added(self, q, k, v):
    T = q.shape[-2]
    mask = torch.triu(torch.full((T, T), float("-inf"), device=q.device), diagonal=1)
    return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.size) + mask, dim=-1) @ v


def multiplied_and_renormalised(self, q, k, v):
    weights = torch.softmax(q @ k.mT / math.sqrt(self.size), dim=-1)
    weights = weights * torch.tril(torch.ones(q.shape[2], q.shape[2]))
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def keys_times_queries(self, q, k, v):
    """Scores that are transposed: softmax over dim -2."""
    scores = k @ q.transpose(-1, -2) / math.sqrt(self.size)  # (B, H, keys, queries)
    scores = scores.masked_fill(torch.ones(q.size(-2), q.size(-2)).tril(-1).bool(), float("-inf"))
    return torch.softmax(scores, dim=-2).transpose(-1, -2) @ v


def triu_indices(self, q, k, v):
    scores = q @ k.mT / math.sqrt(self.size)
    i, j = torch.triu_indices(q.shape[-2], q.shape[-2], offset=1)
    scores[..., i, j] = float("-inf")
    return scores.softmax(-1) @ v


class FilledInPlace(Causal):
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
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        x = x.transpose(0, 1)  # (T, B, C)
        q, k, v = (w(x).transpose(0, 1) for w in (self.q, self.k, self.v))
        mask = torch.full((len(x), len(x)), -1e9).triu(1)
        return (q @ k.transpose(1, 2) / math.sqrt(WIDTH) + mask).softmax(2) @ v


# --- heads ------------------------------------------------------------------------------------------------------------
def future(length):
    return torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)


class MergedBatch(nn.Module):
    """(B*H, T, D) by view."""

    def __init__(self):
        super().__init__()
        self.tokeys, self.toqueries, self.tovalues = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        b, t, e = x.size()
        keys, queries, values = (
            w(x).view(b, t, HEADS, SIZE).transpose(1, 2).contiguous().view(b * HEADS, t, SIZE)
            for w in (self.tokeys, self.toqueries, self.tovalues)
        )
        mask = torch.zeros(t, t).masked_fill(future(t), float("-inf")).expand(b * HEADS, t, t)
        dot = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=SIZE**-0.5)
        out = torch.bmm(F.softmax(dot, dim=2), values).view(b, HEADS, t, SIZE)
        return out.transpose(1, 2).contiguous().view(b, t, e)


class Head(nn.Module):
    """One head, with its own mask."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, SIZE, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x):
        T = x.shape[1]
        k, q = self.key(x), self.query(x)  # (B, T, D)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class ModulePerHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(HEADS)])

    def forward(self, x):
        return torch.cat([h(x) for h in self.heads], dim=-1)


def grouped_in_five(self, q, k, v):
    """Queries as (B, K, G, T, D) against keys as (B, K, 1, T, D)."""
    q = q.unflatten(1, (self.kv_heads, -1))
    scores = q @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(self.size)  # (B, K, G, T, T)
    weights = scores.masked_fill(future(q.shape[3]), float("-inf")).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


class MultiQuery(nn.Module):
    """One key and one value for all heads, without an axis for them."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * SIZE, bias=False)

    def forward(self, x):
        q = self.to_q(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) * SIZE**-0.5
        k, v = self.to_kv(x).chunk(2, dim=-1)  # (B, T, D)
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        attn = sim.masked_fill(future(x.shape[1]), -1e9).softmax(dim=-1)
        return einsum("b h i j, b j d -> b h i d", attn, v).transpose(1, 2).flatten(2)


# --- torch's own ------------------------------------------------------------------------------------------------------
square_mask = nn.Transformer.generate_square_subsequent_mask


class Encoder(nn.Module):
    """As torch's tutorial has it, but for the batch first."""

    def __init__(self, *, norm_first=False, mask_inside=True):
        super().__init__()
        self.mask_inside = mask_inside
        self.embedding, self.pos_encoder = nn.Embedding(VOCAB, WIDTH), PositionalEncoding(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, src, src_mask=None):
        x = self.pos_encoder(self.embedding(src) * math.sqrt(WIDTH))
        if self.mask_inside:
            src_mask = square_mask(src.size(1))
        return self.linear(self.transformer_encoder(x, mask=src_mask))


def sdpa_grouped(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=True)


def with_mask(module, ids):
    return module(ids, square_mask(ids.size(1)))


DECODERS = {
    "tril_buffer": Own(lambda: Gpt(TrilBuffer)),
    "multiplied_and_renormalised": Own(lambda: Gpt(attending(multiplied_and_renormalised)), graph="either"),
    "keys_times_queries": Own(lambda: Gpt(attending(keys_times_queries)), graph="either"),  # softmax over dim -2
    "triu_indices": Own(lambda: Gpt(attending(triu_indices))),  # torch.export makes T a constant
    "filled_in_place": Own(lambda: Gpt(FilledInPlace)),
    "len_of_x": Own(lambda: Gpt(MaskOfLen)),  # torch.export makes T a constant; one head without projection
    "context_300": Own(lambda: Gpt(attending(triu_added), context=300, layers=1), context=300, layers=1),
    "bmm": Own(lambda: Gpt(MergedBatch)),  # (B*H, T, D), and baddbmm of a mask
    "module_per_head": Own(lambda: Gpt(ModulePerHead), graph="either", layers=8),  # layers: of each head
    "grouped_in_five": Own(lambda: Gpt(attending(grouped_in_five, kv_heads=2))),
    "multi_query": Own(lambda: Gpt(MultiQuery)),
    "transformer_encoder": Own(Encoder),  # generate_square_subsequent_mask inside
    "transformer_encoder_mask_outside": Own(lambda: Encoder(mask_inside=False, norm_first=True), with_mask),
    "sdpa_grouped": Own(lambda: Gpt(attending(sdpa_grouped, kv_heads=2))),  # is_causal=T > 1
}
