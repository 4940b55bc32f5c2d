"""The form of an attention's weights is found only from numbers."""

import math

import pytest
import torch

from pastkey.export.graft.time_axis.step.attention_form import LooksAhead, recognised

CONTEXT, HEADS = 24, 3


def distance(new, total):
    """(T, S) of the key before the query."""
    return torch.arange(total - new, total)[:, None] - torch.arange(total)[None, :]


def masked(scores, window=None, ahead=0):
    far = distance(*scores.shape[2:])
    return scores.masked_fill((far < -ahead) | (far >= (window or CONTEXT)), -math.inf)


def weights_of(change):
    return lambda scores, total: change(scores[0]).softmax(-1)


def found(change):
    return recognised(weights_of(change), 1, (HEADS,), CONTEXT)


def exactly(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_causal_mask_is_plain_and_has_a_scale():
    softmax = found(lambda scores: masked(scores * 0.125))
    assert (softmax.plain, softmax.window, softmax.softcap, softmax.sinks) == (True, None, None, None)
    torch.testing.assert_close(softmax.scale, exactly([0.125] * HEADS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [1, 5, 23])
def test_a_window_is_told_by_its_length(window):
    softmax = found(lambda scores: masked(scores, window))
    assert (softmax.plain, softmax.window) == (True, window)


def test_a_soft_cap_is_told():
    softmax = found(lambda scores: masked(30 * torch.tanh(scores * 0.5 / 30)))
    assert softmax.softcap == pytest.approx(30, rel=1e-4)
    torch.testing.assert_close(softmax.scale, exactly([0.5] * HEADS), rtol=1e-4, atol=0)


def test_sinks_take_their_share():
    sinks = exactly(0.5, -1.0, 2.0)

    def change(scores, total):
        column = sinks[None, :, None, None].expand(*scores[0].shape[:3], 1)
        return torch.cat([masked(scores[0]), column], -1).softmax(-1)[..., :-1]

    torch.testing.assert_close(recognised(change, 1, (HEADS,), CONTEXT).sinks, sinks, rtol=0, atol=1e-4)


def test_heads_and_products_have_scales_of_their_own():
    scales = exactly(0.5, 1.0, 2.0)
    torch.testing.assert_close(found(lambda s: masked(s * scales[:, None, None])).scale[0], scales, rtol=1e-5, atol=0)
    softmax = recognised(lambda s, total: masked(s[0] * 0.5 + s[1] * 2).softmax(-1), 2, (HEADS, 1), CONTEXT)
    torch.testing.assert_close(softmax.scale, exactly([0.5] * 3, [2.0] * 3), rtol=1e-5, atol=0)
    assert float(found(lambda scores: masked(scores * 0)).scale.abs().max()) == 0


@pytest.mark.parametrize("head", [0, 2])
def test_a_later_token_that_is_seen_is_told_with_its_head(head):
    def one_ahead(scores):
        return torch.where(torch.arange(HEADS)[:, None, None] == head, masked(scores, ahead=1), masked(scores))

    with pytest.raises(LooksAhead) as caught:
        found(one_ahead)
    assert (caught.value.head, caught.value.column) == (head, caught.value.row + 1)


MIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]], dtype=torch.float64)
OTHER = {
    "heads that talk": weights_of(lambda s: masked(torch.einsum("hg,bgts->bhts", MIX, s))),
    "a table that is not of the distance": weights_of(
        lambda s: masked(s + torch.arange(s.shape[3]).remainder(3) * (torch.arange(s.shape[2])[:, None] + 1))
    ),
    "squares": weights_of(lambda s: masked(s * s)),
    "no softmax": lambda s, total: torch.where(distance(*s[0].shape[2:]) >= 0, s[0].relu(), 0.0),
    "weights that do not add up": lambda s, total: masked(s[0]).softmax(-1) * 2,
    "the diagonal alone is left out": weights_of(lambda s: masked(s).masked_fill(distance(*s.shape[2:]) == 0, -1e9)),
}


@pytest.mark.parametrize("name", OTHER)
def test_anything_else_is_left_as_it_is(name):
    assert recognised(OTHER[name], 1, (HEADS,), CONTEXT) is None


def test_a_later_token_is_seen_where_the_weights_are_no_softmax():
    with pytest.raises(LooksAhead):
        recognised(lambda scores, total: scores[0].relu(), 1, (HEADS,), CONTEXT)
