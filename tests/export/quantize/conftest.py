"""How a graph in memory is run."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from ..plain_loop import run_chunks


@pytest.fixture
def computed(tmp_path_factory):
    """computed(MODEL, IDS): the logits (T, V) of a graph, whose weights are written next to it."""

    def run(model, ids):
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        ir.save(model, path, external_data="model.data")
        return run_chunks(path, [[*map(int, ids)]])

    return run
