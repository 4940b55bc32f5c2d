"""The KV caches, one file per form.

`DecoderGraph.new_cache` gives an engine a `KVCache`, a `FixedKVCache` or a `StaticGraphs`. They have these methods:

    length, batch, nbytes             tokens per sequence, with padding; sequences; bytes
    reserve(batch, tokens)            allocates room for new tokens of each sequence: `grown` in kv.py says how much
    trim(length), reset()             trim each sequence to its first tokens; forget all
    drop(start, end, moved)           evicts tokens in between; the later ones move up
    nearest(length)                   the largest number of tokens, at most `length`, to which it can be trimmed
    rows(length), fill(rows, length)  the first tokens of each tensor, (B, K, length, D), keys and values in turn, as
                                      views in CPU memory; copies such rows in

A run is `reserve`, `DecoderGraph.run` and `advance`.
"""
