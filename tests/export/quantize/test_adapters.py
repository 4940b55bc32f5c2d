"""LoRA adapters that peft saved, on exported bundles. The judge is the model that peft merged them into."""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pastkey.contract import names
from pastkey.errors import InputError
from pastkey.export import export
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
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["v_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 2, r"^model\.layers\.[0-9]+\.self_attn\.(k|v)_proj": 7},
    },
}


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


@functools.cache
def merged(name: str, folder: Path) -> Any:
    return adapted(llama(), folder / name, **ADAPTERS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def bundle(made_once: MadeOnce, precision: str, graph: str = "auto", *, adapters: bool = True) -> Path:
    return (
        made_once(
            f"adapters-{precision}-{graph}-{adapters}",
            lambda made: export(llama(), made / "bundle", precision, graph=graph, adapters=adapters, cache=False),
        )
        / "bundle"
    )


def kl(expected: Tensor, found: Any) -> float:
    p, q = (torch.log_softmax(torch.as_tensor(logits).double(), -1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([TEXT])).logits[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["fused", pytest.param("standard", marks=pytest.mark.matrix)])
def test_texts_in_float32_are_those_of_the_merged_model(graph, made_once, folder):
    models = {name: merged(name, folder) for name in ADAPTERS}
    lm = load(bundle(made_once, "fp32", graph), adapters={name: folder / name for name in ADAPTERS})
    texts = {None: greedy(llama(), COUNT)} | {name: greedy(model, COUNT) for name, model in models.items()}
    assert len({tuple(ids) for ids in texts.values()}) == 3
    for name, ids in texts.items():
        assert lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name).ids == ids
    for name, model in models.items():
        expected = logits_of(model)
        assert np.abs(lm.logits(TEXT, name) - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_the_distance_from_the_merged_float32_model_is_that_of_the_base(precision, made_once, folder):
    models = {name: merged(name, folder) for name in ADAPTERS}
    path = bundle(made_once, precision)
    lm = load(path, adapters={name: folder / name for name in ADAPTERS}, native=False)
    base = logits_of(llama())
    without = kl(base, lm.logits(TEXT))
    for name, model in models.items():
        expected = logits_of(model)
        assert kl(expected, lm.logits(TEXT, name)) < 1.5 * without
        assert kl(expected, base) > 3 * without  # so that the adapter shows
    if precision == "int8":
        # Calibration changed channels, and an adapter that does not follow is far off.
        changes = load(path, adapters={"every": folder / "every"}).adapters._graph
        assert changes is not None
        assert any(key.startswith(names.CHANGES_PREFIX) for key in changes.onnx.get_modelmeta().custom_metadata_map)


def test_an_adapter_of_zeros_changes_nothing(made_once, tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    lm = load(bundle(made_once, "fp32", "fused"), adapters={"zeros": tmp_path})
    assert np.abs(lm.logits(TEXT, "zeros") - lm.logits(TEXT)).max() < 1e-5


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

    def hashes(path: Path) -> dict[str, str]:
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "pastkey.json"]
        return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    found, expected = hashes(with_them), hashes(without)
    assert found.pop(names.ADAPTER_GRAPH)
    assert found == expected


@pytest.mark.parametrize(
    "options", [{"target": "cuda"}, {"precision": "fp16"}, {"graph": "static", "precision": "fp32"}]
)
def test_other_targets_and_forms_are_refused(options):
    with pytest.raises(InputError, match="--adapters and --target"):
        ExportConfig(adapters=True, **options)


def test_an_adapter_of_what_is_no_projection_is_refused(made_once, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(InputError, match=r"lora_embedding_A.*only lora_A and lora_B of linear projections"):
        load(bundle(made_once, "fp32", "fused"), adapters={"bad": tmp_path})
