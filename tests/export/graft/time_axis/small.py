"""A function of embedded tokens as a program, followed along the time axis."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pastkey.export.graft.probe.causes import ObstacleError
from pastkey.export.graft.time_axis.interpret import Whole
from pastkey.export.graft.time_axis.operators.base import Swapped
from pastkey.export.graft.time_axis.program.program import Op, trace_program

VOCAB, WIDTH, LENGTHS = 11, 8, (7, 5)
Function = Callable[[Tensor], Tensor]  # (1, T, WIDTH) -> anything


class Of(nn.Module):
    """The function of embedded tokens."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.token = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids):
        return self.function(self.token(ids))


def program_of(function, lengths=LENGTHS):
    return trace_program(Of(function).eval(), lambda module, ids: module(ids), lengths, VOCAB)


def weight(op):
    assert op.constant is not None
    return op.constant


def ids_of(program):
    return torch.randint(0, VOCAB, (2, program.lengths[0]), generator=torch.Generator().manual_seed(0))


def followed(function):
    """The run of two rows."""
    program = program_of(function)
    swapped: set[Op] = set()
    for _ in range(3):
        run = Whole(program, ids_of(program), weight, swapped)
        try:
            with torch.no_grad():
                run.run()
            return run
        except Swapped as found:
            swapped = swapped | found.products
    raise AssertionError


def result(function):
    """What the function gives, which equals what torch computes row by row."""
    run = followed(function)
    assert not run.refused
    value = run.known[run.program.logits]
    with torch.no_grad():
        for row, ids in enumerate(ids_of(run.program)):
            expected = Of(function)(ids[None])
            found = value.real().explicit()
            tensor = found.tensor[row] if found.batched else found.tensor
            assert tensor.shape == expected.shape
            assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-6)
    return value


def causes(function):
    return [error.cause for error in followed(function).refused]


def cause(function):
    """The one thing that stands in the way."""
    (found,) = causes(function)
    return found


def told(call):
    with pytest.raises(ObstacleError) as caught:
        call()
    return caught.value.cause


def causal(x):
    """Attention by hand, of one head."""
    length = x.shape[1]
    scores = x @ x.transpose(1, 2) * 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1) == 1, float("-inf"))
    return scores.softmax(-1) @ x
