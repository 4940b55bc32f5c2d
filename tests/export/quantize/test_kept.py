"""A quantized source stays what it is, from its file to the bundle's logits."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, ParityError
from pastkey.export import export
from pastkey.export.quantize.exact import exact_engine
from pastkey.export.quantize.rounding.kept import SourceFile
from pastkey.runtime import Engine

from ..source.packed.gguf_blocks import write_llama
from ..source.packed.quantizing import gptq, quantize_folder, quantized
from ..tiny_llama import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others
KINDS = ("Q6_K", "Q4_K", "Q4_0", "F32", "Q5_K", "Q2_K")  # the embedding is of the first, the head of the second


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return write_llama(folder / "mixed.gguf", KINDS)


def weights_of(report) -> dict[str, int]:
    return {what: len(matrices) for what, matrices in report.manifest.quality["weights"].items()}


def test_a_mixed_file_stays_mixed_and_its_logits_are_the_source_s(mixed, tmp_path):
    report = export(mixed, tmp_path / "bundle", quick=True)
    quality = report.manifest.quality
    assert report.manifest.precision == "source"
    assert weights_of(report) == {
        "Q6_K, kept": 2, "Q4_K, kept": 2, "Q4_0, kept": 2, "Q5_K, kept": 1,
        "float32: no quantized matrix of the source has these numbers": 1,
        "int8, rounded: Q2_K has no integers that are multiplied as they are": 1,
    }  # fmt: skip
    assert quality["kl_divergence_of_weights"] < quality["kl_divergence"] < 0.02
    bundle, prompt = open_bundle(tmp_path / "bundle"), [5, 9, 33]
    with exact_engine(bundle) as exact:  # without rounded activations
        expected = exact.prefill(prompt)
    for native in (None, False):
        np.testing.assert_allclose(Engine(bundle, native=native).prefill(prompt), expected, atol=0.2)


def test_a_target_that_does_not_take_a_form_gets_int8(mixed, tmp_path):
    portable = export(mixed, tmp_path / "portable", quick=True, target="portable")
    assert weights_of(portable)["int8, rounded: portable does not multiply by Q4_K, whose blocks have offsets"] == 2
    assert weights_of(portable)["Q6_K, kept"] == 2


def test_gptq_with_channels_in_another_order_and_adapters(tmp_path):
    folder = tmp_path / "tiny-llama"
    llama().save_pretrained(folder)
    order = {64: np.random.default_rng(0).permutation(64), 96: np.random.default_rng(1).permutation(96)}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}

    def rounded(weight: np.ndarray):
        return quantized(weight, 4, 32, sym=False, order=order[weight.shape[1]])

    quantize_folder(folder, settings, rounded, partial(gptq, bits=4))
    report = export(folder, tmp_path / "bundle", quick=True, adapters=True)
    floats = "float32: no quantized matrix of the source has these numbers"  # embedding and head
    assert weights_of(report) == {floats: 2, "GPTQ, 4 bits, groups of 32, kept": 14}
    assert report.manifest.quality["kl_divergence_of_weights"] < 1e-9
    graph = ir.load(tmp_path / "bundle" / names.ADAPTER_GRAPH)
    changes = [json.loads(text) for key, text in graph.metadata_props.items() if key.startswith(names.CHANGES_PREFIX)]
    assert len(changes) == 14
    assert all(kind == "permuted" for [[_, kind, _]] in changes)


def test_a_checkpoint_on_a_lattice_is_kept_there_by_default_and_calibration_is_refused(tmp_path):
    model = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parts = parameter.view(len(parameter), -1, 32)
                scale = (parts.abs().amax(-1, keepdim=True) / 8).half().float()
                parameter.copy_(((parts / scale).round().clamp(-8, 7) * scale).view_as(parameter))
    report = export(model, tmp_path / "bundle", quick=True)
    assert weights_of(report) == {"a lattice of 4 bits, kept": 14, "int8, rounded: its numbers are not on a lattice": 2}
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 20)
    with pytest.raises(InputError, match=r"--calibration.* and --precision source, the default of a quantized source"):
        export(model, tmp_path / "other", calibration=text)
    with pytest.raises(InputError, match="and LlamaForCausalLM has none"):
        export(llama(), tmp_path / "other", "source")


def test_blocks_that_give_other_logits_end_the_export(mixed, tmp_path, monkeypatch):
    find = SourceFile.find

    def wrong(self, weights):
        found = find(self, weights)
        return found and found._replace(blocks=found.blocks and find(self, weights[::-1]).blocks)

    monkeypatch.setattr(SourceFile, "find", wrong)
    kept = write_llama(tmp_path / "kept.gguf", ["Q4_0"])
    with pytest.raises(ParityError, match="give other logits than the source"):
        export(kept, tmp_path / "bundle", quick=True)
    assert not (tmp_path / "bundle").exists()
