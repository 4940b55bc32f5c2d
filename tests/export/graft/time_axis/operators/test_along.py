"""What goes along an axis: along channels as in torch, along the keys of scores, along positions not at all."""

import pytest
import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind

from ..small import WIDTH, causal, cause, followed, result


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1).log_softmax(2),
        lambda x: x - x.mean(-1, keepdim=True) + x.sum((2,), True),
        lambda x: x.var(-1, keepdim=True) + x.norm(dim=-1, keepdim=True),
        lambda x: x.max(-1).values + x.amin(-1) + x.logsumexp(-1),
        lambda x: x.cumsum(-1).flip(-1),
        lambda x: F.layer_norm(x, (WIDTH,), torch.arange(8.0), torch.ones(8)),
        lambda x: F.rms_norm(x, (WIDTH,), torch.arange(8.0), 1e-3),
        lambda x: x.topk(3, -1).values,
        lambda x: F.pad(x, (1, 2)),
        lambda x: x.sort(-1).values,
    ],
)
def test_along_channels_it_is_as_in_torch(function):
    result(function)


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda x: x - x.mean(1, keepdim=True), Kind.LOOK_AHEAD, "averages over all positions, later ones too"),
        (lambda x: x.softmax(1), Kind.LOOK_AHEAD, "computes softmax over all positions, later ones too"),
        (lambda x: x.cumsum(1), Kind.RECURRENCE, "computes cumsum over earlier positions"),
        (lambda x: x.flip(1), Kind.LOOK_AHEAD, "turns the positions around"),
        (lambda x: x * x.max(), Kind.LOOK_AHEAD, "computes max over all positions, later ones too"),
        (lambda x: F.layer_norm(x.mT, (x.shape[1],)).mT, Kind.LOOK_AHEAD, "normalizes over all positions"),
        (lambda x: x.topk(2, 1).values.sum(1, keepdim=True) + x, None, "chooses among positions"),
        (lambda x: x - x.mean(0), Kind.ROWS, "computes mean over the rows of the batch"),
    ],
)
def test_along_positions_it_is_refused_by_its_cause(function, kind, words):
    found = cause(function)
    assert words in found.what or kind is None
    assert kind is None or found.kind == kind


def test_scores_are_masked_by_a_triangle_in_the_manner_of_their_author():
    def linear(x):
        return (x @ x.mT).tril() @ x

    assert result(linear).scores == frozenset()
    assert len(followed(linear).found) == 1


def test_an_own_softmax_passes():
    def own(x):
        scores = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ x

    result(own)
    result(causal)
