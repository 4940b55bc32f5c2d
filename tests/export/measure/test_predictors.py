"""A bundle and the module that it was made of predict the same, each in its own way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pastkey.errors import InputError, NumericsError
from pastkey.export.compare import logits_difference
from pastkey.export.graft.streamed import computing_in_float64
from pastkey.export.measure.predictors import BundlePredictor, ModulePredictor, RecordedPredictor

from ..decoders import Plain


def test_a_greedy_continuation_is_told_by_one_run_of_a_module(exported):
    llama = exported("llama")
    prompt = np.array([3, 1, 4, 1, 5])
    written = prompt.tolist()
    for _ in range(8):  # the slow obvious way
        written.append(int(llama.torch_logits(written)[-1].argmax()))
    own = written[len(prompt) :]
    bundle = BundlePredictor(llama.bundle)
    assert [*bundle.greedy(prompt, 8)] == own
    for predictor in (ModulePredictor(llama.module), bundle):
        assert predictor.agreeing(prompt, own) == 8
        assert predictor.agreeing(prompt, [*own[:3], (own[3] + 1) % 61, *own[4:]]) == 3
    caches = bundle.cache(prompt), ModulePredictor(llama.module).cache(prompt)
    for found, expected in zip(*caches, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


class Fails(Plain):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > 9:
            raise ValueError("too many at once")
        return super().forward(input_ids, position_ids)


def test_a_module_that_fails_or_gives_what_is_not_finite_is_told():
    with pytest.raises(InputError, match=r"Fails failed on a window of 10 tokens at test_predictors\.py:.*too many"):
        ModulePredictor(Fails()).logits(np.arange(10))
    module = Plain()
    nn.init.constant_(module.head.weight, torch.inf)
    with pytest.raises(NumericsError, match="the logits of Plain are not finite"):
        ModulePredictor(module).logits(np.arange(3))


class Single(Plain):
    """Casts to float32 for its own precision, as norms do."""

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(torch.float32) * torch.ones(1, dtype=torch.float32)
        return super().logits(hidden.softmax(-1, dtype=torch.float32).float())


@pytest.mark.parametrize("kind", [Plain, Single])
def test_rounding_is_the_distance_of_float32_from_float64(kind):
    """Also where the module's code names float32: in float64 it does not round at all."""
    module, ids = kind(layers=2), np.arange(12)
    rounding = ModulePredictor(module).rounding(ids)
    assert 0 < rounding < 1e-5
    logits = ModulePredictor(module).logits(ids)
    with computing_in_float64():
        exact = ModulePredictor(module.double()).logits(ids)
    assert exact.dtype == np.float64
    assert rounding == logits_difference(exact, logits)
    assert torch.get_default_dtype() == torch.float32


def test_a_module_that_has_no_float64_has_no_rounding():
    class Refusing(Plain):
        def logits(self, hidden: Tensor) -> Tensor:
            assert hidden.dtype == torch.float32
            return super().logits(hidden)

    assert ModulePredictor(Refusing()).rounding(np.arange(12)) == 0


def test_a_recorded_predictor_runs_each_text_once_and_then_closes_the_graph(exported, monkeypatch):
    bundle, ids = exported("llama").bundle, np.arange(30)
    plain, recorded = BundlePredictor(bundle), RecordedPredictor(bundle)
    first = recorded.logits(ids)
    np.testing.assert_allclose(first, plain.logits(ids), rtol=0, atol=1e-5 * np.abs(first).max())
    tokens = [*plain.greedy(ids[:8], 8)]
    assert recorded.agreeing(ids[:8], tokens) == 8
    assert recorded.agreeing(ids[:8], [*tokens[:3], (tokens[3] + 1) % 61, *tokens[4:]]) == 3
    monkeypatch.setattr(RecordedPredictor, "_open", None)
    assert recorded.logits(ids.copy()) is first
