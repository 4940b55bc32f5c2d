"""How many separate parts of a graph each execution provider got: after every part its results may have to be copied.

A provider that compiles says so itself: onnxruntime records each of its subgraphs. One with a kernel for each operator
is recorded node by node, and nodes that hand tensors to one another are one part; who hands what to whom stands in the
graph's file, since onnxruntime hands out the nodes under their names there.
"""

from __future__ import annotations

import mmap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.protobuf import BYTES, DamagedError, fields

from .ort import OrtError

_GRAPH, _NODE = 7, 1  # of a ModelProto, of its GraphProto
_INPUT, _OUTPUT, _NAME = 1, 2, 3  # of a NodeProto


@dataclass(frozen=True)
class Assigned:
    """What one execution provider was given."""

    operators: Counter[str]  # operator -> nodes
    parts: int | None  # None where that cannot be known

    @property
    def nodes(self) -> int:
        return sum(self.operators.values())


def assigned(session: Any, path: Path) -> dict[str, Assigned]:
    """Who was given what: onnxruntime's name of a provider -> its nodes and parts.

    Nothing of a session without a record: of onnxruntime before 1.24, or opened without the entry that asks for one.
    A provider that wants another layout of images (WebGPU) is recorded in part only.

    Args:
        session: An onnxruntime.InferenceSession.
        path: The graph that it was opened from.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    groups: dict[str, list[list[Any]]] = defaultdict(list)
    try:
        record = session.get_provider_graph_assignment_info()
    except OrtError:  # it was opened without the entry
        return {}
    for subgraph in record:
        groups[subgraph.ep_name].append(list(subgraph.get_nodes()))
    edges = _edges(path)
    found = {}
    for name, of_provider in groups.items():
        compiles = any(len(nodes) > 1 for nodes in of_provider)
        every = [node for nodes in of_provider for node in nodes]
        parts = len(of_provider) if compiles else _connected([node.name for node in every], edges)
        found[name] = Assigned(Counter(node.op_type for node in every), parts)
    return found


def _connected(nodes: Sequence[str], edges: Iterable[tuple[str, str]] | None) -> int | None:
    """How many groups the nodes are in; None where their names do not tell them apart."""
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


def _edges(path: Path) -> list[tuple[str, str]] | None:
    """Which node hands a tensor to which, by their names; None where nodes have none, or share one."""
    made_by: dict[str, str] = {}
    read: list[tuple[str, str]] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for graph in _inner(content, (0, len(content)), _GRAPH):
                for node in _inner(content, graph, _NODE):
                    name, inputs, outputs = _node(content, *node)
                    if not name or name in seen:
                        return None
                    seen.add(name)
                    made_by |= dict.fromkeys(outputs, name)
                    read += [(tensor, name) for tensor in inputs]
    except (DamagedError, IndexError, ValueError):  # a graph of another format
        return None
    return [(made_by[tensor], reader) for tensor, reader in read if tensor in made_by]


def _inner(content: mmap.mmap, place: tuple[int, int], wanted: int) -> list[tuple[int, int]]:
    return [(a, b) for number, wire, a, b in fields(content, *place) if number == wanted and wire == BYTES]


def _node(content: mmap.mmap, start: int, end: int) -> tuple[str, list[str], list[str]]:
    """Name, inputs and outputs."""
    texts: dict[int, list[str]] = {_INPUT: [], _OUTPUT: [], _NAME: []}
    for number, wire, a, b in fields(content, start, end):
        if number in texts and wire == BYTES:
            texts[number].append(content[a:b].decode("utf-8"))
    return "".join(texts[_NAME]), texts[_INPUT], texts[_OUTPUT]
