"""Modules that no cache is right for, each with its true cause: chance, other rows, recurrence, state, lengths."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biases import Scored, causal
from .blocks import Mixing
from .parts import CONTEXT, HEADS, WIDTH, Gpt, NoPositions, Refused
from .positions import Causal


# --- other rows, and chance -------------------------------------------------------------------------------------------
class OverTheBatch(nn.Module):
    """Normalised over the rows, by their own figures in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)) / (x.std(0, keepdim=True, unbiased=False) + 0.5)


class Noisy(Gpt):
    def __init__(self, size: float) -> None:
        super().__init__(Causal)
        self.noise = size

    def embed(self, idx: Tensor) -> Tensor:
        x = super().embed(idx)
        return x + self.noise * torch.randn_like(x)


class ActiveDropout(Scored):
    """F.dropout is active unless it is told otherwise."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(causal(self.scores(q, k)).softmax(-1), p=0.1) @ v


# --- recurrence -------------------------------------------------------------------------------------------------------
class SelectiveScan(nn.Module):
    """Mamba's, as a loop."""

    def __init__(self, state: int = 4) -> None:
        super().__init__()
        self.state, self.log_a = state, nn.Parameter(torch.zeros(WIDTH, state))
        self.step, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, state), nn.Linear(WIDTH, state)

    def forward(self, x: Tensor) -> Tensor:
        delta, b, c = F.softplus(self.step(x)), self.b(x), self.c(x)
        h, ys = x.new_zeros(x.size(0), WIDTH, self.state), []
        for t in range(x.size(1)):
            decay = torch.exp(-delta[:, t, :, None] * self.log_a.exp())
            h = decay * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return torch.stack(ys, dim=1)


class WeightedKeyValue(nn.Module):
    """RWKV's: a numerator and a denominator that decay."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.r = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.decay = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        k, v, r = self.k(x).exp(), self.v(x), self.r(x).sigmoid()
        top = below = torch.zeros_like(x[:, 0])
        out = []
        for t in range(x.shape[1]):
            top, below = top * torch.exp(-self.decay) + k[:, t] * v[:, t], below * torch.exp(-self.decay) + k[:, t]
            out.append(r[:, t] * top / below)
        return torch.stack(out, dim=1)


class LinearAttention(nn.Module):
    """Sums of k vᵀ by cumsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bthd,bthe->bthde", k, v).cumsum(dim=1)
        below = torch.einsum("bthd,bthd->bth", q, k.cumsum(dim=1))
        return (torch.einsum("bthd,bthde->bthe", q, kv) / below[..., None]).flatten(2)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


# --- what is kept from call to call ----------------------------------------------------------------------------------
class Memory(Scored):
    """Keys and values of the text before, as Transformer-XL keeps them on self."""

    def more(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own, T = (k.detach(), v.detach()), q.size(2)
        if self.kept is not None and self.kept[0].size(0) == k.size(0):
            k, v = torch.cat([self.kept[0], k], dim=2), torch.cat([self.kept[1], v], dim=2)
        self.kept = own
        hidden = torch.ones(T, k.size(2)).triu(1 + k.size(2) - T).bool()
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class CacheInPlace(nn.Module):
    """Keys and values are written into buffers of the whole context, and read from them."""

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.register_buffer("cache_k", torch.zeros(4, CONTEXT, HEADS, WIDTH // HEADS))
        self.register_buffer("cache_v", torch.zeros(4, CONTEXT, HEADS, WIDTH // HEADS))

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        B, T, C = x.shape
        xq, xk, xv = (w(x).view(B, T, HEADS, C // HEADS) for w in (self.wq, self.wk, self.wv))
        self.cache_k[:B, start_pos : start_pos + T] = xk
        self.cache_v[:B, start_pos : start_pos + T] = xv
        keys, values = self.cache_k[:B, : start_pos + T], self.cache_v[:B, : start_pos + T]
        q, k, v = (t.transpose(1, 2) for t in (xq, keys, values))
        return self.wo((causal(q @ k.mT / math.sqrt(C // HEADS)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class WithStartPos(Gpt):
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
        x = self.wte(tokens) + self.wpe.weight[start_pos : start_pos + tokens.size(1)]
        for block in self.blocks:
            x = x + block.attn(block.ln_1(x), start_pos)
            x = x + block.mlp(block.ln_2(x))
        return self.lm_head(self.ln_f(x))


# --- lengths and loops ------------------------------------------------------------------------------------------------
class WholeContext(Gpt):
    """Reshaped to the context, which every text must have."""

    def forward(self, idx: Tensor) -> Tensor:
        x = (self.wte(idx) + self.wpe.weight).view(-1, CONTEXT, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ScaledByLength(Scored):
    """By log T, which changes for the tokens before with each that is added."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) * math.log(q.size(2) + 1)


class CountedFromTheEnd(Gpt):
    def embed(self, idx: Tensor) -> Tensor:
        T = idx.size(1)
        return self.wte(idx) + self.wpe(T - 1 - torch.arange(T))


class UntilCertain(nn.Module):
    """Applied again until little changes."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(20):
            before, y = y, torch.tanh(x + 0.3 * self.step(y))
            if (y - before).abs().max() < 1e-5:
                break
        return y


# --- rows and places that no cache has --------------------------------------------------------------------------------
class LearnedToken(Gpt):
    """A learned token in front of the text, whose logits are left out."""

    def __init__(self) -> None:
        super().__init__(Scored)
        self.prefix = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, idx: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(idx.size(0), -1, -1), self.embed(idx)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x[:, 1:]))


class LearnedKeys(Scored):
    """Two learned keys and values in front of the text's."""

    def more(self) -> None:
        self.keys, self.values = (nn.Parameter(torch.zeros(1, self.kv_heads, 2, self.size)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, T = q.size(0), q.size(2)
        k, v = torch.cat([self.keys.expand(B, -1, -1, -1), k], 2), torch.cat([self.values.expand(B, -1, -1, -1), v], 2)
        hidden = F.pad(torch.ones(T, T, dtype=torch.bool).triu(1), (2, 0))
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Skewed(Scored):
    """The Music Transformer's: the last T rows of a table, shifted into place by a pad and a view."""

    def more(self) -> None:
        self.distances = nn.Parameter(torch.zeros(CONTEXT, self.size))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        B, H, T, _ = q.shape
        relative = q @ self.distances[CONTEXT - T :].T  # (B, H, T, T)
        return super().scores(q, k) + F.pad(relative, (1, 0)).view(B, H, T + 1, T)[:, :, 1:]


class PlacesOfTheLargest(Scored):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = causal(self.scores(q, k))
        where = scores.topk(min(5, scores.size(-1)), dim=-1).indices
        return (scores + torch.full_like(scores, float("-inf")).scatter(-1, where, 0.0)).softmax(-1) @ v


REFUSED = {
    "over_the_batch": Refused(lambda: Mixing(OverTheBatch()), "batch mixing"),
    "noise": Refused(lambda: Noisy(0.1), "noise", note="randn_like in eval mode"),
    "active_dropout": Refused(lambda: Gpt(ActiveDropout), "dropout", note="F.dropout without training="),
    "selective_scan": Refused(lambda: Mixing(SelectiveScan()), "recurrence", note="Mamba, a loop over T"),
    "weighted_key_value": Refused(lambda: NoPositions(WeightedKeyValue), "recurrence", note="RWKV"),
    "linear_attention": Refused(lambda: NoPositions(LinearAttention), "recurrence", note="cumsum"),
    "gru": Refused(lambda: Mixing(Gru()), "recurrence", note="nn.GRU beside attention"),
    "memory": Refused(lambda: NoPositions(Memory), "state", note="keys of the call before, on self"),
    "cache_in_place": Refused(
        lambda: WithStartPos(CacheInPlace), "cache written in place", lambda m, ids: m(ids, 0), note="m(ids, start_pos)"
    ),
    "whole_context": Refused(lambda: WholeContext(Causal), "fixed length", note="T == context"),
    "scaled_by_length": Refused(lambda: Gpt(ScaledByLength), "length-dependent number", note="log(T + 1)"),
    "counted_from_the_end": Refused(lambda: CountedFromTheEnd(Causal), "length-dependent number", note="T - 1 - i"),
    "until_certain": Refused(lambda: Mixing(UntilCertain()), "data-dependent loop", note="if change < 1e-6: break"),
    "learned_token": Refused(LearnedToken, "learned rows", note="a prefix or sink token"),
    "learned_keys": Refused(lambda: Gpt(LearnedKeys), "learned rows", note="memory keys and values"),
    "skewed": Refused(lambda: NoPositions(Skewed), "shifted scores", note="the Music Transformer's"),
    "places_of_the_largest": Refused(lambda: Gpt(PlacesOfTheLargest), "places of scores", note="topk(...).indices"),
    "little_noise": Refused(lambda: Noisy(1e-4), "noise", note="1e-4"),
}  # fmt: skip
