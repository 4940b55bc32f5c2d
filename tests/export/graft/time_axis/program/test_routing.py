"""Functions that choose rows by numbers give the same where all rows are computed, in real runs and in a trace."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.probe.causes import Kind, ObstacleError
from pastkey.export.graft.time_axis.program.python_branches import Replay, heard

LENGTH, VOCAB, WIDTH = 11, 29, 6
MANY = 4000  # so many tokens that no text has a certain one
TABLE = torch.randn(MANY, WIDTH, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def of_rows(function):
    """The function of ids (1, T) that another one of their embeddings (T, C), and of the first channel's sign, is."""

    def run(ids):
        x = TABLE[ids][0].clone()
        return function(x, x[:, 0] > 0)[None]

    run.__name__ = function.__name__
    return run


def batch_and_rows(ids):
    x = TABLE[ids]
    batch, rows = torch.where(x[..., 0] > 0)
    out = x.clone()
    out[batch, rows] -= x[batch, rows] @ OTHER
    return out


def second_axis(ids):
    x = TABLE[ids]
    rows = (x[0, :, 0] > 0).nonzero(as_tuple=True)[0]
    return x.index_add(1, rows, x[:, rows] @ OTHER, alpha=2)


def copied(x, mask):
    rows = mask.nonzero().squeeze(-1)
    return x.index_copy(0, rows, torch.index_select(x, dim=0, index=rows) @ OTHER)


def put(x, mask):
    rows = torch.argwhere(mask).view(-1)
    return x.index_put_((rows,), x[rows] @ OTHER, accumulate=True)


def in_the_middle(x, mask):
    out, x, rows = x.unflatten(-1, (2, 3)), x.clone().unflatten(-1, (2, 3)), mask.nonzero().flatten()
    out[rows, ..., 1] = x[rows, :, 2] * 2
    return out.flatten(1)


def no_rows_at_all(x, mask):
    mask = x[:, 0] > 1e9
    if mask.sum().item() != 0:
        x[mask] = x[mask] @ OTHER
    return x


def merged_rows(x, mask):
    x = x.repeat_interleave(2, dim=0)  # (2T, C)
    mask, out = x[:, 0] > 0, torch.zeros_like(x)
    out[mask] = x[mask] @ OTHER
    return out.view(-1, 2, WIDTH).sum(1)


def a_table(x, mask):
    rows, columns = torch.ones(len(x), len(x)).triu(1).nonzero(as_tuple=True)
    later = torch.zeros(len(x), len(x))
    later[rows, columns] = 1
    return x + later.sum(1)[:, None]


def into_itself(ids):
    x = TABLE[ids]
    x[ids == 7] = 0
    x[(ids > 20) & (ids < 25)] *= 2
    return x


def an_axis_before(ids):
    x = TABLE[ids].transpose(1, 2).contiguous()  # (1, C, T)
    batch, rows = torch.where(ids > 9)
    x[batch, :, rows] = 1.0
    return x.transpose(1, 2)


RIGHT = [into_itself, an_axis_before, batch_and_rows, second_axis]
RIGHT += map(of_rows, (copied, put, in_the_middle, no_rows_at_all, merged_rows, a_table))


@pytest.mark.parametrize("run", RIGHT, ids=lambda run: run.__name__)
def test_all_rows_give_what_the_chosen_give(run):
    for seed in range(3):
        ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        with Replay(heard(run, LENGTH, VOCAB)):
            found = run(ids)
        torch.testing.assert_close(found, run(ids))


class Called(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.told = run, heard(run, LENGTH, VOCAB)

    def forward(self, ids):
        with Replay(self.told):
            return self.run(ids)


@pytest.mark.parametrize("run", RIGHT, ids=lambda run: run.__name__)
def test_a_trace_on_one_text_is_right_of_another(run):
    module = Called(run).eval()
    exported = torch.export.export(module, (torch.zeros(1, LENGTH, dtype=torch.long),), strict=False).module()
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(exported(ids), run(ids))


# --- refused ------------------------------------------------------------------------------------------------------
def another_sign(ids):
    return -TABLE[ids] if (ids == 7).any() else TABLE[ids]


def less_their_mean(x, mask):
    out = torch.zeros_like(x)
    out[mask] = x[mask] - x[mask].mean(0)
    return out


def by_their_number(x, mask):
    rows = mask.nonzero().flatten()
    return x.index_add(0, rows, x[rows] / max(rows.numel(), 1))


def beyond_a_number(x, mask):
    if mask.sum() >= 2:
        x[mask] = x[mask] @ OTHER
    return x


def several_of_a_row(x, mask):
    rows, columns = torch.where(x > 0)
    return x.index_add(0, rows, x[rows, columns, None].expand(-1, WIDTH))


def computed_with(x, mask):
    rows = mask.nonzero().flatten()
    return x.index_add(0, rows, rows[:, None] + x[rows])


def beside_others(x, mask):
    return x.index_put((mask.nonzero().flatten(), torch.zeros(1, dtype=torch.long)), torch.zeros(()))


def only_a_wrong_guess_raises(ids):
    x = TABLE[ids]
    if ids[0, 0] == 7:
        place = {7: 1}[int(ids[0, 0])]
        x = x.roll(place, 0) * 2
    return x


def checked_within(ids):
    x = TABLE[ids]
    if ids[0, 0] == 7:
        x = x * 2
        if (ids[0] == 7).sum() != 1:
            raise ValueError("one marker at most")
    return x


def always_so(x, mask):
    return x.tanh() if (x < 1e9).all() else x


MARKERS = [another_sign, only_a_wrong_guess_raises, checked_within]  # of a token that few texts have, or none
WRONG = [*MARKERS, *map(of_rows, (less_their_mean, by_their_number, beyond_a_number, several_of_a_row, computed_with))]
WRONG += map(of_rows, (beside_others, always_so))


@pytest.mark.parametrize(
    ("run", "vocabulary"),
    [*((run, VOCAB) for run in WRONG), *((run, MANY) for run in MARKERS)],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_what_depends_on_the_rows_that_are_there_is_refused(run, vocabulary):
    with pytest.raises(ObstacleError) as caught:
        heard(run, LENGTH, vocabulary)
    assert caught.value.cause.kind == Kind.DATA


def test_an_assertion_may_put_numbers_into_its_words():
    def checked(ids):
        if ids.max() >= VOCAB:
            raise ValueError(f"the largest of {ids.shape[1]} tokens is {ids.max().item()}")
        return TABLE[ids]

    assert heard(checked, LENGTH, VOCAB).answers
    assert not heard(lambda ids: TABLE[ids] @ OTHER, LENGTH, VOCAB).answers  # asks nothing
