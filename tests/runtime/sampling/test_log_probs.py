"""Log-probabilities against a plain log-softmax."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.runtime.sampling.log_probs import likeliest, token_logprob

logit_arrays = arrays(np.float32, st.integers(1, 40), elements=st.floats(-300, 300, width=32))


@given(logits=logit_arrays, top=st.integers(0, 45), place=st.integers(0, 39))
def test_they_are_the_log_softmax(logits, top, place):
    token = place % logits.size
    wide = logits.astype(np.float64) - logits.max()
    expected = wide - np.log(np.exp(wide).sum())
    found = token_logprob(logits, token, top)
    assert found.id == token
    assert found.logprob == pytest.approx(expected[token], rel=1e-6, abs=1e-5)
    assert len(found.top) == min(top, logits.size)
    assert [i for i, _ in found.top] == np.argsort(-logits, kind="stable")[:top].tolist()
    np.testing.assert_allclose([p for _, p in found.top], expected[[i for i, _ in found.top]], rtol=1e-6, atol=1e-5)


def test_of_equal_ones_the_smaller_id_comes_first():
    assert likeliest(np.array([1, 5, 5, 2, 5], np.float32), 2) == [1, 2]
    assert likeliest(np.array([1, 5], np.float32), 0) == []
