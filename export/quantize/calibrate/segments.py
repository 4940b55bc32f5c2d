"""Captures values inside a graph segment by segment, so that only the values of one segment are in memory.

The nodes of a graph are cut, in their order, into segments. Each segment runs once for each window, from the values
that earlier segments made for it, so that all segments together cost one run of the graph. Weights stay in their mapped
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph.session import cpu_session, window_feeds
from ...measure.metrics import Ids
from ...measure.predictors import IN_PLACE

KEPT_BYTES = 1 << 29  # of a segment's values in memory, unless a single one is larger
_Values = dict[str, np.ndarray]


def captured(
    model: ir.Model, folder: Path, windows: Sequence[Ids], wanted: Mapping[str, int], *, kept_bytes: int = KEPT_BYTES
) -> list[Segment]:
    """Returns the segments of a graph, which are to be run one after another.

    Args:
        model: The graph, whose large weights are in a file.
        folder: Holds the weights file that the graph names.
        windows: Token ids (T,), without a past.
        wanted: Names of float32 values, and the bytes that the caller keeps of each.
        kept_bytes: The most that the caller may keep of one segment.
    """
    shapes = {str(value.name): tuple(value.shape or ()) for value in model.graph.inputs}
    live = [window_feeds(shapes, ids) for ids in windows]
    groups = _cut(_leading_to(model, wanted), wanted, kept_bytes)
    made = {*shapes, *(str(value.name) for group in groups for node in group for value in node.outputs)}
    reads = [{str(v.name) for node in group for v in node.inputs if v is not None} & made for group in groups]
    segments = []
    for number, group in enumerate(groups):
        makes = [str(value.name) for node in group for value in node.outputs]
        after = frozenset[str]().union(*reads[number + 1 :])
        outputs = [name for name in makes if name in wanted or name in after]
        captures = tuple(name for name in outputs if name in wanted)
        segments.append(Segment(captures, model, folder, live, sorted(reads[number] - set(makes)), outputs, after))
    return segments


@dataclass(frozen=True)
class Segment:
    """Neighbouring nodes of a graph. A loop over it runs them, and yields the rows (T, K) of `wanted` per window."""

    wanted: tuple[str, ...]
    _model: ir.Model
    _folder: Path
    _live: list[_Values]  # of each window: values of earlier segments that this or later ones read
    _inputs: list[str]
    _outputs: list[str]
    _after: frozenset[str]  # names of the values that later segments read

    def __iter__(self) -> Iterator[_Values]:
        session = self._session()
        for place, values in enumerate(self._live):
            fed = {name: values[name] for name in self._inputs}
            found = dict(zip(self._outputs, session.run(self._outputs, fed), strict=True))
            self._live[place] = {name: array for name, array in (values | found).items() if name in self._after}
            yield {name: found[name].reshape(-1, found[name].shape[-1]) for name in self.wanted}

    def _session(self) -> Any:
        """Opens the segment as a separate graph, next to its weights."""
        graph = self._model.graph
        by_name = {str(value.name): value for value in graph.inputs}
        by_name |= {str(value.name): value for node in graph for value in node.outputs}
        ends = [[by_name[name] for name in names] for names in (self._inputs, self._outputs)]
        part = ir.convenience.extract(graph, *ends).clone()
        for value in part.inputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(self._live[0][str(value.name)].dtype))
        for value in (*part.inputs, *part.outputs):
            value.shape = None
        path = self._folder / "segment.onnx"
        try:
            ir.save(ir.Model(part, ir_version=self._model.ir_version), path)
            return cpu_session(path, IN_PLACE)
        finally:
            path.unlink(missing_ok=True)


def _cut(nodes: list[ir.Node], wanted: Mapping[str, int], kept_bytes: int) -> list[list[ir.Node]]:
    """Cuts a list of nodes, so that at most `kept_bytes` are kept of each part."""
    groups: list[list[ir.Node]] = [[]]
    kept = 0
    for node in nodes:
        size = sum(wanted.get(str(value.name), 0) for value in node.outputs)
        if kept and kept + size > kept_bytes:
            groups.append([])
            kept = 0
        kept += size
        groups[-1].append(node)
    return groups


def _leading_to(model: ir.Model, wanted: Mapping[str, int]) -> list[ir.Node]:
    """Returns the nodes that the wanted values need, in the graph's order, but not those of constants only.

    Each segment computes its constants itself: they may be as large as a weight, and would be held for each window.
    """
    varying = {id(value) for value in model.graph.inputs}
    for node in model.graph:
        if any(id(value) in varying for value in node.inputs):
            varying |= {id(value) for value in node.outputs}
    needed, found = set(wanted), list[ir.Node]()
    for node in reversed(model.graph):
        if any(id(value) in varying and value.name in needed for value in node.outputs):
            needed |= {str(value.name) for value in node.inputs if value is not None}
            found.append(node)
    return found[::-1]
