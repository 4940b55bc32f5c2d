"""What stands around attention: norms, MLPs, experts, shared and tied weights; and rows of earlier tokens beside it."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import VOCAB, WIDTH, Block, Gpt, Own
from .positions import Causal, RotaryGrouped


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


class DenseExperts(nn.Module):
    """All experts over all tokens; those outside the top two weigh nothing."""

    def __init__(self, experts=4, active=2):
        super().__init__()
        self.active, self.gate = active, nn.Linear(WIDTH, experts)
        self.w_in = nn.Parameter(torch.empty(experts, WIDTH, 32))
        self.w_out = nn.Parameter(torch.empty(experts, 32, WIDTH))

    def forward(self, x):
        top, which = self.gate(x).topk(self.active, dim=-1)
        weights = torch.zeros(*x.shape[:-1], self.w_in.size(0)).scatter(-1, which, top.softmax(-1))
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.w_in))
        return torch.einsum("bteh,ehc,bte->btc", hidden, self.w_out, weights)


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


class SmearedEmbedding(Gpt):
    """Part of the token before is mixed into each embedding, by a gate; without a cache it takes no text of one."""

    def __init__(self):
        super().__init__(Causal)
        self.smear_gate = nn.Linear(12, 1, bias=False)

    def embed(self, idx):
        assert idx.size(1) > 1, "training forward should have T > 1"
        x = super().embed(idx) * 4
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, :12]))
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)


class Bigrams(Gpt):
    """The token before is embedded, too; in front of the first one stands token 0."""

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


class BatchNorm(nn.Module):
    """With the figures of the training: over (B, C, T), or flattened to (B*T, C)."""

    def __init__(self, *, flat):
        super().__init__()
        self.flat, self.norm, self.mlp = flat, nn.BatchNorm1d(WIDTH), SwiGLU()
        self.norm.running_mean = torch.linspace(-1, 1, WIDTH)
        self.norm.running_var = torch.linspace(0.5, 2, WIDTH)

    def forward(self, x):
        normed = self.norm(x.flatten(0, 1)).view_as(x) if self.flat else self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.mlp(normed)


class GroupNorm(nn.Module):
    """Each token by itself, as a row of (B*T, C)."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(4, WIDTH), SwiGLU()

    def forward(self, x):
        return self.mlp(self.norm(x.flatten(0, 1)).view_as(x))


def blocks_with(**parts):
    """Two blocks with one of their parts (attn, mlp) replaced."""
    blocks = [Block(Causal()) for _ in range(2)]
    for block in blocks:
        for name, make in parts.items():
            setattr(block, name, make())
    return list(blocks)


def mixed(**parts):
    """One block with such a part, one without."""
    return Stack(blocks_with(**parts)[0], Block(Causal()), positions=48)


class Mixing(Gpt):
    """The second block has another MLP, which mixes what it should not."""

    def __init__(self, mlp):
        super().__init__(Causal)
        self.blocks[1] = blocks_with(mlp=lambda: mlp)[1]


DECODERS = {
    "swiglu": Own(lambda: Stack(Modern(SwiGLU), Modern(SwiGLU))),  # RMSNorm by hand, grouped queries, tied
    "dense_experts": Own(lambda: Stack(Modern(DenseExperts), Modern(DenseExperts))),
    "one_layer_three_times": Own(lambda: Stack(Modern(SwiGLU), times=3), layers=3),  # shared weights
    "batch_norm": Own(lambda: mixed(mlp=lambda: BatchNorm(flat=False))),  # over (B, C, T), in eval mode
    "batch_norm_of_rows": Own(lambda: mixed(mlp=lambda: BatchNorm(flat=True))),  # over (B*T, C), in eval mode
    "group_norm_of_rows": Own(lambda: mixed(mlp=GroupNorm)),  # over (B*T, C)
    "smeared_embedding": Own(SmearedEmbedding, graph="standard", state=True),  # nanochat's: cat of the first row
    "bigrams": Own(Bigrams, graph="standard", state=True),  # a shift of the ids themselves
    "time_shift": Own(lambda: mixed(mlp=TimeShift), graph="standard", state=True),  # ZeroPad2d, RWKV's
    "shifted_keys": Own(lambda: mixed(attn=ShiftedKeys), graph="standard", state=True),  # pad, then [:, :-1]
    "short_conv": Own(lambda: mixed(mlp=ShortConv), graph="standard", state=True),  # padding=3, cut to T; C groups
    "short_conv_padded_left": Own(lambda: mixed(mlp=lambda: ShortConv(3, both=False)), graph="standard", state=True),
}  # fmt: skip
