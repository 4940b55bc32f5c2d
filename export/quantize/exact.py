"""A quantized bundle without rounded activations: the effect of rounding on its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.runtime import Engine

from ..measure.predictors import IN_PLACE

_GRAPH = Path(names.LAST_LOGITS_GRAPH).with_name("exact.onnx")  # next to the weights, for as long as it is open
_EXACT = 1  # of MatMulNBits: activations stay float32


class _Exact(Bundle):
    @property
    def last_logits_graph(self) -> Path:
        return self.path / _GRAPH


@contextlib.contextmanager
def exact_engine(bundle: Bundle) -> Iterator[Engine]:
    """An engine over the weights of a bundle whose products do not round their inputs."""
    model = ir.load(bundle.last_logits_graph)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _EXACT)
    exact = _Exact(bundle.path, bundle.manifest)
    ir.save(model, exact.last_logits_graph)
    try:
        yield Engine(exact, providers="cpu", native=False, session_options=IN_PLACE)
    finally:
        exact.last_logits_graph.unlink()
