from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.providers.parts import assigned

from ...onnx_text import encode_model

CPU, NPU = "CPUExecutionProvider", "NPUExecutionProvider"
# a -> b -> c -> d -> e, and f apart; what each node yields has the node's name and a prime.
CHAIN = """<ir_version: 8, opset_import: ["": 17]>
chain (float[N] x) => (float[N] e1, float[N] f1) {
    a1 = Neg(x)
    b1 = Abs(a1)
    c1 = Neg(b1)
    d1 = Add(c1, a1)
    e1 = Neg(d1)
    f1 = Abs(x)
}"""


@dataclass(frozen=True)
class Node:
    name: str
    op_type: str = "Neg"


@dataclass(frozen=True)
class Subgraph:
    ep_name: str
    nodes: Sequence[Node]

    def get_nodes(self) -> Sequence[Node]:
        return self.nodes


@dataclass(frozen=True)
class Session:
    subgraphs: Sequence[Subgraph]

    def get_provider_graph_assignment_info(self) -> Sequence[Subgraph]:
        return self.subgraphs


def session(*groups: tuple[str, str]) -> Session:
    """session((NPU, "ab"), (CPU, "c")): subgraphs and the one-letter names of their nodes."""
    return Session([Subgraph(provider, [Node(name) for name in nodes]) for provider, nodes in groups])


@pytest.fixture
def chain(tmp_path):
    path = tmp_path / "chain.onnx"
    path.write_bytes(encode_model(CHAIN, {})[0])
    return path


WEIGHTED = """<ir_version: 8, opset_import: ["": 17]>
weighted (float[3,5] x) => (float[3,5] c1) {
    a1 = Add(x, w)
    b1 = Mul(a1, w)
    c1 = Mul(b1, v)
}"""


@pytest.fixture
def named_by_output(monkeypatch):
    """Calls a node in a file by the first letter of what it yields."""
    import pastkey.runtime.providers.parts as parts

    read = parts._node

    def with_name(*where: Any) -> tuple[str, list[str], list[str]]:
        _, inputs, outputs = read(*where)
        return outputs[0][0], inputs, outputs

    monkeypatch.setattr(parts, "_node", with_name)


def weight_bytes_of(session: Session, path: Path) -> dict[str, int | None]:
    return {name: given.weight_bytes for name, given in assigned(session, path).items()}


@pytest.mark.parametrize("data_file", ["", "weights"])
def test_weight_bytes_of_a_compiling_provider(tmp_path, named_by_output, data_file):
    path = tmp_path / "weighted.onnx"
    weights = {"w": np.zeros((3, 5), np.float32), "v": np.zeros(5, np.float32)}
    path.write_bytes(encode_model(WEIGHTED, weights, data_file)[0])
    # w is read by a and b, v by c; nodes that onnxruntime makes of others have names of its own.
    assert weight_bytes_of(session((NPU, "ab"), (NPU, "c")), path) == {NPU: 60 + 60 + 20}
    assert weight_bytes_of(session((NPU, "xyz")), path) == {NPU: 60 + 60 + 20}
    assert weight_bytes_of(session((NPU, "ac"), (CPU, "b")), path) == {NPU: 60 + 20, CPU: None}


def test_the_record_of_onnxruntime_itself(chain):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = onnxruntime.InferenceSession(str(chain), options, providers=[CPU])
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        pytest.skip("onnxruntime before 1.24 keeps no record")
    found = assigned(opened, chain)[CPU]
    assert (found.operators, found.parts) == ({"Neg": 3, "Abs": 2, "Add": 1}, None)  # nodes without names
    assert assigned(object(), chain) == {}
