"""LoRA adapters that peft saved, on exported bundles. The judge is the model that peft merged them into."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export import export
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.settings import ExportConfig
from pastkey.runtime import load

from ...conftest import MadeOnce
from ..cases import CASES

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from ..tiny_llama import PROMPT, greedy, llama

# Of peft with transformers 5.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

COUNT = 24
TEXT = (PROMPT * 8)[:40]
ADAPTERS: dict[str, dict[str, Any]] = {
    "every": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "some": {
        "r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 2, r"^model\.layers\.[0-9]+\.self_attn\.(k|v)_proj": 7},
    },
}  # fmt: skip


def adapted(module: nn.Module, folder: Path, **config: Any) -> Any:
    """Saves a random adapter of a module; returns the module that it is merged into."""
    torch.manual_seed(7)
    model = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def models(folder):
    """The models that the adapters were merged into."""
    return {name: adapted(llama(), folder / name, **config) for name, config in ADAPTERS.items()}


def bundle(made_once: MadeOnce, precision: str, graph: str = "auto", *, adapters: bool = True) -> Path:
    options = {"graph": graph, "adapters": adapters, "cache": False}
    name = f"adapters-{precision}-{graph}-{adapters}"
    return made_once(name, lambda made: export(llama(), made / "bundle", precision, **options)) / "bundle"


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["fused", pytest.param("standard", marks=pytest.mark.matrix)])
def test_texts_in_float32_are_those_of_the_merged_model(graph, made_once, folder, models):
    lm = load(bundle(made_once, "fp32", graph), adapters={name: folder / name for name in ADAPTERS})
    texts = {None: greedy(llama(), COUNT)} | {name: greedy(model, COUNT) for name, model in models.items()}
    assert len({tuple(ids) for ids in texts.values()}) == 3
    for name, ids in texts.items():
        assert lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name).ids == ids
    for name, model in models.items():
        expected = logits_of(model)
        assert np.abs(lm.logits(TEXT, name) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_the_distance_from_the_merged_float32_model_is_that_of_the_base(precision, made_once, folder, models):
    path = bundle(made_once, precision)
    lm = load(path, adapters={name: folder / name for name in ADAPTERS}, native=False)
    base = logits_of(llama())
    without = kl_divergence(base, lm.logits(TEXT))
    for name, model in models.items():
        expected = logits_of(model)
        assert kl_divergence(expected, lm.logits(TEXT, name)) < 1.5 * without
        assert kl_divergence(expected, base) > 3 * without  # so that the adapter shows
    if precision == "int8":
        # Calibration changed channels, and an adapter that does not follow is far off.
        changes = load(path, adapters={"every": folder / "every"}).adapters._graph
        assert any(key.startswith(names.CHANGES_PREFIX) for key in changes.onnx.get_modelmeta().custom_metadata_map)


def test_a_fused_projection_of_a_module_of_ones_own_works_as_its_module_does(tmp_path):
    case = CASES["nano_gpt"]
    module = case.build().eval()
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and "head" not in name]
    model = adapted(module, tmp_path / "adapter", r=2, lora_alpha=8, target_modules=linear)
    export(case.build(), tmp_path / "bundle", "fp32", context_length=case.context, adapters=True, cache=False)
    lm, ids = load(tmp_path / "bundle", adapters={"own": tmp_path / "adapter"}), [1, 5, 2, 7, 3]
    with torch.no_grad():
        expected, base = (one(torch.tensor([ids]), torch.arange(len(ids))[None])[0].numpy() for one in (model, module))
    assert np.abs(lm.logits(ids, "own") - expected).max() < 1e-4
    assert np.abs(base - expected).max() > 1e-2


def test_the_other_files_are_those_of_an_export_without_adapters(made_once):
    with_them, without = (bundle(made_once, "fp32", "fused", adapters=adapters) for adapters in (True, False))
    found, expected = (dict(open_bundle(path).manifest.files) for path in (with_them, without))
    assert found.pop(names.ADAPTER_GRAPH)
    assert found == expected


@pytest.mark.parametrize(
    "options", [{"target": "cuda"}, {"precision": "fp16"}, {"graph": "static", "precision": "fp32"}]
)
def test_other_targets_and_forms_are_refused(options):
    with pytest.raises(InputError, match="--adapters and --target"):
        ExportConfig(adapters=True, **options)
