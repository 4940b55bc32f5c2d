"""Rows that are shifted keep as many rows as they reach back; what reaches ahead or too far is refused."""

import pytest
import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind
from pastkey.export.graft.time_axis.step.state import MOST_ROWS, Shifted, find_state
from pastkey.export.graft.time_axis.values import NEW

from ..small import WIDTH, followed, told, weight


def state(function):
    run = followed(function)
    assert not run.refused
    (end,) = run.shifted_back
    return find_state(run.program, end, run.known, run.local, weight)


def convolved(x, kernel, before):
    weights = torch.arange(1.0, 1 + WIDTH * kernel).reshape(WIDTH, 1, kernel) / kernel
    return F.conv1d(F.pad(x.mT, (before, kernel - 1 - before)), weights, groups=WIDTH).mT


SHIFTS = {
    "padded and cut": (lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1], 1),
    "joined with zeros": (lambda x: torch.cat([torch.zeros(1, 1, WIDTH), x[:, :-1]], 1), 1),
    "by two": (lambda x: F.pad(x, (0, 0, 2, -2)), 2),
    "a kernel of 4": (lambda x: convolved(x, 4, 3), 3),
    "padded by torch, and cut": (
        lambda x: F.conv1d(x.mT, torch.ones(WIDTH, 1, 3), padding=2, groups=WIDTH)[..., : x.shape[1]].mT, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIFTS)
def test_the_kept_rows_and_the_new_ones_give_the_new_rows(name):
    function, keep = SHIFTS[name]
    run = followed(function)
    (end,) = run.shifted_back
    found = find_state(run.program, end, run.known, run.local, weight)
    assert found.keep == keep
    (source,) = found.inputs
    value = run.known[source]
    rows = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(3))
    at = value.dim(next(i for i, axis in enumerate(value.axes) if axis.time))
    given = value.with_(tensor=rows[:, 6 - keep :].movedim(1, at))
    made = Shifted(run.program, 3 + keep, weight).run(found.between, found.op, {source: given})
    new = made.tensor.movedim(made.dim(made.time_axes(NEW)[0]), 1)[:, keep:]
    assert torch.allclose(new, function(rows)[:, 6:], atol=1e-4)


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda x: convolved(x, 3, 1), Kind.LOOK_AHEAD, "moves rows of later tokens to earlier ones"),
        (lambda x: F.pad(x, (0, 0, -1, 1)), Kind.LOOK_AHEAD, "moves rows of later tokens to earlier ones"),
        (lambda x: convolved(x, MOST_ROWS + 2, MOST_ROWS + 1), Kind.RECURRENCE, f"the {MOST_ROWS + 1} tokens before"),
    ],
)
def test_rows_of_later_tokens_and_of_too_many_are_refused(function, kind, words):
    found = told(lambda: state(function))
    assert found.kind == kind
    assert words in found.what
