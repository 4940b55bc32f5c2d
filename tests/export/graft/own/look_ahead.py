"""Modules in which a token sees later ones, by a mistake of their author; the last one hardly does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .biases import WINDOW, Scored, causal
from .blocks import Mixing
from .parts import WIDTH, Gpt, Refused


class OnesAndZerosAdded(Scored):
    """A mask that is meant to be multiplied, or to hold -inf."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        return (self.scores(q, k) + torch.tril(torch.ones(T, T))).softmax(-1) @ v


class NoMask(Scored):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scores(q, k).softmax(-1) @ v


class DiagonalOfTwo(Scored):
    """Each token sees the next one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        return (self.scores(q, k) + torch.full((T, T), float("-inf")).triu(2)).softmax(-1) @ v


class OneHeadAhead(Scored):
    """The next token, in the last head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        hidden = torch.stack([torch.ones(T, T).triu(1)] * (self.heads - 1) + [torch.ones(T, T).triu(2)]).bool()
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class WindowAhead(Scored):
    """A window of ten that ends one token too late."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.size(2))
        distance = place[:, None] - place
        allowed = (distance >= -1) & (distance < WINDOW - 1)
        return self.scores(q, k).masked_fill(~allowed, -1e9).softmax(-1) @ v


class SoftmaxOverQueries(Scored):
    """Over the wrong axis: later queries stand in the sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(self.scores(q, k)).softmax(dim=-2) @ v


class LittleAhead(Scored):
    """A thousandth of the mean of all values, in one head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = super().attend(q, k, v)
        little = 1e-3 * v[:, :1].mean(dim=2, keepdim=True)
        return torch.cat([y[:, :1] + little, y[:, 1:]], dim=1)


class Centred(nn.Module):
    """The mean over the whole text is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


class NormalisedOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class Fourier(nn.Module):
    """FNet's mixing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real / 8


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(x, dims=(1,)) * 0.5


class CentredConv(nn.Module):
    """A convolution padded on both sides, and not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


REFUSED = {
    "ones_and_zeros_added": Refused(lambda: Gpt(OnesAndZerosAdded), "look-ahead", note="a mask for multiplying, added"),
    "no_mask": Refused(lambda: Gpt(NoMask), "look-ahead", note="an encoder"),
    "diagonal_of_two": Refused(lambda: Gpt(DiagonalOfTwo), "look-ahead", note="triu(..., 2)"),
    "one_head_ahead": Refused(lambda: Gpt(OneHeadAhead), "look-ahead", note="of one position in one head"),
    "window_ahead": Refused(lambda: Gpt(WindowAhead), "look-ahead", note="a window off by one"),
    "softmax_over_queries": Refused(lambda: Gpt(SoftmaxOverQueries), "look-ahead", note="dim=-2 by mistake"),
    "mean_over_time": Refused(lambda: Mixing(Centred()), "look-ahead", note="x - x.mean(1)"),
    "normalised_over_time": Refused(lambda: Mixing(NormalisedOverTime()), "look-ahead"),
    "fourier": Refused(lambda: Mixing(Fourier()), "look-ahead", note="FFT over time"),
    "flipped": Refused(lambda: Mixing(Flipped()), "look-ahead", note="flip over time"),
    "centred_convolution": Refused(lambda: Mixing(CentredConv()), "look-ahead", note="padding=1 of a kernel of 3"),
    "little_ahead": Refused(lambda: Gpt(LittleAhead), "look-ahead", note="1e-3 of a mean, in one head"),
}  # fmt: skip
