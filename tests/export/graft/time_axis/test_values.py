"""Where the axes of a tensor are."""

import torch

from pastkey.export.graft.time_axis.values import NEW, Axis, Value

TIME = Axis(1, NEW)


def test_the_batch_of_the_author_is_no_axis_of_the_tensor_until_it_must_be():
    value = Value(torch.zeros(2, 4, 3, 5), (Axis(4), Axis(1), TIME, Axis(5)), batch_axis=1)
    assert [value.dim(i) for i in (0, 2, 3)] == [1, 2, 3]
    assert value.explicit().tensor.shape == (2, 4, 1, 3, 5)
    assert value.time_axes(NEW) == [2]


def test_an_expanded_axis_is_copied_by_neighbours():
    tensor = torch.arange(6.0).reshape(1, 2, 3)
    value = Value(tensor, (Axis(4, repeat=2), Axis(3)))
    assert torch.equal(value.real().tensor, tensor.repeat_interleave(2, 1))
    assert value.real().axes == (Axis(4), Axis(3))
    whole = Value(torch.ones(1, 1, 3), (Axis(5, repeat=5), Axis(3)))
    assert whole.real().tensor.shape == (1, 5, 3)


def test_operands_stand_beside_one_another():
    value = Value(torch.zeros(2, 3, 8), (Axis(1), TIME, Axis(8)), batch_axis=0)
    assert value.aligned(4, 1, False).shape == (2, 1, 3, 8)
    assert value.aligned(3, 0, True).shape == (2, 1, 3, 8)
    table = Value(torch.zeros(3, 8), (TIME, Axis(8)), batched=False)
    assert table.aligned(3, 0, False).shape == (3, 8)
