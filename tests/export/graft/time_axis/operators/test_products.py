"""Products: of channels as in torch; of rows with rows an attention."""

import pytest
import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind
from pastkey.export.graft.time_axis.values import KEY, NEW

from ..small import WIDTH, causal, cause, followed, result

MATRIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(x, MATRIX, torch.ones(WIDTH)),
        lambda x: x @ MATRIX @ MATRIX.T,
        lambda x: torch.einsum("btc,dc->btd", x, MATRIX),
        lambda x: torch.einsum("...c,c", x, MATRIX[0]),
        lambda x: torch.einsum("btc,btc->bt", x, x),
        lambda x: torch.einsum("btc->bct", x).mT,
        lambda x: torch.einsum("btc,cd,de->bte", x, MATRIX, MATRIX),
        lambda x: F.conv1d(x.mT, MATRIX[..., None], torch.ones(WIDTH)).mT,
        lambda x: (x[0] @ MATRIX)[None],
        lambda x: torch.einsum("btc,tc->btc", x, torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH)),
    ],
)
def test_products_of_channels_are_those_of_torch(function):
    result(function)


def by_einsum(x):
    heads = x.view(1, x.shape[1], 2, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", heads, heads)
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), heads).flatten(2)


def keys_first(x):
    scores = x @ x.mT  # keys, queries
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).tril(-1).bool(), -torch.inf)
    return scores.softmax(1).mT @ x


@pytest.mark.parametrize("function", [causal, by_einsum, keys_first])
def test_a_product_of_rows_with_rows_is_an_attention(function):
    result(function)
    run = followed(function)
    (attention,) = run.found
    (product,) = attention.products
    scores = run.known[product]
    assert sorted(axis.time for axis in scores.axes if axis.time) == [KEY, NEW]
    assert run.swapped == ({product} if function is keys_first else set())


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda x: x.mT @ x, Kind.LOOK_AHEAD, "sums over all positions, later ones too"),
        (lambda x: x @ x.mT @ (x @ x.mT) @ x, None, ""),
    ],
)
def test_other_sums_over_positions_are_refused(function, kind, words):
    found = [error.cause for error in followed(function).refused]
    assert found
    assert words in found[0].what
    assert kind is None or found[0].kind == kind


def test_a_diagonal_is_refused():
    assert cause(lambda x: torch.einsum("bthh->bth", x.view(1, -1, 2, 4)[..., :2])).what
