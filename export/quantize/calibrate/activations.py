"""Captures values inside a graph on a text, by running the graph with additional outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from ...graph.session import cpu_session, window_feeds
from ...graph.write.weights_file import INLINE_BYTES, remove_with_weights, save_with_weights
from ...measure.metrics import Ids
from ...measure.predictors import IN_PLACE

_NO_INPUTS: Mapping[str, np.ndarray] = MappingProxyType({})


class Probe(Protocol):
    """Runs the graph on ids (T,) and on its further inputs. Returns rows (T, K) by the names of values."""

    def __call__(self, ids: Ids, further: Mapping[str, np.ndarray] = ..., /) -> dict[str, np.ndarray]: ...


@contextlib.contextmanager
def probing(model: ir.Model, folder: Path, wanted: Sequence[str]) -> Iterator[Probe]:
    """Opens a graph to capture values inside it, on ids without a past.

    Args:
        model: The graph; restored afterwards.
        folder: Holds the weights file that the graph names. If weights were changed since, all are written there again
            for the time of the block.
        wanted: Names of float32 values.
    """
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    ends = list(model.graph.outputs)
    extra = [made[name] for name in wanted if made[name] not in ends]
    for value in extra:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(extra)
    probe, session = folder / "probe.onnx", None
    try:
        changed = any(_is_large_and_in_memory(value) for value in model.graph.initializers.values())
        if changed:
            save_with_weights(model, probe)
        else:
            ir.save(model, probe)
        # Without prepacking, the kernel of quantized weights is another one, which does not quantize activations.
        quantized = any(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())
        session = cpu_session(probe, {} if quantized else IN_PLACE)
        yield lambda ids, further=_NO_INPUTS: _run(session, wanted, ids, further)
    finally:
        session = None  # closed, even if the caller still holds the function
        model.graph.outputs[:] = ends
        for value in extra:
            value.type = None
        remove_with_weights(probe)


def _run(session: Any, wanted: Sequence[str], ids: Ids, further: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name not in further}
    found = session.run(list(wanted), window_feeds(shapes, ids) | dict(further))
    return {name: rows.reshape(-1, *rows.shape[-1:]) for name, rows in zip(wanted, found, strict=True)}


def _is_large_and_in_memory(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= INLINE_BYTES
