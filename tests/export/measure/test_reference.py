"""The references of a bundle. The mistakes of users are in test_eval_command.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pastkey.__main__ import main
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, NumericsError
from pastkey.export.compare import logits_difference
from pastkey.export.graft.streamed import computing_in_float64
from pastkey.export.measure import reference
from pastkey.export.measure.predictors import BundlePredictor, ModulePredictor, RecordedPredictor, agreeing
from pastkey.export.measure.reference import open_exported, open_reference

from ..commands import fails
from ..decoders import Plain

MINE = """
from torch import nn
from tests.export.graft.own.registry import DECODERS

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = DECODERS["tril_buffer"].make()
    def forward(self, ids, targets=None):
        return self.inner(ids), None

def changed():
    found = Mine()
    for mask in found.buffers():
        mask.triu_(-4)  # a window
    return found
def smaller():
    found = Mine()
    found.inner.wte, found.inner.lm_head = nn.Embedding(28, 32), nn.Linear(32, 28)
    return found
def of_logits_alone():
    return Mine().inner
"""


def test_what_a_bundle_was_exported_from_comes_with_its_attention_calls(exported, checkpoint, monkeypatch):
    """Also where a smaller row could be cached, and the bundle holds keys and values, as one of `--graph fused`."""
    made = exported("llama")
    _, layers = open_exported(str(checkpoint), made.bundle)
    assert [layer.geometry for layer in layers] == list(made.bundle.manifest.layers)
    real = reference._open_module

    def opened(*args: Any, latents: bool = True) -> Any:
        source, module, observation = real(*args, latents=latents)
        return source, module, dataclasses.replace(observation, layers=()) if latents else observation

    monkeypatch.setattr(reference, "_open_module", opened)
    _, layers = open_exported(str(checkpoint), made.bundle)
    assert [layer.geometry for layer in layers] == list(made.bundle.manifest.layers)


def test_a_source_of_another_shape_is_not_what_it_was_exported_from(exported, checkpoint):
    with pytest.raises(InputError, match="name the source that it was exported from"):
        open_exported(str(checkpoint), exported("gpt2").bundle)


# --- modules that do not keep the contract ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder with mine.py and the bundle that the command made of it."""
    folder = tmp_path_factory.mktemp("followed")
    (folder / "mine.py").write_text(MINE)
    choices = ("--precision", "fp32", "--context", "48", "--out", f"{folder}/bundle")
    assert main(["export", f"{folder}/mine.py:Mine", *choices]) == 0
    return folder


@pytest.mark.slow
def test_a_bundle_is_verified_against_the_call_of_its_author(followed, command):
    assert command("verify", followed / "bundle", f"{followed}/mine.py:Mine")[0] == 0
    assert command("verify", followed / "bundle", f"{followed}/mine.py:changed")[0] == 1


def test_a_source_that_is_not_what_the_bundle_was_exported_from_is_refused(followed, command):
    name_it = "name the source that"
    fails(command("verify", followed / "bundle", f"{followed}/mine.py:smaller"), name_it)
    told = command("verify", followed / "bundle", f"{followed}/mine.py:of_logits_alone")
    fails(told, "does not run as model(ids)", name_it)
    assert "--call" not in told[2]  # verify has none


def test_eval_takes_such_a_module_as_a_reference(followed):
    bundle, ids = open_bundle(followed / "bundle"), [n % 29 for n in range(40)]
    module = open_reference(f"{followed}/mine.py:Mine", bundle, ids, 40)
    own = open_reference(str(bundle.path), bundle, ids, 40)
    assert isinstance(module, ModulePredictor)
    np.testing.assert_allclose(own.logits(np.array(ids)), module.logits(np.array(ids)), atol=1e-4)


# --- a bundle and the module that it was made of predict the same, each in its own way --------------------------------
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
        assert agreeing(predictor, prompt, own) == 8
        assert agreeing(predictor, prompt, [*own[:3], (own[3] + 1) % 61, *own[4:]]) == 3


class Fails(Plain):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > 9:
            raise ValueError("too many at once")
        return super().forward(input_ids, position_ids)


def test_a_module_that_fails_or_gives_what_is_not_finite_is_told():
    with pytest.raises(InputError, match=r"Fails failed on a window of 10 tokens at test_reference\.py:.*too many"):
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


def test_a_recorded_text_is_run_once_and_then_the_graph_is_closed(exported, monkeypatch):
    bundle, ids = exported("llama").bundle, np.arange(30)
    plain, recorded = BundlePredictor(bundle), RecordedPredictor(bundle)
    recorded.record(ids)
    first = recorded.logits(ids)
    np.testing.assert_allclose(first, plain.logits(ids), rtol=0, atol=1e-5 * np.abs(first).max())
    monkeypatch.setattr(RecordedPredictor, "_open", None)
    assert recorded.logits(ids.copy()) is first
