"""A model whose weights do not fit a protobuf message of 2 GiB."""

from __future__ import annotations

import pytest
import torch

import pastkey
from pastkey.export import export
from pastkey.export.resources import parameters
from pastkey.files.memory import available_memory

from .decoders import Plain

_NEEDED = 13e9  # bytes


@pytest.mark.matrix
def test_a_model_over_2_gib_is_exported_and_runs(tmp_path):
    free = available_memory()
    if free is not None and free < _NEEDED:
        pytest.skip(f"{free / 1e9:.0f} GB of memory are available, {_NEEDED / 1e9:.0f} are needed")
    module = Plain(vocab=290_000, width=1024, heads=8, size=16, context=32)
    assert 4 * parameters(module) > 2.2 * 2**30
    report = export(module, tmp_path / "bundle", precision="fp32", context_length=32)
    assert report.manifest.parity["fp32"]["ok"]
    graph, data = tmp_path / "bundle" / "onnx" / "model.onnx", tmp_path / "bundle" / "onnx" / "model.onnx_data"
    assert graph.stat().st_size < 1 << 20
    assert data.stat().st_size > 2.2 * 2**30
    ids = [7, 289_999, 12_345]
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.arange(3)[None])[0, -1].argmax()
    assert pastkey.load(tmp_path / "bundle").generate(ids, max_new_tokens=1).ids == [int(expected)]
