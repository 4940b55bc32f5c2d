"""The nodes of a graph by execution provider: operators, connected parts, and weights of compiling providers.

The results of each part may have to be copied. onnxruntime records each subgraph of a provider that compiles. A
provider with a kernel per operator is recorded node by node. Its connected nodes are one part. The edges come from the
graph's file; onnxruntime records nodes by their names there.
"""

from __future__ import annotations

import mmap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pastkey.files.external_data import tensor_data
from pastkey.files.protobuf import BYTES, DamagedError, fields

from .ort import OrtError

_GRAPH = 7  # of a ModelProto
_NODE, _INITIALIZER = 1, 5  # of a GraphProto
_INPUT, _OUTPUT, _NAME = 1, 2, 3  # of a NodeProto
_TENSOR_NAME, _INLINE_DATA = 8, (4, 5, 7, 9, 10, 11)  # of a TensorProto


@dataclass(frozen=True)
class Assigned:
    """The share of one execution provider."""

    operators: Counter[str]  # operator -> nodes
    parts: int | None  # None if unknown
    # For a compiling provider: the bytes of the weights that its nodes read. A weight that two nodes read counts twice.
    # onnxruntime's profile has 0 if the weights are in the compiled subgraph.
    weight_bytes: int | None = None

    @property
    def nodes(self) -> int:
        return sum(self.operators.values())


def assigned(session: Any, path: Path) -> dict[str, Assigned]:
    """onnxruntime's name of a provider -> its share of the graph.

    Empty for a session without a record: onnxruntime before 1.24, or a session opened without the entry RECORD. A
    provider with another image layout (WebGPU) is recorded only in part.

    Args:
        session: An onnxruntime.InferenceSession.
        path: The graph that it was opened from.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    groups: dict[str, list[list[Any]]] = defaultdict(list)
    try:
        record = session.get_provider_graph_assignment_info()
    except OrtError:  # opened without the entry
        return {}
    for subgraph in record:
        groups[subgraph.ep_name].append(list(subgraph.get_nodes()))
    file = _read(path)
    every = {name: [node for nodes in of_provider for node in nodes] for name, of_provider in groups.items()}
    found = {}
    for name, of_provider in groups.items():
        compiles = any(len(nodes) > 1 for nodes in of_provider)
        if compiles:
            # onnxruntime gives fused nodes new names, so all nodes of the file that no other provider has are counted.
            others = {node.name for other, nodes in every.items() if other != name for node in nodes}
            weight_bytes = sum(size for node, size in file.weight_bytes.items() if node not in others)
        found[name] = Assigned(
            Counter(node.op_type for node in every[name]),
            parts=len(of_provider) if compiles else _connected([node.name for node in every[name]], file.edges),
            weight_bytes=weight_bytes if compiles and file.weight_bytes else None,
        )
    return found


def _connected(nodes: Sequence[str], edges: Iterable[tuple[str, str]] | None) -> int | None:
    """The number of connected groups of nodes; None if their names are not unique."""
    if edges is None or not all(nodes) or len(set(nodes)) < len(nodes):
        return None
    leader = {node: node for node in nodes}

    def first(node: str) -> str:
        while leader[node] != node:
            leader[node] = node = leader[leader[node]]
        return node

    for a, b in edges:
        if a in leader and b in leader:
            leader[first(a)] = first(b)
    return sum(leader[node] == node for node in nodes)


@dataclass(frozen=True)
class _File:
    """The edges and weights in a graph's file."""

    edges: Sequence[tuple[str, str]] | None = None  # (producer, consumer) by node name; None if names are not unique
    weight_bytes: Mapping[str, int] = field(default_factory=dict)  # node name or "" -> bytes that it reads


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            graphs = _inner(content, (0, len(content)), _GRAPH)
            nodes = [_node(content, *place) for graph in graphs for place in _inner(content, graph, _NODE)]
            tensors = [_tensor(content, *place) for graph in graphs for place in _inner(content, graph, _INITIALIZER)]
    except (DamagedError, IndexError, ValueError):  # a graph of another format
        return _File()
    sizes, weight_bytes = dict(tensors), Counter[str]()
    for name, inputs, _ in nodes:
        weight_bytes[name] += sum(sizes.get(tensor, 0) for tensor in inputs)
    return _File(_edges(nodes), weight_bytes)


def _edges(nodes: Sequence[tuple[str, list[str], list[str]]]) -> list[tuple[str, str]] | None:
    """(producer, consumer) by node name; None if names are missing or not unique."""
    if len({name for name, _, _ in nodes} - {""}) < len(nodes):
        return None
    made_by = {tensor: name for name, _, outputs in nodes for tensor in outputs}
    return [(made_by[tensor], name) for name, inputs, _ in nodes for tensor in inputs if tensor in made_by]


def _inner(content: mmap.mmap, place: tuple[int, int], wanted: int) -> list[tuple[int, int]]:
    return [(a, b) for number, wire, a, b in fields(content, *place) if number == wanted and wire == BYTES]


def _node(content: mmap.mmap, start: int, end: int) -> tuple[str, list[str], list[str]]:
    """Name, inputs and outputs."""
    texts: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _NAME: []}
    for number, wire, a, b in fields(content, start, end):
        if number in texts and wire == BYTES:
            texts[number].append(content[a:b].decode("utf-8"))
    return "".join(texts[_NAME]), texts[_INPUT], texts[_OUTPUT]


def _tensor(content: mmap.mmap, start: int, end: int) -> tuple[str, int]:
    """Name and size in bytes, of inline or external data."""
    name, inline = "", 0
    for number, wire, a, b in fields(content, start, end):
        if number == _TENSOR_NAME and wire == BYTES:
            name = content[a:b].decode("utf-8")
        elif number in _INLINE_DATA and wire == BYTES:
            inline += b - a
    data = tensor_data(content, start, end)
    return name, inline if data is None else data.length
