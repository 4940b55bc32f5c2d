"""Weights that stay in their safetensors files: the same logits, the same bundle, and no reading while a graph is made.

Tiny models, of which every matrix counts as large here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.errors import IntegrityError, ResourceError
from pastkey.export.compare import logits_difference
from pastkey.export.graft.probe.observe import Observation, natively, observe, run_uncached
from pastkey.export.graft.streamed import in_float64, load, resident_bytes
from pastkey.export.graft.trace import trace
from pastkey.export.grafting import grafted, observed
from pastkey.export.graph.clean import clean
from pastkey.export.graph.fuse import fuse
from pastkey.export.graph.stored import StoredWeight, StoredWeights, stored_weights
from pastkey.export.progress import SILENT
from pastkey.export.settings import ExportConfig
from pastkey.export.source import stored_tensors
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening, Source
from pastkey.export.source.stored_tensors import MappedTensor, kept_in_files
from pastkey.files import memory

from ...shared import ROOT, divided
from ..families import CONTEXT, FAMILIES, FROM_TRANSFORMERS_5, build
from ..tiny_llama import TRANSFORMERS_4, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others

WHOLE = 1 << 40


def families_of(start: str) -> set[str]:
    """Those that the documentation lists."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    return {name.strip() for name in page.split(start)[1].split(";")[0].split(",")}


# Families of which transformers computes some parameters of several tensors, or turns them: these are in memory.
COMPUTED = families_of("- experts that transformers merges:")
CHANGED = {"youtu"}  # transformers sets the row of the padding to zero after it has read it
# Families that are followed along the time axis, whose rules read weights.
FOLLOWED = families_of("along the time axis:")


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch):
    monkeypatch.setattr(stored_tensors, "LARGE", 1000)


@pytest.fixture
def reads(monkeypatch):
    """The shapes of the tensors that were read."""
    found: list[tuple[int, ...]] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(MappedTensor, name)

        def read(self: MappedTensor, given: Any) -> Any:
            found.append(self.shape)
            return original(self, given)

        return read

    for name in ("read_into", "mapped"):
        monkeypatch.setattr(MappedTensor, name, counted(name))
    return found


def saved(model: Any, folder: Path, kind: str = "") -> Path:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind, torch.float32)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "60KB"} if kind == "shards" else {}))
    return folder


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it stays in its file."""
    weights = stored_weights(module)
    hollow = {id(parameter) for parameter, _ in weights.parameters(module)} if weights is not None else set()
    yield from ((name, parameter, id(parameter) in hollow) for name, parameter in module.named_parameters())


def logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with natively(module):
        return run_uncached(module, ids).logits


# --- torch --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "tied"), [("bf16", True), ("f16", False), ("", True), ("shards", False)])
def test_logits_are_those_of_the_loaded_model(kind, tied, tmp_path):
    folder = saved(llama(tie_word_embeddings=tied), tmp_path / "model", kind)
    module = open_source(folder).module
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert all(stored == (parameter.dim() > 1) for _, parameter, stored in parameters(module))
    assert resident_bytes(module) < 3000
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert logits_difference(expected(input_ids=ids, use_cache=False).logits, logits(module, ids)) < 5e-6
        wide, expected = in_float64(module), expected.double()
        assert resident_bytes(wide) < 6000
        assert torch.equal(logits(wide, ids), expected(input_ids=ids, use_cache=False).logits.float())
        load(module)
        assert torch.equal(logits(module, ids), expected.float()(input_ids=ids, use_cache=False).logits)
    whole = [*expected.parameters(), *module.buffers()]
    assert resident_bytes(module) == sum(tensor.nbytes for tensor in whole)


def test_a_file_that_changes_meanwhile_is_noticed(saved_llama, tmp_path):
    folder = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    module = open_source(folder).module
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed while it was exported"):
        logits(module, torch.arange(4)[None])


def test_a_model_that_another_thread_loads_meanwhile_is_whole(saved_llama):
    weights = StoredWeights()

    def load_another() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(saved_llama)

    with kept_in_files(weights), ThreadPoolExecutor(1) as pool:
        model = pool.submit(load_another).result()
    assert weights.empty
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# --- the graph ----------------------------------------------------------------------------------------------------
def traced(source: Source, observation: Observation, warn: Callable[[str], None]) -> ir.Model:
    model = trace(source.module, observation, "fused", source.context_length, warn)
    fuse(model, source.context_length)
    clean(model, source.module, observation.geometry, observation.vocab_size)
    return model


@pytest.mark.slow
def test_a_graph_is_made_without_reading_the_weights(saved_llama, reads):
    source = open_source(saved_llama)
    observation = observe(source.module, source.context_length)
    assert len(reads) > 10
    reads.clear()
    model = traced(source, observation, pytest.fail)
    assert reads == []
    large = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value.nbytes > 1000
    }
    assert {"cos_cache_0", "sin_cache_0"} == {name for name in large if name.endswith("_cache_0")}
    large = {name: tensor for name, tensor in large.items() if not name.endswith("_cache_0")}
    assert set(large) == {name for name, _, stored in parameters(source.module) if stored}
    assert all(isinstance(tensor, StoredWeight) for tensor in large.values())
    matrix = large["model.model.layers.1.mlp.down_proj.weight"]
    expected = transformers.AutoModelForCausalLM.from_pretrained(saved_llama).model.layers[1].mlp.down_proj.weight
    assert np.array_equal(matrix.numpy(), expected.detach().numpy().T)  # MatMul's layout


@pytest.mark.slow
@pytest.mark.matrix
def test_a_trace_that_reads_a_stored_weight_loads_all(saved_llama, monkeypatch):
    """Such as a copy that torch makes of a parameter."""
    source, told, original = open_source(saved_llama), list[str](), StoredWeights.weight
    observation = observe(source.module, source.context_length)
    monkeypatch.setattr(
        StoredWeights, "weight", lambda self, raw: None if len(getattr(raw, "shape", ())) == 2 else original(self, raw)
    )
    traced(source, observation, told.append)
    assert not any(stored for *_, stored in parameters(source.module))
    assert any("reads a large weight, so that all are loaded" in sentence for sentence in told)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_transformers_computes_of_several_tensors_is_in_memory(family, tmp_path):
    assert_in_memory(
        family, open_source(saved(build(family), tmp_path / "model"), Opening(context_length=CONTEXT)).module
    )


def assert_in_memory(family: str, module: nn.Module) -> None:
    found = [name for name, parameter, stored in parameters(module) if not stored and parameter.nbytes >= 1000]
    assert bool(found) == ((family in COMPUTED and not TRANSFORMERS_4) or family in CHANGED)


def graph_of(folder: Path, context: int) -> tuple[nn.Module, bytes]:
    """The module of a folder, and its float32 graph with the weights as a file."""
    source = open_source(folder, Opening(context_length=context))
    model = grafted(*observed(source, ExportConfig(context_length=context), SILENT), SILENT).model
    return source.module, ir.to_proto(model).SerializeToString()


CASES = [
    *((family, "") for family in FAMILIES),
    ("llama", "tied"), ("llama", "shards"), ("qwen2", "bf16"), ("gemma2", "bf16"), ("phi3", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), divided(CASES))
def test_the_float32_graph_is_that_of_loaded_weights(family, kind, tmp_path, monkeypatch):
    if family not in transformers.CONFIG_MAPPING or (TRANSFORMERS_4 and family in FROM_TRANSFORMERS_5):
        pytest.skip(f"not with transformers {transformers.__version__}")
    context = 80 if kind == "tied" else CONTEXT
    model = llama(tie_word_embeddings=True) if kind == "tied" else build(family)
    folder = saved(model, tmp_path / "model", kind)
    assert_in_memory(family, open_source(folder, Opening(context_length=context)).module)
    module, graph = graph_of(folder, context)
    assert any(stored for *_, stored in parameters(module)) == (family not in FOLLOWED)
    monkeypatch.setattr(stored_tensors, "LARGE", WHOLE)
    assert graph_of(folder, context)[1] == graph


def test_weights_that_do_not_fit_are_not_loaded(saved_llama, monkeypatch):
    module = open_source(saved_llama).module
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="reading all weights needs about"):
        load(module)
