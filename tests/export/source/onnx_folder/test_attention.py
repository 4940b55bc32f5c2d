"""Attention of other programs' graphs: where it is recognised, and what takes its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from pastkey.export.source.onnx_folder.attention import UnrecognisedError, fuse_attention, recognise
from pastkey.export.source.onnx_folder.given import GivenGraph, read_given, standard_form

from ...small_graphs import run_model
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


def fused(given: GivenGraph) -> ir.Model:
    model = standard_form(given)
    fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)
    return model


def run(
    path: Path, ids: np.ndarray, past: list[np.ndarray], mask: np.ndarray, positions: np.ndarray | None = None
) -> list[np.ndarray]:
    """Logits and present of ids (B, T) over a past (B, K, P, D); positions count the mask."""
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :] if positions is None else positions
    feeds = {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": array for i, array in enumerate(past)}
    return run_model(ir.load(path), input_ids=ids, attention_mask=mask, position_ids=positions, **feeds)


@pytest.mark.parametrize("name", KINDS)
def test_fused_attention_computes_the_same(name, tmp_path):
    kind = KINDS[name]
    path, other = write_graph(tmp_path / "model.onnx", kind), tmp_path / "fused.onnx"
    model = fused(read_given(path))
    calls = [node.attributes for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [call.get_int("local_window_size", 0) for call in calls] == [kind.window or 0] * LAYERS
    assert [call.get_int("num_heads", 0) for call in calls] == [HEADS] * LAYERS
    assert calls[0].get_float("scale", 0.0) == pytest.approx(SIZE**-0.5)
    assert calls[0].get_float("softcap", 0.0) == pytest.approx(kind.softcap or 0.0)
    assert "Softmax" not in {node.op_type for node in model.graph}
    ir.save(model, other)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, TOKENS))
    mask, empty = np.ones_like(ids), [np.zeros((1, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    expected = run(path, ids, empty, mask)[0]
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(run(other, ids, empty, mask)[0], expected, atol=tolerance)
    past = run(other, ids[:, :-3], empty, mask[:, :-3])[1:]
    np.testing.assert_allclose(run(other, ids[:, -3:], past, mask)[0], expected[:, -3:], atol=tolerance)


def test_counted_positions_become_those_of_each_row(tmp_path):
    """A shorter row in a batch, padded on the right, gets the positions of its own tokens afterwards."""
    path, other = write_graph(tmp_path / "model.onnx", KINDS["gemma2"]), tmp_path / "fused.onnx"
    ir.save(fused(read_given(path)), other)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
    empty = [np.zeros((2, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    past = run(other, ids, empty, np.array([[1] * 6, [1, 1, 1, 0, 0, 0]]))[1:]
    new = np.array([[7], [8]])
    expected = run(path, new[1:], [array[1:, :, :3] for array in past], np.ones((1, 4), np.int64))[0]
    # GroupQueryAttention counts the tokens of a row by the mask and writes the new one behind them.
    after = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    found = run(other, new, past, after, np.array([[6], [3]]))[0]
    np.testing.assert_allclose(found[1], expected[0], atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("window", "context", "found"),
    [(WINDOW, WINDOW, None), (WINDOW, WINDOW + 1, WINDOW), (1000, 4096, 1000)],
    ids=["as long as the context", "one token shorter", "in a long context"],
)
def test_a_window_is_found_where_it_is_shorter_than_the_context(window, context, found, tmp_path):
    given = read_given(write_graph(tmp_path / "model.onnx", Kind(window=window)))
    assert [call.window for call in recognise(standard_form(given), given.layers, context)] == [found] * LAYERS


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


REFUSED: dict[str, tuple[Kind, Callable[[ir.Model], None], str]] = {
    "a bias": (Kind(bias=True), lambda model: None, "scores have a bias"),
    "other scores": (Kind(), lambda model: change_before_softmax(model, "Exp"), "scores of layer 0 become weights in"),
    "past read elsewhere": (Kind(), read_past_elsewhere, "ReduceSum reads past beside attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_form_stays_as_it_is(name, tmp_path):
    kind, change, reason = REFUSED[name]
    given = read_given(write_graph(tmp_path / "model.onnx", kind))
    model = standard_form(given)
    change(model)
    common.NameFixPass()(model)
    with pytest.raises(UnrecognisedError, match=reason):
        fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)
