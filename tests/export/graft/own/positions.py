"""Where positions come from: sinusoids and tables cut to T, rotary positions of all kinds, none of them an argument."""

import math

import torch
from torch import nn

from .parts import CONTEXT, Causal, Gpt, NoPositions, Own


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len=CONTEXT):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(x + self.pe[:, : x.size(1), :])


class PositionsOfTheBatch(Gpt):
    """arange repeated for the rows, as long integers."""

    def embed(self, idx):
        N, length = idx.shape
        return self.wte(idx) + self.wpe(torch.arange(0, length).expand(N, length).to(idx.device))


class PositionsByCumsum(Gpt):
    """Counted by a cumulative sum of ones."""

    def embed(self, idx):
        return self.wte(idx) + self.wpe(torch.ones_like(idx).cumsum(-1) - 1)


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def interleaved(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class RotaryGrouped(Causal):
    """Cosines and sines made in every call; queries and keys are turned before keys are repeated for the queries."""

    crossed = staticmethod(rotate_half)

    def more(self):
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, self.size, 2).float() / self.size))

    def angles(self, length):
        return torch.einsum("i,j->ij", torch.arange(length).float(), self.inv_freq)

    def tables(self, length):
        emb = torch.cat([self.angles(length)] * 2, dim=-1)
        return emb.cos(), emb.sin()

    def attend(self, q, k, v):
        cos, sin = self.tables(q.size(2))
        q, k = ((t * cos + self.crossed(t) * sin).to(t.dtype) for t in (q, k))
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return super().attend(q, k, v)


class RotaryTables(RotaryGrouped):
    """cos[:T] and sin[:T] of buffers."""

    dtype = torch.float32

    def more(self):
        super().more()
        cos, sin = super().tables(self.context)
        self.register_buffer("cos", cos.to(self.dtype), persistent=False)
        self.register_buffer("sin", sin.to(self.dtype), persistent=False)

    def tables(self, length):
        return self.cos[:length], self.sin[:length]


class BfloatTables(RotaryTables):
    dtype = torch.bfloat16


class RotaryKept(RotaryGrouped):
    """Kept on self, made anew where a text is longer."""

    max_seq_len_cached = 0

    def tables(self, length):
        if self.max_seq_len_cached < length:
            self.max_seq_len_cached = length
            self.cos_cached, self.sin_cached = super().tables(length)
        return self.cos_cached[:length], self.sin_cached[:length]


class RotaryByLength(RotaryGrouped):
    """A dictionary of tables by length, of neighbours."""

    crossed = staticmethod(interleaved)

    def more(self):
        super().more()
        self.made = dict[int, object]()

    def tables(self, length):
        if length not in self.made:
            angles = self.angles(length).repeat_interleave(2, dim=-1)
            self.made[length] = angles.cos(), angles.sin()
        return self.made[length]


class RotaryComplex(Causal):
    """freqs_cis by polar, multiplied as complex numbers before the heads move to the front."""

    def more(self):
        freqs = 1.0 / 10000 ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(self.context), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (w(x).view(bsz, seqlen, self.heads, self.size) for w in (self.q, self.k, self.v))
        freqs = self.freqs_cis[:seqlen].view(1, seqlen, 1, -1)
        xq, xk = (
            torch.view_as_real(torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2)) * freqs).flatten(3)
            for t in (xq, xk)
        )
        y = self.attend(*(t.transpose(1, 2) for t in (xq, xk, xv)))
        return self.o(y.transpose(1, 2).reshape(bsz, seqlen, -1))


DECODERS = {
    "positions_of_the_batch": Own(lambda: PositionsOfTheBatch(Causal)),
    "positions_by_cumsum": Own(lambda: PositionsByCumsum(Causal)),  # of ones_like(ids): a contraction over time
    "no_positions": Own(lambda: NoPositions(Causal)),
    "rotary_in_bfloat16": Own(lambda: NoPositions(BfloatTables)),  # tables of bfloat16 with others of float32
    "rotary_kept": Own(lambda: NoPositions(RotaryKept)),  # an attribute that grows
    "rotary_by_length": Own(lambda: NoPositions(RotaryByLength)),  # a dictionary of lengths
    "rotary_complex": Own(lambda: NoPositions(RotaryComplex)),  # polar, view_as_complex
}  # fmt: skip
