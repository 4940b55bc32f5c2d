"""Rows in int8 with a scale: read as they were written, to half a step."""

from __future__ import annotations

import numpy as np

from pastkey.runtime.engine.caches.int8_rows import decoded, encoded


def test_rows_are_read_as_they_were_written() -> None:
    rows = np.random.default_rng(0).normal(size=(1, 2, 5, 32)).astype(np.float32)
    rows[0, 1, 2] = 0
    rows[0, 0, 3] *= 1000
    stored = encoded(rows)
    assert stored.dtype == np.int8
    assert stored.shape == (1, 2, 5, 36)
    step = np.abs(rows).max(-1, keepdims=True) / 127
    assert (np.abs(decoded(stored) - rows) <= step / 2 * 1.001).all()
    np.testing.assert_array_equal(encoded(decoded(stored)), stored)
