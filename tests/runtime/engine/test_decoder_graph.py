"""The abilities of a graph; the inputs of its runs, their sizes, and the lock around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.runtime import Engine
from pastkey.runtime.engine import decoder_graph
from pastkey.runtime.engine.binding import Binding
from pastkey.runtime.engine.decoder_graph import DecoderGraph
from pastkey.runtime.engine.padding import Padding
from pastkey.runtime.providers.inference import OrtSession

from ...onnx_text import encode_model


def test_what_can_be_decoded_together(fused_bundle, standard_bundle, tiny, make_bundle):
    graph = Engine(fused_bundle, threads=1).graph
    assert graph.batches
    assert graph.copies
    assert graph.bytes_per_token == 4 * 2 * (8 + 8 + 16 + 16)
    assert not Engine(standard_bundle, threads=1).graph.batches
    assert not Engine(fused_bundle, graph="all_logits", threads=1).graph.batches
    assert not Engine(make_bundle(tiny, "static", chunk=4), threads=1).graph.batches
    graph.one_by_one = True
    assert not graph.batches


def test_chunks_shrink_with_the_context_where_scores_are_stored(standard_bundle, fused_bundle, monkeypatch):
    standard = DecoderGraph(standard_bundle, threads=1)
    monkeypatch.setattr(decoder_graph, "FLASH_ATTENTION_FROM", (1, 0))
    assert DecoderGraph(fused_bundle, threads=1).chunk_sizes(8000, 0)[-1] > standard.chunk_sizes(8000, 0)[-1]
    monkeypatch.setattr(decoder_graph, "FLASH_ATTENTION_FROM", (99, 0))
    assert DecoderGraph(fused_bundle, threads=1).chunk_sizes(8000, 0) == standard.chunk_sizes(8000, 0)
    for tokens, length in ((8000, 0), (3, 1023), (1026, 0), (1, 5000), (5000, 3000), (2, 2047)):
        sizes = standard.chunk_sizes(tokens, length)
        ends = length + np.cumsum(sizes)
        assert sum(sizes) == tokens
        assert min(sizes) >= min(2, tokens)
        assert (sizes * np.maximum(ends, 1024)).max() <= 1.02 * decoder_graph.SCORES
    assert standard.chunk_sizes(1, 200_000) == [1]
    assert [standard.chunk_sizes(tokens, 0, 2) for tokens in (1, 2, 3, 4, 5)] == [[1], [2], [3], [2, 2], [3, 2]]


# --- masks and positions --------------------------------------------------------------------------------------------
def test_a_position_is_the_number_of_real_tokens_before_it():
    padding = Padding()
    mask, positions = padding.of_run(3, 2, 1, None)
    assert (mask.tolist(), positions.tolist()) == ([[1, 1, 1, 1]] * 2, [[3]] * 2)
    assert padding.of_run(0, 1, 3, np.array([[0, 1, 1]]))[1].tolist() == [[0, 0, 1]]
    mask, positions = padding.of_run(0, 2, 3, np.array([[1, 1, 0], [1, 1, 1]]))
    assert positions.tolist() == [[0, 1, 1], [0, 1, 2]]
    padding.mask = mask
    mask, positions = padding.of_run(3, 2, 2, None)
    assert mask.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[2, 3], [3, 4]]
    assert positions.flags.c_contiguous


def test_what_is_left_of_it():
    padding = Padding()
    assert padding.first(3) is None
    padding.mask = np.array([[1, 0, 1]])
    assert padding.first(2).tolist() == [[1, 0]]
    assert padding.first(0) is None


# --- an input has the values that its array had when given ----------------------------------------------------------
GRAPH = '<ir_version: 10, opset_import: ["": 21]> g (int64[N, M] x) => (int64[N, M] y) { y = Identity(x) }'


@pytest.mark.parametrize("device", ["CPUExecutionProvider", "DeviceExecutionProvider"])
def test_each_run_has_what_was_given_to_it(device, monkeypatch):
    session = OrtSession(encode_model(GRAPH, {})[0], providers=["CPUExecutionProvider"])
    monkeypatch.setattr(session, "get_providers", lambda: [device])
    binding = Binding(session)

    def told() -> Any:
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy().tolist()

    for rows in ([[1, 2]], [[3, 4]], [[5]], [[6], [7]], [[8, 9]]):
        array = np.array(rows, np.int64)
        binding.feed("x", array)
        array[:] = 0
        assert told() == rows
    binding.feed("x", np.array([[1, 2], [3, 4]], np.int64).T)  # its layout does not count
    assert told() == [[1, 3], [2, 4]]
    binding.feed("x", np.array([[5, 6], [7, 8]], np.int64))
    assert told() == [[5, 6], [7, 8]]
