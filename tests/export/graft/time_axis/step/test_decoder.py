"""A module of its author's becomes one of the contract, with what is known of its attention."""

import pytest
import torch

from pastkey.export.graft.attention import intercept, torch_attention
from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find, whole_logits

from ..small import VOCAB, WIDTH, Of, causal

CONTEXT = 16


def call(module, ids):
    logits = module(ids)
    return logits if logits.dim() == 3 else logits[:, None]


def found(function):
    return find(Of(function).eval(), call, CONTEXT, VOCAB)


def alibi(x):
    places = torch.arange(x.shape[1])
    far = places[:, None] - places[None, :]
    return (x @ x.mT - 0.5 * far).masked_fill(far < 0, -torch.inf).softmax(-1) @ x


def window(x):
    places = torch.arange(x.shape[1])
    far = places[:, None] - places[None, :]
    return (x @ x.mT).masked_fill((far < 0) | (far >= 3), -torch.inf).softmax(-1) @ x


def last(x):
    return causal(x)[:, -1]


def test_a_plain_attention_is_planned_with_its_scale():
    (planned,) = found(causal).plan.values()
    assert planned.known
    assert planned.scale == pytest.approx(0.5, rel=1e-6)
    assert (planned.window, planned.bias, planned.softcap, planned.sinks) == (None, False, None, False)


def test_a_bias_is_kept_and_a_window_is_told():
    kept = found(alibi)
    assert [planned.bias for planned in kept.plan.values()] == [True]
    assert torch.allclose(kept.constants["bias_0"], -0.5 * torch.arange(CONTEXT)[None].float(), atol=1e-5)
    assert [planned.window for planned in found(window).plan.values()] == [3]


@pytest.mark.parametrize("function", [causal, alibi, window, last])
def test_it_computes_what_its_author_does_for_every_row(function):
    module = Of(function).eval()
    decoder = TimeAxisDecoder(module, call, find(module, call, CONTEXT, VOCAB), CONTEXT)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), intercept(torch_attention):
        made = decoder(ids, torch.arange(9).expand(2, 9))
        with decoder.native():
            native = decoder(ids, torch.arange(9).expand(2, 9))
    assert made.shape == (2, 9, WIDTH)
    assert torch.allclose(made, native, atol=1e-5)
    assert torch.equal(native[:1], whole_logits(module, call, ids[:1]))


def test_a_mask_that_is_off_by_one_is_told_with_its_positions():
    def ahead(x):
        future = torch.ones(x.shape[1], x.shape[1]).triu(2).bool()
        return (x @ x.mT).masked_fill(future, -torch.inf).softmax(-1) @ x

    with pytest.raises(NoCacheError) as caught:
        found(ahead)
    (cause,) = caught.value.causes
    assert cause.kind == Kind.LOOK_AHEAD
    assert "see that at" in cause.what
    assert cause.where.startswith("test_decoder.py:")


def test_a_part_of_the_rows_that_comes_back_nowhere_is_refused():
    with pytest.raises(NoCacheError, match="takes a part of the positions"):
        found(lambda x: x[:, 1:])


def spread(x):
    """Scores that differ by tens, and a mask of later tokens."""
    return x @ x.mT, torch.ones(x.shape[1], x.shape[1]).triu(1).bool()


def below_the_largest(x):
    scores, later = spread(x)
    scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) - 40, -1e9)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ x


def hidden_below_the_mean(x):
    scores, later = spread(x)
    scores = torch.where(scores < scores.mean(-1, keepdim=True) - 40, -torch.inf, scores)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ x


def with_a_temperature_of_each_token(x):
    scores, later = spread(x)
    scores = scores * (1 + x[..., :1].sigmoid())
    scores = scores.clamp(min=scores.max(-1, keepdim=True).values - 50)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ x


def of_a_softmax(x):
    scores, later = spread(x)
    weights = scores.softmax(-1)
    return weights.masked_fill(later | (weights < 1e-18), 0) @ x / 3


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (below_the_largest, "amax"),
        (hidden_below_the_mean, "mean"),
        (with_a_temperature_of_each_token, "max"),
        (of_a_softmax, "scores of later tokens"),
    ],
)
def test_a_number_made_of_all_scores_before_the_mask_is_refused_with_its_line(function, name):
    with pytest.raises(NoCacheError) as caught:
        found(function)
    (cause,) = [cause for cause in caught.value.causes if "before the mask" in cause.what]
    first = function.__code__.co_firstlineno
    assert cause.kind == Kind.LOOK_AHEAD
    assert name in cause.what
    assert first < int(cause.where.removeprefix("test_decoder.py:")) < first + 5


def the_largest_is_taken_away_first(x):
    scores, later = spread(x)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(later, 0)
    return weights / weights.sum(-1, keepdim=True) @ x


def softmax_before_the_mask(x):
    scores, later = spread(x)
    weights = (scores.float() * 4).softmax(-1) * ~later
    return weights / weights.sum(-1, keepdim=True) @ x


def below_the_largest_that_is_seen(x):
    scores, later = spread(x)
    scores = scores.masked_fill(later, -1e4)
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - 40, -1e9).softmax(-1) @ x


def of_squares(x):
    scores, later = spread(x)
    return scores.relu().square().masked_fill(later, 0) @ x


@pytest.mark.parametrize(
    "function", [the_largest_is_taken_away_first, softmax_before_the_mask, below_the_largest_that_is_seen, of_squares]
)
def test_a_number_of_all_scores_that_cancels_or_that_the_mask_precedes_is_none(function):
    assert len(found(function).plan) == 1
