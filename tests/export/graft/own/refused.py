"""Modules that no cache is right for, each with the line and the words of its true cause."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from .blocks import Mixing
from .parts import CONTEXT, HEADS, WIDTH, Causal, Gpt, NoPositions, Refused, attending, causal


# --- later tokens -----------------------------------------------------------------------------------------------------
def no_mask(self, q, k, v):
    return self.scores(q, k).softmax(-1) @ v


def one_head_ahead(self, q, k, v):
    """The next token, in the last head."""
    T = q.size(2)
    hidden = torch.stack([torch.ones(T, T).triu(1)] * (self.heads - 1) + [torch.ones(T, T).triu(2)]).bool()
    return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def softmax_over_queries(self, q, k, v):
    """Over the wrong axis: later queries are in the sum."""
    return causal(self.scores(q, k)).softmax(dim=-2) @ v


class Centred(nn.Module):
    """The mean over the whole text is subtracted."""

    def forward(self, x):
        return x - x.mean(dim=1, keepdim=True)


# --- other rows, and chance -------------------------------------------------------------------------------------------
class OverTheBatch(nn.Module):
    """Normalised over the rows, also in eval mode by their own figures."""

    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) / (x.std(0, keepdim=True, unbiased=False) + 0.5)


class Noisy(Gpt):
    def embed(self, idx):
        x = super().embed(idx)
        return x + 1e-4 * torch.randn_like(x)


# --- recurrence -------------------------------------------------------------------------------------------------------
class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.gru(x)[0]


# --- what is kept from call to call ----------------------------------------------------------------------------------
class Memory(Causal):
    """Keys and values of the text before, as Transformer-XL keeps them on self."""

    def more(self):
        self.kept = list[torch.Tensor]()

    def attend(self, q, k, v):
        own, T = [k.detach(), v.detach()], q.size(2)
        if self.kept and self.kept[0].size(0) == k.size(0):
            k, v = torch.cat([self.kept[0], k], dim=2), torch.cat([self.kept[1], v], dim=2)
        self.kept = own
        hidden = torch.ones(T, k.size(2)).triu(1 + k.size(2) - T).bool()
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class CacheInPlace(nn.Module):
    """Keys and values are written into buffers of the whole context, and read from them."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.register_buffer("cache_k", torch.zeros(4, CONTEXT, HEADS, WIDTH // HEADS))
        self.register_buffer("cache_v", torch.zeros(4, CONTEXT, HEADS, WIDTH // HEADS))

    def forward(self, x, start_pos):
        B, T, C = x.shape
        xq, xk, xv = (w(x).view(B, T, HEADS, C // HEADS) for w in (self.wq, self.wk, self.wv))
        self.cache_k[:B, start_pos : start_pos + T] = xk
        self.cache_v[:B, start_pos : start_pos + T] = xv
        keys, values = self.cache_k[:B, : start_pos + T], self.cache_v[:B, : start_pos + T]
        q, k, v = (t.transpose(1, 2) for t in (xq, keys, values))
        return self.wo((causal(q @ k.mT / math.sqrt(C // HEADS)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class WithStartPos(Gpt):
    def forward(self, tokens, start_pos):  # type: ignore[override]
        x = self.wte(tokens) + self.wpe.weight[start_pos : start_pos + tokens.size(1)]
        for block in self.blocks:
            x = x + block.attn(block.ln_1(x), start_pos)
            x = x + block.mlp(block.ln_2(x))
        return self.lm_head(self.ln_f(x))


class Counting(Gpt):
    """Counts its calls in a buffer, which its logits read or not."""

    share = 0.0

    def __init__(self):
        super().__init__(Causal, layers=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, idx):
        self.calls += 1  # type: ignore[assignment]
        logits = super().forward(idx)
        return logits + self.share * self.calls if self.share else logits


class CountRead(Counting):
    share = 1e-9


# --- lengths and loops ------------------------------------------------------------------------------------------------
def scaled_by_length(self, q, k):
    """By log T, which changes for the tokens before with each that is added."""
    return Causal.scores(self, q, k) * math.log(q.size(2) + 1)


# --- rows and places that no cache has --------------------------------------------------------------------------------
class LearnedKeys(Causal):
    """Two learned keys and values in front of the text's."""

    def more(self):
        self.keys, self.values = (nn.Parameter(torch.zeros(1, self.kv_heads, 2, self.size)) for _ in range(2))

    def attend(self, q, k, v):
        B, T = q.size(0), q.size(2)
        k, v = torch.cat([self.keys.expand(B, -1, -1, -1), k], 2), torch.cat([self.values.expand(B, -1, -1, -1), v], 2)
        hidden = F.pad(torch.ones(T, T, dtype=torch.bool).triu(1), (2, 0))
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Skewed(Causal):
    """The Music Transformer's: the last T rows of a table, shifted into place by a pad and a view."""

    def more(self):
        self.distances = nn.Parameter(torch.zeros(CONTEXT, self.size))

    def scores(self, q, k):
        B, H, T, _ = q.shape
        relative = q @ self.distances[CONTEXT - T :].T  # (B, H, T, T)
        return super().scores(q, k) + F.pad(relative, (1, 0)).view(B, H, T + 1, T)[:, :, 1:]


def places_of_the_largest(self, q, k, v):
    scores = causal(self.scores(q, k))
    where = scores.topk(min(5, scores.size(-1)), dim=-1).indices
    return (scores + torch.full_like(scores, float("-inf")).scatter(-1, where, 0.0)).softmax(-1) @ v


# --- what no rule can follow -----------------------------------------------------------------------------------------
def complex_scores(self, q, k, v):
    a, b = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    return causal((a @ b.conj().transpose(-1, -2)).real / self.size**0.5).softmax(-1) @ v


def flexible(self, q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, _b, _h, i, j: torch.where(i >= j, s, -float("inf")))


def ahead(head):
    return rf"lets the token at position 0 see that at 1, a later one \(attention, head {head}\)"


OF_LENGTH = "computes with a number made from the length of the text"
REFUSED = {
    "no_mask": Refused(lambda: Gpt(attending(no_mask)), no_mask, ahead(0)),
    "one_head_ahead": Refused(lambda: Gpt(attending(one_head_ahead)), one_head_ahead, ahead(3)),
    "softmax_over_queries": Refused(
        lambda: Gpt(attending(softmax_over_queries)), softmax_over_queries, "softmax over the queries"
    ),
    "mean_over_time": Refused(lambda: Mixing(Centred()), Centred, "averages over all positions, including later ones"),
    "over_the_batch": Refused(lambda: Mixing(OverTheBatch()), OverTheBatch, "mean over the rows of the batch", 2),
    "little_noise": Refused(lambda: Noisy(Causal), Noisy, "draws random numbers outside training"),
    "gru": Refused(lambda: Mixing(Gru()), Gru, "runs a GRU in both directions"),
    "memory": Refused(lambda: NoPositions(Memory), Memory, r"keeps blocks\.0\.attn\.kept from one call to the next"),
    "cache_in_place": Refused(
        lambda: WithStartPos(CacheInPlace), CacheInPlace, r"writes into the buffers blocks\.0\.attn\.cache_k", 2
    ),
    "scaled_by_length": Refused(lambda: Gpt(attending(scores=scaled_by_length)), scaled_by_length, OF_LENGTH),
    "learned_keys": Refused(lambda: Gpt(LearnedKeys), LearnedKeys, "has 2 rows more than the text has tokens"),
    "skewed": Refused(lambda: NoPositions(Skewed), Skewed, "multiplies by rows that are counted from the end"),
    "places_of_the_largest": Refused(
        lambda: Gpt(attending(places_of_the_largest)),
        places_of_the_largest,
        "reads where the largest scores are",
        2,
    ),
    "count_that_the_logits_read": Refused(CountRead, Counting, "writes into the buffer calls"),
    "complex_scores": Refused(
        lambda: Gpt(attending(complex_scores)), complex_scores, "multiplies matrices of complex numbers"
    ),
    "flex_attention": Refused(
        lambda: Gpt(attending(flexible)),
        flexible,
        "calls flex_attention, which cannot be followed: write F.scaled_dot_product",
    ),
}
