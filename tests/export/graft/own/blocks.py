"""The parts around attention: norms, MLPs, experts, shared and tied weights; and rows of earlier tokens outside it."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import VOCAB, WIDTH, Block, Causal, Gpt, Own
from .positions import RotaryGrouped


class RMSNorm(nn.Module):
    def __init__(self, dim=WIDTH, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, hidden=64):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Modern(nn.Module):
    """RMSNorm, grouped queries with rotary positions, another MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.attention_norm, self.ffn_norm, self.feed_forward = RMSNorm(), RMSNorm(), mlp()
        self.attention = RotaryGrouped(kv_heads=2)

    def forward(self, x):
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Stack(nn.Module):
    """Any blocks, with a tied head, applied as often as it is told."""

    def __init__(self, *blocks, times=1, positions=0):
        super().__init__()
        self.times, self.tok_embeddings = times, nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(positions, WIDTH) if positions else None
        self.layers, self.norm = nn.ModuleList(blocks), RMSNorm()
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens):
        h = self.tok_embeddings(tokens) * 3
        if self.positions is not None:
            h = h + self.positions(torch.arange(0, tokens.shape[-1]))
        for _ in range(self.times):
            for layer in self.layers:
                h = layer(h)
        return self.output(self.norm(h)) / 2


# --- experts that compute only the tokens that chose them -------------------------------------------------------------
EXPERTS, ACTIVE = 4, 2


class Experts(nn.Module):
    """A router's two best experts of four for each token; a variant says how their rows are read and written back."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(EXPERTS)]
        )

    def forward(self, x):
        flat = x.view(-1, x.size(-1))  # (B*T, C)
        weights, which = torch.topk(self.gate(flat), ACTIVE)
        return self.routed(flat, weights.softmax(-1), which).view_as(x)

    def routed(self, x, weights, which):
        raise NotImplementedError


class Where(Experts):
    """torch.where gives the rows, and the place of the expert in them."""

    def routed(self, x, weights, which):
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, nth = torch.where(which == i)
            results[rows] += weights[rows, nth, None] * expert(x[rows])
        return results


class Counted(Experts):
    """An expert without tokens, by their count, is left out."""

    def routed(self, x, weights, which):
        y = torch.zeros_like(x)
        counts = torch.bincount(which.flatten(), minlength=EXPERTS).tolist()
        for i in range(EXPERTS):
            if counts[i] == 0:
                continue
            idx, top = torch.where(which == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return y


class Unique(Experts):
    """Only the experts that any token chose."""

    def routed(self, x, weights, which):
        out = torch.zeros(x.size(0), WIDTH, dtype=x.dtype)
        for chosen in torch.unique(which):
            expert = int(chosen.item())
            mask = which == expert
            rows = mask.any(dim=-1).nonzero(as_tuple=False).squeeze(-1)
            if rows.numel() == 0:
                continue
            nth = mask[rows].int().argmax(dim=-1, keepdim=True)
            weight = torch.gather(weights.index_select(0, rows), dim=-1, index=nth).squeeze(-1)
            out.index_add_(0, rows, self.experts[expert](x.index_select(0, rows)) * weight.unsqueeze(-1))
        return out


class Hit(Experts):
    """A mask of experts, places and tokens, and a list of the experts that are hit."""

    def routed(self, x, weights, which):
        final = torch.zeros_like(x)
        mask = F.one_hot(which, num_classes=EXPERTS).permute(2, 1, 0)  # (E, k, B*T)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            nth, rows = torch.where(mask[expert].squeeze(0))
            state = x[None, rows].reshape(-1, WIDTH)
            final.index_add_(0, rows, self.experts[int(expert)](state) * weights[rows, nth, None])
        return final


class Scattered(Experts):
    """masked_scatter into zeros, if any token chose the expert."""

    def routed(self, x, weights, which):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = which == i
            mask = mine.any(-1)
            if mask.any():
                y = expert(x[mask]) * (weights * mine).sum(-1)[mask, None]
                out = out + torch.zeros_like(x).masked_scatter(mask[:, None].expand_as(x), y)
        return out


# --- rows of earlier tokens -------------------------------------------------------------------------------------------
class SmearedEmbedding(Gpt):
    """Part of the token before is mixed into each embedding, by a gate; without a cache it fails on a text of one."""

    def __init__(self):
        super().__init__(Causal)
        self.smear_gate = nn.Linear(12, 1, bias=False)

    def embed(self, idx):
        assert idx.size(1) > 1, "training forward should have T > 1"
        x = super().embed(idx) * 4
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, :12]))
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)


class Bigrams(Gpt):
    """The token before is also embedded; token 0 is in front of the first one."""

    def __init__(self):
        super().__init__(Causal)
        self.before = nn.Embedding(VOCAB, WIDTH)

    def embed(self, idx):
        shifted = torch.cat([torch.zeros_like(idx[:, :1]), idx[:, :-1]], dim=1)
        return super().embed(idx) + self.before((idx + 7 * shifted) % VOCAB)


class TimeShift(nn.Module):
    """Keys and values of an MLP see the token before: a pad of one row, the last one cut."""

    def __init__(self):
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix, self.mlp = nn.Parameter(torch.full((WIDTH,), 0.5)), SwiGLU()

    def forward(self, x):
        return self.mlp(x * self.mix + self.time_shift(x) * (1 - self.mix))


class ShiftedKeys(Causal):
    """Half of the channels come from the token before, of a row of zeros at the start."""

    def forward(self, x):
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().forward(torch.cat([before[..., : WIDTH // 2], x[..., WIDTH // 2 :]], dim=-1))


class ShortConv(nn.Module):
    """A depthwise convolution over the last tokens: padded on both sides, cut to T; or padded on the left."""

    def __init__(self, kernel=4, *, both=True):
        super().__init__()
        self.kernel, self.both = kernel, both
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, groups=WIDTH, padding=kernel - 1 if both else 0)
        self.gate, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        T, rows = x.shape[1], x.transpose(1, 2)  # (B, C, T)
        mixed = self.conv(rows)[..., :T] if self.both else self.conv(F.pad(rows, (self.kernel - 1, 0)))
        return self.out(self.gate(x) * F.silu(mixed.transpose(1, 2)))


class Normed(nn.Module):
    """A norm of whole columns with the figures of the training: over (B, C, T), or flattened to (B*T, C)."""

    def __init__(self, norm, *, flat=True):
        super().__init__()
        self.flat, self.norm, self.mlp = flat, norm, SwiGLU()
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean, norm.running_var = torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH)

    def forward(self, x):
        normed = self.norm(x.flatten(0, 1)).view_as(x) if self.flat else self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.mlp(normed)


def mixed(attention=None, mlp=None):
    """One block with such a part, one without."""
    return Stack(Block(attention or Causal(), mlp=mlp), Block(Causal()), positions=48)


class Mixing(Gpt):
    """The second block has another MLP, which mixes what it should not."""

    def __init__(self, mlp):
        super().__init__(Causal)
        self.blocks[1] = Block(Causal(), mlp=mlp)


DECODERS = {
    "swiglu": Own(lambda: Stack(Modern(SwiGLU), Modern(SwiGLU))),  # RMSNorm in its own code, grouped queries, tied
    "one_layer_three_times": Own(lambda: Stack(Modern(SwiGLU), times=3), layers=3),  # shared weights
    "batch_norm": Own(lambda: mixed(mlp=Normed(nn.BatchNorm1d(WIDTH), flat=False))),  # in eval mode
    "batch_norm_of_rows": Own(lambda: mixed(mlp=Normed(nn.BatchNorm1d(WIDTH)))),  # in eval mode
    "group_norm_of_rows": Own(lambda: mixed(mlp=Normed(nn.GroupNorm(4, WIDTH)))),  # each token by itself
    "smeared_embedding": Own(SmearedEmbedding, graph="standard", rows=1),  # nanochat's: cat of the first row
    "bigrams": Own(Bigrams, graph="standard", rows=1),  # a shift of the ids themselves
    "time_shift": Own(lambda: mixed(mlp=TimeShift()), graph="standard", rows=1),  # ZeroPad2d, RWKV's
    "shifted_keys": Own(lambda: mixed(ShiftedKeys()), graph="standard", rows=1),  # pad, then [:, :-1]
    "short_conv": Own(lambda: mixed(mlp=ShortConv()), graph="standard", rows=3),  # padding=3, cut to T; C groups
    "short_conv_padded_left": Own(lambda: mixed(mlp=ShortConv(3, both=False)), graph="standard", rows=2),
"experts_where": Own(lambda: Stack(Modern(Where)), layers=1),  # results[rows] += ...
    "experts_counted": Own(lambda: Stack(Modern(Counted)), layers=1),  # bincount(...).tolist()
    "experts_unique": Own(lambda: Stack(Modern(Unique)), layers=1),  # for expert in unique(...)
    "experts_hit": Own(lambda: Stack(Modern(Hit)), layers=1),  # one_hot(...).permute(2, 1, 0)
    "experts_scattered": Own(lambda: Stack(Modern(Scattered)), layers=1),  # masked_scatter, if mask.any()
}  # fmt: skip
