"""Views, permutations and expansions equal torch's, and leave what is expanded uncopied."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastkey.export.graft.time_axis.values import NEW, Axis

from ..small import WIDTH, cause, result


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(1, x.shape[1], 2, 4).transpose(1, 2),
        lambda x: x.view(1, x.shape[1], 2, 4).transpose(1, 2).reshape(2, x.shape[1], 4),  # B·H
        lambda x: x.reshape(-1, WIDTH).reshape(1, x.shape[1], WIDTH),  # B·T
        lambda x: x.reshape(-1).reshape(1, -1, 2, 4),  # T·C
        lambda x: x.permute(1, 0, 2).movedim(0, 1).mT.mT,
        lambda x: x[0].T.T[None].squeeze(0).unsqueeze(0),
        lambda x: x.view(1, x.shape[1], 2, 4).flatten(2).unflatten(2, (4, 2)),
        lambda x: x[:, :, :4].repeat_interleave(2, 2).repeat(1, 1, 3),
        lambda x: x[0].repeat_interleave(3, 0).view(-1, 3, WIDTH).sum(1),  # tokens for three experts each
        lambda x: x[:, :, None, :].expand(-1, -1, 3, -1).flatten(2),
        lambda x: x[:, :, :, None].expand(-1, -1, -1, 3).flatten(2),
    ],
)
def test_a_shape_of_another_form_holds_the_same_numbers(function):
    assert len(result(function).time_axes(NEW)) == 1


def test_positions_merged_with_others_are_an_axis_of_factors():
    value = result(lambda x: x.reshape(-1, 4))
    assert value.axes[0] == Axis(2, NEW, 1, 2)


def test_heads_that_are_repeated_stay_uncopied():
    def grouped(x):
        keys = x.view(1, x.shape[1], 2, 4).transpose(1, 2)
        return keys[:, :, None].expand(1, 2, 3, x.shape[1], 4).reshape(1, 6, x.shape[1], 4)

    value = result(grouped)
    assert value.axes[1] == Axis(6, repeat=3)
    assert value.tensor.shape[1] == 2


def test_two_expanded_axes_of_which_one_is_merged_in_the_wrong_order_are_copied():
    def function(x):
        wide = x.view(1, x.shape[1], 1, 2, 4, 1).expand(1, -1, 3, 2, 4, 5)
        return wide.reshape(1, x.shape[1], 6, 4, 5)

    result(function)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.transpose(1, 2).reshape(1, -1, WIDTH), "over all positions, later ones too"),
        (lambda x: x.repeat(1, 2, 1), "repeats positions"),
        (lambda x: x.repeat_interleave(2, 1)[:, : x.shape[1]], "takes a part of the positions"),
    ],
)
def test_a_shape_that_mixes_positions_is_refused(function, words):
    assert words in cause(function).what


# --- chains -------------------------------------------------------------------------------------------------------
@st.composite
def chains(draw):
    """Steps on a shape in which T stands as 0."""
    shape, steps = [1, 0, WIDTH], []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["permute", "unsqueeze", "split", "merge", "expand"]))
        at = draw(st.integers(0, len(shape) - 1))
        if kind == "permute" and len(shape) < 7:
            order = tuple(draw(st.permutations(range(len(shape)))))
            shape = [shape[i] for i in order]
            steps.append((kind, order))
        elif kind == "unsqueeze" and len(shape) < 6:
            shape.insert(at, 1)
            steps.append((kind, (at,)))
        elif kind == "split" and shape[at] > 3 and not shape[at] % 2:
            shape[at : at + 1] = [2, shape[at] // 2]
            steps.append(("view", tuple(shape)))
        elif kind == "merge" and at + 1 < len(shape) and 0 not in shape[at : at + 2]:
            shape[at : at + 2] = [math.prod(shape[at : at + 2])]
            steps.append(("view", tuple(shape)))
        elif kind == "expand" and shape[at] == 1 and math.prod(n or 1 for n in shape) < 200:
            shape[at] = 3
            steps.append((kind, tuple(shape)))
    return steps


def taken(x, steps):
    length = x.shape[1]
    for kind, numbers in steps:
        sizes = [n or length for n in numbers]
        if kind == "permute":
            x = x.permute(numbers)
        elif kind == "unsqueeze":
            x = x.unsqueeze(numbers[0])
        else:
            x = x.reshape(sizes) if kind == "view" else x.expand(sizes)
    return x * 1


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chains())
def test_chains_of_shapes_equal_those_of_torch(steps):
    result(lambda x: taken(x, steps))
