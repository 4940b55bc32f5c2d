"""Rotary positions are found by what they do, however they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pastkey.export.graft.time_axis.step.rope import Rotation, find_rotation, rotate

from ..small import causal, followed, weight

SIZE, CONTEXT = 8, 10
Turn = Callable[[Tensor], Tensor]


def angles(length: int) -> Tensor:
    return torch.outer(torch.arange(length).float(), 100.0 ** -(torch.arange(0, SIZE, 2) / SIZE))


def halves(x: Tensor) -> Tensor:
    table = torch.cat([angles(x.shape[1])] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * table.cos() + torch.cat([-second, first], -1) * table.sin()


def neighbours(x: Tensor) -> Tensor:
    table, even, odd = angles(x.shape[1]), x[..., ::2], x[..., 1::2]
    return torch.stack([even * table.cos() - odd * table.sin(), even * table.sin() + odd * table.cos()], -1).flatten(-2)


def complex_numbers(x: Tensor) -> Tensor:
    table = angles(x.shape[1])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(table), table)
    return torch.view_as_real(pairs).flatten(-2)


def partial(x: Tensor) -> Tensor:
    table = angles(x.shape[1])[:, :2]
    first, second = x[..., :2], x[..., 2:4]
    return torch.cat([first * table.cos() - second * table.sin(), second * table.cos() + first * table.sin(),
                      x[..., 4:]], -1)  # fmt: skip


def added(x: Tensor) -> Tensor:
    return x + torch.cat([angles(x.shape[1])] * 2, -1)


def attended(x: Tensor, query: Turn, key: Turn) -> Tensor:
    length = x.shape[1]
    scores = query(x.tanh()) @ key(x.sin()).mT
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1) @ x


def found(query: Turn, key: Turn) -> Rotation | None:
    run = followed(lambda x: attended(x, query, key))
    (attention,) = run.found
    return find_rotation(run.program, attention, run.known, weight, CONTEXT, swapped=False)


@pytest.mark.parametrize(("turn", "interleaved"), [(halves, False), (neighbours, True), (complex_numbers, True)])
def test_a_rotation_is_found_with_the_angles_of_every_position(turn, interleaved):
    rotation = found(turn, turn)
    assert rotation is not None
    assert rotation.interleaved == interleaved
    assert torch.allclose(rotation.cos, angles(CONTEXT).cos(), atol=1e-5)
    assert torch.allclose(rotation.sin, angles(CONTEXT).sin(), atol=1e-5)
    assert (rotation.query.name, rotation.key.name) == ("tanh", "sin")
    x = torch.randn(1, CONTEXT, SIZE, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(rotate(x, rotation.cos, rotation.sin, interleaved=interleaved), turn(x), atol=1e-5)


@pytest.mark.parametrize(
    ("query", "key"),
    [(partial, partial), (added, added), (halves, neighbours), (halves, torch.clone)],
    ids=["a part of a head", "a sum", "two manners", "queries alone"],
)
def test_what_turns_not_both_alike_is_none(query, key):
    assert found(query, key) is None


def test_attention_without_positions_has_none():
    run = followed(causal)
    assert find_rotation(run.program, run.found[0], run.known, weight, CONTEXT, swapped=False) is None
