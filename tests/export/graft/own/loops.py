"""Recurrences as people write them: loops over tokens, torch's own layers and cells, running sums."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import CONTEXT, HEADS, SIZE, VOCAB, WIDTH, Own


class Lm(nn.Module):
    """An embedding, layers that add to it, and a head."""

    def __init__(self, *layers):
        super().__init__()
        self.wte, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


# --- torch's layers and cells -----------------------------------------------------------------------------------------
class Layer(nn.Module):
    """nn.GRU and its like, whichever axis is first, with or without a learned beginning."""

    def __init__(self, kind, *, learned=False, **settings):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, **settings)
        self.h0 = nn.Parameter(torch.zeros(self.rnn.num_layers, 1, WIDTH)) if learned else None

    def forward(self, x):
        h0 = None if self.h0 is None else self.h0.expand(-1, x.size(0), -1).contiguous()
        if isinstance(self.rnn, nn.LSTM) and h0 is not None:
            h0 = (h0, torch.tanh(h0))
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        y = self.rnn(x, h0)[0]
        return y if self.rnn.batch_first else y.transpose(0, 1)


class LastState(nn.Module):
    """The logits of only the last position, of the last state."""

    def __init__(self):
        super().__init__()
        self.wte, self.gru, self.head = nn.Embedding(VOCAB, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        return self.head(self.gru(self.wte(ids).transpose(0, 1))[1][-1])


class Cells(nn.Module):
    """Layers of cells inside the loop over tokens."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(WIDTH, WIDTH), nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu")])
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x):
        states = [torch.zeros(x.size(0), WIDTH) for _ in self.cells]
        h = c = torch.zeros(x.size(0), WIDTH)
        outputs = []
        for t in range(x.size(1)):
            y = x[:, t]
            for i, cell in enumerate(self.cells):
                states[i] = cell(y, states[i])
                y = y + states[i] / 2
            h, c = self.lstm(y, (h, c))
            outputs.append(h.unsqueeze(1))
        return torch.cat(outputs, dim=1)


class TokenByToken(nn.Module):
    """A layer of torch's that is called for each token, from None."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2)

    def forward(self, x):
        hidden, outputs = None, []
        for t in range(x.size(1)):
            y, hidden = self.gru(x[:, t].unsqueeze(0), hidden)
            outputs.append(y[0])
        return torch.stack(outputs, 1)


# --- loops ------------------------------------------------------------------------------------------------------------
class Ema(nn.Module):
    """An average that begins with the first token."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        a = torch.sigmoid(self.a)
        ema = [x[:, 0]]
        for t in range(1, x.shape[1]):
            ema.append(a * ema[-1] + (1 - a) * x[:, t])
        return torch.stack(ema, 1)


class MinGru(nn.Module):
    """Written into a tensor; begins with a learned state."""

    def __init__(self):
        super().__init__()
        self.z, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.h0 = nn.Parameter(torch.zeros(1, WIDTH))

    def forward(self, x):
        B, T, _ = x.shape
        out, h = torch.zeros(B, T, WIDTH), self.h0.expand(B, -1)
        for t, x_t in enumerate(x.unbind(1)):
            z = torch.sigmoid(self.z(x_t))
            h = (1 - z) * h + z * self.h(x_t)
            out[:, t] = h
        return out


class Delta(nn.Module):
    """The gated delta rule, with a matrix for each head as its state."""

    def __init__(self):
        super().__init__()
        self.qkv, self.gates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, HEADS, SIZE).unbind(2)
        k = F.normalize(k, dim=-1)
        beta, decay = torch.sigmoid(self.gates(x)).chunk(2, -1)
        S, outputs = x.new_zeros(B, HEADS, SIZE, SIZE), []
        for t in range(T):
            S = S * decay[:, t, :, None, None]
            u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + k[:, t, :, :, None] * u[:, :, None]
            outputs.append((q[:, t, :, None] @ S).flatten(1))
        return torch.stack(outputs, dim=1)


class Mamba(nn.Module):
    """The selective scan of Mamba 1 behind a short convolution."""

    def __init__(self, states=4):
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.dt, self.bc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * states)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(WIDTH, 1))
        self.D = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        u = F.silu(self.mix(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2))
        dt, (b, c) = F.softplus(self.dt(u)), self.bc(u).chunk(2, -1)
        h, ys = torch.zeros(x.size(0), WIDTH, b.size(-1)), []
        for i in range(x.size(1)):
            h = torch.exp(dt[:, i, :, None] * -self.A_log.exp()) * h + (dt[:, i] * u[:, i])[..., None] * b[:, i, None]
            ys.append((h * c[:, i, None]).sum(-1))
        return torch.stack(ys, 1) + self.D * u


class Rwkv(nn.Module):
    """The time mixing of RWKV 4: three states, of which one begins with a large negative number."""

    def __init__(self):
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.kvr, self.w, self.u = nn.Linear(WIDTH, 3 * WIDTH), *(nn.Parameter(torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x):
        k, v, r = self.kvr((x + self.shift(x)) / 2).chunk(3, -1)
        aa, bb = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        pp, out = torch.full_like(aa, -1e38), torch.empty_like(v)
        for t in range(x.size(1)):
            ww = self.u + k[:, t]
            p = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - p), torch.exp(ww - p)
            out[:, t] = (e1 * aa + e2 * v[:, t]) / (e1 * bb + e2)
            ww = pp - self.w.exp()
            p = torch.maximum(ww, k[:, t])
            e1, e2 = torch.exp(ww - p), torch.exp(k[:, t] - p)
            aa, bb, pp = e1 * aa + e2 * v[:, t], e1 * bb + e2, p
        return torch.sigmoid(r) * out


class Before(nn.Module):
    """Gives its state out before the token changes it, and carries the token before."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = last = torch.zeros(x.size(0), WIDTH)
        outputs = []
        for x_t in x.transpose(0, 1):
            outputs.append(h - last)
            h, last = torch.tanh(self.w(h) + x_t), x_t
        return torch.stack(outputs).transpose(0, 1)


class PerToken(nn.Module):
    """One text at a time, rows of a table of positions, and the last state's logits."""

    def __init__(self):
        super().__init__()
        self.wte, self.pe = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(2 * CONTEXT, WIDTH))
        self.w, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        h = torch.zeros(WIDTH)
        for t in range(len(ids)):
            h = torch.tanh(self.w(h) + self.wte(ids[t]) + self.pe[t])
        return self.head(h)


class Summed(nn.Module):
    """Linear attention by sums over the text."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        products = torch.einsum("btd,bte->btde", k, v).cumsum(dim=1)
        return torch.einsum("btd,btde->bte", q, products) / (q * k.cumsum(1)).sum(-1, keepdim=True)


def lm(*layers):
    return Own(lambda: Lm(*(layer() for layer in layers)), graph="either", layers=0)


def one_by_one(module, ids):
    return torch.stack([module(row) for row in ids])


DECODERS = {
    "gru_layers": lm(lambda: Layer(nn.GRU, num_layers=2, dropout=0.5)),
    "lstm_learned_beginning": lm(lambda: Layer(nn.LSTM, learned=True, num_layers=2, batch_first=True)),
    "rnn_without_bias": lm(lambda: Layer(nn.RNN, nonlinearity="relu", bias=False, batch_first=True)),
    "gru_last_state": Own(LastState, graph="either", layers=0),
    "cells_in_the_loop": lm(Cells),
    "token_by_token": lm(TokenByToken),
    "moving_average": lm(Ema, Ema),
    "min_gru": lm(MinGru),
    "delta_rule": lm(Delta, Delta),
    "mamba": Own(lambda: Lm(Mamba()), graph="either", layers=0, rows=2),
    "rwkv": Own(lambda: Lm(Rwkv()), graph="either", layers=0, rows=1),
    "state_before": lm(Before),
    "per_token": Own(PerToken, one_by_one, graph="either", layers=0),
    "summed_attention": lm(Summed),
}  # fmt: skip
