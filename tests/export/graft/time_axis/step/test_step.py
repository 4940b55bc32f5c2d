"""A step computes new tokens at their positions as the whole text does."""

import pytest
import torch

from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find

from ..small import VOCAB, WIDTH, Of

CONTEXT = 24
TABLE = torch.randn(CONTEXT, WIDTH, generator=torch.Generator().manual_seed(5))


def decoder(function):
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
def test_tables_give_each_new_token_the_row_of_its_position(function):
    stepped = decoder(function)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])  # rows of different lengths
    with torch.no_grad():
        whole = torch.stack([stepped.model(row[None])[0] for row in ids])
        found = stepped(ids.gather(1, positions), positions)
    expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[2]))
    assert torch.allclose(found, expected, atol=1e-5)
