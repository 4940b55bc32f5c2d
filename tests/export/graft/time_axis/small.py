"""A function of embedded tokens as a program, followed along the time axis."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.probe.causes import ObstacleError
from pastkey.export.graft.time_axis.interpret import Whole
from pastkey.export.graft.time_axis.operators.base import Swapped
from pastkey.export.graft.time_axis.program.program import Op, trace_program

VOCAB, WIDTH, LENGTHS = 11, 8, (7, 5)


class Of(nn.Module):
    """The function, (1, T, WIDTH) -> anything, of embedded tokens."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.token = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids):
        return self.function(self.token(ids))


def program_of(function):
    return trace_program(Of(function).eval(), lambda module, ids: module(ids), LENGTHS, VOCAB)


def weight(op):
    return op.constant


def ids_of(program):
    return torch.randint(0, VOCAB, (2, program.lengths[0]), generator=torch.Generator().manual_seed(0))


def followed(function):
    """The run of two rows."""
    program = program_of(function)
    swapped = set[Op]()
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
    """The result of the function, which equals torch's row by row."""
    run = followed(function)
    assert not run.refused
    value = run.known[run.program.logits]
    found = value.real().explicit()
    with torch.no_grad():
        for row, ids in enumerate(ids_of(run.program)):
            tensor = found.tensor[row] if found.batched else found.tensor
            torch.testing.assert_close(tensor, Of(function)(ids[None]), rtol=1e-5, atol=1e-6)
    return value


def causes(function):
    return [error.cause for error in followed(function).refused]


def cause(function):
    """The one obstacle."""
    (found,) = causes(function)
    return found


def told(call):
    with pytest.raises(ObstacleError) as caught:
        call()
    return caught.value.cause


def future(x):
    """(T, T) of which token is a later one."""
    return torch.ones(x.shape[1], x.shape[1]).triu(1) == 1


def causal(x):
    """Attention in its own code, of one head."""
    scores = (x @ x.transpose(1, 2) * 0.5).masked_fill(future(x), float("-inf"))
    return scores.softmax(-1) @ x
