"""Experts that compute only the tokens that chose them, in the manners of those who write so."""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Modern, Stack
from .parts import WIDTH, Own

EXPERTS, ACTIVE = 4, 2


class Experts(nn.Module):
    """A router's two best experts of four for each token; a variant says how their rows are taken and given back."""

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
    """torch.where gives the rows, and where in them the expert stands."""

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


class Switch(Experts):
    """The best one alone, by a mask over the batch and the length."""

    def forward(self, x):
        weights, which = self.gate(x).softmax(-1).max(dim=-1)  # (B, T)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = which == i
            if mask.sum() > 0:
                out[mask] = expert(x[mask]) * weights[mask].unsqueeze(-1)
        return x + out


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


DECODERS = {
    "experts_where": Own(lambda: Stack(Modern(Where)), layers=1),  # results[rows] += ...
    "experts_counted": Own(lambda: Stack(Modern(Counted)), layers=1),  # bincount(...).tolist()
    "experts_unique": Own(lambda: Stack(Modern(Unique)), layers=1),  # for expert in unique(...)
    "experts_hit": Own(lambda: Stack(Modern(Hit)), layers=1),  # one_hot(...).permute(2, 1, 0)
    "experts_scattered": Own(lambda: Stack(Modern(Scattered)), layers=1),  # masked_scatter, if mask.any()
    "experts_switch": Own(lambda: Stack(Modern(Switch)), layers=1),  # out[mask] = ..., (B, T)
}
