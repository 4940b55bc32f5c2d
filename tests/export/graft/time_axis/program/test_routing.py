"""Functions that choose rows by numbers give the same where all rows are taken, in real runs and in a trace."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.probe.causes import Kind, ObstacleError
from pastkey.export.graft.time_axis.program.python_branches import Replay, heard

LENGTH, VOCAB, WIDTH = 11, 29, 6
MANY = 4000  # so many tokens that no text has a certain one
TABLE = torch.randn(MANY, WIDTH, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def embedded(ids):
    return TABLE[ids]  # (1, T, C)


def replayed(run, ids):
    told = heard(run, ids.shape[1], VOCAB)
    with Replay(told):
        return run(ids)


def batch_and_rows(ids):
    x = embedded(ids)
    batch, rows = torch.where(x[..., 0] > 0)
    out = x.clone()
    out[batch, rows] -= x[batch, rows] @ OTHER
    return out


def columns_of_nonzero(ids):
    x = embedded(ids)
    found = (x[..., 0] > 0).nonzero()
    out = x.clone()
    out[found[:, 0], found[:, 1]] = x[found[:, 0], found[:, 1]] @ OTHER
    return out


def second_axis(ids):
    x = embedded(ids)
    rows = (x[0, :, 0] > 0).nonzero(as_tuple=True)[0]
    return x.index_add(1, rows, x[:, rows] @ OTHER, alpha=2)


def copied(ids):
    x = embedded(ids)[0]
    rows = (x[:, 0] > 0).nonzero().squeeze(-1)
    return x.index_copy(0, rows, torch.index_select(x, dim=0, index=rows) @ OTHER)[None]


def put(ids):
    x = embedded(ids)[0].clone()
    rows = torch.argwhere(x[:, 0] > 0).view(-1)
    return x.index_put_((rows,), x[rows] @ OTHER, accumulate=True)[None]


def in_the_middle(ids):
    x = embedded(ids)[0].unflatten(-1, (2, 3))  # (T, 2, 3)
    rows = (x[:, 0, 0] > 0).nonzero().flatten()
    out = x.clone()
    out[rows, ..., 1] = x[rows, :, 2] * 2
    return out.flatten(1)[None]


def no_rows_at_all(ids):
    x = embedded(ids)
    mask = x[..., 0] > 1e9
    if mask.sum().item() != 0:
        x = x.clone()
        x[mask] = x[mask] @ OTHER
    return x


def merged_rows(ids):
    x = embedded(ids)[0].repeat_interleave(2, dim=0)  # (2T, C)
    mask = x[:, 0] > 0
    out = torch.zeros_like(x)
    out[mask] = x[mask] @ OTHER
    return out.view(-1, 2, WIDTH).sum(1)[None]


def a_table(ids):
    x = embedded(ids)
    rows, columns = torch.ones(ids.shape[1], ids.shape[1]).triu(1).nonzero(as_tuple=True)
    mask = torch.zeros(ids.shape[1], ids.shape[1])
    mask[rows, columns] = 1
    return x + mask.sum(1)[None, :, None]


def into_itself(ids):
    x = embedded(ids)
    x[ids == 7] = 0
    x[(ids > 20) & (ids < 25)] *= 2
    return x


def an_axis_before(ids):
    x = embedded(ids).transpose(1, 2).contiguous()  # (1, C, T)
    batch, rows = torch.where(ids > 9)
    x[batch, :, rows] = 1.0
    return x.transpose(1, 2)


RIGHT = [
    into_itself, an_axis_before,
    batch_and_rows, columns_of_nonzero, second_axis, copied, put, in_the_middle,
    no_rows_at_all, merged_rows, a_table,
]  # fmt: skip


@pytest.mark.parametrize("run", RIGHT, ids=lambda run: run.__name__)
def test_all_rows_give_what_the_chosen_give(run):
    for seed in range(3):
        ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(replayed(run, ids), run(ids))


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
    x = embedded(ids)
    return -x if (ids == 7).any() else x


def less_their_mean(ids):
    x = embedded(ids)[0]
    mask = x[:, 0] > 0
    out = torch.zeros_like(x)
    out[mask] = x[mask] - x[mask].mean(0)
    return out[None]


def by_their_number(ids):
    x = embedded(ids)[0]
    rows = (x[:, 0] > 0).nonzero().flatten()
    return x.index_add(0, rows, x[rows] / max(rows.numel(), 1))[None]


def beyond_a_number(ids):
    x = embedded(ids)[0]
    mask = x[:, 0] > 0
    if mask.sum() < 2:
        return x[None]
    out = x.clone()
    out[mask] = x[mask] @ OTHER
    return out[None]


def several_of_a_row(ids):
    x = embedded(ids)[0]
    rows, columns = torch.where(x > 0)
    return x.index_add(0, rows, x[rows, columns, None].expand(-1, WIDTH))[None]


def computed_with(ids):
    x = embedded(ids)[0]
    rows = (x[:, 0] > 0).nonzero().flatten()
    return x.index_add(0, rows, rows[:, None] + x[rows])[None]


def beside_others(ids):
    x = embedded(ids)[0]
    rows = (x[:, 0] > 0).nonzero().flatten()
    return x.index_put((rows, torch.zeros(1, dtype=torch.long)), torch.zeros(()))[None]


def only_a_wrong_guess_raises(ids):
    x = embedded(ids)
    if ids[0, 0] == 7:
        place = {7: 1}[int(ids[0, 0])]
        x = x.roll(place, 0) * 2
    return x


def checked_within(ids):
    x = embedded(ids)
    if ids[0, 0] == 7:
        x = x * 2
        if (ids[0] == 7).sum() != 1:
            raise ValueError("one marker at most")
    return x


def always_so(ids):
    x = embedded(ids)
    return x.tanh() if (x < 1e9).all() else x


WRONG = [
    another_sign, less_their_mean, by_their_number, beyond_a_number, several_of_a_row, computed_with, beside_others,
    always_so, only_a_wrong_guess_raises, checked_within,
]  # fmt: skip


@pytest.mark.parametrize("run", WRONG, ids=lambda run: run.__name__)
def test_what_depends_on_the_rows_that_are_there_is_refused(run):
    with pytest.raises(ObstacleError) as caught:
        heard(run, LENGTH, VOCAB)
    assert caught.value.cause.kind == Kind.DATA


@pytest.mark.parametrize("run", [another_sign, only_a_wrong_guess_raises, checked_within], ids=lambda run: run.__name__)
def test_a_token_that_no_text_has_is_not_taken_for_an_assertion(run):
    with pytest.raises(ObstacleError) as caught:
        heard(run, LENGTH, MANY)
    assert caught.value.cause.kind == Kind.DATA


def test_an_assertion_may_put_numbers_into_its_words():
    def checked(ids):
        if ids.max() >= VOCAB:
            raise ValueError(f"the largest of {ids.shape[1]} tokens is {ids.max().item()}")
        return embedded(ids)

    assert heard(checked, LENGTH, VOCAB).answers


def test_a_call_that_asks_nothing_is_run_once():
    runs = []

    def run(ids):
        runs.append(ids)
        return embedded(ids) @ OTHER

    assert not heard(run, LENGTH, VOCAB).answers
    assert len(runs) == 1
