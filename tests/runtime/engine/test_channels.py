"""A change of a weight's channels acts on the factors of its update as on the weight."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.engine.channels import changed, rotation

N, K, R = 12, 8, 3


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["rotated", "scaled", "permuted"])
def test_an_update_follows_its_weight(kind, axis):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(R, K)).astype(np.float32), rng.normal(size=(N, R)).astype(np.float32)
    size = (N, K)[axis]
    numbers = {
        "rotated": np.array([4]),
        "scaled": rng.uniform(0.5, 2, size).astype(np.float32),
        "permuted": rng.permutation(size),
    }[kind]
    want = changed(b @ a, axis, kind, numbers)
    found = changed(b, 0, kind, numbers) @ a if axis == 0 else b @ changed(a, 1, kind, numbers)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not np.allclose(want, b @ a)


@pytest.mark.parametrize("size", [4, 6, 8])
def test_a_rotation_is_orthogonal(size):
    np.testing.assert_allclose(rotation(size) @ rotation(size).T, np.eye(size), atol=1e-12)
