"""The graph's numbers and the runtime's, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.export.generation.random_stream import uniforms
from pastkey.runtime.sampling.random_stream import MAX_SEED, uniform

from .small_models import DOUBLE, INT64, run

SEEDS = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1, 2**62, MAX_SEED - 1, MAX_SEED]


@pytest.mark.parametrize("seed", [*SEEDS, *np.random.default_rng(0).integers(0, MAX_SEED, 4).tolist()])
def test_they_are_the_runtimes(seed):
    call = run(
        {"seed": (INT64, [1]), "places": (INT64, ["n"])},
        lambda n, given: uniforms(n, given["seed"], given["places"]),
        DOUBLE,
    )
    places = [*range(300), 2**31 - 1, 2**31, 2**32 - 1]
    found = call(seed=np.array([seed]), places=np.array(places))
    assert found.tolist() == [uniform(seed, place) for place in places]
