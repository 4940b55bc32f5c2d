"""Captures values inside a graph segment by segment, so that what is kept of one segment alone is in memory.

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

from pastkey.runtime.providers.ort import onnxruntime

from ...graph.write.weights_file import remove_with_weights
from ...measure.metrics import Ids
from ...progress import SILENT, Progress
from .activations import window_feeds

KEPT_BYTES = 1 << 29  # what a segment's values may amount to in memory, unless one alone is larger
_Values = dict[str, np.ndarray]


def captured(
    model: ir.Model,
    folder: Path,
    windows: Sequence[Ids],
    wanted: Mapping[str, int],
    progress: Progress = SILENT,
    *,
    kept_bytes: int = KEPT_BYTES,
) -> Iterator[tuple[tuple[str, ...], Iterator[_Values]]]:
    """Yields each segment as the names of its wanted values, and their rows (T, K) for each of the windows in turn.

    Args:
        model: The graph, whose large weights are in a file.
        folder: Holds the weights file that the graph names.
        windows: Token ids (T,), without a past.
        wanted: Names of float32 values, in any order, and the bytes that the caller keeps of each.
        progress: Advances after each window of a segment.
        kept_bytes: What the caller may keep of one segment.
    """
    shapes = {str(value.name): tuple(value.shape or ()) for value in model.graph.inputs}
    live = [window_feeds(shapes, ids) for ids in windows]
    segments = _cut(model, wanted, kept_bytes)
    for number, segment in enumerate(segments):
        path = folder / "segment.onnx"
        try:
            ir.save(segment.model(live[0]), path)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.disable_prepacking", "1")  # a packed copy of each weight
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        finally:
            remove_with_weights(path)

        def run(number: int = number, segment: _Segment = segment, session: Any = session) -> Iterator[_Values]:
            for place, values in enumerate(live):
                found = dict(zip(segment.outputs, session.run(segment.outputs, segment.fed(values)), strict=True))
                live[place] = {name: array for name, array in (values | found).items() if name in segment.after}
                progress.advance(number * len(live) + place + 1, len(segments) * len(live))
                yield {name: found[name].reshape(-1, found[name].shape[-1]) for name in segment.wanted}

        rows = run()
        yield segment.wanted, rows
        for _ in rows:  # windows that the caller left
            pass


@dataclass(frozen=True)
class _Segment:
    """Neighbouring nodes of a graph, by the names of the values that they read and make."""

    graph: ir.Graph
    inputs: list[str]  # that other segments make, or inputs of the graph
    outputs: list[str]  # that are wanted, or that later segments read
    wanted: tuple[str, ...]
    after: frozenset[str]  # values of this and earlier segments, and inputs, that later ones read

    def fed(self, values: _Values) -> _Values:
        return {name: values[name] for name in self.inputs}

    def model(self, values: _Values) -> ir.Model:
        """Returns the segment as a graph of its own, whose inputs have the types of `values`."""
        by_name = _values_by_name(self.graph)
        ends = [[by_name[name] for name in names] for names in (self.inputs, self.outputs)]
        part = ir.convenience.extract(self.graph, *ends).clone()
        for value in part.inputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(values[str(value.name)].dtype))
            value.shape = None
        for value in part.outputs:
            value.shape = None
        return ir.Model(part, ir_version=10)


def _cut(model: ir.Model, wanted: Mapping[str, int], kept_bytes: int) -> list[_Segment]:
    """Cuts the nodes that lead to the wanted values, so that what is kept of each segment is at most `kept_bytes`."""
    nodes = _leading_to(model, wanted)
    groups: list[list[ir.Node]] = [[]]
    kept = 0
    for node in nodes:
        size = sum(wanted.get(str(value.name), 0) for value in node.outputs)
        if kept and kept + size > kept_bytes:
            groups.append([])
            kept = 0
        kept += size
        groups[-1].append(node)
    given = {str(value.name) for value in model.graph.inputs}
    made = given | {str(value.name) for node in nodes for value in node.outputs}
    reads = [{str(v.name) for node in group for v in node.inputs if v is not None} & made for group in groups]
    segments = []
    for number, group in enumerate(groups):
        makes = [str(value.name) for node in group for value in node.outputs]
        after = frozenset[str]().union(*reads[number + 1 :])
        outputs = [name for name in makes if name in wanted or name in after]
        segments.append(
            _Segment(
                model.graph,
                inputs=sorted(reads[number] - set(makes)),
                outputs=outputs,
                wanted=tuple(name for name in outputs if name in wanted),
                after=after,
            )
        )
    return segments


def _leading_to(model: ir.Model, wanted: Mapping[str, int]) -> list[ir.Node]:
    """Returns the nodes that the wanted values need, in the graph's order, but not those of constants alone.

    Each segment computes its constants itself: they may be as large as a weight, and would be kept for each window.
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


def _values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
