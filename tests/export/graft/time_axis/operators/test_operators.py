"""Along channels an operator is as in torch; rows with rows are an attention; others along positions are refused."""

import pytest
import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind
from pastkey.export.graft.time_axis.values import KEY, NEW, Axis

from ..small import VOCAB, WIDTH, Of, causal, cause, causes, followed, future, ids_of, result

GENERATOR = torch.Generator().manual_seed(1)
MATRIX, TABLE = torch.randn(WIDTH, WIDTH, generator=GENERATOR), torch.randn(VOCAB, 3, generator=GENERATOR)


def marked(x):
    """Every second channel of a table of tokens is written into."""
    x = x * 1
    x[..., ::2] = x[..., 1::2] * 2
    return x


def ends_written(x):
    x = x * 1
    x[..., -1] = x[..., 0] * 2
    x[..., 0] = x[..., 1]
    return x


def turned(x):
    """Neighbours as complex numbers, by angles."""
    pairs = torch.view_as_complex(x.reshape(1, x.shape[1], WIDTH // 2, 2))
    angles = torch.outer(torch.arange(x.shape[1]).float(), torch.ones(WIDTH // 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def merged_in_the_wrong_order(x):
    """Two expanded axes, of which one is copied."""
    wide = x.view(1, x.shape[1], 1, 2, 4, 1).expand(1, -1, 3, 2, 4, 5)
    return wide.reshape(1, x.shape[1], 6, 4, 5)


SHAPES = [
    lambda x: x.view(1, x.shape[1], 2, 4).transpose(1, 2),
    lambda x: x.view(1, x.shape[1], 2, 4).transpose(1, 2).reshape(2, x.shape[1], 4),  # B·H
    lambda x: x.reshape(-1, WIDTH).reshape(1, x.shape[1], WIDTH),  # B·T
    lambda x: x.reshape(-1).reshape(1, -1, 2, 4),  # T·C
    lambda x: x.permute(1, 0, 2).movedim(0, 1).mT.mT,
    lambda x: x[0].T.T[None].squeeze(0).unsqueeze(0),
    lambda x: x.view(1, x.shape[1], 2, 4).flatten(2).unflatten(2, (4, 2)),
    lambda x: x[:, :, :4].repeat_interleave(2, 2).repeat(1, 1, 3),
    lambda x: x[0].repeat_interleave(3, 0).view(-1, 3, WIDTH).sum(1),  # tokens for three experts each
    lambda x: x[:, :, None, :].expand(-1, -1, 3, -1).flatten(2),
    lambda x: x[:, :, :, None].expand(-1, -1, -1, 3).flatten(2),
    lambda x: x.view(1, x.shape[1], 2, 2, 2).permute(1, 3, 0, 4, 2).expand(-1, 2, 3, 2, 2).flatten(1, 2).flatten(2),
    lambda x: x[:, None, :, None].expand(-1, 3, -1, 2, -1).permute(2, 1, 0, 4, 3).flatten(3).unsqueeze(1),
    merged_in_the_wrong_order,
]
ALONG_CHANNELS = [
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
    lambda x: torch.erf(F.silu(x)) + x.sigmoid().atan2(x.abs()).round() + torch.where(x > 0, x, -x).log1p(),
    lambda x: x * torch.arange(WIDTH) + x[..., :1] - x.unsqueeze(1).squeeze(1).clamp(min=0),
    lambda x: F.dropout(x, 0.1, False) * 2,
    lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (4, 2)))).flatten(2),
    turned,
]
PARTS = [
    lambda x: x[..., 1:7:2],
    lambda x: x[:, :, 3] + x[:, :, -1],
    lambda x: torch.cat([*x.chunk(2, -1)][::-1], -1),
    lambda x: torch.stack(x.split([2, 2, 4], -1)[:2], 2).flatten(2),
    lambda x: sum(x.unbind(-1)),
    lambda x: torch.cat([x, torch.arange(x.shape[1])[None, :, None] * 1.0], -1),
    lambda x: x[..., torch.tensor([3, 1, 1])],
    lambda x: x.index_select(-1, torch.tensor([0, 2])),
    lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0),
    lambda x: torch.ones(x.shape[1] + 3, WIDTH)[: x.shape[1]] + x,
    lambda x: x[:, : x.shape[1]].narrow(2, 1, 3),
    lambda x: TABLE[x.argmax(-1)],
    marked,
    ends_written,
]
PRODUCTS = [
    lambda x: F.linear(x, MATRIX, torch.ones(WIDTH)),
    lambda x: x @ MATRIX @ MATRIX.T,
    lambda x: x @ MATRIX[0],
    lambda x: MATRIX[0] @ x.mT,
    lambda x: torch.einsum("btc,dc->btd", x, MATRIX),
    lambda x: torch.einsum("...c,c", x, MATRIX[0]),
    lambda x: torch.einsum("btc,btc->bt", x, x),
    lambda x: torch.einsum("btc->bct", x).mT,
    lambda x: torch.einsum("btc,cd,de->bte", x, MATRIX, MATRIX),
    lambda x: F.conv1d(x.mT, MATRIX[..., None], torch.ones(WIDTH)).mT,
    lambda x: (x[0] @ MATRIX)[None],
    lambda x: torch.einsum("btc,tc->btc", x, torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH)),
]


@pytest.mark.parametrize("function", [*SHAPES, *ALONG_CHANNELS, *PARTS, *PRODUCTS])
def test_along_channels_it_is_as_in_torch(function):
    value = result(function)
    assert len(value.time_axes(NEW)) == 1 or function not in SHAPES


# The refusals along positions, by which kind of cause, and in which words.
AHEAD, OVER_ALL = Kind.LOOK_AHEAD, "over all positions, including later ones"
REFUSED = [
    (lambda x: x - x.mean(1, keepdim=True), AHEAD, "averages " + OVER_ALL),
    (lambda x: x.softmax(1), AHEAD, "computes softmax " + OVER_ALL),
    (lambda x: x.cumprod(1), Kind.RECURRENCE, "computes cumprod over earlier positions"),
    (lambda x: x.flip(1), AHEAD, "turns the positions around"),
    (lambda x: x * x.max(), AHEAD, "computes max " + OVER_ALL),
    (lambda x: F.layer_norm(x.mT, (x.shape[1],)).mT, AHEAD, "normalizes over all positions"),
    (lambda x: x.topk(2, 1).values.sum(1, keepdim=True) + x, AHEAD, "computes topk " + OVER_ALL),
    (lambda x: x - x.mean(0), Kind.ROWS, "computes mean over the rows of the batch"),
    (lambda x: x.transpose(1, 2).reshape(1, -1, WIDTH), None, OVER_ALL),
    (lambda x: x.repeat(1, 2, 1), None, "repeats positions"),
    (lambda x: x.repeat_interleave(2, 1)[:, : x.shape[1]], None, "reads a part of the positions"),
    (lambda x: x.mT @ x, AHEAD, "sums " + OVER_ALL),
    (lambda x: x @ x.mT @ (x @ x.mT) @ x, Kind.UNKNOWN, "multiplies scores with scores"),
    (lambda x: x * x.shape[1], Kind.LENGTH, "computes with a number made from the length of the text"),
    (lambda x: (x[:, :, None] - x[:, None, :]).abs().amax(2), Kind.UNKNOWN, "compares every token"),
    (lambda x: x + torch.randn_like(x), Kind.CHANCE, "draws random numbers outside training"),
    (lambda x: F.dropout(x, 0.1, True), Kind.CHANCE, ""),
    (lambda x: torch.fft.rfft(x, dim=1).abs().sum(1, keepdim=True) + x, Kind.UNKNOWN, "computes fft_rfft"),
    (lambda x: torch.einsum("bthh->bth", x.view(1, -1, 2, 4)[..., :2]), None, ""),
    (lambda x: torch.view_as_real(torch.view_as_complex(x.view(1, -1, 4, 2)).exp()), None, "write it with real ones"),
    (lambda x: x.scatter(1, x.argmax(-1, keepdim=True).clamp(max=3), 0.0), None, ""),
]


@pytest.mark.parametrize(("function", "kind", "words"), REFUSED)
def test_along_positions_it_is_refused_by_its_cause_and_line(function, kind, words):
    found = cause(function)
    assert words in found.what
    assert found.kind == (kind or found.kind)
    assert found.where.startswith("test_operators.py:")


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda x: (x + torch.rand_like(x)).cumprod(1).flip(1), [Kind.CHANCE, Kind.RECURRENCE, AHEAD]),
        (lambda x: causal(x.cumprod(1)).flip(1), [Kind.RECURRENCE, AHEAD]),
        (lambda x: x + torch.arange(x.shape[1]).flip(0)[:, None], [Kind.LENGTH]),  # a table that moves with the length
    ],
)
def test_all_that_is_refused_is_told_at_once(function, kinds):
    assert [one.kind for one in causes(function)] == kinds


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :1] + x,
        lambda x: x[:, 2] * 1,
        lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]],
        lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
    ],
)
def test_parts_of_the_positions_are_refused(function):
    run = followed(function)
    assert run.refused or run.known[run.program.logits].local


def test_rows_that_are_taken_one_by_one_are_computed_all_at_once():
    result(lambda x: torch.stack([row * 2 for row in x.unbind(1)], 1))


@pytest.mark.parametrize("last", [lambda x: x[:, -1], lambda x: x[:, [-1], :].squeeze(1), lambda x: x[:, -1:][:, 0]])
def test_the_last_position_is_computed_for_every_one(last):
    def function(x):
        return torch.tanh(last(x)) * 2

    run = followed(function)
    value = run.known[run.program.logits]
    assert value.lifted
    for length in (1, 4, 7):
        with torch.no_grad():
            expected = Of(function)(ids_of(run.program)[:1, :length])
        assert torch.allclose(value.tensor[0, length - 1].flatten(), expected.flatten(), atol=1e-6)


# --- where the axes are -------------------------------------------------------------------------------------------
def test_a_table_beside_tokens_gives_each_its_row():
    value = result(lambda x: x + torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH))
    assert (value.time_axes(NEW), value.batch_axis) == ([1], 0)


def test_positions_merged_with_others_are_an_axis_of_factors():
    assert result(lambda x: x.reshape(-1, 4)).axes[0] == Axis(2, NEW, 1, 2)


def test_heads_that_are_repeated_stay_uncopied():
    def grouped(x):
        keys = x.view(1, x.shape[1], 2, 4).transpose(1, 2)
        return keys[:, :, None].expand(1, 2, 3, x.shape[1], 4).reshape(1, 6, x.shape[1], 4)

    value = result(grouped)
    assert value.axes[1] == Axis(6, repeat=3)
    assert value.tensor.shape[1] == 2


# --- attention ----------------------------------------------------------------------------------------------------
def own_softmax(x):
    scores = (x @ x.mT).masked_fill(future(x), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ x


def linear(x):
    return (x @ x.mT).tril() @ x


def by_einsum(x):
    heads = x.view(1, x.shape[1], 2, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", heads, heads).masked_fill(future(x), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), heads).flatten(2)


def keys_first(x):
    scores = x @ x.mT  # keys, queries
    return scores.masked_fill(future(x).mT, -torch.inf).softmax(1).mT @ x


def sunk(weights_of_keys, *, at):
    """A further column of scores has its share of the weights, and is removed by `weights_of_keys`."""

    def attention(x):
        scores = (x @ x.mT).masked_fill(future(x), -torch.inf)
        columns = [scores, torch.ones(1, x.shape[1], 1)]
        return weights_of_keys(torch.cat(columns[::at], -1).softmax(-1)) @ x

    return attention


SUNK = [
    sunk(lambda w: w[..., :-1], at=1),
    sunk(lambda w: w[..., : w.shape[-1] - 1], at=1),
    sunk(lambda w: w[..., : w.shape[-2]], at=1),
    sunk(lambda w: w[..., 1:], at=-1),
]


@pytest.mark.parametrize("function", [causal, own_softmax, linear, by_einsum, keys_first, *SUNK])
def test_a_product_of_rows_with_rows_is_an_attention(function):
    assert result(function).scores == frozenset()
    run = followed(function)
    (attention,) = run.found
    (product,) = attention.products
    assert sorted(axis.time for axis in run.known[product].axes if axis.time) == [KEY, NEW]
    assert run.swapped == ({product} if function is keys_first else set())
