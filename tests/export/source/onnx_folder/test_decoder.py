"""A given ONNX graph as a module of the contract: what it computes, and what running it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from pastkey.errors import ContractError, InputError
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.positions import find_shift
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.onnx_folder.given import read_given
from pastkey.runtime.providers.ort import onnxruntime

from .given_graphs import CONTEXT, HEADS, LAYERS, VOCABULARY, Decoder, Kind, write_graph

WINDOW = 12

Given = Callable[..., GivenDecoder]


@pytest.fixture
def given(tmp_path):
    """The function that writes a kind's graph and opens it."""

    def make(kind: Kind = Kind(), window: int | None = None) -> GivenDecoder:  # noqa: B008  # it is frozen
        write_graph(tmp_path / "model.onnx", kind)
        return GivenDecoder(read_given(tmp_path / "model.onnx"), HEADS, window)

    return make


def test_it_computes_what_the_file_computes(given):
    decoder = given()
    ids = torch.arange(14).reshape(2, 7)
    past = [torch.zeros(2, 2, 0, 16)] * (2 * LAYERS)
    with torch.no_grad():
        expected = Decoder(Kind()).eval()(
            ids, torch.ones(2, 7, dtype=torch.long), torch.arange(7)[None].expand(2, 7), *past
        )
    run = decoder.uncached(ids)
    torch.testing.assert_close(run.logits, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.keys[1], expected[3], rtol=1e-4, atol=1e-5)
    assert decoder.rounding(ids[0].numpy()) < 1e-5


@pytest.mark.parametrize(
    ("kind", "window", "padding"),
    [
        (Kind(), None, True),
        (Kind(window=WINDOW), WINDOW, False),  # counts columns
        (Kind(counts_positions=True), None, False),
        (Kind(masked=False), None, False),
        (Kind(), 4000, False),  # a window that is too long to try
    ],
)
def test_a_run_shows_whether_past_may_have_holes(kind, window, padding, given):
    context = 8000 if window == 4000 else CONTEXT
    assert given(kind)._takes_holes(context, VOCABULARY, window) is padding


def test_what_is_observed_and_the_two_graphs(given):
    decoder = given(Kind(window=WINDOW), WINDOW)
    found = in_contract(decoder, CONTEXT, None, print)
    observation = found.observation
    assert found.module is decoder
    assert observation.vocab_size == VOCABULARY
    assert observation.window == WINDOW
    assert [layer.heads for layer in observation.layers] == [HEADS] * LAYERS
    assert not observation.padding
    fused, seen = decoder.graph("fused", observation)
    assert seen.padding
    assert "GroupQueryAttention" in {node.op_type for node in fused.graph}
    assert "blocks.0.down.weight" in fused.graph.initializers
    standard, seen = decoder.graph("standard", observation)
    assert not seen.padding
    assert "GroupQueryAttention" not in {node.op_type for node in standard.graph}


def test_rotary_keys_can_be_shifted_and_counted_positions_cannot(given):
    for kind, refused in ((Kind(), ""), (Kind(counts_positions=True), "it computes the positions of tokens itself")):
        decoder = given(kind)
        observation = decoder.observed(CONTEXT)
        _, observation = decoder.graph("fused", observation)
        shift = find_shift(decoder, observation, CONTEXT)
        assert shift.refused == refused
        assert bool(shift.rotations) is not bool(refused)


def test_an_unread_input_of_positions_is_no_position(given, tmp_path):
    """Otherwise keys that the graph turns by its own count would be taken for keys without positions."""
    given(Kind(counts_positions=True))
    model = onnx.load(tmp_path / "model.onnx")
    axes = ["batch_size", "sequence_length"]
    model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, axes))
    onnx.save(model, tmp_path / "model.onnx")
    decoder = GivenDecoder(read_given(tmp_path / "model.onnx"), HEADS, None)
    decoder.observed(CONTEXT)
    assert not decoder.takes_positions


def test_a_call_is_not_for_a_graph(given):
    with pytest.raises(InputError, match="is for a module in Python"):
        in_contract(given(), CONTEXT, "model(ids)", print)


def test_an_opset_that_onnxruntime_does_not_know_is_refused(given, tmp_path):
    given()
    model = onnx.load(tmp_path / "model.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=f"onnxruntime {onnxruntime.__version__} cannot open .*install the newest"):
        GivenDecoder(read_given(tmp_path / "model.onnx"), HEADS, None)


def change_logits(path: Path, *nodes: onnx.NodeProto, **weights: np.ndarray) -> None:
    """Appends nodes that make `logits` of `whole`."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "logits" else name for name in node.output]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, path)


def test_a_graph_of_the_last_logits_alone_is_refused(given, tmp_path):
    given()
    last = onnx.helper.make_node("Slice", ["whole", "begin", "end", "axis"], ["logits"])
    most = np.array([np.iinfo(np.int64).max])
    change_logits(tmp_path / "model.onnx", last, begin=np.array([-1]), end=most, axis=np.array([1]))
    decoder = GivenDecoder(read_given(tmp_path / "model.onnx"), HEADS, None)
    with pytest.raises(InputError, match=r"returns logits of float32 \(2, 1, 61\) for ids \(2, 4\): expected"):
        decoder.observed(CONTEXT)


def test_group_query_attention_in_a_file_stays_and_has_no_standard_graph(given, tmp_path):
    decoder = given()
    model, _ = decoder.graph("fused", decoder.observed(CONTEXT))
    ir.save(model, tmp_path / "fused.onnx")
    fused = GivenDecoder(read_given(tmp_path / "fused.onnx"), HEADS, None)
    observation = fused.observed(CONTEXT)
    assert observation.layers[0].special is None
    again, _ = fused.graph("fused", observation)
    assert sum(node.op_type == "GroupQueryAttention" for node in again.graph) == LAYERS
    with pytest.raises(ContractError, match="is GroupQueryAttention, which a standard graph does not have"):
        fused.graph("standard", observation)
