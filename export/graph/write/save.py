"""Writes the graphs of a bundle over one weights file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from pastkey.contract import names
from pastkey.precisions import PRECISIONS

from .embedding_rows import take_embedding_rows
from .last_hidden import yield_hidden_states
from .last_logits import keep_last_positions
from .output_head import take_head
from .sequence_lengths import take_sequence_lengths
from .weights_file import WeightsFile
from .windows import evict_behind_windows


def write_graphs(
    model: ir.Model,
    folder: Path,
    precision: str,
    hidden_size: int | None = None,
    shard_size: int | None = None,
    evicting: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the all-logits graph, its weights, and the last-logits graph over the same weights. Changes `model`.

    With `hidden_size`, which needs an output head, the last-logits graph also outputs the last hidden states. With
    `shard_size`, each weights file is smaller than so many bytes. With `evicting`, the context length, the last-logits
    graph lets cached rows behind windows go. `advance` is told the written weights, and all.

    Returns the bytes of the weights, in their own file and in the graph.
    """
    head = take_head(model)  # first: the marks must not be saved
    all_logits = folder / PRECISIONS[precision].graph
    all_logits.parent.mkdir(parents=True, exist_ok=True)
    file = WeightsFile.of(all_logits, shard_size)
    inline = file.take_weights(model, advance)
    ir.save(model, all_logits)
    if hidden_size is not None:
        yield_hidden_states(model, head, hidden_size, half=PRECISIONS[precision].bits == 16)
    keep_last_positions(model, head)
    take_sequence_lengths(model)
    if evicting is not None:
        evict_behind_windows(model, evicting)
    take_embedding_rows(model)
    ir.save(model, folder / names.LAST_LOGITS_GRAPH)
    return file.size + inline


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())
