"""Views of hollow memory identify their part of their stored tensor."""

import numpy as np
import pytest
import torch

from pastkey.export.graph.stored import StoredWeights

from ..in_memory import InMemory

CONTENT = torch.arange(24.0).view(4, 6)


@pytest.mark.parametrize("form", ["whole", "transposed", "a part", "reshaped", "of numpy"])
def test_a_view_of_hollow_memory_reads_that_view_of_the_stored_tensor(form):
    weights = StoredWeights()
    hollow, other = weights.hollow(InMemory(CONTENT)), weights.hollow(InMemory(-CONTENT))
    views = {
        "whole": lambda t: t,
        "transposed": lambda t: t.T,
        "a part": lambda t: t[1:3, 2:],
        "reshaped": lambda t: t.view(3, 8),
        "of numpy": lambda t: t.numpy()[1:].T,
    }
    view = views[form]
    found, negated = weights.weight(view(hollow)), weights.weight(view(other))
    expected = np.asarray(view(CONTENT))
    assert np.array_equal(found.numpy(), expected)
    assert np.array_equal(found.transposed().numpy(), expected.T)
    assert found.sample(np.array([0, 3, 5])).tolist() == expected.flat[[0, 3, 5]].tolist()
    assert found.is_same(weights.weight(view(hollow)))
    assert not found.is_same(negated)
    assert not found.is_same(found.transposed())


def test_numbers_in_memory_are_not_stored():
    weights = StoredWeights()
    hollow = weights.hollow(InMemory(CONTENT))
    assert weights.weight(CONTENT) is weights.weight(None) is None
    assert weights.of(CONTENT) is None
    assert weights.of(hollow.T) is weights.of(hollow)
    assert hollow.view(-1)[[0, -1]].isnan().all()  # so that reading them shows
    other = weights.hollow(InMemory(CONTENT))
    assert hollow.numpy().tobytes() != other.numpy().tobytes()  # so that no pass mistakes one for the other
