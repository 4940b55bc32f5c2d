"""A given ONNX graph as a module of the contract: what it computes, and what running it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info

from pastkey.errors import ContractError, InputError
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.positions import find_shift
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.onnx_folder.given import read_given
from pastkey.runtime.providers.ort import onnxruntime

from .given_graphs import CONTEXT, HEADS, LAYERS, VOCABULARY, Decoder, Kind, write_graph

WINDOW, PLAIN = 12, Kind()


def opened(folder: Path, window: int | None = None) -> GivenDecoder:
    return GivenDecoder(read_given(folder / "model.onnx"), HEADS, window)


def decoder_of(folder: Path, kind: Kind = PLAIN, window: int | None = None) -> GivenDecoder:
    write_graph(folder / "model.onnx", kind)
    return opened(folder, window)


def test_it_computes_what_the_file_computes(tmp_path):
    decoder = decoder_of(tmp_path)
    ids, past = torch.arange(14).reshape(2, 7), [torch.zeros(2, 2, 0, 16)] * (2 * LAYERS)
    with torch.no_grad():
        expected = Decoder(PLAIN).eval()(ids, torch.ones_like(ids), torch.arange(7).expand(2, 7), *past)
    run = decoder.uncached(ids)
    torch.testing.assert_close(run.logits, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.keys[1], expected[3], rtol=1e-4, atol=1e-5)
    assert decoder.rounding(ids[0].numpy()) < 1e-5
    with pytest.raises(InputError, match="is for a module in Python"):
        in_contract(decoder, CONTEXT, "model(ids)", print)


@pytest.mark.parametrize(
    ("kind", "window", "padding"),
    [
        (PLAIN, None, True),
        (Kind(window=WINDOW), WINDOW, False),  # counts columns
        (Kind(counts_positions=True), None, False),
        (Kind(masked=False), None, False),
        (PLAIN, 4000, False),  # a window that is too long to try
    ],
)
def test_a_run_shows_whether_past_may_have_holes(kind, window, padding, tmp_path):
    context = 8000 if window == 4000 else CONTEXT
    assert decoder_of(tmp_path, kind)._takes_holes(context, VOCABULARY, window) is padding


def test_what_is_observed_and_the_two_graphs(tmp_path):
    decoder = decoder_of(tmp_path, Kind(window=WINDOW), WINDOW)
    found = in_contract(decoder, CONTEXT, None, print)
    observation = found.observation
    assert found.module is decoder
    assert (observation.vocab_size, observation.window, observation.padding) == (VOCABULARY, WINDOW, False)
    assert [layer.heads for layer in observation.layers] == [HEADS] * LAYERS
    fused, seen = decoder.graph("fused", observation)
    assert seen.padding
    assert "GroupQueryAttention" in {node.op_type for node in fused.graph}
    assert "blocks.0.down.weight" in fused.graph.initializers
    standard, seen = decoder.graph("standard", observation)
    assert not seen.padding
    assert "GroupQueryAttention" not in {node.op_type for node in standard.graph}


@pytest.mark.parametrize("counts", [False, True])
def test_rotary_keys_can_be_shifted_and_counted_positions_cannot(counts, tmp_path):
    decoder = decoder_of(tmp_path, Kind(counts_positions=counts))
    _, observation = decoder.graph("fused", decoder.observed(CONTEXT))
    shift = find_shift(decoder, observation, CONTEXT)
    assert shift.refused == ("it computes the positions of tokens itself" if counts else "")
    assert bool(shift.rotations) is not counts


def test_an_unread_input_of_positions_is_no_position(tmp_path):
    """Otherwise keys that the graph turns by its own count would be taken for keys without positions."""
    model = onnx.load(write_graph(tmp_path / "model.onnx", Kind(counts_positions=True)))
    axes = ["batch_size", "sequence_length"]
    model.graph.input.append(make_tensor_value_info("position_ids", onnx.TensorProto.INT64, axes))
    onnx.save(model, tmp_path / "model.onnx")
    decoder = opened(tmp_path)
    decoder.observed(CONTEXT)
    assert not decoder.takes_positions


def test_an_opset_that_onnxruntime_does_not_know_and_the_last_logits_alone_are_refused(tmp_path):
    model = onnx.load(write_graph(tmp_path / "model.onnx"))
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "logits" else name for name in node.output]
    model.graph.node.append(make_node("Slice", ["whole", "begin", "end", "axis"], ["logits"]))
    for name, number in {"begin": -1, "end": np.iinfo(np.int64).max, "axis": 1}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"returns logits of float32 \(2, 1, 61\) for ids \(2, 4\): expected"):
        opened(tmp_path).observed(CONTEXT)
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=f"onnxruntime {onnxruntime.__version__} cannot open .*install the newest"):
        opened(tmp_path)


def test_group_query_attention_in_a_file_stays_and_has_no_standard_graph(tmp_path):
    decoder = decoder_of(tmp_path)
    model, _ = decoder.graph("fused", decoder.observed(CONTEXT))
    ir.save(model, tmp_path / "model.onnx")
    fused = opened(tmp_path)
    observation = fused.observed(CONTEXT)
    assert observation.layers[0].special is None
    again, _ = fused.graph("fused", observation)
    assert sum(node.op_type == "GroupQueryAttention" for node in again.graph) == LAYERS
    with pytest.raises(ContractError, match="is GroupQueryAttention, which a standard graph does not have"):
        fused.graph("standard", observation)
