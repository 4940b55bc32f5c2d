"""A step computes new tokens at their positions as the whole text does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find
from pastkey.export.graft.time_axis.step.step import _flat, _from_first

from ..small import VOCAB, WIDTH, Function, Of, program_of

CONTEXT = 24
TABLE = torch.randn(CONTEXT, WIDTH, generator=torch.Generator().manual_seed(5))


def decoder(function: Function) -> TimeAxisDecoder:
    module = Of(function).eval()
    found = find(module, lambda module, ids: module(ids), CONTEXT, VOCAB)
    return TimeAxisDecoder(module, lambda module, ids: module(ids), found, CONTEXT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + TABLE[: x.shape[1]],
        lambda x: x + TABLE[torch.arange(x.shape[1])],
        lambda x: x * torch.arange(x.shape[1])[None, :, None].float().sin(),
        lambda x: (x.mT + TABLE.T[:, : x.shape[1]]).mT,
        lambda x: torch.cat([x, TABLE[: x.shape[1], :2].cos().expand(1, -1, -1)], -1),
        lambda x: x.reshape(-1, WIDTH // 2).reshape(1, -1, WIDTH) + 1,
    ],
)
def test_tables_give_each_new_token_the_row_of_its_position(function: Callable[[Tensor], Tensor]) -> None:
    stepped = decoder(function)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])  # rows of different lengths
    with torch.no_grad():
        whole = torch.stack([stepped.model(row[None])[0] for row in ids])
        found = stepped(ids.gather(1, positions), positions)
    expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[2]))
    assert torch.allclose(found, expected, atol=1e-5)


def test_heads_that_follow_one_another_share_keys() -> None:
    keys = torch.randn(2, 2, 1, 3, 4)
    flat, count = _flat(keys, [2, 3], [2, 1])
    assert (flat.shape, count) == ((2, 2, 3, 4), 2)
    flat, count = _flat(torch.randn(2, 1, 3, 5, 4), [2, 3], [1, 3])  # that do not
    assert (flat.shape, count) == ((2, 6, 5, 4), 6)


@pytest.mark.parametrize(("start", "first"), [(0, True), (2, False)])
def test_a_slice_from_the_first_row_leaves_none_out(start: int, first: bool) -> None:
    program = program_of(lambda x: x + torch.arange(x.shape[1] + start)[start:][:, None])
    slices = [op for op in program.ops if op.name == "slice"]
    assert [_from_first(op) for op in slices] == [first] * len(slices)
