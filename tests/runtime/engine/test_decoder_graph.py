"""One graph under several caches."""

from __future__ import annotations

import numpy as np

from pastkey.runtime import Engine
from pastkey.runtime.engine import decoder_graph
from pastkey.runtime.engine.decoder_graph import DecoderGraph
from pastkey.runtime.providers.ort import onnxruntime


def test_engines_over_one_graph_keep_apart(bundle, tiny, monkeypatch):
    first = Engine(bundle, threads=1)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)  # none is opened any more
    second, third = Engine.over(first.graph), Engine.over(first.graph)
    first.prefill([1, 2, 3])
    second.prefill([4, 5])
    third.prefill([6])
    np.testing.assert_allclose(first.decode(7), tiny([1, 2, 3, 7])[-1], atol=1e-4)
    np.testing.assert_allclose(second.decode(8), tiny([4, 5, 8])[-1], atol=1e-4)
    np.testing.assert_allclose(third.decode(9), tiny([6, 9])[-1], atol=1e-4)
    assert first.onnx is second.onnx


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


def test_all_logits_come_of_the_graph_of_the_last_ones(bundle, tiny):
    engine = Engine(bundle, threads=1)
    ids = [number % 37 for number in range(300)]
    np.testing.assert_allclose(engine.all_logits(ids), tiny(ids), atol=2e-4)


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
