"""int8 of whole decoders: what is quantized, what the blocks hold, and what it costs in bytes."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from pastkey.contract.config import ModelConfig
from pastkey.export import export
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.train.settings import PRESETS

from ...shared import divided
from ..blocks import scales_of
from ..conftest import Exported
from ..decoders import drawn
from ..plain_loop import run_chunks

Array = npt.NDArray[Any]


def float_matrices(model: onnx.ModelProto) -> list[str]:
    """Initializers in float32 that have two axes and more than a handful of elements, but for factors of scales."""
    return [
        t.name
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
        and len(t.dims) >= 2
        and np.prod(t.dims) > 16
        and not (t.name.startswith("scales_of_") and t.name.endswith(".row_scales"))
    ]


def test_every_matrix_is_in_blocks_for_int8_activations_and_a_third_of_the_bytes(exported):
    made, report = exported("llama", "int8"), exported("llama", "int8").report
    for last in (False, True):
        assert float_matrices(made.graph(last=last)) == []
    assert float_matrices(exported("llama").graph()) != []
    assert not {"MatMul", "Gemm"} & set(made.bundle.manifest.operators)
    for node in [node for node in made.graph().graph.node if node.op_type == "MatMulNBits"]:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["bits"], attributes["accuracy_level"]) == (8, 4)
        assert attributes["block_size"] in (16, 32, 64)
    assert report.fp32_weight_bytes == exported("llama").report.weight_bytes
    assert report.weight_bytes <= 0.33 * report.fp32_weight_bytes


@dataclass(frozen=True)
class Uncalibrated:
    """A decoder's int8 graph whose scales were left where they are, and the graph's weights."""

    path: Path
    weights: dict[str, Array]
    scales: dict[str, Array]

    def dequantized(self, rows: dict[str, int]) -> dict[str, Array]:
        """name -> the matrix that its blocks stand for, padded to whole blocks, for matrices of so many rows.

        Matrices that read one activation stand under one another, their names joined by "+".
        """
        found: dict[str, Array] = {}
        for key, data in self.weights.items():
            joined, _, kind = key.rpartition(".")
            if kind not in ("blocks", "table"):
                continue
            parts = joined.split("+")
            values = ((data.astype(np.float32) - 128) * self.scales[joined][..., None]).reshape(len(data), -1)
            ends = np.cumsum([rows[part] for part in parts])[:-1]
            found |= dict(zip(parts, np.split(values, ends), strict=True))
        return found


def uncalibrated(made: Exported, folder: Path) -> Uncalibrated:
    model = ir.load(made.bundle.all_logits_graph)
    quantize(model)
    path = folder / "int8.onnx"
    ir.save(model, path)
    weights = {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values()}
    return Uncalibrated(path, weights, scales_of(model))


def inside(made: Exported, folder: Path) -> Path:
    """A folder with the weights file that the float32 graph names."""
    for file in made.bundle.all_logits_graph.parent.glob("*_data"):
        shutil.copy(file, folder)
    return folder


def exact_matmuls(path: Path) -> Path:
    """The int8 graph with its weights computed in float32: accuracy level 1 leaves activations alone."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    exact = path.with_name("exact.onnx")
    onnx.save(model, exact)
    return exact


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_int8_graph_is_the_dequantized_model_but_for_its_activations(name, exported, tmp_path):
    import torch

    made = exported(name)
    int8 = uncalibrated(made, inside(made, tmp_path))
    ids = np.random.default_rng(0).integers(0, 61, 40).tolist()
    twin = copy.deepcopy(made.module)
    matrices = {key: parameter for key, parameter in twin.named_parameters() if parameter.dim() == 2}
    dequantized = int8.dequantized({key: len(parameter) for key, parameter in matrices.items()})
    assert dequantized.keys() == matrices.keys()
    with torch.no_grad():
        for key, parameter in matrices.items():
            parameter.copy_(torch.from_numpy(dequantized[key][:, : parameter.shape[1]]))  # without the block's padding
    expected = replace(made, module=twin).torch_logits(ids)
    exact = run_chunks(exact_matmuls(int8.path), [ids])
    np.testing.assert_allclose(exact, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    shipped = run_chunks(int8.path, [ids])
    assert 0 < np.abs(shipped - expected).max() <= 0.05 * np.abs(expected).max()
    assert kl_divergence(expected, shipped) < 0.02


@pytest.mark.parametrize(
    ("preset", "tied"),
    divided(product(("gpt2", "llama"), (True, False))),
)
def test_int8_takes_at_most_0_29_of_float32_from_three_million_parameters(preset, tied, tmp_path):
    sizes = {"vocab_size": 2003, "hidden_size": 288, "intermediate_size": 800, "tie_word_embeddings": tied}
    module = drawn(ModelConfig(**(dict(PRESETS[preset].model) | sizes)))
    assert sum(p.numel() for p in module.parameters()) >= 3_000_000
    report = export(module, tmp_path / "bundle", context_length=module.config.max_position_embeddings)
    assert report.verification.ok
    assert report.weight_bytes / report.fp32_weight_bytes <= 0.29
    stored = sum(path.stat().st_size for path in (tmp_path / "bundle" / "onnx").iterdir())
    assert stored / report.fp32_weight_bytes <= 0.3  # both graphs included
