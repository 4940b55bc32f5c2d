"""Tables beside values, and pointwise operators."""

import torch

from pastkey.export.graft.probe.causes import Kind
from pastkey.export.graft.time_axis.values import NEW

from ..small import WIDTH, cause, result


def test_a_table_beside_tokens_gives_each_its_row():
    value = result(lambda x: x + torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH))
    assert value.time_axes(NEW) == [1]
    assert value.batch_axis == 0


def test_operands_of_fewer_axes_are_aligned_from_the_right():
    result(lambda x: x * torch.arange(WIDTH) + x[..., :1] - x.unsqueeze(1).squeeze(1).clamp(min=0))


def test_complex_numbers_are_multiplied_as_pairs():
    def function(x):
        pairs = torch.view_as_complex(x.reshape(1, x.shape[1], WIDTH // 2, 2))
        angles = torch.outer(torch.arange(x.shape[1]).float(), torch.ones(WIDTH // 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)

    result(function)


def test_other_operators_of_complex_numbers_are_refused():
    def function(x):
        pairs = torch.view_as_complex(x.reshape(1, x.shape[1], WIDTH // 2, 2))
        return torch.view_as_real(torch.exp(pairs)).flatten(2)

    assert "write it with real ones" in cause(function).what


def test_a_number_made_from_the_length_is_refused():
    found = cause(lambda x: x * x.shape[1])
    assert (found.kind, found.what) == (Kind.LENGTH, "computes with a number made from the length of the text")
    assert found.where.startswith("test_base.py:")


def test_every_token_beside_every_other_one_is_refused():
    found = cause(lambda x: (x[:, :, None] - x[:, None, :]).abs().amax(2))
    assert found.kind in (Kind.UNKNOWN, Kind.LOOK_AHEAD, Kind.RECURRENCE)
    assert "every token with every other one" in found.what or "later ones too" in found.what
