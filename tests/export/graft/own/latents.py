"""Multi-head latent attention as people write it: keys and values out of a small vector of each token."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from pastkey.contract.bundle import KVGeometry

from .parts import HEADS, WIDTH, Gpt, NoPositions, Own, causal

RANK, NOPE, ROPE, SIZE = 12, 8, 4, 8  # of the latent; of keys without and with positions; of values
SCALE = 1 / math.sqrt(NOPE + ROPE)


def turned(x):
    """(..., T, ROPE) rotated in halves."""
    angles = torch.outer(torch.arange(x.shape[-2]), 1.0 / 10000 ** (torch.arange(0, ROPE, 2) / ROPE))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Latent(nn.Module):
    """Scores are a sum of two products: of the heads' keys, and of one rotated key of all heads."""

    def __init__(self):
        super().__init__()
        self.w_q = nn.Linear(WIDTH, HEADS * (NOPE + ROPE), bias=False)
        self.w_down, self.norm = nn.Linear(WIDTH, RANK, bias=False), nn.LayerNorm(RANK)
        self.w_kr = nn.Linear(WIDTH, ROPE, bias=False)
        self.w_up = nn.Linear(RANK, HEADS * (NOPE + SIZE), bias=False)
        self.w_o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)

    def queries(self, x):
        """(B, H, T, NOPE) and (B, H, T, ROPE)."""
        q = self.w_q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q_c, q_r = q.split([NOPE, ROPE], dim=-1)
        return q_c, turned(q_r)

    def forward(self, x):
        up = self.w_up(self.norm(self.w_down(x))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k_c, v = up.split([NOPE, SIZE], dim=-1)
        k_r = turned(self.w_kr(x).unsqueeze(1))  # (B, 1, T, ROPE)
        q_c, q_r = self.queries(x)
        return self.w_o(self.mixed(q_c, q_r, k_c, k_r, v).transpose(1, 2).flatten(2))

    def mixed(self, q_c, q_r, k_c, k_r, v):
        return causal((q_c @ k_c.mT + q_r @ k_r.mT) * SCALE).softmax(-1) @ v


class ByCat(Latent):
    """Keys put together for F.scaled_dot_product_attention, the rotated part expanded for all heads."""

    def mixed(self, q_c, q_r, k_c, k_r, v):
        q, k = torch.cat([q_c, q_r], dim=-1), torch.cat([k_c, k_r.expand(-1, HEADS, -1, -1)], dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Filled(nn.Module):
    """One projection down and one up, queries of low rank, and keys and queries written into empty tensors."""

    def __init__(self):
        super().__init__()
        self.q_a, self.q_norm = nn.Linear(WIDTH, 10, bias=False), nn.RMSNorm(10)
        self.q_b = nn.Linear(10, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(WIDTH, RANK + ROPE, bias=False), nn.RMSNorm(RANK)
        self.kv_b = nn.Linear(RANK, HEADS * (NOPE + SIZE), bias=False)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(B, T, HEADS, NOPE + ROPE).transpose(1, 2)
        q_nope, q_pe = torch.split(q, [NOPE, ROPE], dim=-1)
        latent, k_pe = torch.split(self.kv_a(x), [RANK, ROPE], dim=-1)
        k_pe = turned(k_pe.view(B, T, 1, ROPE).transpose(1, 2))
        kv = self.kv_b(self.kv_norm(latent)).view(B, T, HEADS, NOPE + SIZE).transpose(1, 2)
        k_nope, v = torch.split(kv, [NOPE, SIZE], dim=-1)
        q, k = (k_pe.new_empty(B, HEADS, T, NOPE + ROPE) for _ in range(2))
        q[..., :NOPE], q[..., NOPE:] = q_nope, turned(q_pe)
        k[..., :NOPE], k[..., NOPE:] = k_nope, k_pe
        weights = causal(q @ k.transpose(2, 3) * SCALE).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, T, HEADS * SIZE))


class Absorbed(Latent):
    """The author multiplies the queries by the keys' weights, and scores read the latent itself."""

    def forward(self, x):
        q_c, q_r = self.queries(x)
        latent, k_r = self.norm(self.w_down(x)), turned(self.w_kr(x))
        w_k, w_v = self.w_up.weight.view(HEADS, NOPE + SIZE, RANK).split([NOPE, SIZE], dim=1)
        q_c = torch.einsum("bhtd,hdr->bhtr", q_c, w_k)
        scores = torch.einsum("bhtr,bsr->bhts", q_c, latent) + torch.einsum("bhtr,bsr->bhts", q_r, k_r)
        mixed = torch.einsum("bhts,bsr->bthr", causal(scores * SCALE).softmax(-1), latent)
        return self.w_o(torch.einsum("bthr,hdr->bthd", mixed, w_v).flatten(2))


class Unturned(nn.Module):
    """Without rotated keys, every projection with a bias; the positions are learned ones."""

    heads = HEADS

    def __init__(self, rank=RANK):
        super().__init__()
        self.W_query, self.W_DKV = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, rank)
        self.W_UK, self.W_UV = nn.Linear(rank, WIDTH), nn.Linear(rank, WIDTH)

    def rows(self, x):
        latent = self.W_DKV(x)
        return self.W_query(x), self.W_UK(latent), self.W_UV(latent)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.rows(x))
        return self.mixed(q, k, v).transpose(1, 2).flatten(2)

    def mixed(self, q, k, v):
        return causal(q @ k.transpose(2, 3) / math.sqrt(q.size(-1))).softmax(-1) @ v


class TwoLatents(Unturned):
    """A latent of the keys and another one of the values."""

    def __init__(self):
        super().__init__(rank=8)
        self.W_DV = nn.Linear(WIDTH, 8)

    def rows(self, x):
        return self.W_query(x), self.W_UK(self.W_DKV(x)), self.W_UV(self.W_DV(x))


class TurnedAfter(Unturned):
    """Each head's key is rotated after the latent was expanded, so that no row of all positions gives the keys."""

    heads = WIDTH // ROPE

    def mixed(self, q, k, v):
        return super().mixed(turned(q), turned(k), v)


TURNED = KVGeometry(1, ROPE, RANK)  # the rotated key, and the latent
DECODERS = {
    "latent": Own(lambda: NoPositions(Latent), graph="standard", geometry=TURNED),  # scores of two products
    "latent_by_cat": Own(lambda: NoPositions(ByCat), graph="standard", geometry=TURNED),
    "latent_filled": Own(lambda: NoPositions(Filled), graph="standard", geometry=TURNED),  # new_empty
    "latent_absorbed": Own(lambda: NoPositions(Absorbed), graph="standard", geometry=TURNED),
    "latent_unturned": Own(lambda: Gpt(Unturned), graph="standard", geometry=KVGeometry(1, 6, 6)),
    "two_latents": Own(lambda: Gpt(TwoLatents), geometry=KVGeometry(1, 8, 8)),  # one of keys and one of values
    "latent_turned_after": Own(lambda: Gpt(TurnedAfter), graph="standard", geometry=KVGeometry(8, 4, 4)),
    "wide_latent": Own(lambda: Gpt(partial(Unturned, rank=2 * WIDTH)), geometry=KVGeometry(HEADS, 8, 8)),
}
