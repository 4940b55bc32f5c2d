"""Two traces become one program of numbers a·T + b; other numbers are refused."""

import pytest
import torch

from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.time_axis.program.program import LengthNumber, Size, Tables, size_of

from ..small import program_of, told


@pytest.mark.parametrize(
    ("first", "second", "size"), [(6, 4, Size(1, -1)), (28, 20, Size(4, 0)), (3, 3, Size(0, 3)), (-7, -5, Size(-1, 0))]
)
def test_two_numbers_are_one_of_the_length(first, second, size):
    found = size_of(first, second, (7, 5))
    assert found == size
    assert (found.at(7), found.at(5)) == (first, second)


def test_half_the_length_is_no_such_number_and_is_refused_when_it_is_needed():
    found = size_of(9 // 2, 6 // 2, (9, 6))
    assert found == LengthNumber(4, 3)
    assert found.moves
    assert told(lambda: found.at(8)).kind == Kind.LENGTH


def test_a_program_has_sizes_of_the_length_and_what_depends_on_the_tokens():
    program = program_of(lambda x: x + torch.arange(len(x[0]))[:, None])
    assert program.logits.shape == (Size(0, 1), Size(1, 0), Size(0, 8))
    table = next(op for op in program.ops if op.name == "arange")
    assert (table.depends, table.timed, program.logits.depends) == (False, True, True)
    assert program.logits.where.startswith("test_program.py:")
    for length in (3, 9):
        assert torch.equal(Tables(length)(table), torch.arange(length))


def test_a_table_is_traced_again_for_its_length_and_refused_where_it_has_none():
    squares = program_of(lambda x: x + torch.tensor([float(i * i) for i in range(x.shape[1])])[:, None])
    table = next(i for i in squares.logits.inputs if not i.depends)
    assert Tables(4)(table).flatten().tolist() == [0, 1, 4, 9]
    parts = program_of(lambda x: x + torch.arange(x.shape[1]).sub(1 / x.shape[1])[:, None])
    table = next(i for i in parts.logits.inputs if not i.depends)
    found = told(lambda: Tables(9)(table))
    assert found.kind == Kind.LENGTH
    assert found.where.startswith("test_program.py:")


def test_a_branch_on_a_table_is_taken_as_every_text_takes_it():
    kept = torch.ones(3)
    assert program_of(lambda x: x * 2 if bool(kept.sum() == 3) else x).logits.name == "mul"


def halves(x):
    """A loop over every second token."""
    return torch.stack([torch.tanh(x[:, i]) for i in range(0, x.shape[1], 2)], 1).sum(1)


@pytest.mark.parametrize(
    ("function", "kind"),
    [(halves, Kind.RECURRENCE), (lambda x: x * 2 if bool(x[0, 0, 0] > 0) else x, Kind.DATA)],
    ids=["a loop over every second token", "a branch on the tokens"],
)
def test_what_is_no_program_of_all_texts_is_refused(function, kind):
    with pytest.raises(NoCacheError) as caught:
        program_of(function)
    (cause,) = caught.value.causes
    assert cause.kind == kind
    assert cause.where.startswith("test_program.py:")
