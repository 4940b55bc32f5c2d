"""The KV caches, one file per form.

`DecoderGraph.new_cache` gives an engine a `CachePair` or a `StaticGraphs`. Both have these methods:

    length, batch, nbytes             tokens per sequence, with padding; sequences; bytes
    for_run(batch, tokens, padded)    the cache for the next run, with room for its tokens in each sequence
    reserve(batch, tokens)            allocates room for new tokens
    trim(length), reset()             trim each sequence to its first tokens; forget all
    drop(start, end, moved)           evicts tokens in between; the later ones move up
    rows(length), fill(rows)          the first tokens of each tensor, (B, K, length, D), keys and values in turn, as
                                      views in CPU memory; copies such rows in

A run is `for_run`, `DecoderGraph.run` with the returned cache, and that cache's `advance`.
"""
