"""An engine with exact products is as far from the bundle as rounding its activations takes it."""

from __future__ import annotations

import numpy as np

from pastkey.export.quantize.exact import exact_engine
from pastkey.runtime import Engine

IDS = np.random.default_rng(0).integers(0, 61, 12)


def test_exact_products_are_apart_from_rounded_ones_and_leave_no_file(exported):
    made = exported("llama", "int8")
    files = sorted(made.bundle.path.rglob("*"))
    rounded = Engine(made.bundle, native=False).prefill(IDS)
    with exact_engine(made.bundle) as exact:
        steps = [exact.decode(int(token)) for token in IDS]
        exact.reset()
        found = exact.prefill(IDS)
    assert sorted(made.bundle.path.rglob("*")) == files
    largest = np.abs(rounded).max()
    assert 1e-4 < np.abs(found - rounded).max() / largest < 5e-2
    assert np.abs(found - steps[-1]).max() / largest < 1e-5  # which no rounding amplifies
