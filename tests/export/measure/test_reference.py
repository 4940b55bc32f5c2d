"""What a bundle may be compared with. What users mistype is in test_eval_command.py."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pastkey.__main__ import main
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export.measure import reference
from pastkey.export.measure.predictors import ModulePredictor
from pastkey.export.measure.reference import open_exported, open_reference

from ..commands import fails

MINE = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, window):
        super().__init__()
        torch.manual_seed(3)
        self.window = window
        self.tokens, self.places = nn.Embedding(61, 32), nn.Embedding(48, 32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 61)

    def forward(self, ids, targets=None):
        T = ids.shape[1]
        x = self.tokens(ids) + self.places(torch.arange(T))
        q, k, v = (part.view(-1, T, 2, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        seen = torch.ones(T, T).tril() - torch.ones(T, T).tril(-self.window)
        weights = ((q @ k.mT) * 4).masked_fill(seen == 0, -1e9).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, T, 32))
        return self.head(x), None

def make(): return Mine(99)
def changed(): return Mine(5)
def smaller():
    found = Mine(99)
    found.tokens, found.head = nn.Embedding(60, 32), nn.Linear(32, 60)
    return found
def of_one_argument():
    found = Mine(99)
    found.forward = lambda ids: Mine.forward(found, ids)[0]
    return found
"""
MAKES = "import torch\nfrom pastkey.train.checkpoint import load_checkpoint\ndef make():\n"


@pytest.fixture
def factory(checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text(f"{MAKES}    return load_checkpoint({str(checkpoint)!r}).model\n")
    return f"{tmp_path}/mine.py:make"


def test_what_a_bundle_was_exported_from_comes_with_its_attention_calls(exported, factory):
    made = exported("llama")
    module, layers = open_exported(factory, made.bundle)
    assert module is not made.module
    assert [layer.geometry for layer in layers] == list(made.bundle.manifest.layers)


def test_a_bundle_may_hold_keys_and_values_where_a_smaller_row_could_be_cached(exported, factory, monkeypatch):
    """As one of `--graph fused`, or of a version that knew no such row."""
    real = reference._open_module

    def opened(*args: Any, latents: bool = True) -> Any:
        source, module, observation = real(*args, latents=latents)
        return source, module, dataclasses.replace(observation, layers=()) if latents else observation

    monkeypatch.setattr(reference, "_open_module", opened)
    made = exported("llama")
    _, layers = open_exported(factory, made.bundle)
    assert [layer.geometry for layer in layers] == list(made.bundle.manifest.layers)


def test_a_source_of_another_shape_is_not_what_it_was_exported_from(exported, factory):
    with pytest.raises(InputError, match="name the source that it was exported from"):
        open_exported(factory, exported("gpt2").bundle)


# --- modules that do not keep the contract ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder with mine.py and the bundle that the command made of it."""
    folder = tmp_path_factory.mktemp("followed")
    (folder / "mine.py").write_text(MINE)
    choices = ("--precision", "fp32", "--context", "48", "--out", f"{folder}/bundle")
    assert main(["export", f"{folder}/mine.py:make", *choices]) == 0
    return folder


@pytest.mark.slow
def test_a_bundle_is_verified_against_the_call_of_its_author(followed, command):
    status, printed, _ = command("verify", followed / "bundle", f"{followed}/mine.py:make", "--json")
    assert (status, json.loads(printed)["reference"]) == (0, "source")
    assert command("verify", followed / "bundle", f"{followed}/mine.py:changed")[0] == 1


def test_a_source_that_is_not_what_the_bundle_was_exported_from_is_refused(followed, command):
    name_it = "name the source that"
    fails(command("verify", followed / "bundle", f"{followed}/mine.py:smaller"), name_it)
    told = command("verify", followed / "bundle", f"{followed}/mine.py:of_one_argument")
    fails(told, "does not run as model(ids)", name_it)
    assert "--call" not in told[2]  # verify has none


def test_eval_takes_such_a_module_as_a_reference(followed):
    bundle, ids = open_bundle(followed / "bundle"), list(range(40))
    module = open_reference(f"{followed}/mine.py:make", bundle, ids, 40)
    own = open_reference(str(bundle.path), bundle, ids, 40)
    assert isinstance(module, ModulePredictor)
    np.testing.assert_allclose(own.logits(np.array(ids)), module.logits(np.array(ids)), atol=1e-4)
