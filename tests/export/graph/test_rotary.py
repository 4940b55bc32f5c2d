"""Rotary positions whose frequencies are scaled: fixed ones are fused, moving ones as far as they stay the same."""

import json
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.contract.config import RopeScaling
from pastkey.errors import InputError
from pastkey.export import export
from pastkey.runtime.engine.engine import Engine

from ...shared import divided
from .. import decoders, tiny_llama
from .test_fuse import rotating

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

HALF = 8  # pairs of a head
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 48},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48},
    "longrope": {"short_factor": [1.1] * HALF, "long_factor": [2.0] * HALF, "original_max_position_embeddings": 48},
}


def llama(kind):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the configuration is written as transformers 5 has it")
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ROTARY[kind]
    return tiny_llama.llama(max_position_embeddings=96, rope_parameters=rope)


@pytest.mark.parametrize("kind", divided(ROTARY, ci=["longrope", "dynamic", "yarn"]))
def test_scaled_frequencies_are_transformers_own(kind, tmp_path):
    """As far as the context reaches: beyond the original one where the frequencies do not depend on the length."""
    context = 48 if kind == "longrope" else 96
    llama(kind).save_pretrained(tmp_path / "llama")
    if kind in ("linear", "yarn"):
        spell_as_transformers_4(tmp_path / "llama" / names.CONFIG)
    report = export(tmp_path / "llama", tmp_path / "bundle", precision="fp32", context_length=context)
    assert report.manifest.parity["fp32"]["ok"]
    assert report.manifest.parity["fp32"]["tokens"] == context
    assert_computes_the_same(tmp_path / "bundle", tmp_path / "llama", context)
    written = json.loads((tmp_path / "bundle" / names.CONFIG).read_text(encoding="utf-8"))
    assert (kind == "longrope") or ROTARY[kind].items() <= written["rope_scaling"].items()


def spell_as_transformers_4(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(content), encoding="utf-8")


def assert_computes_the_same(bundle, folder, context):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, context)  # (T,)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()  # (T, V)
    found = Engine(open_bundle(bundle), graph="all_logits").forward(ids[None])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_decoder_of_pastkey_train_keeps_its_scaled_positions(tmp_path):
    scaled = decoders.llama(rope_scaling=RopeScaling("yarn", 4.0, 10))
    manifest = export(scaled, tmp_path / "b", precision="fp32", context_length=40).manifest
    assert manifest.parity["fp32"]["ok"]
    assert all(rotating(file) == [True, True] for file in (tmp_path / "b").rglob("*.onnx"))


def test_frequencies_that_change_within_the_context_are_refused_with_the_context_to_take(tmp_path):
    with pytest.raises(InputError, match="--context 48 or less"):
        export(llama("longrope"), tmp_path / "bundle", precision="fp32")
    assert list(tmp_path.iterdir()) == []
