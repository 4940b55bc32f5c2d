"""Parts of a tensor, and what is joined or written: along channels as in torch, along positions not at all."""

import pytest
import torch

from pastkey.export.graft.probe.causes import Kind, NoCacheError

from ..small import VOCAB, WIDTH, Of, cause, followed, ids_of, result


def marked(x):
    """Every second channel of a table of tokens is written into."""
    x = x * 1
    x[..., ::2] = x[..., 1::2] * 2
    return x


@pytest.mark.parametrize(
    "function",
    [
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
        marked,
    ],
)
def test_parts_of_channels_are_those_of_torch(function):
    result(function)


@pytest.mark.parametrize("last", [lambda x: x[:, -1], lambda x: x[:, [-1], :].squeeze(1), lambda x: x[:, -1:][:, 0]])
def test_the_last_position_is_computed_for_every_one(last):
    def function(x):
        return torch.tanh(last(x)) * 2

    run = followed(function)
    value = run.known[run.program.logits]
    assert value.lifted
    ids = ids_of(run.program)
    for length in (1, 4, 7):
        with torch.no_grad():
            expected = Of(function)(ids[:1, :length])
        assert torch.allclose(value.tensor[0, length - 1].flatten(), expected.flatten(), atol=1e-6)


def test_a_table_of_weights_is_looked_up_by_tokens():
    table = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1))
    result(lambda x: table[x.argmax(-1)])


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


def test_rows_that_are_taken_one_by_one_are_a_loop():
    with pytest.raises(NoCacheError) as caught:
        followed(lambda x: torch.stack([row * 2 for row in x.unbind(1)], 1))
    assert [found.kind for found in caught.value.causes] == [Kind.RECURRENCE]


def test_a_write_into_the_positions_by_an_index_of_tokens_is_refused():
    found = cause(lambda x: x.scatter(1, x.argmax(-1, keepdim=True).clamp(max=3), 0.0))
    assert found.what
    assert found.where.startswith("test_parts.py:")
