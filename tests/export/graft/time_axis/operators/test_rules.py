"""An operator has a rule, or is refused by its name and line."""

import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind

from ..small import cause, causes, result


def test_pointwise_operators_need_no_rule_of_their_own():
    result(lambda x: torch.erf(F.silu(x)) + x.sigmoid().atan2(x.abs()).round() + torch.where(x > 0, x, -x).log1p())


def test_noise_is_refused_as_chance():
    found = cause(lambda x: x + torch.randn_like(x))
    assert (found.kind, found.what) == (Kind.CHANCE, "draws random numbers outside training")
    assert found.where.startswith("test_rules.py:")


def test_dropout_is_refused_where_it_is_active_alone():
    assert [found.kind for found in causes(lambda x: F.dropout(x, 0.1, True))] == [Kind.CHANCE]
    result(lambda x: F.dropout(x, 0.1, False) * 2)


def test_an_operator_without_a_rule_is_tried_by_itself():
    ahead = cause(lambda x: torch.fft.rfft(x, dim=1).abs().sum(1, keepdim=True) + x)
    assert ahead.kind in (Kind.LOOK_AHEAD, Kind.UNKNOWN)
    assert "fft" in ahead.what


def test_all_that_is_refused_is_told_at_once():
    found = causes(lambda x: (x + torch.rand_like(x)).cumsum(1).flip(1))
    assert [one.kind for one in found] == [Kind.CHANCE, Kind.RECURRENCE, Kind.LOOK_AHEAD]


def test_pairs_become_complex_numbers_and_pairs_again():
    result(lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (4, 2)))).flatten(2))
