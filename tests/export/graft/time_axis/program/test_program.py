"""Two traces become one program of numbers a·T + b; what has no such form is refused."""

import pytest
import torch

from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.time_axis.program.program import LengthNumber, Size, Tables, size_of

from ..small import program_of, told


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [(7, 5, Size(1, 0)), (6, 4, Size(1, -1)), (28, 20, Size(4, 0)), (3, 3, Size(0, 3)), (-7, -5, Size(-1, 0))],
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
    assert (table.depends, table.timed) == (False, True)
    assert program.logits.depends
    assert program.logits.where.startswith("test_program.py:")
    for length in (3, 9):
        assert torch.equal(Tables(length)(table), torch.arange(length))


def test_a_table_made_of_half_the_length_is_refused_with_its_line():
    program = program_of(lambda x: x + torch.arange(x.shape[1]).sub(1 / x.shape[1])[:, None])
    table = next(i for i in program.logits.inputs if not i.depends)
    found = told(lambda: Tables(9)(table))
    assert found.kind == Kind.LENGTH
    assert found.where.startswith("test_program.py:")


def test_a_table_of_python_numbers_is_traced_again_for_its_length():
    program = program_of(lambda x: x + torch.tensor([float(i * i) for i in range(x.shape[1])])[:, None])
    table = next(i for i in program.logits.inputs if not i.depends)
    assert Tables(4)(table).flatten().tolist() == [0, 1, 4, 9]


def test_a_branch_on_a_table_is_taken_as_every_text_takes_it():
    kept = torch.ones(3)

    def function(x):
        return x * 2 if bool(kept.sum() == 3) else x

    assert program_of(function).logits.name == "mul"


def test_a_branch_on_the_tokens_is_refused():
    with pytest.raises(NoCacheError) as caught:
        program_of(lambda x: x * 2 if bool(x[0, 0, 0] > 0) else x)
    assert [found.kind for found in caught.value.causes] == [Kind.DATA]


def test_a_loop_over_positions_is_a_recurrence():
    def function(x):
        state, rows = x[:, 0], []
        for i in range(x.shape[1]):
            state = torch.tanh(state + x[:, i])
            rows.append(state)
        return torch.stack(rows, 1)

    with pytest.raises(NoCacheError) as caught:
        program_of(function)
    assert [found.kind for found in caught.value.causes] == [Kind.RECURRENCE]
    assert caught.value.causes[0].what.startswith("is a loop over positions or a recurrence")
    assert caught.value.causes[0].where.startswith("test_program.py:")
