"""What a graph can do, and the sizes of its runs."""

from __future__ import annotations

import numpy as np

from pastkey.runtime import Engine
from pastkey.runtime.engine import decoder_graph
from pastkey.runtime.engine.decoder_graph import DecoderGraph


def test_what_can_be_decoded_together(fused_bundle, standard_bundle, tiny, make_bundle):
    graph = Engine(fused_bundle, threads=1).graph
    assert graph.batches
    assert graph.copies
    assert graph.bytes_per_token == 4 * 2 * (8 + 8 + 16 + 16)
    for other, which in (
        (standard_bundle, "last_logits"),
        (fused_bundle, "all_logits"),
        (make_bundle(tiny, "static", chunk=4), "last_logits"),
    ):
        assert not Engine(other, graph=which, threads=1).graph.batches
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
