"""The key/value caches, one file per form.

An engine has one of two, `CachePair` or `StaticGraphs`, which `DecoderGraph.new_cache` chooses. Both have these verbs:

    length, batch, nbytes             tokens per row, with padding; rows; bytes
    for_run(batch, tokens, padded)    the cache that the next run goes through, with room for its tokens in each row
    reserve(batch, tokens)            makes room for new tokens
    trim(length), reset()             forget all but the first tokens of each row; forget all
    drop(start, end, moved)           forgets tokens within; the rows behind them move up
    rows(length), fill(rows)          the first tokens of each tensor, (B, K, length, D); takes copies of such rows
    layer(index)                      copies of one attention call's keys and values, each (B, K, length, D)

A run is `for_run`, `DecoderGraph.run` through the cache that it returned, and that cache's `advance`.
"""
