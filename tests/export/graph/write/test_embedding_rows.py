"""pastkey's own graph is handed the embedding's rows where the table is large; nothing that it computes changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.graph.write import embedding_rows
from pastkey.runtime import Engine

from ...cases import CASES

IDS = np.random.default_rng(0).integers(0, 33, 12)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_rows_are_read_from_the_file(name, tmp_path, monkeypatch):
    """llama's table is its head too; gpt2 gathers positions by another input, which stays in the graph."""
    case = CASES[name]
    found = []
    for folder, large in ((tmp_path / "inside", 1 << 20), (tmp_path / "outside", 1)):
        monkeypatch.setattr(embedding_rows, "_LARGE", large)
        export(case.build(), folder, context_length=case.context)
        bundle = open_bundle(folder)
        inputs = {value.name for value in onnx.load(bundle.last_logits_graph, load_external_data=False).graph.input}
        assert (names.EMBEDDING_ROWS in inputs) == (large == 1)
        common = {value.name for value in onnx.load(bundle.all_logits_graph, load_external_data=False).graph.input}
        assert names.EMBEDDING_ROWS not in common
        session = Engine(bundle, threads=1)
        logits = [session.prefill(IDS[:8]), *(session.decode(int(token)) for token in IDS[8:])]
        session.reset()
        logits.append(session.forward(IDS.reshape(2, 6))[1, 0])
        found.append(np.stack(logits))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.slow
def test_float32_and_small_tables_stay_in_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)
    case = CASES["llama"]
    export(case.build(), tmp_path / "fp32", context_length=case.context, precision="fp32")
    graph = onnx.load(open_bundle(tmp_path / "fp32").last_logits_graph, load_external_data=False).graph
    assert names.EMBEDDING_ROWS not in {value.name for value in graph.input}
