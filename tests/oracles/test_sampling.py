"""transformers' logits processors as a live oracle: all of them, in transformers' own order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.runtime.sampling import truncation
from pastkey.runtime.sampling.sampler import _changes, _Text, _truncations
from pastkey.runtime.settings import SamplingConfig

torch = pytest.importorskip("torch")
GenerationConfig = pytest.importorskip("transformers").GenerationConfig
GenerationMixin = pytest.importorskip("transformers.generation.utils").GenerationMixin

SIZE = 12
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.5, 1.3, 3.0]),
    "no_repeat_ngram_size": st.integers(1, 5),
    "bad_words_ids": st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3), max_size=6).map(
        lambda words: [*words, [1, 2]]
    ),
    "min_new_tokens": st.integers(1, 9),
    "suppress_tokens": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=4),
    "temperature": st.sampled_from([0.3, 0.7, 2.0]),
    "top_k": st.integers(1, 14),
    "top_p": st.floats(0.01, 0.999),
    "min_p": st.floats(0.001, 0.9),
    "typical_p": st.floats(0.01, 0.999),
}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ids=st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=20),
    given=st.fixed_dictionaries({}, optional=VALUES),
)
def test_every_subset_of_settings_has_the_probabilities_of_generate(seed, ids, given):
    """In the order in which `generate` of transformers lists their processors."""
    logits = np.random.default_rng(seed).normal(0, 2, SIZE).astype(np.float32)
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **given})
    config._eos_token_tensor = torch.tensor([5])
    model = type("Model", (GenerationMixin,), {"config": type("Config", (), {"is_encoder_decoder": False})()})()
    expected = torch.from_numpy(logits.astype(np.float64)[None])
    for processor in model._get_logits_processor(config, input_ids_seq_length=4, device="cpu"):
        expected = processor(torch.tensor([ids]), expected)

    ours = SamplingConfig(**{"temperature": 1.0, **given})
    found: np.ndarray = logits
    for change in _changes(ours, _Text(4, None, frozenset({5}), {})):
        found = change(found, np.array(ids))
    if np.isneginf(found).all():
        assert bool(expected.softmax(-1).isnan().all())
        return
    found = truncation.apply_temperature(found, ours.temperature)
    for _, truncate in _truncations(ours):
        found = truncate(found)
    np.testing.assert_allclose(truncation.softmax(found), expected[0].softmax(-1).numpy(), atol=2e-6)
