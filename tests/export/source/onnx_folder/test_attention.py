"""Attention of other programs' graphs: where it is recognised, and what takes its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from pastkey.export.source.onnx_folder.attention import UnrecognisedError, fuse_attention, recognise
from pastkey.export.source.onnx_folder.given import GivenGraph, read_given, standard_form
from pastkey.runtime.providers.ort import onnxruntime

from .given_graphs import CONTEXT, HEADS, KV_HEADS, LAYERS, SIZE, VOCABULARY, Kind, write_graph

TOKENS = 40
WINDOW = 12
KINDS = {
    "llama": Kind(),
    "window": Kind(window=WINDOW),
    "gemma2": Kind(window=WINDOW, counts_positions=True, softcap=4.0),
    "gpt2": Kind(learned=True),
    "no mask": Kind(masked=False),
}

Folder = Callable[[Kind], Path]


@pytest.fixture
def graph(tmp_path):
    """The function that writes a kind's graph."""

    def write(kind: Kind) -> Path:
        write_graph(tmp_path / "model.onnx", kind)
        return tmp_path / "model.onnx"

    return write


def fused(given: GivenGraph) -> ir.Model:
    model = standard_form(given)
    fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)
    return model


def run(model: Path, ids: np.ndarray, past: list[np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Runs ids (B, T) over a past (B, K, P, D); positions count the mask."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    feeds |= {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": array for i, array in enumerate(past)}
    taken = {value.name for value in session.get_inputs()}
    logits, *present = session.run(None, {name: array for name, array in feeds.items() if name in taken})
    return logits, present


@pytest.mark.parametrize("name", KINDS)
def test_fused_attention_computes_the_same(name, graph, tmp_path):
    kind = KINDS[name]
    path = graph(kind)
    model = fused(read_given(path))
    calls = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(calls) == LAYERS
    assert [call.attributes.get_int("local_window_size", 0) for call in calls] == [kind.window or 0] * LAYERS
    assert [call.attributes.get_int("num_heads", 0) for call in calls] == [HEADS] * LAYERS
    assert calls[0].attributes.get_float("scale", 0.0) == pytest.approx(SIZE**-0.5)
    assert calls[0].attributes.get_float("softcap", 0.0) == pytest.approx(kind.softcap or 0.0)
    assert "Softmax" not in {node.op_type for node in model.graph}
    ir.save(model, tmp_path / "fused.onnx")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, TOKENS))
    empty = [np.zeros((1, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    for first in (TOKENS, TOKENS - 3):  # all at once, and three tokens behind the others
        expected, _ = run(path, ids, empty, np.ones_like(ids))
        found, past = run(tmp_path / "fused.onnx", ids[:, :first], empty, np.ones_like(ids[:, :first]))
        if first < TOKENS:
            found, _ = run(tmp_path / "fused.onnx", ids[:, first:], past, np.ones_like(ids))
        np.testing.assert_allclose(found, expected[:, -found.shape[1] :], atol=2e-5 * np.abs(expected).max())


def test_counted_positions_become_those_of_each_row(graph, tmp_path):
    """A shorter row in a batch, padded on the right, gets the positions of its own tokens afterwards."""
    path = graph(KINDS["gemma2"])
    ir.save(fused(read_given(path)), tmp_path / "fused.onnx")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]])
    empty = [np.zeros((2, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    _, past = run(tmp_path / "fused.onnx", ids, empty, mask)
    new = np.array([[7], [8]])
    rows = [array[1:, :, :3] for array in past]
    expected, _ = run(path, new[1:], rows, np.ones((1, 4), np.int64))
    # GroupQueryAttention counts the tokens of a row by the mask and writes the new one behind them.
    after = np.concatenate([mask, [[1], [0]]], 1)
    after[1, 3] = 1
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": new, "attention_mask": after, "position_ids": np.array([[6], [3]])}
    feeds |= {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": array for i, array in enumerate(past)}
    found = session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(found[1], expected[0], atol=2e-5 * np.abs(expected).max())


def test_a_bias_on_scores_is_not_recognised(graph):
    with pytest.raises(UnrecognisedError, match="scores have a bias"):
        fused(read_given(graph(Kind(bias=True))))


def test_a_window_as_long_as_the_context_is_none(graph):
    given = read_given(graph(Kind(window=WINDOW)))
    model = standard_form(given)
    assert [call.window for call in recognise(model, given.layers, WINDOW)] == [None] * LAYERS
    assert [call.window for call in recognise(model, given.layers, WINDOW + 1)] == [WINDOW] * LAYERS


def test_a_window_is_found_in_a_long_context(graph):
    given = read_given(graph(Kind(window=1000)))
    assert [call.window for call in recognise(standard_form(given), given.layers, 4096)] == [1000] * LAYERS


def change_before_softmax(model: ir.Model, operator: str) -> None:
    """Puts an operator between the scores and the softmax of each layer."""
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        new = ir.node(operator, [node.inputs[0]])
        model.graph.insert_before(node, new)
        node.replace_input_with(0, new.outputs[0])


def read_past_elsewhere(model: ir.Model) -> None:
    """Adds the keys of past to the logits."""
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    total = ir.node("ReduceSum", [past], {"keepdims": 0})
    added = ir.node("Add", [logits, total.outputs[0]])
    added.outputs[0].name, logits.name = "logits", "logits_before"
    added.outputs[0].type, added.outputs[0].shape = logits.type, logits.shape
    model.graph.extend([total, added])
    model.graph.outputs[0] = added.outputs[0]


CHANGED: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "scores": (lambda model: change_before_softmax(model, "Exp"), "scores of layer 0 become weights in another way"),
    "past": (read_past_elsewhere, "ReduceSum reads past beside attention"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_form_stays_as_it_is(name, graph):
    given = read_given(graph(Kind()))
    model = standard_form(given)
    change, reason = CHANGED[name]
    change(model)
    common.NameFixPass()(model)
    with pytest.raises(UnrecognisedError, match=reason):
        fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)
