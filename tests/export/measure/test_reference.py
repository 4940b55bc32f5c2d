"""What a bundle may be compared with, and the packages that it takes. What users mistype is in test_eval_command.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, MissingExtraError
from pastkey.export.measure.predictors import BundlePredictor, ModulePredictor
from pastkey.export.measure.reference import open_exported, open_reference

from ...conftest import Run
from ..conftest import Export

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
def factory(checkpoint: Path, tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(f"{MAKES}    return load_checkpoint({str(checkpoint)!r}).model\n")
    return f"{tmp_path}/mine.py:make"


def test_a_bundle_and_a_source_are_opened_as_what_they_are(exported: Export, factory: str) -> None:
    bundle, ids = exported("llama").bundle, list(range(20))
    own = open_reference(str(bundle.path), bundle, ids, 20)
    module = open_reference(factory, bundle, ids, 20)
    assert isinstance(own, BundlePredictor)
    assert isinstance(module, ModulePredictor)
    assert (own.name, module.name) == (str(bundle.path), factory)
    np.testing.assert_allclose(own.logits(np.array(ids)), module.logits(np.array(ids)), atol=1e-4)


def test_what_a_bundle_was_exported_from_comes_with_its_attention_calls(exported: Export, factory: str) -> None:
    made = exported("llama")
    module, layers = open_exported(factory, made.bundle)
    assert module is not made.module
    assert [layer.geometry for layer in layers] == list(made.bundle.manifest.layers)


def test_a_source_of_another_shape_is_not_what_it_was_exported_from(exported: Export, factory: str) -> None:
    with pytest.raises(InputError, match="name the source that it was exported from"):
        open_exported(factory, exported("gpt2").bundle)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("torch", "safetensors"), "torch and safetensors are not installed: type  pip install torch safetensors  and"),
        (("torch",), "torch is not installed: type  pip install torch  and"),
    ],
)
def test_a_source_without_torch_names_the_packages(
    missing: tuple[str, ...], words: str, exported: Export, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("llama").bundle
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    for opening in (lambda: open_exported(factory, bundle), lambda: open_reference(factory, bundle, [1], 2)):
        with pytest.raises(MissingExtraError, match=words):
            opening()


# --- modules that do not keep the contract ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, pastkey_command: Run) -> Path:
    """A folder with mine.py and the bundle that the command made of it."""
    folder = tmp_path_factory.mktemp("followed")
    (folder / "mine.py").write_text(MINE)
    choices = ("--precision", "fp32", "--context", "48", "--out", "bundle")
    done = pastkey_command("export", "mine.py:make", *choices, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_bundle_is_verified_against_the_call_of_its_author(followed: Path, pastkey_command: Run) -> None:
    done = pastkey_command("verify", "bundle", "mine.py:make", "--json", cwd=followed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reference"] == "source"


def test_a_changed_source_is_told_from_the_one_that_was_exported(followed: Path, pastkey_command: Run) -> None:
    done = pastkey_command("verify", "bundle", "mine.py:changed", cwd=followed)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_source_of_another_vocabulary_is_not_what_it_was_exported_from_either(
    followed: Path, pastkey_command: Run
) -> None:
    done = pastkey_command("verify", "bundle", "mine.py:smaller", cwd=followed)
    assert done.returncode == 2
    assert "name the source that it was exported from" in done.stderr


def test_a_source_that_does_not_run_by_the_call_is_refused(followed: Path, pastkey_command: Run) -> None:
    done = pastkey_command("verify", "bundle", "mine.py:of_one_argument", cwd=followed)
    assert done.returncode == 2
    assert "does not run as model(ids)" in done.stderr
    assert "name the source that the bundle was exported from" in done.stderr
    assert "--call" not in done.stderr  # verify has none


def test_eval_takes_such_a_module_as_a_reference(followed: Path, pastkey_command: Run) -> None:
    bundle, ids = open_bundle(followed / "bundle"), list(range(40))
    module = open_reference(f"{followed}/mine.py:make", bundle, ids, 40)
    own = open_reference(str(bundle.path), bundle, ids, 40)
    assert isinstance(module, ModulePredictor)
    np.testing.assert_allclose(own.logits(np.array(ids)), module.logits(np.array(ids)), atol=1e-4)
